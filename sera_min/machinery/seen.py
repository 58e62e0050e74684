"""What the reviews saw, read from the files that they wrote: a part of report.md, and review.png. No method here."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sera_min.folder import read_jsonl

IsFlipped = Callable[[dict], bool] | None  # whether a row's label is wrong; None where nobody knows
SHOWN = 400  # characters of a text; of a longer one its beginning and its end
COLOURS = {"right label": "#0072B2", "flipped label": "#E69F00", "kept": "#009E73", "not kept": "#BBBBBB"}


class Seen(NamedTuple):
    """The review of iteration t: lines of pairs.jsonl and dropped.jsonl."""

    t: int
    kept: list[dict[str, Any]]  # given pairs
    dropped: list[dict[str, Any]]
    bootstrapped: list[dict[str, Any]]  # those kept
    sampled: dict[int, float]  # by row of the prompt: the margin of best against worst, where two samples are usable

    def given(self) -> list[dict[str, Any]]:
        """All given pairs, smallest margin first."""
        return sorted(self.kept + self.dropped, key=lambda pair: pair["margin"])


def read_review(out: Path, t: int) -> Seen:
    here = out / f"iteration-{t}"
    pairs, dropped = read_jsonl(here / "pairs.jsonl"), read_jsonl(here / "dropped.jsonl")
    kept, bootstrapped = ([pair for pair in pairs if pair["source"] == source] for source in ("offline", "bootstrap"))
    rows, samples = sorted(pair["row"] for pair in kept + dropped), here / "samples.jsonl"
    return Seen(t, kept, dropped, bootstrapped, sampled_margins(samples, rows) if samples.exists() else {})


def sampled_margins(file: Path, rows: list[int]) -> dict[int, float]:
    """The samples of the prompt of every row follow each other, in the order of the rows."""
    with open(file, encoding="utf-8") as lines:  # line by line: they may be many
        rewards = [json.loads(line)["reward"] for line in lines]
    n = len(rewards) // len(rows)
    usable = {row: [r for r in rewards[k * n : (k + 1) * n] if r is not None] for k, row in enumerate(rows)}
    return {row: max(rs) - min(rs) for row, rs in usable.items() if rs and max(rs) > min(rs)}


def summarise(seen: Seen, before: Seen | None) -> str:
    """One line; `before` is the review of the iteration before, None at t = 2."""
    given, kept = seen.given(), {pair["row"] for pair in seen.kept}
    negative = sum(pair["margin"] < 0 for pair in given) / len(given)
    counts = f"{len(kept)} of {len(given)} given pairs kept, {len(seen.dropped)} dropped"
    line = f"{counts}; {negative:.0%} of the margins are negative"
    if before is None:
        return line
    again = len(kept & {pair["row"] for pair in before.kept}) / max(1, len(kept))
    now, then = ([pair["row"] for pair in review.given()] for review in (seen, before))
    alike = f"{again:.0%} of the kept were kept the time before; Spearman's correlation of all margins with those then"
    return f"{line}; {alike} {spearman(now, then):.2f}"


def spearman(now: list[int], then: list[int]) -> float:
    """The correlation of the places that the same things have in two orders."""
    places = torch.tensor([now, then]).argsort().double()  # (2, N): row by row, the place of each thing
    return torch.corrcoef(places)[0, 1].item() if len(now) > 1 else 1.0


def describe(seen: Seen, summary: str, prompts: dict[int, str], is_flipped: IsFlipped) -> Iterator[str]:
    """The lines of report.md. prompts: by row, as people read them."""
    given = seen.given()
    yield from ["", f"### Iteration {seen.t}", "", f"{summary}."]
    for title, pairs in {
        "The given pairs with the smallest margins": given[:5],
        "The given pairs with the largest margins": given[::-1][:5],
        "Pairs of its own samples": seen.bootstrapped[:3],
    }.items():
        yield from ["", f"{title}:"] if pairs else []
        for pair in pairs:
            wrong = is_flipped and pair["source"] == "offline" and is_flipped(pair)
            head = f"{pair['margin']:.2f}, row {pair['row']}{'; the label is flipped' * bool(wrong)}"
            texts = {"prompt": prompts[pair["row"]], "chosen": pair["chosen"], "rejected": pair["rejected"]}
            yield from ["", *block({"margin": head, **texts})]


def block(parts: dict[str, str]) -> list[str]:
    """Texts as code, which Markdown leaves as they are, each after its name."""
    width = max(map(len, parts))
    named = [(name, shortened(text).split("\n")) for name, text in parts.items()]
    return [f"    {name if first else '':>{width}}{':' if first else ' '} {line}"
            for name, lines in named for first, line in zip([True] + [False] * len(lines), lines)]  # fmt: skip


def shortened(text: str) -> str:
    text, half = text.strip(), SHOWN // 2
    left_out = len(text) - SHOWN
    return text if left_out <= 0 else f"{text[:half]} … {left_out} characters … {text[-half:]}"


def draw(figure: Any, reviews: list[Seen], is_flipped: IsFlipped) -> None:
    """A column a review: above the margins of all given pairs, below those of the bootstrapped pairs; the cuts."""
    above, below = figure.subplots(2, len(reviews), squeeze=False)
    for seen, given_axes, sampled_axes in zip(reviews, above, below):
        kept, dropped = ([pair["margin"] for pair in pairs] for pairs in (seen.kept, seen.dropped))
        groups = {"kept": kept, "not kept": dropped}
        if is_flipped:
            labels = [(pair["margin"], is_flipped(pair)) for pair in seen.given()]
            groups = {name: [m for m, wrong in labels if wrong == flipped]
                      for name, flipped in {"right label": False, "flipped label": True}.items()}  # fmt: skip
        histogram(given_axes, groups, kept, dropped, f"iteration {seen.t}", "given pairs")
        taken = {pair["row"] for pair in seen.bootstrapped}
        kept = [margin for row, margin in seen.sampled.items() if row in taken]
        dropped = [margin for row, margin in seen.sampled.items() if row not in taken]
        groups = {"kept": kept, "not kept": dropped}
        histogram(sampled_axes, groups, kept, dropped, f"iteration {seen.t}", "new pairs")
    for axes in (above[0], below[0]):
        axes.set_ylabel("pairs")


def histogram(
    axes: Any, groups: dict[str, list[float]], kept: list[float], dropped: list[float], iteration: str, pairs: str
) -> None:
    """Of the groups, one upon the other; a line at the smallest margin that was kept, where none above it was not."""
    colours, values = [COLOURS[name] for name in groups], kept + dropped or [0.0]
    low, high = min(values), max(values)
    is_cut = bool(kept and dropped) and max(dropped) <= min(kept)
    edge = min(kept) if is_cut else low  # so that no bar has pairs on both sides of the cut
    width = (high - low) / min(50, len(values)) or 1.0
    edges = [edge + k * width for k in range(math.floor((low - edge) / width), math.ceil((high - edge) / width) + 2)]
    labels = [f"{name}: {len(margins)}" for name, margins in groups.items()]
    axes.hist(list(groups.values()), bins=edges, stacked=True, color=colours, label=labels)
    if is_cut:
        axes.axvline(edge, color="black", linestyle="--", label="kept: right of it")
    axes.set_ylim(top=1.4 * axes.get_ylim()[1])  # room for the legend
    axes.set_title(f"{iteration}: {len(kept)} of {len(kept) + len(dropped)} {pairs} kept", fontsize="medium")
    axes.set_xlabel("implicit reward margin, nats")
    axes.legend(fontsize="small")
