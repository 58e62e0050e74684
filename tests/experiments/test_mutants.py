"""Every entry of experiments/mutants.txt still is what it says: one change, at one place, of what the code does."""

import ast
import functools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "experiments"))
import mutants  # noqa: E402

MUTANTS = mutants.read_mutants()


@functools.cache
def read(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    return text, ast.dump(ast.parse(text))


def test_every_mutant_applies():
    for mutant in MUTANTS:
        text, unchanged = read(mutant.file)
        assert text.count(mutant.old) == 1 and mutant.new != mutant.old, mutant.name
        mutated = ast.dump(ast.parse(mutant.applied(text)))  # it parses
        assert mutated != unchanged, mutant.name  # more than comments or layout differs


def test_the_list():
    assert len(MUTANTS) >= 60 and len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)
    with pytest.raises(ValueError, match="its text is 0 times in"):
        MUTANTS[0].applied("another text")
