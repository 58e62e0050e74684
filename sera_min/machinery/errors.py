"""The errors that a user can mend, each one line: what was wrong, where, and what was expected."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class InputError(ValueError):
    """What the user gave is not as expected."""


class Paused(Exception):
    """The run stops here until another program has done its part. The message says what and how."""


class Unusable(Exception):
    """A row in a known form that gives no pair to train on: dropped, and counted under this message."""


def print_replaces() -> None:
    """From now on a terminal that cannot write a π shows ? in its place, and does not end the run."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:1000] or type(error).__name__


@contextmanager
def in_one_line(doing: str) -> Iterator[None]:
    """Whatever a model's, a template's or a tokenizer's own code raises becomes an InputError."""
    try:
        yield
    except (InputError, Unusable, FloatingPointError, torch.OutOfMemoryError):
        raise  # these already say what is wrong
    except Exception as error:
        raise InputError(f"{doing}: {one_line(error)}") from error


def format_counts(counts: Counter) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
