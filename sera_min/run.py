"""What a run writes and how it resumes: metrics, pairs, checkpoints, table, report. Nothing of the method is here.

    output_dir/
      config.json               the resolved configuration
      metrics.jsonl             one line a step ("phase": "train") and one an evaluation ("eval", at the end "final")
      iteration-<t>/pairs.jsonl, samples.jsonl
      policy/                   the final policy and its tokenizer, for `from_pretrained`
      report.md                 the table of iterations, and prompts answered before and after
      curves.png, margins.png   its figures, where matplotlib is installed
      tensorboard/              the metrics again, where tensorboard is installed
      samples.json              the final policy's answers to --prompt_file, in AlpacaEval's format
      state/                    while it runs, what `--resume_from_checkpoint` needs:
        <t>-done, <t>-<step>    policy, optimizer and state, after iteration t or within it; at 0 the reference
        <t>-<phase>.pt          what a finished phase of iteration t returned: log-probs, samples

Whatever may be read again is written beside and renamed: a run that dies leaves the last whole version.
"""

import argparse
import json
import math
import os
import shutil
import signal
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sera_min.data import InputError

COLUMNS = {  # of the table: heading -> where it comes from, and what it is
    "iteration": ("iteration", "0 is the SFT policy"),
    "pairs": ("pairs", "offline pairs kept"),
    "precision": ("select/precision", "share of them whose chosen response has the larger true reward"),
    "own": ("own", "bootstrapped pairs"),
    "own precision": ("bootstrap/precision", "the same share of those"),
    "reward": ("gold/reward", "true reward, mean over fresh samples for held-out prompts"),
    "win rate": ("gold/win_rate", "of those samples against the SFT policy's, ties ½"),
    "words": ("gold/length", "mean length of those samples"),
    "accuracy": ("eval_rewards/accuracies", "share of held-out pairs with a positive implicit reward margin, ties ½"),
    "margin": ("eval_rewards/margins", "β times their mean implicit reward margin"),
    "seconds": ("seconds", "review, training and evaluation, since the last resume"),
}


SECONDS: Counter[str] = Counter()  # of this process, by phase
WRITERS: dict[Path, Any] = {}  # of TensorBoard's events, by folder


@contextmanager
def timed(phase: str) -> Iterator[None]:
    """As a decorator: what the function takes is counted as this phase's."""
    began = time.monotonic()
    try:
        yield
    finally:
        SECONDS[phase] += time.monotonic() - began  # type: ignore[assignment]


def seed_of(seed: int, t: int, phase: str) -> int:
    """A seed of its own for everything that is drawn: the run's seed, the iteration and the phase make it."""
    return zlib.crc32(f"{seed} {t} {phase}".encode())


def halving(attempt: Callable[[int], Any], tokens: int, least: int) -> tuple[Any, int]:
    """attempt(tokens), and where the GPU's memory runs out with half of it, not below `least`; and what was enough."""
    while True:
        try:
            return attempt(tokens), tokens
        except torch.OutOfMemoryError:
            if tokens <= least:
                raise
            tokens //= 2
            tqdm.write(f"out of memory: again, with {tokens} tokens at a time")


def group_help(parser: argparse.ArgumentParser, headings: dict[str, str]) -> None:
    """--help under headings, each begun by the flag that it is given for."""
    flags, group = parser._optionals._group_actions, parser._optionals
    for action in list(flags):
        if action.dest in headings:
            group = parser.add_argument_group(headings[action.dest])
        if group is not parser._optionals:
            flags.remove(action)
            group._group_actions.append(action)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """--help: the file's header as it is written, and every flag with its default in the place of a value."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=120)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.dest == "help":
            return super()._format_action_invocation(action)
        value = "…" if action.default is None else action.default
        return f"--{action.dest}" if value is False else f"--{action.dest} {value}"


def existing(path: Path) -> Path:
    """The path itself, or what is there of it."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def check(out: Path, config: dict[str, Any], resume: bool) -> None:
    """`out` is free for a run of this configuration, or holds one begun with it. Raises InputError."""
    there = existing(out)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {out}: {there} is no folder that can be written to")
    if not resume:
        if (out / "config.json").exists():
            if (out / "policy").exists():
                raise InputError(f"{out} already holds a run, which has ended: another --output_dir")
            raise InputError(f"{out} already holds a run: --resume_from_checkpoint {out}, or another --output_dir")
        for name in ("policy", "state", "metrics.jsonl"):
            if (out / name).exists():
                raise InputError(f"{out} already holds a {name}, which a run would write: another --output_dir")
        return
    if not (out / "config.json").is_file():
        raise InputError(f"--resume_from_checkpoint {out}: no run has begun there")
    with reading(out / "config.json"):
        before = dict(json.loads((out / "config.json").read_text()))
    free = {"output_dir", "data", "max_tokens", "gradient_checkpointing", "save_steps"}  # nothing but rounding
    for name in sorted((config.keys() | before.keys()) - free):
        if config.get(name) != before.get(name):
            raise InputError(f"{out} was begun with {name} = {before.get(name)!r}, not {config.get(name)!r}")
    if (out / "policy").exists():
        tidy(out)
        raise InputError(f"{out}: this run has ended, its policy is in {out / 'policy'}")


def begin(out: Path, config: dict[str, Any], data: str, policy: Any) -> None:
    """Claim `out`, where there is room: from here on it holds a run on this data. Raises InputError.

    At once there are at most the reference, the last policy, and two checkpoints within an iteration, each with its
    optimizer, twice a policy.
    """
    if (out / "config.json").exists():
        if (before := json.loads((out / "config.json").read_text()).get("data")) != data:
            raise InputError(f"{out} was begun with other data: {before}, not {data}")
        for rest in (out / "state").glob(".*"):  # of a write that died
            shutil.rmtree(rest)
        return
    needed = 8 * sum(p.nbytes for p in policy.parameters())
    if (free := shutil.disk_usage(existing(out)).free) < needed:
        raise InputError(f"--output_dir {out}: {free / 1e9:.1f} GB free, and checkpoints take {needed / 1e9:.1f}")
    replace(out / "config.json", json.dumps({**config, "data": data}, indent=2) + "\n")


def once(out: Path, t: int, phase: str, compute: Callable[[], Any]) -> Any:
    """compute(), kept in state/ until iteration t is done: a resumed run does not do it again."""
    file = out / "state" / f"{t:03d}-{phase}.pt"
    file.parent.mkdir(exist_ok=True)
    if file.exists():
        with reading(file):
            return torch.load(file, weights_only=True)
    result = compute()
    with writing(file):
        torch.save(result, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
    return result


def first_line(error: Exception) -> str:  # torch's go on with a trace of their own
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What fails here is an OSError of one line, and leaves no half a file or folder to fill the disk."""
    try:
        yield
    except Exception as error:  # safetensors and torch each raise their own
        shutil.rmtree(path.with_name(f".{path.name}"), ignore_errors=True)
        path.with_suffix(".tmp").unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {first_line(error)}") from None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What fails here is an InputError of one line."""
    try:
        yield
    except Exception as error:  # json and torch each raise their own
        raise InputError(f"{path} cannot be read: {first_line(error)}") from None


@contextmanager
def stop_after_step() -> Iterator[list[int]]:
    """Meanwhile SIGINT and SIGTERM are only noted, in the list given, that a step may end; a second stops at once."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def load(path: str | Path, device: str) -> tuple[Any, Any]:
    """A policy in float32, on `device` and without dropout, and its tokenizer; safetensors only, no remote code."""
    if not Path(path).exists() and (str(path).count("/") > 1 or str(path).startswith((".", "~", "/"))):
        raise InputError(f"{path}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        settings = AutoConfig.from_pretrained(path, trust_remote_code=False)
        for part in (settings, settings.get_text_config()):  # within the former where it sees or hears too
            for name, value in part.to_dict().items():
                if "drop" in name and isinstance(value, float):
                    setattr(part, name, 0.0)
        options: dict[str, Any] = {"config": settings, "dtype": torch.float32, "use_safetensors": True}
        options |= {"trust_remote_code": False, "output_loading_info": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, **options)
    except Exception as error:  # of files that are missing, broken, of another shape, or need another package
        raise InputError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    policy, info = loaded
    if info["missing_keys"]:
        raise InputError(f"{path}: its weights lack {', '.join(sorted(info['missing_keys'])[:3])}")
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: its tokenizer has no EOS token: no response could end")
    size = policy.get_input_embeddings().num_embeddings
    if len(tokenizer) > size:
        raise InputError(f"{path}: its tokenizer has {len(tokenizer)} ids, the model embeds {size}")
    try:
        policy.generation_config.validate(strict=True)
    except ValueError:  # settings of sampling without do_sample, which transformers would not save
        policy.generation_config.do_sample = True
    return policy.to(device), tokenizer


def eos_ids_of(policy: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a response: the tokenizer's first, then what else the model's `generation_config` names."""
    ends = policy.generation_config.eos_token_id or []
    return list(dict.fromkeys([tokenizer.eos_token_id, *([ends] if isinstance(ends, int) else ends)]))


def check_positions(policy: Any, longest: int, flags: str) -> None:
    """The model has a position for every token of the longest row that the flags allow. Raises InputError."""
    positions = getattr(policy.config, "max_position_embeddings", None) or math.inf
    if longest > positions:
        raise InputError(f"{flags} is {longest}: the model has {positions} positions")


def replace(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(file.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def write_jsonl(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    replace(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def log(out: Path, **metrics: Any) -> dict[str, Any]:
    """Append a line to metrics.jsonl. No clock is in it: a resumed run's lines are the uninterrupted run's.

    Where tensorboard is installed, also an event: a curve an iteration by step, and the evaluations by iteration.
    """
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")
    t = metrics["iteration"]
    curve, at = (f"iteration-{t}", metrics["step"]) if metrics["phase"] == "train" else ("evaluation", t)
    if writer := events(out / "tensorboard" / curve, at):
        for name, value in metrics.items():
            if isinstance(value, float):
                writer.add_scalar(name, value, at)
        writer.flush()
    return metrics


def events(folder: Path, at: int) -> Any:
    """TensorBoard's writer into the folder, from step `at` on, open until the run ends; None where there is none."""
    if folder not in WRITERS:
        try:
            from torch.utils.tensorboard import SummaryWriter

            WRITERS[folder] = SummaryWriter(str(folder), purge_step=at)
        except ImportError:
            WRITERS[folder] = None
        except Exception as error:  # a broken installation raises anything, and is no reason to end a run
            WRITERS[folder] = print(f"no TensorBoard: {first_line(error)}")
    return WRITERS[folder]


def draw(out: Path, t: int) -> list[str]:
    """curves.png and, of iteration t > 1, margins.png, where matplotlib is installed; the names of those drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    except Exception as error:  # as in `events`
        print(f"no figures: {first_line(error)}")
        return []
    steps = [row for row in read_jsonl(out / "metrics.jsonl") if row["phase"] == "train"]
    curves = Figure((11, 3), layout="constrained")
    for axes, name in zip(curves.subplots(1, 3), ("loss", "rewards/accuracies", "rewards/margins")):
        for i in range(1, t + 1):
            axes.plot(*zip(*((at, row[name]) for at, row in enumerate(steps, 1) if row["iteration"] == i)))
        axes.set(title=name, xlabel="step, a colour an iteration")
    figures = {"curves.png": curves}
    if t > 1:  # something was selected
        pairs, sources = read_jsonl(out / f"iteration-{t}" / "pairs.jsonl"), ("offline", "bootstrap")
        figures["margins.png"] = Figure((6, 3), layout="constrained")
        axes = figures["margins.png"].subplots()
        axes.hist([[pair["margin"] for pair in pairs if pair["source"] == s] for s in sources], bins=50, label=sources)
        axes.set(xlabel=f"margin of the pairs of iteration {t}, nats", ylabel="pairs")
        axes.legend()
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.tmp", format="png")
        (out / f"{name}.tmp").replace(out / name)
    return list(figures)


def save_checkpoint(
    out: Path, t: int, policy: Any, tokenizer: Any, state: dict[str, Any], step: int | None = None, **more: Any
) -> None:
    """state/<t>-<step>, or state/<t>-done after an iteration: the policy, and what goes on from here.

    Kept are the newest, the ends of this iteration and the one before, for the reward ensemble, and the reference's.
    Raises OSError where it cannot be written, FloatingPointError where the weights are none: the one before it stays.
    """
    metrics = out / "metrics.jsonl"
    written = metrics.stat().st_size if metrics.exists() else 0
    state = {**state, **more, "iteration": t, "step": step, "metrics_bytes": written}
    name = f"{t:03d}-done" if step is None else f"{t:03d}-{step:08d}"
    beside = out / "state" / f".{name}"
    if not all(p.isfinite().all() for p in policy.parameters()):
        raise FloatingPointError(f"iteration {t}: weights of the policy are no numbers; the last good checkpoint stays")
    with writing(out / "state" / name):
        policy.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        torch.save(state, beside / "state.pt")
        beside.rename(out / "state" / name)
    for other in (out / "state").iterdir():
        if other.suffix and step is None:  # of phases of an iteration that is done
            other.unlink()
        elif not other.suffix and other.name not in (name, f"{t:03d}-done", f"{t - 1:03d}-done", "000-done"):
            shutil.rmtree(other)


def latest_checkpoint(out: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint's folder and state ("done" sorts after any step); metrics.jsonl goes back to it."""
    folders = sorted(folder for folder in (out / "state").glob("[0-9]*") if (folder / "state.pt").is_file())
    if not folders:
        (out / "metrics.jsonl").unlink(missing_ok=True)
        return None
    with reading(folders[-1] / "state.pt"):
        state = torch.load(folders[-1] / "state.pt", weights_only=True, map_location="cpu")
    with open(out / "metrics.jsonl", "a") as file:
        file.truncate(state["metrics_bytes"])
    return folders[-1], state


def row(evaluation: dict[str, Any], kept: list[int] | None = None, seconds: float | None = None) -> dict[str, Any]:
    """An iteration's row of the table."""
    pairs, own = kept or (None, None)
    every = {**evaluation, "pairs": pairs, "own": own, "seconds": seconds if seconds is None else round(seconds)}
    return {heading: every.get(key) for heading, (key, _) in COLUMNS.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """The iterations as a Markdown table, of the columns that any row has."""
    columns = [c for c in COLUMNS if any(row.get(c) is not None for row in rows)]
    lines = [[format_cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *lines)]
    lines = [columns, ["-" * (w - 1) + ":" for w in widths], *lines]
    return "\n".join("| " + " | ".join(cell.rjust(w) for cell, w in zip(line, widths)) + " |" for line in lines)


def format_cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def tidy(out: Path) -> None:
    """Once there is a policy/, nothing is left to resume."""
    (out / "policy" / "state.pt").unlink(missing_ok=True)
    shutil.rmtree(out / "state", ignore_errors=True)


def finish(out: Path, t: int, rows: list[dict[str, Any]], answers: Iterable[tuple[str, str, str]]) -> None:
    """Write report.md, print the table and the answers; the last checkpoint becomes policy/, and state/ goes."""
    shown = table(rows)
    report = [f"# {out.name}", "", shown, "", *(f"- {c}: {COLUMNS[c][1]}" for c in COLUMNS if f" {c} " in shown), ""]
    for prompt, before, after in answers:
        for who, text in {"prompt": prompt, "SFT": before, "now": after}.items():
            report += [f"    {who:>6}: {line}" for line in text.strip().split("\n")]  # as code: it is no Markdown
        report += [""]
    print("\n" + "\n".join(report[2:]))
    report += [f"![{name}]({name})" for name in draw(out, t)]
    replace(out / "report.md", "\n".join(report))
    for folder in [folder for folder in WRITERS if out in folder.parents]:
        if writer := WRITERS.pop(folder):
            writer.close()
    (out / "state" / f"{t:03d}-done").rename(out / "policy")
    tidy(out)
    print("Seconds:", ", ".join(f"{seconds:.0f} {phase}" for phase, seconds in SECONDS.most_common()))
    print(f"The policy is in {out / 'policy'}, the rest of the run in {out}.")
