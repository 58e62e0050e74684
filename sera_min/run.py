"""What a run writes and how it resumes: metrics, pairs, checkpoints, table, report. Nothing of the method is here.

    output_dir/
      config.json               the resolved configuration
      metrics.jsonl             one line a step ("phase": "train") and one an evaluation ("eval", at the end "final")
      iteration-<t>/pairs.jsonl, samples.jsonl
      policy/                   the final policy and its tokenizer, for `from_pretrained`
      report.md                 the table of iterations, and prompts answered before and after
      state/                    while it runs: what `--resume_from_checkpoint` needs

Whatever may be read again is written beside and renamed: a run that dies leaves the last whole version.
"""

import argparse
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
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
    "seconds": ("seconds", "review, training and evaluation"),
}


SECONDS: Counter[str] = Counter()  # of this process, by phase


def timed(phase: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: what the function takes is counted as this phase's."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timing(*args: Any, **kwargs: Any) -> Any:
            began = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                SECONDS[phase] += time.monotonic() - began  # type: ignore[assignment]

        return timing

    return decorate


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help: the file's header as it is written, and every flag with its default."""


def check(out: Path, config: dict[str, Any], resume: bool) -> None:
    """`out` is free for a run of this configuration, or holds one begun with it. Writes nothing; raises InputError."""
    if not resume:
        if (out / "config.json").exists():
            raise InputError(f"{out} already holds a run: --resume_from_checkpoint {out}, or another --output_dir")
        return
    if not (out / "config.json").is_file():
        raise InputError(f"--resume_from_checkpoint {out}: no run has begun there")
    before = json.loads((out / "config.json").read_text())
    for name in sorted((config.keys() | before.keys()) - {"output_dir"}):
        if config.get(name) != before.get(name):
            raise InputError(f"{out} was begun with {name} = {before.get(name)!r}, not {config.get(name)!r}")
    if (out / "policy").exists():
        raise InputError(f"{out}: this run has ended, its policy is in {out / 'policy'}")


def begin(out: Path, config: dict[str, Any]) -> None:
    """Claim `out`: from here on it holds a run."""
    (out / "state").mkdir(parents=True, exist_ok=True)
    replace(out / "config.json", json.dumps(config, indent=2) + "\n")


def load(path: str | Path, device: str) -> tuple[Any, Any]:
    """A policy in float32, on `device` and without dropout, and its tokenizer; safetensors only, no remote code."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        settings = AutoConfig.from_pretrained(path)
        for name, value in settings.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(settings, name, 0.0)
        options: dict[str, Any] = {"config": settings, "dtype": torch.float32, "use_safetensors": True}
        policy: Any = AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: its tokenizer has no EOS token: no response could end")
    size = policy.get_input_embeddings().num_embeddings
    if len(tokenizer) > size:
        raise InputError(f"{path}: its tokenizer has {len(tokenizer)} ids, the model embeds {size}")
    return policy.to(device), tokenizer


def replace(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(file.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)


def write_jsonl(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    replace(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def log(out: Path, **metrics: Any) -> dict[str, Any]:
    """Append a line to metrics.jsonl. No clock is in it: a resumed run's lines are the uninterrupted run's."""
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")
    return metrics


def save_checkpoint(
    out: Path, t: int, policy: Any, tokenizer: Any, state: dict[str, Any], step: int | None = None, **more: Any
) -> None:
    """state/<t>-<step>, or state/<t>-done after an iteration: the policy, and what goes on from here.

    Kept are the newest, and the ends of this iteration and the one before: the reward ensemble asks for both.
    """
    metrics = out / "metrics.jsonl"
    written = metrics.stat().st_size if metrics.exists() else 0
    state = {**state, **more, "iteration": t, "step": step, "metrics_bytes": written}
    name = f"{t:03d}-done" if step is None else f"{t:03d}-{step:08d}"
    beside = out / "state" / f".{name}"
    shutil.rmtree(beside, ignore_errors=True)
    policy.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    torch.save(state, beside / "state.pt")
    beside.rename(out / "state" / name)
    for other in (out / "state").iterdir():
        if other.name not in (name, f"{t:03d}-done", f"{t - 1:03d}-done", "000-done"):
            shutil.rmtree(other)


def latest_checkpoint(out: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint's folder and state ("done" sorts after any step); metrics.jsonl goes back to it."""
    folders = sorted(folder for folder in (out / "state").glob("[0-9]*") if (folder / "state.pt").is_file())
    if not folders:
        (out / "metrics.jsonl").unlink(missing_ok=True)
        return None
    state = torch.load(folders[-1] / "state.pt", weights_only=True)
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


def finish(
    out: Path, rows: list[dict[str, Any]], answers: Iterable[tuple[str, str, str]], policy: Any, tokenizer: Any
) -> None:
    """Save policy/ and report.md, print the table and the answers, and drop state/."""
    shown = table(rows)
    report = [f"# {out.name}", "", shown, "", *(f"- {c}: {COLUMNS[c][1]}" for c in COLUMNS if f" {c} " in shown), ""]
    for prompt, before, after in answers:
        report += [f"**{prompt.strip()}**", "", f"- SFT: {before.strip()}", f"- now: {after.strip()}", ""]
    print("\n" + "\n".join(report[2:]))
    replace(out / "report.md", "\n".join(report))
    beside = out / ".policy"
    policy.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    beside.rename(out / "policy")
    shutil.rmtree(out / "state")
    print("Seconds:", ", ".join(f"{seconds:.0f} {phase}" for phase, seconds in SECONDS.most_common()))
    print(f"The policy is in {out / 'policy'}, the rest of the run in {out}.")
