"""What a person looks at: metrics.jsonl, TensorBoard's curves, the table, answers, figures, seconds. No method here.

What report.md and review.png tell of the reviews is in seen.py.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from sera_min import seen
from sera_min.folder import first_line, read_jsonl, write

COLUMNS = {  # of the table: heading -> the name in metrics.jsonl, and what it is
    "iteration": ("iteration", "0 is the SFT policy"),
    "kept": ("select/pairs", "given pairs that were trained on"),
    "precision": ("select/precision", "share of them whose chosen response has the larger true reward"),
    "bootstrapped": ("bootstrap/pairs", "pairs that the policy wrote and ranked itself"),
    "their precision": ("bootstrap/precision", "the same share of those, ties ½"),
    "true reward": ("gold/reward", "mean over fresh answers to evaluation prompts"),
    "win rate": ("gold/win_rate", "share of them with a larger true reward than the SFT policy's answer, ties ½"),
    "KL": ("kl", "mean over fresh answers to evaluation prompts of log π_θ(y|x) − log π_ref(y|x), nats: how far the "
           "policy has gone from the reference, at temperature 1; an estimate, so it may be below 0 at first"),
    "words": ("gold/length", "mean length of these answers"),
    "accuracy": ("eval_rewards/accuracies", "share of evaluation pairs with a positive implicit reward margin, ties ½"),
    "β·margin": ("eval_rewards/margins", "β times their mean implicit reward margin"),
    "seconds": ("seconds", "review, training and evaluation, in this process"),
}
SECONDS: Counter[str] = Counter()  # of this process, by phase
WRITERS: dict[Path, Any] = {}  # of TensorBoard's events, by folder


POSTFIX = "loss {loss:.3f}, accuracy {rewards/accuracies:.3f}, margin {rewards/margins:.3f}"  # of the training bar


def preference_metrics(losses: Tensor, r: Tensor, beta: float) -> dict[str, float]:
    """Means over the pairs' losses (b,) and rewards (b, 2), by TRL's names; a tied reward is half right."""
    margins = r[:, 0] - r[:, 1]  # (b,)
    right = (margins > 0).float() + 0.5 * (margins == 0)
    return {"loss": losses.mean().item(), "rewards/accuracies": right.mean().item(),
            "rewards/margins": beta * margins.mean().item()}  # fmt: skip


def means(name: str, values: Tensor) -> dict[str, float]:  # (b, 2): of the chosen and of the rejected responses
    return dict(zip((f"{name}/chosen", f"{name}/rejected"), values.mean(0).tolist()))


@contextmanager
def timed(phase: str) -> Iterator[None]:
    """Counts the seconds of a function, as its decorator, or of a `with` block under this name."""
    began = time.monotonic()
    try:
        yield
    finally:
        SECONDS[phase] += time.monotonic() - began  # type: ignore[assignment]


def start() -> None:
    """Nothing of another run in this process."""
    SECONDS.clear()
    for writer in WRITERS.values():
        if writer:
            writer.close()
    WRITERS.clear()


def log(out: Path, *lines: dict[str, Any]) -> None:
    """Append lines to metrics.jsonl, and to TensorBoard's curves: one an iteration by step, and the evaluations.

    No clock is in a line, so a resumed run's are the uninterrupted run's.
    """
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    for line in lines:
        log_events(out, line)


def log_events(out: Path, line: dict[str, Any]) -> None:
    t = line["iteration"]
    curve, at = (f"iteration-{t}", line["step"]) if line["phase"] == "train" else ("evaluation", t)
    if writer := events(out / "tensorboard" / curve, at):
        for name, value in line.items():
            if isinstance(value, float):
                writer.add_scalar(name, value, at)
        writer.flush()


def events(folder: Path, at: int) -> Any:
    """TensorBoard's writer into the folder, from step `at` on, open until the run ends; None where there is none."""
    if folder not in WRITERS:
        try:
            from torch.utils.tensorboard import SummaryWriter

            WRITERS[folder] = SummaryWriter(str(folder), purge_step=at)
        except ImportError:
            WRITERS[folder] = None
        except Exception as error:  # a broken installation raises anything, and is no reason to end a run
            print(f"no TensorBoard: {first_line(error)}")
            WRITERS[folder] = None
    return WRITERS[folder]


def table(evaluations: list[dict[str, Any]]) -> str:
    """The iterations as a Markdown table, of the columns that any evaluation has."""
    rows = [{heading: line.get(name) for heading, (name, _) in COLUMNS.items()} for line in evaluations]
    columns = [c for c in COLUMNS if any(row[c] is not None for row in rows)]
    lines = [[format_cell(row[c]) for c in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *lines)]
    lines = [columns, ["-" * (w - 1) + ":" for w in widths], *lines]
    return "\n".join("| " + " | ".join(cell.rjust(w) for cell, w in zip(line, widths)) + " |" for line in lines)


def format_cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def draw_figures(out: Path, reviews: list[seen.Seen], is_flipped: seen.IsFlipped) -> list[str]:
    """review.png, where there was a review, and curves.png; the names of those drawn. None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no figures: matplotlib is not installed")
        return []
    except Exception as error:  # as in `events`
        print(f"no figures: {first_line(error)}")
        return []
    figures = {}
    if reviews:
        figures["review.png"] = Figure((max(7, 3.5 * len(reviews)), 5), layout="constrained")
        seen.draw(figures["review.png"], reviews, is_flipped)
    steps = [line for line in read_jsonl(out / "metrics.jsonl") if line["phase"] == "train"]
    figures["curves.png"] = Figure((11, 3), layout="constrained")
    names = ("loss", "rewards/accuracies", "rewards/margins")
    for axes, name in zip(figures["curves.png"].subplots(1, 3), names):
        for t in range(1, steps[-1]["iteration"] + 1):
            points = [(at, line[name]) for at, line in enumerate(steps, 1) if line["iteration"] == t]
            axes.plot(*zip(*points), label=f"iteration {t}")
        axes.set(title=name, xlabel="step")
    axes.legend(fontsize="small")
    for name, figure in figures.items():
        figure.savefig(out / f".{name}", format="png")
        (out / f".{name}").replace(out / name)
    return list(figures)


def write_report(out: Path, last: int, prompts: dict[int, str], is_flipped: seen.IsFlipped) -> None:
    """Write report.md, and print what is in it but for the reviewed pairs: the table, five prompts before and after.

    prompts: of the given pairs, by row, as people read them. is_flipped: see seen.py.
    """
    evaluations = [line for line in read_jsonl(out / "metrics.jsonl") if line["phase"] != "train"]
    shown = table([{**line, "seconds": round(SECONDS.pop(f"iteration {t}"))} for t, line in enumerate(evaluations)])
    report = [shown, "", *(f"- {heading}: {what}" for heading, (_, what) in COLUMNS.items() if f" {heading} " in shown)]
    for answer in read_jsonl(out / f"iteration-{last}" / "answers.jsonl")[:5]:
        texts = {"prompt": answer["prompt"], "before": answer["reference"], "after": answer["answer"]}
        report += ["", *seen.block(texts)]
    reviews = [seen.read_review(out, t) for t in range(2, last + 1)]
    summaries = [seen.summarise(review, before) for review, before in zip(reviews, [None, *reviews])]
    print("\n" + "\n".join(report) + "\n")
    for review, summary in zip(reviews, summaries):
        print(f"iteration {review.t}: {summary}")
    described = [line for review, summary in zip(reviews, summaries)
                 for line in seen.describe(review, summary, prompts, is_flipped)]  # fmt: skip
    figures = [f"![{name}]({name})" for name in draw_figures(out, reviews, is_flipped)]
    title = ["", "## What the review saw"] if reviews else []
    parts = [f"# {out.name}", "", *report, *title, *described, "", *figures]
    write(out / "report.md", "\n".join(parts) + "\n")
    print("Seconds:", ", ".join(f"{spent:.0f} {phase}" for phase, spent in SECONDS.most_common()))
    start()
