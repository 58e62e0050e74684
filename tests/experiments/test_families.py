"""Architectures of every kind: scored, trained and sampled right, or refused. All: experiments/families.py."""

import sys
from pathlib import Path

import pytest

from sera_min import bootstrap

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import families

RIGHT = ["mamba", "qwen3_next", "llama4_text", "modernbert-decoder"]
REFUSED = {
    "rwkv": "as it is sampled differs from its logits'",  # no padding on the left
    "bert": "differs from its logits'",  # it looks to the right
}


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(bootstrap, "STRIDE", 8)
    monkeypatch.setattr(families, "NEW_TOKENS", 10)


@pytest.mark.parametrize("family", RIGHT)
def test_a_family_is_right(family):
    assert families.verdict(family) == ("right", "")


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_is_refused(family):
    what, why = families.verdict(family)
    assert what == "refused" and REFUSED[family] in why


def test_the_table():
    rows = [("llama", "right", ""), ("rwkv", "refused", "log π(y|x) …"), ("gpt2", "right", "")]
    text = families.table(rows, 2.4)
    assert "3 families: 2 right, 1 refused" in text and "2 seconds" in text
    assert text.splitlines()[-3:] == [
        "| rwkv | refused | log π(y/x) … |",
        "| llama | right |  |",
        "| gpt2 | right |  |",
    ]
