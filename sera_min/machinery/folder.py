"""What a run keeps on disk. The folder is the state: a phase whose file is there is read and not run again.

    output_dir/
      config.json                    the resolved flags, and a checksum of the data
      metrics.jsonl                  one line a step ("phase": "train") and one an evaluation ("eval", last "final")
      iteration-<t>/                 pairs.jsonl that were trained on; dropped.jsonl, the given pairs that
                                     were not; samples.jsonl; answers.jsonl of the evaluation
      policy/                        the final policy and its tokenizer, for `from_pretrained`
      report.md, …                   see report.py
      state/                         until the run ends
        policy-<t>/                  π_θt, of the last two iterations (and π_θ0, where the run made it)
        steps-<t>.jsonl              the lines of metrics.jsonl that its training wrote
        prompts-<t>.json             with --pause_before_sampling: what another engine is asked to sample,
        samples-<t>.jsonl            and what it wrote, see `read_samples` in run.py
        checkpoint-<t>-<step>/       within the training of π_θt: policy, optimizer, lines so far
        <name>.pt                    what another phase returned: data, log-probs, samples, evaluations

Everything is written beside and then renamed, so a run that dies leaves whole files. metrics.jsonl is written anew at a
resume, from the phases that are done, so it has the lines that an uninterrupted run has.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sera_min.forms import InputError
from sera_min.models import load

# at a resume: nothing but rounding comes of it
MAY_CHANGE = {"output_dir", "max_tokens", "gradient_checkpointing", "save_steps", "pause_before_sampling"}


def check(out: Path, config: dict[str, Any], resume: bool) -> None:
    """`out` is free for a new run, or holds one that was begun with these flags and has not ended. InputError."""
    there = existing(out)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {out}: {there} is no folder that can be written to")
    begun, ended = (out / "config.json").exists(), (out / "policy").exists()
    if not resume:
        if begun and ended:
            raise InputError(f"{out} already holds a run, which has ended: another --output_dir")
        if begun:
            raise InputError(f"{out} already holds a run: --resume_from_checkpoint {out}, or another --output_dir")
        for name in ("policy", "state", "metrics.jsonl"):
            if (out / name).exists():
                raise InputError(f"{out} already holds a {name}, which a run would write: another --output_dir")
        return
    if not begun:
        raise InputError(f"--resume_from_checkpoint {out}: no run has begun there")
    if ended:
        shutil.rmtree(out / "state", ignore_errors=True)  # it was killed between its last two acts
        raise InputError(f"{out}: this run has ended, its policy is in {out / 'policy'}")
    before = read_json(out / "config.json")
    for name in sorted((config.keys() | before.keys()) - MAY_CHANGE - {"data"}):
        if config.get(name) != before.get(name):
            raise InputError(f"{out} was begun with {name} = {before.get(name)!r}, not {config.get(name)!r}: "
                             "give the flags that it was begun with")  # fmt: skip


@contextmanager
def claimed(out: Path, config: dict[str, Any], data: str, needed: int) -> Iterator[None]:
    """Meanwhile `out` is this process's: a second one is refused. Writes config.json, where it is not there yet.

    Raises InputError where the run was begun with other data, or the disk has no room for `needed` bytes.
    """
    free = shutil.disk_usage(existing(out)).free
    if free < needed and not (out / "config.json").exists():
        raise InputError(f"--output_dir {out}: {free / 1e9:.1f} GB free, and checkpoints take {needed / 1e9:.1f}")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        if (out / "policy").exists():  # of a process that ended while this one prepared
            raise InputError(f"{out}: this run has ended, its policy is in {out / 'policy'}")
        if not (out / "config.json").exists():
            write(out / "config.json", json.dumps({**config, "data": data}, indent=2) + "\n")
        if (before := read_json(out / "config.json").get("data")) != data:
            raise InputError(f"{out} was begun with other data: {before}, not {data}")
        for rest in (out / "state").glob(".*-*"):  # of a write that died
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
        (out / "metrics.jsonl").unlink(missing_ok=True)
        yield


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A lock on the folder that no other process can have meanwhile. The system takes it from a process that dies."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process is running in it") from None
        yield
    finally:
        os.close(handle)


def phase_file(out: Path, name: str) -> Path:
    return out / "state" / f"{name}.pt"


def phase(out: Path, name: str, compute: Callable[[], Any]) -> Any:
    """What compute() returns; from its file, where that is there."""
    file = phase_file(out, name)
    if file.exists():
        with reading(file):
            return torch.load(file, weights_only=True)
    result = compute()
    with writing(file) as beside:
        torch.save(result, beside)
    return result


class Policies:
    """π_θ0 = π_ref, π_θ1, … as model folders, of which one at a time is in memory."""

    def __init__(self, out: Path, source: str | None, device: str) -> None:
        self.state, self.source, self.device = out / "state", source, device
        self.number: int | None = None  # of the policy in memory
        self.policy: Any = None
        self.tokenizer: Any = None

    def newest(self) -> int:
        """The number of the last policy that there is; −1 where not even π_θ0 is."""
        numbers = [int(end) for p in self.state.glob("policy-*") if (end := p.name.removeprefix("policy-")).isdigit()]
        return max(numbers, default=-1 if self.source is None else 0)

    def folder(self, i: int) -> str:
        return self.source if i == 0 and self.source is not None else str(self.state / f"policy-{i}")

    def get(self, i: int) -> Any:
        """π_θi, from its folder if it is not the one in memory."""
        if self.number != i:
            self.number = self.policy = None  # before the next is read
            self.hold(i, *load(self.folder(i), self.device))
        return self.policy

    def to_train(self, t: int) -> tuple[Any, dict[str, Any]]:
        """The policy that becomes π_θt, and the state of its last checkpoint: π_θ(t−1) and {} where there is none."""
        folders = sorted(self.state.glob(f"checkpoint-{t}-[0-9]*"))
        if not folders:
            policy, state = self.get(t - 1), {}
        else:
            with reading(folders[-1] / "state.pt"):
                state = torch.load(folders[-1] / "state.pt", weights_only=True, map_location="cpu")
            self.number = self.policy = None  # before the next is read
            policy = load(folders[-1], self.device)[0]
        self.number = self.policy = None  # once it is trained, it is no policy of the run until it is put
        return policy, state

    def hold(self, i: int, policy: Any, tokenizer: Any) -> None:
        self.number, self.policy, self.tokenizer = i, policy, tokenizer

    def put(self, i: int, policy: Any, tokenizer: Any) -> None:
        """Save a policy as π_θi, and forget those that nothing will ask for."""
        save_model(self.state / f"policy-{i}", policy, tokenizer)
        self.hold(i, policy, tokenizer)
        for old in [*self.state.glob("checkpoint-*"), self.state / f"policy-{i - 2}"]:
            if old.name != "policy-0":
                shutil.rmtree(old, ignore_errors=True)


def keep_policy(out: Path, last: int) -> None:
    """The last policy becomes policy/, and state/ goes: there is nothing left to resume."""
    (out / "state" / f"policy-{last}").rename(out / "policy")
    shutil.rmtree(out / "state")
    print(f"The policy is in {out / 'policy'}, the rest of the run in {out}.")


def save_model(folder: Path, policy: Any, tokenizer: Any, **more: Any) -> None:
    """A model folder, with state.pt of what else is given. Raises FloatingPointError where a weight is no number."""
    if not all(p.isfinite().all() for p in policy.parameters()):
        raise FloatingPointError(f"{folder.name}: its weights are not finite numbers")
    with writing(folder) as beside:
        policy.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        if more:
            torch.save(more, beside / "state.pt")


def save_checkpoint(
    out: Path, t: int, step: int, policy: Any, tokenizer: Any, lines: list[dict[str, Any]], optimizer: Any
) -> None:
    """Within the training of π_θt, after `step` steps, which logged `lines`. The checkpoint before it goes."""
    name = f"checkpoint-{t}-{step:08d}"
    save_model(out / "state" / name, policy, tokenizer, step=step, lines=lines, optimizer=optimizer.state_dict())
    for other in (out / "state").glob("checkpoint-*"):
        if other.name != name:
            shutil.rmtree(other)


def existing(path: Path) -> Path:
    """The path itself, or what is there of it."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A name beside `path`, that becomes `path` at the end. What fails is an OSError of one line and leaves nothing."""
    beside = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        beside.replace(path)
    except Exception as error:  # safetensors and torch each raise their own
        shutil.rmtree(beside, ignore_errors=True) if beside.is_dir() else beside.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {first_line(error)}") from None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What fails here is an InputError of one line."""
    try:
        yield
    except Exception as error:  # json and torch each raise their own
        raise InputError(f"{path} cannot be read: {first_line(error)}") from None


def first_line(error: Exception) -> str:  # torch's go on with a trace of their own
    return (str(error).splitlines() or [type(error).__name__])[0]


def write(file: Path, text: str) -> None:
    with writing(file) as beside:
        beside.write_text(text, encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    with reading(file):
        return dict(json.loads(file.read_text(encoding="utf-8")))


def write_jsonl(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    with writing(file) as beside, open(beside, "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    with reading(file):
        return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


@contextmanager
def stop_after_step() -> Iterator[list[int]]:
    """Meanwhile SIGINT and SIGTERM are noted in the list given, so that a step may end; a second stops at once."""
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
