"""What people look at: report.md, review.png and curves.png of a run, and TensorBoard's curves.

The report is made of the files that the run wrote: metrics.jsonl and, of every iteration,
pairs.jsonl, dropped.jsonl, samples.jsonl and answers.jsonl.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sera_min.machinery.errors import one_line
from sera_min.machinery.folder import read_jsonl, write, writing

COLUMNS = {  # of the table: heading -> the name in metrics.jsonl, and what it means
    "iteration": ("iteration", "0 is the SFT policy"),
    "kept": ("select/pairs", "given pairs that were trained on"),
    "precision": ("select/precision", "share of them whose label is right by the true reward"),
    "bootstrapped": ("bootstrap/pairs", "pairs that the policy wrote and ranked itself"),
    "their precision": ("bootstrap/precision", "the same share of those, ties ½"),
    "true reward": ("gold/reward", "mean over fresh answers to evaluation prompts"),
    "win rate": ("gold/win_rate", "how often it beats that of the SFT policy's answer, ties ½"),
    "KL": (
        "kl",
        "mean over fresh answers to evaluation prompts of log π_θ(y|x) − log π_ref(y|x), nats: "
        "how far the policy has gone from the reference, at temperature 1; an estimate, so it "
        "may be below 0 at first",
    ),
    "words": ("gold/length", "mean length of these answers"),
    "accuracy": ("eval_rewards/accuracies", "share of evaluation pairs with margin > 0, ties ½"),
    "β·margin": ("eval_rewards/margins", "β times their mean implicit reward margin"),
    "seconds": ("seconds", "review, training and evaluation, in this process"),
}
CURVES = ("loss", "rewards/accuracies", "rewards/margins")  # in curves.png
COLOURS = {"right label": "C0", "flipped label": "C1", "kept": "C2", "not kept": "0.75"}
SHOWN = 400  # characters of a text; a longer one loses its middle

Line = dict[str, Any]  # of a JSONL file
IsFlipped = Callable[[Line], bool] | None  # whether a label is wrong; None where nobody knows


class Curves:
    """TensorBoard's curves, where it is installed: one an iteration, and one of the evaluations."""

    def __init__(self, out: Path) -> None:
        self.folder = out / "tensorboard"
        self.writers: dict[str, Any] = {}
        self.is_off = False

    def add(self, line: Line) -> None:
        """Add a line of metrics.jsonl. A curve's first replaces those of an earlier process."""
        if self.is_off:
            return
        try:
            self.write_events(line)
        except Exception as error:  # not installed; or broken, which may raise anything
            self.is_off = True
            if not isinstance(error, ImportError):
                print(f"no TensorBoard: {one_line(error)}")

    def write_events(self, line: Line) -> None:
        from torch.utils.tensorboard import SummaryWriter

        is_step = line["phase"] == "train"
        curve = f"iteration-{line['iteration']}" if is_step else "evaluation"
        at = line["step"] if is_step else line["iteration"]
        if curve not in self.writers:
            self.writers[curve] = SummaryWriter(str(self.folder / curve), purge_step=at)
        for name, value in line.items():
            if isinstance(value, float):
                self.writers[curve].add_scalar(name, value, at)
        self.writers[curve].flush()

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


def write_report(out: Path, seconds: dict[int, float], prompts: dict[int, str], is_flipped: IsFlipped) -> None:
    """Write report.md and the figures, and print all but the reviewed pairs.

    seconds: by iteration, what this process spent on it. prompts: of the given pairs, by the
    number of their row, as people read them.
    """
    metrics = read_jsonl(out / "metrics.jsonl")
    steps = [line for line in metrics if line["phase"] == "train"]
    evaluations = [line for line in metrics if line["phase"] != "train"]
    for line in evaluations:
        if line["iteration"] in seconds:
            line["seconds"] = round(seconds[line["iteration"]])
    last = evaluations[-1]["iteration"]
    answers = read_jsonl(out / f"iteration-{last}" / "answers.jsonl")
    results = describe_results(evaluations, answers)
    print("\n" + "\n".join(results) + "\n")

    reviews: list[Reviewed] = []
    pairs = []
    for t in range(1, last + 1):
        folder = out / f"iteration-{t}"
        if not (folder / "dropped.jsonl").exists():  # t = 1, which takes all given pairs
            continue
        before = reviews[-1] if reviews else None
        reviews.append(read_review(folder, t, is_flipped))
        summary = summarise(reviews[-1], before)
        print(f"iteration {t}: {summary}")
        pairs += describe_review(reviews[-1], summary, prompts)
    title = ["", "## What the review saw"] if reviews else []
    parts = [f"# {out.name}", "", *results, *title, *pairs, ""]
    for name in draw_figures(out, steps, reviews):
        parts.append(f"![{name}]({name})")
    write(out / "report.md", "\n".join(parts) + "\n")


def describe_results(evaluations: list[Line], answers: list[Line]) -> list[str]:
    """The table, what its columns mean, and five answers."""
    parts = [table(evaluations), ""]
    header = parts[0].split("\n")[0]
    for heading, (_, meaning) in COLUMNS.items():
        if f" {heading} " in header:
            parts.append(f"- {heading}: {meaning}")
    for line in answers[:5]:
        texts = {"prompt": line["prompt"], "before": line["reference"], "after": line["answer"]}
        parts += ["", block(texts)]
    return parts


def table(evaluations: list[Line]) -> str:
    """The iterations as a Markdown table, of the columns that any evaluation has."""
    columns = []
    for heading, (name, _) in COLUMNS.items():
        cells = [format_cell(line.get(name)) for line in evaluations]
        if set(cells) == {"–"}:
            continue
        width = max(map(len, [heading, *cells]))
        ruled = [heading, "-" * (width - 1) + ":", *cells]
        columns.append([cell.rjust(width) for cell in ruled])
    lines = [f"| {' | '.join(row)} |" for row in zip(*columns)]
    return "\n".join(lines)


def format_cell(value: Any) -> str:
    if value is None or value != value:  # NaN
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


class Reviewed(NamedTuple):
    """What the review of iteration t made of the given pairs and of its samples, by row."""

    t: int
    given: list[Line]  # all of them, smallest margin first
    margins: dict[int, float]  # of the given pairs, in the same order, nats
    kept: set[int]
    flipped: set[int]  # whose label is wrong, where that is known
    bootstrapped: list[Line]  # pairs of samples that were kept
    sampled: dict[int, float]  # margins of all pairs of samples


def read_review(folder: Path, t: int, is_flipped: IsFlipped) -> Reviewed:
    pairs = read_jsonl(folder / "pairs.jsonl")
    given = [pair for pair in pairs if pair["source"] == "offline"]
    kept = {pair["row"] for pair in given}
    given += read_jsonl(folder / "dropped.jsonl")
    given.sort(key=lambda pair: pair["margin"])
    margins = {pair["row"]: pair["margin"] for pair in given}
    flipped = {pair["row"] for pair in given if is_flipped and is_flipped(pair)}
    bootstrapped = [pair for pair in pairs if pair["source"] == "bootstrap"]
    sampled = sampled_margins(folder / "samples.jsonl", sorted(margins))
    return Reviewed(t, given, margins, kept, flipped, bootstrapped, sampled)


def sampled_margins(file: Path, rows: list[int]) -> dict[int, float]:
    """By row the largest reward of the samples of its prompt minus the smallest, if they differ.

    The file has the same number of samples of every prompt, in the order of the rows.
    """
    if not file.exists():
        return {}
    values = []
    with open(file, encoding="utf-8") as lines:  # line by line: they may be many
        for line in lines:
            reward = json.loads(line)["reward"]
            if reward is None:
                reward = math.nan
            values.append(reward)
    rewards = torch.tensor(values, dtype=torch.float64).view(len(rows), -1)  # (P, n)
    largest = rewards.nan_to_num(-math.inf).amax(1)
    smallest = rewards.nan_to_num(math.inf).amin(1)
    margins = (largest - smallest).tolist()
    return {row: margin for row, margin in zip(rows, margins) if margin > 0}


def summarise(review: Reviewed, before: Reviewed | None) -> str:
    """One line about a review, and how it differs from the one `before` it."""
    n = len(review.given)
    k = len(review.kept)
    negative = sum(margin < 0 for margin in review.margins.values()) / n
    line = f"{k} of {n} given pairs kept, {n - k} not selected; "
    line += f"{negative:.0%} of the margins are negative"
    if before is None:
        return line
    again = len(review.kept & before.kept) / max(1, k)
    alike = spearman(list(review.margins), list(before.margins))
    return (
        f"{line}; {again:.0%} of the kept were kept the time before; Spearman's correlation "
        f"of all margins with those then {alike:.2f}"
    )


def spearman(now: list[int], then: list[int]) -> float:
    """The correlation of the places that the same N things have in two orders."""
    if len(now) < 2:
        return 1.0
    places = torch.tensor([now, then]).argsort().double()  # (2, N): of each thing its place
    return torch.corrcoef(places)[0, 1].item()


def describe_review(review: Reviewed, summary: str, prompts: dict[int, str]) -> list[str]:
    """The part of report.md about one review."""
    shown = {
        "The given pairs with the smallest margins": review.given[:5],
        "The given pairs with the largest margins": review.given[::-1][:5],
        "Pairs of its own samples": review.bootstrapped[:3],
    }
    parts = ["", f"### Iteration {review.t}", "", f"{summary}."]
    for title, pairs in shown.items():
        if pairs:
            parts += ["", f"{title}:"]
        for pair in pairs:
            row = pair["row"]
            margin = f"{pair['margin']:.2f}, row {row}"
            if pair["source"] == "offline" and row in review.flipped:
                margin += "; the label is flipped"
            texts = {"margin": margin, "prompt": prompts[row]}
            texts |= {"chosen": pair["chosen"], "rejected": pair["rejected"]}
            parts += ["", block(texts)]
    return parts


def block(texts: dict[str, str]) -> str:
    """Texts as code, which Markdown leaves as they are, each after its name."""
    width = max(map(len, texts))
    lines = []
    for name, text in texts.items():
        indented = shortened(text).replace("\n", "\n" + " " * (4 + width + 2))
        lines.append(f"    {name:>{width}}: {indented}")
    return "\n".join(lines)


def shortened(text: str) -> str:
    text = text.strip()
    left_out = len(text) - SHOWN
    if left_out <= 0:
        return text
    return f"{text[: SHOWN // 2]} … {left_out} characters … {text[-SHOWN // 2 :]}"


def draw_figures(out: Path, steps: list[Line], reviews: list[Reviewed]) -> list[str]:
    """Draw review.png, where there was a review, and curves.png; returns the names."""
    try:
        from matplotlib.figure import Figure
    except Exception as error:  # not installed, or broken, which may raise anything
        print(f"no figures: {one_line(error)}")
        return []
    curves = Figure((11, 3), layout="constrained")
    draw_curves(curves, steps)
    save(curves, out / "curves.png")
    if not reviews:
        return ["curves.png"]
    picture = Figure((max(7, 3.5 * len(reviews)), 5), layout="constrained")
    draw_reviews(picture, reviews)
    save(picture, out / "review.png")
    return ["review.png", "curves.png"]


def save(figure: Any, file: Path) -> None:
    with writing(file) as beside:
        figure.savefig(beside, format="png")


def draw_curves(figure: Any, steps: list[Line]) -> None:
    panels = figure.subplots(1, len(CURVES))
    for axes, name in zip(panels, CURVES):
        for t in sorted({line["iteration"] for line in steps}):
            points = {at: line[name] for at, line in enumerate(steps, 1) if line["iteration"] == t}
            axes.plot(list(points), list(points.values()), label=f"iteration {t}")
        axes.set(title=name, xlabel="step")
    panels[-1].legend(fontsize="small")


def draw_reviews(figure: Any, reviews: list[Reviewed]) -> None:
    """A column a review: above all given pairs, below all pairs of its samples."""
    above, below = figure.subplots(2, len(reviews), squeeze=False)
    for review, upper, lower in zip(reviews, above, below):
        histogram(upper, review.margins, review.kept, review.flipped)
        counts = f"{len(review.kept)} of {len(review.margins)}"
        upper.set_title(f"iteration {review.t}: {counts} given pairs kept", fontsize="medium")
        taken = {pair["row"] for pair in review.bootstrapped}
        histogram(lower, review.sampled, taken, set())
        counts = f"{len(taken)} of {len(review.sampled)}"
        lower.set_title(f"iteration {review.t}: {counts} new pairs kept", fontsize="medium")
    for axes in (above[0], below[0]):
        axes.set_ylabel("pairs")


def histogram(axes: Any, margins: dict[int, float], kept: set[int], flipped: set[int]) -> None:
    """Of margins by row; a line at the smallest one kept, where none above it was left out."""
    inside, outside = split(margins, kept)
    groups = {"kept": inside, "not kept": outside}
    if flipped:
        wrong, right = split(margins, flipped)
        groups = {"right label": right, "flipped label": wrong}
    values = list(margins.values()) or [0.0]
    is_cut = bool(inside and outside) and max(outside) <= min(inside)
    edge = min(inside) if is_cut else min(values)  # no bar has pairs on both sides of it
    width = (max(values) - min(values)) / min(50, len(values)) or 1.0
    first = math.floor((min(values) - edge) / width)
    last = math.ceil((max(values) - edge) / width) + 1
    bins = [edge + k * width for k in range(first, last + 1)]
    colours = list(map(COLOURS.get, groups))
    labels = [f"{name}: {len(group)}" for name, group in groups.items()]
    axes.hist(list(groups.values()), bins, stacked=True, color=colours, label=labels)
    if is_cut:
        axes.axvline(edge, color="black", linestyle="--", label="kept: right of it")
    axes.set_ylim(top=1.4 * axes.get_ylim()[1])  # room for the legend
    axes.set_xlabel("implicit reward margin, nats")
    axes.legend(fontsize="small")


def split(margins: dict[int, float], rows: set[int]) -> tuple[list[float], list[float]]:
    """The margins of these rows, and those of the others."""
    others = margins.keys() - rows
    return [margins[row] for row in margins.keys() & rows], [margins[row] for row in others]
