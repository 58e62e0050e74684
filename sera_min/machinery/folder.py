"""Files that are whole or not there, and a folder that belongs to one process.

What a run leaves in output_dir is in docs/data.md. Until it ends, state/ holds what a resume reads
and does not compute again:
  data.json                    the pairs and prompts as token ids
  metrics.jsonl                a copy, so that a resume does not depend on the one in output_dir
  policy-<t>/                  π_θt, of the last two iterations
  checkpoint-<t>.pt            within the training of π_θt
  logps-<i>-<key>.json         log-probs under π_θi of the rows that the key stands for
  samples-<i>-<key>.jsonl      samples from π_θi; prompts-<i>-<key>.json asks an engine for them
"""

import json
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sera_min.machinery.errors import InputError, naming, one_line


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A name beside `path` that becomes `path`, or replaces it, at the end. A failure is an OSError of one line."""
    beside = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)  # a folder that a kill has left
        yield beside
        if path.is_dir() and beside.is_dir():  # only a folder replaces a folder
            shutil.rmtree(path)
        beside.replace(path)
    except Exception as error:  # safetensors and torch raise their own kinds
        shutil.rmtree(beside, ignore_errors=True)  # of a folder; nothing if it is a file
        beside.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {one_line(error)}") from error


def make_readable(folder: Path) -> None:
    """Its weights are as readable as its other files: safetensors makes them its owner's alone."""
    other = next(folder.glob("*config.json"))
    for file in folder.glob("*.safetensors"):
        shutil.copymode(other, file)


def write(file: Path, text: str) -> None:
    with writing(file) as beside:
        beside.write_text(text, encoding="utf-8")


def read_json(file: Path) -> Any:
    with naming(f"{file} cannot be read"):
        return json.loads(file.read_text(encoding="utf-8"))


def write_jsonl(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    with writing(file) as beside, open(beside, "w", encoding="utf-8") as lines:
        for row in tqdm(rows, f"write {file.name}", delay=5, leave=False):
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    with naming(f"{file} cannot be read"), open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def at_home(path: str | Path) -> str:
    """The path that is meant by a ~ at its beginning, which a shell leaves as it is in --output_dir=~/runs."""
    return os.path.expanduser(path)  # noqa: PTH111 (a name on the hub stays one)


def is_path(name: str) -> bool:
    """Whether this is a path, not a hub name "owner/name": it has another form, or there is a folder "owner"."""
    folder = Path(name).parent
    if folder != Path() and folder.is_dir():
        return True
    return name.count("/") > 1 or name.startswith((".", "~", "/")) or name.endswith("/")


def is_lfs_pointer(file: Path) -> bool:
    """Whether these are Git LFS's three lines about a file that was never downloaded."""
    with open(file, "rb") as start:
        return start.read(24) == b"version https://git-lfs."


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def check_free(out: Path) -> None:
    """A new run may write into `out`. Raises InputError."""
    there = existing(out)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {out}: cannot write to {there}")
    if (out / "config.json").exists():
        check_not_ended(out)
        raise InputError(f"{out} already holds a run: --resume_from_checkpoint {out}, or another --output_dir")
    for name in ("policy", "state", "metrics.jsonl"):
        if (out / name).exists():
            other = "of no run that train.py can resume: give another --output_dir"
            raise InputError(f"{out} already holds a {name}, {other}")


def check_not_ended(out: Path) -> None:
    if (out / "policy").exists():
        raise InputError(f"{out} already holds a run that has ended; its policy is in {out / 'policy'}")


def delete_state_of_ended(out: Path) -> None:
    """If a run was killed between its last two acts, its policy is there, and its state/ is left over."""
    if all((out / name).exists() for name in ("config.json", "policy", "state")):
        with locked(out):
            shutil.rmtree(out / "state", ignore_errors=True)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """No other process runs in `out` meanwhile. The system frees the lock of one that dies."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{out}: another process is running in it") from None
        yield
    finally:
        os.close(handle)


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are noted in the list, so that a step may end. A second stops at once."""
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # if it was ignored at the start, it stays so
            before[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
