"""The few types that train.py and the machinery share. All texts are token ids.

From sera_min 0.1.0, Apache-2.0; SeRA, arXiv:2410.09362.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

Ids = list[int]  # token ids
Samples = list[list[tuple[Ids, bool]]]  # of each prompt its samples: token ids, and whether they ended


class Pair(NamedTuple):
    """A preference (x, y_w, y_l). A response that was not cut ends with its end of sequence."""

    prompt: Ids
    chosen: Ids
    rejected: Ids


def padded_tokens(pair: Pair) -> int:
    """The tokens that its two rows take when both are padded to the longer one."""
    return 2 * (len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)))


def rows_of(pairs: list[Pair]) -> tuple[list[Ids], list[Ids]]:
    """Prompts and responses of N pairs as 2N rows: chosen, rejected, chosen, rejected, …"""
    prompts: list[Ids] = []
    responses: list[Ids] = []
    for pair in pairs:
        prompts += [pair.prompt, pair.prompt]
        responses += [pair.chosen, pair.rejected]
    return prompts, responses


@dataclass
class TrainingSet:
    """N pairs, and what the review knows of each."""

    pairs: list[Pair]
    reference: Tensor  # (N, 2): log π_ref of chosen and rejected, nats
    margins: Tensor  # (N,): m̄_t, nats (IPO, SimPO: a token); 0 in iteration 1, where nothing is reviewed
    sources: list[str]  # "offline", a given pair, or "bootstrap"
    pair_index: list[int]  # index in D of the pair; of a bootstrapped one, of the pair that gave the prompt

    def and_also(self, other: "TrainingSet") -> "TrainingSet":
        """Both, one after the other."""
        return TrainingSet(
            self.pairs + other.pairs,
            torch.cat([self.reference, other.reference]),
            torch.cat([self.margins, other.margins]),
            self.sources + other.sources,
            self.pair_index + other.pair_index,
        )


@dataclass
class Rows:
    """R responses, each beside its prompt; and the log-probs that have been computed for them."""

    prompts: list[Ids]
    responses: list[Ids]
    # Index in D of the row's pair, or of the pair that gave a sample its prompt; none for evaluation prompts.
    pair_index: list[int] = field(default_factory=list)
    logps: dict[int, Tensor] = field(default_factory=dict)  # i -> log π_θi(y|x), (R,), nats

    @property
    def lengths(self) -> Tensor:
        """|y|, int64 (R,)"""
        return torch.tensor([len(y) for y in self.responses], dtype=torch.int64)

    def paired(self, best: Tensor, worst: Tensor, margins: Tensor, reference: Tensor) -> TrainingSet:
        """Bootstrapped pairs. best, worst: K̃ rows each, with their margins; reference: (R,), of all rows."""
        pairs = []
        for w, l in zip(best.tolist(), worst.tolist()):
            pairs.append(Pair(self.prompts[w], self.responses[w], self.responses[l]))
        both = torch.stack([reference[best], reference[worst]], dim=1)  # (K̃, 2)
        pair_index = [self.pair_index[w] for w in best.tolist()]
        return TrainingSet(pairs, both, margins, ["bootstrap"] * len(pairs), pair_index)


class Preferences:
    """Given pairs such as D, and their responses as rows: chosen, rejected, chosen, …"""

    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = pairs
        prompts, responses = rows_of(pairs)
        pair_index = torch.arange(len(pairs)).repeat_interleave(2).tolist()  # 0, 0, 1, 1, …
        self.rows = Rows(prompts, responses, pair_index)

    def subset(self, indices: Tensor, margins: Tensor, reference: Tensor) -> TrainingSet:
        """The pairs at these indices, in this order. margins: (|D|,); reference: (2|D|,)."""
        pairs = [self.pairs[i] for i in indices.tolist()]
        return TrainingSet(
            pairs, reference.view(-1, 2)[indices], margins[indices], ["offline"] * len(pairs), indices.tolist()
        )


class Review(NamedTuple):
    """The pairs that an iteration trains on, all of D at first; and what else its review found."""

    training_set: TrainingSet
    not_selected: TrainingSet | None = None  # the other given pairs, smallest margin first
    samples: Samples | None = None
    rewards: Tensor | None = None  # (R,): r̄_t of the samples that ended, in their order
