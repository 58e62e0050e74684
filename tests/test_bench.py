"""The README's speeds are what experiments/bench.py wrote, and what it compares is the same work."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
import bench  # noqa: E402


@pytest.mark.parametrize("file", sorted((ROOT / "experiments/results").glob("bench-*.json")), ids=lambda file: file.stem)
def test_the_readme_s_speeds_are_those_measured(file):
    results, text = json.loads(file.read_text()), (ROOT / "README.md").read_text()
    assert bench.table(results) in text
    assert set(results["parts"]) == set(bench.PARTS)


@pytest.fixture
def tiny(monkeypatch):
    for name, value in {"DEVICE": "cpu", "PAIRS": 8, "PROMPT": 12, "RESPONSE": 10, "MAX_TOKENS": 256}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setitem(bench.SHAPES, "small", (32, 64, 2, 2, 2, 120))


@pytest.mark.parametrize("options", [bench.FAIR, bench.SHIPPED], ids=["fair", "shipped"])
def test_trl_s_trainer_and_ours_take_the_same_steps(tiny, monkeypatch, options):
    monkeypatch.setattr(bench, "LEARNING_RATE", 1e-3)
    got = bench.side_by_side("small", options, 4, 1, 5, "")
    assert got["loss difference"] < 1e-4 and got["rate"].keys() == {"ours", "TRL"}


def test_both_samplers_write_as_much(tiny):
    """Tokens a sample, of ours and of the loop it is measured against: geometric, mean about 10, cut off at 20."""
    model = bench.made_model("small").eval()
    prompts = [x for x, _, _ in bench.made_pairs(64, 120)]
    ours, plain = (side(model, prompts) / (64 * bench.N) for side in (bench.sample_ours, bench.sample_plain))
    assert ours == pytest.approx(plain, abs=2)  # a standard error is 0.4
