"""Preference pairs as token ids in memory: what the loop and its phases hand to each other."""

import random
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Ids = list[int]  # token ids
Triple = tuple[int, int, int]


class Pair(NamedTuple):
    """A preference (x, y_w, y_l) as token ids; a response that was not cut ends with its end of sequence."""

    prompt: Ids
    chosen: Ids
    rejected: Ids


class Given(NamedTuple):
    """A pair of the user's data, its prompt as people read it, and the number of its row there (the first is 0)."""

    pair: Pair
    text: str
    row: int


class TrainingSet(NamedTuple):
    """What an iteration trains on: N pairs; log π_ref of their responses; their margins, and where they come from."""

    pairs: list[Pair]
    reference: Tensor  # (N, 2), nats
    margins: Tensor  # (N,), nats; 0 at t = 1, where nothing is reviewed
    sources: list[str]  # offline or bootstrap
    numbers: list[int]  # in D: of the pair itself, or of the one whose prompt was sampled from

    @staticmethod
    def given(offline: list[Pair], reference: Tensor, margins: Tensor, numbers: list[int]) -> "TrainingSet":
        """Of D, its log π_ref (|D|, 2) and its margins (|D|,), the pairs with these numbers, in this order."""
        pairs = [offline[i] for i in numbers]
        return TrainingSet(pairs, reference[numbers], margins[numbers], ["offline"] * len(pairs), numbers)

    @staticmethod
    def bootstrapped(offline: list[Pair], samples: "Samples", triples: list[Triple], margins: Tensor) -> "TrainingSet":
        """The pairs that (prompt, best, worst) name, numbers of prompts and of their samples, with their margins."""
        y, index = samples.responses, torch.tensor(triples, dtype=torch.int64).view(-1, 3)  # y[i][j]: sample j of x_i
        pairs = [Pair(offline[i].prompt, y[i][best], y[i][worst]) for i, best, worst in triples]
        reference = samples.reference[index[:, :1], index[:, 1:]]  # (P, n) -> (K̃, 2)
        return TrainingSet(pairs, reference, margins, ["bootstrap"] * len(pairs), index[:, 0].tolist())

    def union(self, others: "TrainingSet") -> "TrainingSet":
        return TrainingSet(
            self.pairs + others.pairs, torch.cat([self.reference, others.reference]),
            torch.cat([self.margins, others.margins]), self.sources + others.sources, self.numbers + others.numbers,
        )  # fmt: skip


class Review(NamedTuple):
    """What becomes of D and of the samples, steps 3 to 6."""

    training_set: TrainingSet
    dropped: TrainingSet | None = None  # the given pairs that were not selected; None at t = 1
    samples: "Samples | None" = None  # those that the bootstrapped pairs are made of; None where there are none


class Samples(NamedTuple):
    """n samples of each of P prompts, and what the review makes of them."""

    responses: list[list[Ids]]
    ended: Tensor  # (P, n) bool
    usable: Tensor  # (P, n) bool: ended, and not below --token_floor
    rewards: Tensor  # (P, n), nats, those that rank; NaN where a sample is not usable
    reference: Tensor  # (P, n), nats: log π_ref(y|x)


def rows_of(pairs: Sequence[Pair]) -> tuple[list[Ids], list[Ids]]:
    """Prompts and responses of N pairs as 2N rows: chosen, rejected, chosen, rejected, …"""
    prompts = [pair.prompt for pair in pairs for _ in range(2)]
    return prompts, [y for pair in pairs for y in (pair.chosen, pair.rejected)]


def tokens_of(pair: Pair) -> int:
    return 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def lengths_of(pairs: Sequence[Pair]) -> Tensor:
    return torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in pairs])  # (N, 2)


def split_by_prompt(given: list[Given], share: float, seed: int) -> tuple[list[Given], list[Given]]:
    """The pairs to train on and those held out: a random `share` of the prompts, none of which is in both."""
    prompts = list(dict.fromkeys(tuple(pair.prompt) for pair, *_ in given))
    held = set(random.Random(seed).sample(prompts, round(share * len(prompts))))
    in_held = [tuple(pair.prompt) in held for pair, *_ in given]
    return [one for one, out in zip(given, in_held) if not out], [one for one, out in zip(given, in_held) if out]


def pack(rows: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """R rows of token ids as one row of all, int32 (Σ lengths,), and their lengths (R,): small, and quick to read."""
    tokens = array("i")
    for row in rows:
        tokens.extend(row)
    # frombuffer takes no empty buffer
    flat = torch.frombuffer(tokens, dtype=torch.int32).clone() if tokens else torch.zeros(0, dtype=torch.int32)
    return flat, torch.tensor([len(row) for row in rows], dtype=torch.int64)


def unpack(tokens: Tensor, lengths: Tensor) -> list[Ids]:
    """The rows again. Equal ids are one object: 8 bytes a token, where a list of ids as it comes takes 40."""
    number = list(range(int(tokens.max()) + 1)) if len(tokens) else []
    return [[number[token] for token in row.tolist()] for row in tokens.split(lengths.tolist())]


def format_counts(counts: Counter) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items()) or "none"
