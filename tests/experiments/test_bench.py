"""The speeds that are shown are what experiments/bench.py wrote, and what it compares is the same work."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "experiments"))
import bench  # noqa: E402

RESULTS = {file.stem: file for file in sorted((ROOT / "experiments/results").glob("bench-*.json"))}
READMES = [file for file in (ROOT / "README.md", ROOT / "experiments/README.md") if file.exists()]


@pytest.mark.parametrize("name", RESULTS)
def test_the_tables_are_those_measured(name):
    results = json.loads(RESULTS[name].read_text())
    assert RESULTS[name].with_suffix(".md").read_text() == bench.table(results) + "\n"
    assert set(results["parts"]) == set(bench.PARTS)


def rows_of(text):
    """What a row of a Markdown table is about, and its figures, for every row but the headings and the rules."""
    lines = text.splitlines()
    for line, after in zip(lines, [*lines[1:], ""]):
        if line.startswith("|") and not line.startswith("|--") and not after.startswith("|--"):
            label, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            yield label, tuple(cell for cell in cells if cell != "–")


def numbers_and_words(label):
    return set(re.findall(r"\d[\d,.]*", label)), set(re.findall(r"[a-zA-Z_]{4,}", label))


def made_of(label, figures, measured):
    """Whether a row's figures are those of rows that were measured, whole ones and in order, of what its label says."""
    if not figures:
        return True
    numbers, words = numbers_and_words(label)
    for name, values in measured:
        of_numbers, of_words = numbers_and_words(name)
        alike = numbers <= of_numbers and words & of_words
        if values and alike and figures[: len(values)] == values and made_of(label, figures[len(values) :], measured):
            return True
    return False


@pytest.mark.parametrize("readme", READMES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_speeds_that_a_readme_shows_are_those_measured(readme):
    """Every row within `<!-- bench: NAME -->` … `<!-- end -->` is made of rows of NAME.md, figure by figure."""
    text = readme.read_text()
    blocks = re.findall(r"<!-- bench: (.+?) -->(.*?)<!-- end -->", text, re.DOTALL)
    assert len(blocks) == text.count("<!-- bench:")
    for name, block in blocks:
        assert name in RESULTS, name
        measured = list(rows_of(RESULTS[name].with_suffix(".md").read_text()))
        wrong = [label for label, figures in rows_of(block) if not made_of(label, figures, measured)]
        assert not wrong and list(rows_of(block))


def test_a_row_that_is_copied_wrongly_is_seen():
    measured = list(rows_of("| a | b |\n|---|--:|\n| 8 pairs a pass | 1,200 | – | 0.5 |\n| 4 pairs a pass | 7 |"))
    assert measured == [("8 pairs a pass", ("1,200", "0.5")), ("4 pairs a pass", ("7",))]
    assert made_of("8 pairs", ("1,200", "0.5"), measured) and made_of("pairs", ("1,200", "0.5", "7"), measured)
    for label, figures in [("8 pairs", ("1,201", "0.5")), ("8 pairs", ("0.5", "1,200")), ("8 pairs", ("1,200",)),
                           ("8 pairs", ("7",)), ("16 pairs", ("1,200", "0.5")), ("steps", ("7",))]:  # fmt: skip
        assert not made_of(label, figures, measured), (label, figures)


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
