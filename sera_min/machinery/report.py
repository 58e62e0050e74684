"""What people look at: report.md, review.png and curves.png, made of the files that the run wrote."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    "KL": ("kl", "mean of log π_θ(y|x) − log π_ref(y|x) over such answers, nats: how far π_θ has gone from π_ref"),
    "words": ("gold/length", "mean length of these answers"),
    "accuracy": ("eval_rewards/accuracies", "share of evaluation pairs with margin > 0, ties ½"),
    "β·margin": ("eval_rewards/margins", "β times their mean margin"),
}
CURVES = ("loss", "rewards/accuracies", "rewards/margins")  # in curves.png
GROUPS = {"given": "C0", "right label": "C0", "flipped label": "C1", "bootstrapped": "C2"}  # in review.png
SHOWN = 400  # characters of a text; a longer one loses its middle

Line = dict[str, Any]  # of a JSONL file
IsFlipped = Callable[[Line], bool] | None  # whether a label is wrong; None where nobody knows


def write_report(out: Path, prompts: dict[int, str], is_flipped: IsFlipped) -> None:
    """Write report.md and the figures, and print all but the reviewed pairs.

    prompts: of the given pairs, by the number of their row, as people read them.
    """
    metrics = read_jsonl(out / "metrics.jsonl")
    evaluations = having(metrics, "phase", "eval", "final")
    last = evaluations[-1]["iteration"]
    answers = read_jsonl(out / f"iteration-{last}" / "answers.jsonl")
    parts = ["# Results", describe_results(evaluations, answers[:5])]
    print(f"\n{parts[-1]}\n")

    reviews: dict[int, list[Line]] = {}
    kept_before: set[int] = set()
    for t in range(1, last + 1):
        here = out / f"iteration-{t}"
        if not (here / "dropped.jsonl").exists():  # t = 1, which takes all given pairs
            continue
        reviews[t] = read_review(here, is_flipped)
        given = having(reviews[t], "source", "offline")
        own = having(reviews[t], "source", "bootstrap")
        kept = {pair["row"] for pair in having(given, "kept", True)}
        summary = summarise(given, kept, kept_before)
        kept_before = kept
        print(f"iteration {t}: {summary}")
        parts += [f"## The review of iteration {t}", f"{summary}."]
        parts += describe_pairs("The given pairs with the smallest margins:", given[:5], prompts)
        parts += describe_pairs("The given pairs with the largest margins:", given[::-1][:5], prompts)
        parts += describe_pairs("Pairs of its own samples:", own[::-1][:3], prompts)
    for name in draw_figures(out, having(metrics, "phase", "train"), reviews):
        parts.append(f"![{name}]({name})")
    write(out / "report.md", "\n\n".join(parts) + "\n")


def having(lines: list[Line], name: str, *values: Any) -> list[Line]:
    return [line for line in lines if line[name] in values]


def read_review(here: Path, is_flipped: IsFlipped) -> list[Line]:
    """The pairs of a review, smallest margin first: with whether they were kept, and one of GROUPS."""
    pairs = []
    for name in ("pairs", "dropped"):
        for pair in read_jsonl(here / f"{name}.jsonl"):
            group = "given"
            if pair["source"] == "bootstrap":
                group = "bootstrapped"
            elif is_flipped is not None:
                group = "flipped label" if is_flipped(pair) else "right label"
            pairs.append({**pair, "kept": name == "pairs", "group": group})
    return sorted(pairs, key=lambda pair: pair["margin"])


def summarise(given: list[Line], kept: set[int], before: set[int]) -> str:
    """One line about the given pairs of a review; before: those that the review before it kept, if there was one."""
    n = len(given)
    negative = sum(pair["margin"] < 0 for pair in given) / n
    line = f"{len(kept)} of {n} given pairs kept, {n - len(kept)} not selected; "
    line += f"{negative:.0%} of the margins are negative"
    if kept and before:
        line += f"; {len(kept & before) / len(kept):.0%} of the kept were kept the time before"
    return line


def describe_results(evaluations: list[Line], answers: list[Line]) -> str:
    """The table of the columns that any evaluation has, what they mean, and the answers."""
    columns, legend = [], []
    for heading, (name, meaning) in COLUMNS.items():
        cells = [format_cell(line.get(name)) for line in evaluations]
        if set(cells) == {"–"}:
            continue
        width = max(map(len, [heading, *cells]))
        ruled = [heading, "-" * (width - 1) + ":", *cells]
        columns.append([cell.rjust(width) for cell in ruled])
        legend.append(f"- {heading}: {meaning}")
    rows = [f"| {' | '.join(row)} |" for row in zip(*columns)]
    parts = ["\n".join(rows), "\n".join(legend)]
    for line in answers:
        parts.append(block({"prompt": line["prompt"], "before": line["reference"], "after": line["answer"]}))
    return "\n\n".join(parts)


def format_cell(value: Any) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "–"
    return f"{value:.3f}"


def describe_pairs(title: str, pairs: list[Line], prompts: dict[int, str]) -> list[str]:
    parts = [title] if pairs else []
    for pair in pairs:
        margin = f"{pair['margin']:.2f}, row {pair['row']}, {pair['group']}"
        texts = {"margin": margin, "prompt": prompts[pair["row"]]}
        parts.append(block({**texts, "chosen": pair["chosen"], "rejected": pair["rejected"]}))
    return parts


def block(texts: dict[str, str]) -> str:
    """Texts as code, which Markdown leaves as they are, each after its name."""
    width = max(map(len, texts))
    lines = []
    for name, text in texts.items():
        text = text.strip()
        if len(text) > SHOWN:
            text = f"{text[: SHOWN // 2]} … {len(text) - SHOWN} characters … {text[-SHOWN // 2 :]}"
        indented = text.replace("\n", "\n" + " " * (4 + width + 2))
        lines.append(f"    {name:>{width}}: {indented}")
    return "\n".join(lines)


def draw_figures(out: Path, steps: list[Line], reviews: dict[int, list[Line]]) -> list[str]:
    """Draw review.png, where there was a review, and curves.png; returns the names."""
    try:
        from matplotlib.figure import Figure
    except Exception as error:  # not installed, or broken, which may raise anything
        print(f"no figures: {one_line(error)}")
        return []
    figures = {}
    if reviews:
        figures["review.png"] = Figure((max(7, 3.5 * len(reviews)), 4), layout="constrained")
        draw_reviews(figures["review.png"], reviews)
    figures["curves.png"] = Figure((11, 3), layout="constrained")
    draw_curves(figures["curves.png"], steps)
    for name, figure in figures.items():
        with writing(out / name) as beside:
            figure.savefig(beside, format="png")
    return list(figures)


def draw_curves(figure: Any, steps: list[Line]) -> None:
    panels = figure.subplots(1, len(CURVES))
    for axes, name in zip(panels, CURVES):
        for t in sorted({line["iteration"] for line in steps}):
            points = {at: line[name] for at, line in enumerate(steps, 1) if line["iteration"] == t}
            axes.plot(list(points), list(points.values()), label=f"iteration {t}")
        axes.set(title=name, xlabel="step")
    panels[-1].legend(fontsize="small")


def draw_reviews(figure: Any, reviews: dict[int, list[Line]]) -> None:
    """The margins of the given pairs and, on top of them, of the bootstrapped ones; a line where selection cut."""
    panels = figure.subplots(1, len(reviews), squeeze=False)[0]
    for axes, (t, pairs) in zip(panels, reviews.items()):
        margins, colours, labels = [], [], []
        for name, colour in GROUPS.items():
            of_group = margins_of(pairs, "group", name)
            if of_group:
                margins.append(of_group)
                colours.append(colour)
                labels.append(f"{name}: {len(of_group)}")
        axes.hist(margins, bins=50, stacked=True, color=colours, label=labels)
        given = having(pairs, "source", "offline")
        kept = margins_of(given, "kept", True)
        others = margins_of(given, "kept", False)
        if kept and others and max(others) <= min(kept):
            axes.axvline(min(kept), color="black", linestyle="--", label="given pairs kept: right of it")
        axes.set_title(f"iteration {t}: {len(kept)} of {len(given)} given pairs kept", fontsize="medium")
        axes.set_ylim(top=1.6 * axes.get_ylim()[1])  # room for the legend
        axes.set(xlabel="margin", ylabel="pairs")
        axes.legend(fontsize="small")


def margins_of(pairs: list[Line], name: str, value: Any) -> list[float]:
    return [pair["margin"] for pair in having(pairs, name, value)]
