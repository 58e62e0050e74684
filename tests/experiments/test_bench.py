"""The speeds that are shown are what experiments/bench.py wrote, and what it compares is the same work."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "experiments"))
import bench  # noqa: E402

RESULTS = {"bench-cpu-small": ROOT / "experiments/results/bench-cpu-small.json"}


@pytest.mark.parametrize("name", RESULTS)
def test_the_tables_are_those_measured(name):
    results = json.loads(RESULTS[name].read_text())
    assert RESULTS[name].with_suffix(".md").read_text() == bench.table(results) + "\n"
    assert set(results["parts"]) == set(bench.PARTS)


def numbers_of(value):
    """All numbers in JSON, as a page writes them: 115,100."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return set().union(*map(numbers_of, value))
    if isinstance(value, (int, float)):
        return {f"{value:,.0f}"}
    return set()


def test_the_speeds_on_the_page_are_those_measured():
    """Its numbers of thousands, but for those that say what was measured."""
    on_page = set(re.findall(r"\d{1,3},\d{3}", (ROOT / "docs/speed.md").read_text()))
    settings = {"1,024", "2,048", "8,192", "16,384", "32,768", "10,000", "61,000"}
    on_paper = {"23,000"}
    on_a_gpu = numbers_of(json.loads((ROOT / "experiments/results/gpu.json").read_text()))
    on_a_cpu = set(re.findall(r"\d{1,3},\d{3}", RESULTS["bench-cpu-small"].with_suffix(".md").read_text()))
    assert on_page - settings - on_paper - on_a_gpu - on_a_cpu == set()
    assert len(on_page & on_a_gpu) > 15 and on_page & on_a_cpu


@pytest.fixture
def tiny(monkeypatch):
    for name, value in {"DEVICE": "cpu", "PAIRS": 8, "PROMPT": 12, "RESPONSE": 10, "MAX_TOKENS": 512}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setitem(bench.SHAPES, "small", (32, 64, 2, 2, 2, 120))


@pytest.mark.parametrize("options", [bench.FAIR, bench.SHIPPED], ids=["fair", "shipped"])
def test_trl_s_trainer_and_ours_take_the_same_steps(tiny, monkeypatch, options):
    monkeypatch.setattr(bench, "LEARNING_RATE", 1e-3)
    got = bench.side_by_side("small", options, 4, 1, 3, "")
    assert got["loss difference"] < 1e-4 and got["rate"].keys() == {"ours", "TRL"}


def test_both_samplers_write_as_much(tiny):
    """Tokens a sample, of ours and of the loop it is measured against: geometric, mean about 10, cut off at 20."""
    model = bench.made_model("small").eval()
    prompts = [x for x, _, _ in bench.made_pairs(64, 120)]
    ours, plain = (side(model, prompts) / (64 * bench.N) for side in (bench.sample_ours, bench.sample_plain))
    assert ours == pytest.approx(plain, abs=2)  # a standard error is 0.4
