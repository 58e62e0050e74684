"""Related methods that train on samples of their own, as the few lines in which they differ from SeRA.

    python experiments/claims.py --studies neighbours

Every method is one function, which makes a train.Variant: its `review` makes the pairs of iteration t. All else is
SeRA's loop in the playground, with the reference π_θ0 unless the docstring says another. These are methods whose code
could be read; a docstring says what is simplified. No number here says how good a method is on its own task.
"""

import math

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import train
from sera_min import playground
from sera_min.bootstrap import best_worst_pairs, ended_responses
from sera_min.machinery.config import Resolved, seed_of
from sera_min.machinery.policies import Policies
from sera_min.pairs import Ids, Pair, Preferences, Review, Rows, Samples, TrainingSet, rows_of
from train import Variant

TOKENIZER = playground.make_tokenizer()


def to_train_on(policies: Policies, pairs: list[Pair], against: int = 0) -> Review:
    """These N pairs, and as π_ref the policy of iteration `against`."""
    reference = policies.log_prob(against, Rows(*rows_of(pairs), [0] * 2 * len(pairs))).view(-1, 2)
    return Review(TrainingSet(pairs, reference, torch.zeros(len(pairs)), ["own"] * len(pairs), [0] * len(pairs)))


def drawn(t: int, prompts: list[Ids], policies: Policies, config: Resolved) -> Samples:
    """Samples of π_θ(t−1): those that SeRA draws for iteration t."""
    return policies.sample(t - 1, prompts, config.samples_per_prompt, seed_of(config.seed, t, "samples"))


def ranked(t: int, prompts: list[Ids], policies: Policies, config: Resolved, against: int = 0) -> tuple[Rows, Tensor]:
    """The samples of π_θ(t−1) that ended, R rows; rewards (R,): log π_θ(t−1) − log π_θ`against`."""
    prompt_of, responses, _ = ended_responses(drawn(t, prompts, policies, config))
    rows = Rows([prompts[i] for i in prompt_of], responses, prompt_of)
    return rows, policies.log_prob(t - 1, rows) - policies.log_prob(against, rows)


def best_and_worst(rows: Rows, rewards: Tensor) -> tuple[list[Pair], Tensor]:
    """The pairs that these rewards (R,) make of the samples, with their margins."""
    best, worst, _ = best_worst_pairs(rows.pair_index, rows.responses, rewards)
    x, y = rows.prompts, rows.responses
    pairs = [Pair(x[w], y[w], y[l]) for w, l in zip(best.tolist(), worst.tolist())]
    return pairs, rewards[best] - rewards[worst]


def dice() -> Variant:
    """DICE (arXiv:2406.09760 and its code). The best and the worst sample by a reward without length, and old pairs:

        −log σ(βm),    q(x,y) = log π_θ(t−1)(y|x) − log π_θ(t−2)(y|x) − α|y|,    reference π_θ(t−1)
    α: best and worst have the same mean length. From t = 2 on; samples answer the prompts of D's first half, and the
    pairs of the second are kept. Simplified: 4 samples, not 16; lengths in tokens; prompts occur in both halves.
    """

    def review(t: int, given: Preferences, policies: Policies, config: Resolved, variant: Variant) -> Review:
        if t == 1:
            return train.review(t, given, policies, config, variant)
        half = len(given.pairs) // 2
        rows, r = ranked(t, [x for x, _, _ in given.pairs[:half]], policies, config, against=t - 2)
        made, _ = best_and_worst(rows, r - length_price(r, rows.lengths, rows.pair_index) * rows.lengths)
        return to_train_on(policies, made + given.pairs[half:], against=t - 1)

    return Variant("DICE", review=review)


def length_price(rewards: Tensor, lengths: Tensor, prompt_of: list[int]) -> float:
    """Of α = 0, 0.001, …, 1 that at which best and worst differ least in length, on average over the prompts; (R,)."""
    of_prompt: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompt_of):
        of_prompt.setdefault(prompt, []).append(row)
    rows = pad_sequence([torch.tensor(some) for some in of_prompt.values()], batch_first=True, padding_value=-1)
    r, length, there = rewards[rows], lengths[rows], rows >= 0  # (P, n)

    def gap(alpha: float) -> float:
        q = r - alpha * length
        best, worst = q.where(there, -math.inf).argmax(1), q.where(there, math.inf).argmin(1)
        longer = length.gather(1, best[:, None]) - length.gather(1, worst[:, None])
        return abs(longer.double().mean().item())

    return min((k / 1000 for k in range(1001)), key=gap)


def spin() -> Variant:
    """SPIN (arXiv:2401.01335 and its code). The chosen responses against own samples; the rejected ones are not used:

        −log σ(βm),    y_w: the chosen response of D,    y_l ~ π_θ(t−1)(·|x),    reference π_θ(t−1)
    The round before's pairs stay. Two samples a prompt, not one; and all rounds have one β and one learning rate.
    """

    def review(t: int, given: Preferences, policies: Policies, config: Resolved, _) -> Review:
        made, prompts = [], [x for x, _, _ in given.pairs]
        for i in range(max(t - 1, 1), t + 1):  # samples of the round before are on disk
            for (x, w, _), row in zip(given.pairs, drawn(i, prompts, policies, config)):
                made += [Pair(x, w, y) for y, ended in row if ended and y != w]
        return to_train_on(policies, made, against=t - 1)

    return Variant("SPIN", review=review)


METHODS = {  # what makes it, and flags
    "DICE": (dice, {}),
    "SPIN": (spin, {"samples_per_prompt": 2}),
}
