"""experiments/kills.py in short: SIGKILL, resume, and the same bytes; the whole script takes 50 runs."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))


def test_killed_at_random_moments_it_ends_alike(sft, monkeypatch, capsys):
    import kills  # it sets a lock for tqdm's bars: not before other tests

    monkeypatch.setattr(kills.playground, "make_sft_policy", lambda *_, **__: sft)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # which the forks would draw with
    smaller = ["--max_train_pairs", "24", "--max_new_tokens", "12", "--iterations", "2"]  # four steps an iteration
    monkeypatch.setattr(kills, "FLAGS", [*kills.FLAGS, *smaller])
    monkeypatch.setattr(sys, "argv", ["kills.py", "--runs", "1"])
    kills.main()
    assert re.match(r"1 runs, \d+ kills, 1 identical ends", capsys.readouterr().out)
