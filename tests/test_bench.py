"""The speeds that are shown are what experiments/bench.py wrote, and what it compares is the same work."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
import bench  # noqa: E402

RESULTS = {file.stem: file for file in sorted((ROOT / "experiments/results").glob("bench-*.json"))}
READMES = [file for file in (ROOT / "README.md", ROOT / "experiments/README.md") if file.exists()]


@pytest.mark.parametrize("name", RESULTS)
def test_the_tables_are_those_measured(name):
    results = json.loads(RESULTS[name].read_text())
    assert RESULTS[name].with_suffix(".md").read_text() == bench.table(results) + "\n"
    assert set(results["parts"]) == set(bench.PARTS)


@pytest.mark.parametrize("readme", READMES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_speeds_that_a_readme_shows_are_those_measured(readme):
    """Every row of a table of bench.py's, and every figure within `<!-- bench: NAME -->` … `<!-- end -->`, is NAME.md's."""
    written = {name: file.with_suffix(".md").read_text().splitlines() for name, file in RESULTS.items()}
    text = readme.read_text()
    for name, block in re.findall(r"<!-- bench: (.+?) -->(.*?)<!-- end -->", text, re.DOTALL):
        assert name in written, name
        cells, known = ([cell.strip() for line in lines for cell in line.strip("|").split("|")]
                        for lines in (block.splitlines(), written[name]))  # fmt: skip
        assert not [cell for cell in cells if re.fullmatch(r"[\d.,e-]*\d", cell) and cell not in known]
    known = {line for lines in written.values() for line in lines}
    for heading in ("| measured |", "| without the trick |"):
        for rows in re.findall(rf"^{re.escape(heading)}.*(?:\n\|.*)*", text, re.MULTILINE):
            assert not [line for line in rows.splitlines() if line not in known]


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
