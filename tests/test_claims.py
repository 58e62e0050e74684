"""What the README says of results is what experiments/claims.py wrote."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
import claims  # noqa: E402

RUNS = json.loads((ROOT / "experiments/results/claims.json").read_text())["runs"]


def test_the_readme_s_table_is_that_of_the_runs():
    assert claims.table(RUNS) in (ROOT / "README.md").read_text()


def test_what_the_table_is_to_show():
    """SFT within 0.05 of its data's true reward (0.25), else nothing after it means anything; SeRA ahead of the loss alone.

    Over the seeds: one's own SFT reward, the mean of 1,024 samples, has a standard error of nearly 0.02.
    """
    sft = {key.split()[-1]: run["sft/reward"] for key, run in RUNS.items()}  # by seed
    assert len(sft) >= 3 and abs(sum(sft.values()) / len(sft) - 0.25) < 0.05
    for loss in ("dpo", "ipo", "slic", "simpo"):
        pairs = [(RUNS[key], RUNS[key.replace("SeRA", "loss alone")]) for key in RUNS if key.startswith(f"{loss}, SeRA")]
        assert pairs and all(ours["gold/reward"] > ours["sft/reward"] for ours, _ in pairs)
        if loss == "dpo":
            gain = sum(ours["gold/win_rate"] - alone["gold/win_rate"] for ours, alone in pairs) / len(pairs)
            precision = sum(ours["select/precision"] - ours["data/label_accuracy"] for ours, _ in pairs) / len(pairs)
            assert len(pairs) >= 3 and gain >= 0.08 and precision >= 0.12


def test_the_readme_names_only_what_is_there():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(([\w/.]+)\)", text) + re.findall(r"python ((?:experiments/)?\w+\.py)", text):
        assert (ROOT / path).exists(), path
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert named and all(f"def {name}(" in tests for name in named)
