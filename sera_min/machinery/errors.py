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
def naming(place: str) -> Iterator[None]:
    """Whatever goes wrong here, in the code of others too, is an InputError that begins with its place."""
    try:
        yield
    except (Unusable, FloatingPointError, torch.OutOfMemoryError):
        raise  # each has its own end
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    except Exception as error:
        raise InputError(f"{place}: {one_line(error)}") from error


def format_counts(counts: Counter) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
