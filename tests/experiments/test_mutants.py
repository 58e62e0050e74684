"""Every entry of experiments/mutants.txt still is what it says: one change, at one place, of what the code does."""

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "experiments"))
import mutants  # noqa: E402

MUTANTS = mutants.read_mutants()


@functools.cache
def read(file):
    return (ROOT / file).read_text(encoding="utf-8")


def code_of(text):
    """Without comments and white space."""
    return "".join(re.sub("#.*", "", text).split())


def test_every_mutant_applies():
    for mutant in MUTANTS:
        text = read(mutant.file)
        assert text.count(mutant.old) == 1, mutant.name
        ast.parse(mutant.applied(text))  # it parses
        assert code_of(mutant.new) != code_of(mutant.old), mutant.name


def test_the_list():
    assert len(MUTANTS) >= 60 and len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)
    with pytest.raises(ValueError, match="its text is 0 times in"):
        MUTANTS[0].applied("another text")
