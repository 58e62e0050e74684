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
from sera_min.bootstrap import best_worst_pairs, ended_responses
from sera_min.machinery.config import Resolved, seed_of
from sera_min.machinery.policies import Policies
from sera_min.pairs import Ids, Pair, Preferences, Review, Rows, Samples, TrainingSet, rows_of
from train import Variant


def to_train_on(policies: Policies, pairs: list[Pair], against: int = 0) -> Review:
    """These N pairs, and as π_ref the policy of iteration `against`."""
    n = len(pairs)
    prompts, responses = rows_of(pairs)
    rows = Rows(prompts, responses, pair_index=[0] * 2 * n)
    reference = policies.log_prob(against, rows).view(-1, 2)
    return Review(TrainingSet(pairs, reference, torch.zeros(n), sources=["own"] * n, pair_index=[0] * n))


def drawn(t: int, prompts: list[Ids], policies: Policies, config: Resolved) -> Samples:
    """Samples of π_θ(t−1): those that SeRA draws for iteration t."""
    return policies.sample(t - 1, prompts, config.samples_per_prompt, seed_of(config.seed, t, "samples"))


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
        prompts = [pair.prompt for pair in given.pairs[:half]]
        samples = drawn(t, prompts, policies, config)
        prompt_of, responses, _cut_off = ended_responses(samples)
        rows = Rows([prompts[i] for i in prompt_of], responses, prompt_of)
        r = policies.log_prob(t - 1, rows) - policies.log_prob(t - 2, rows)  # (R,)
        q = r - length_price(r, rows.lengths, prompt_of) * rows.lengths
        best, worst, _dropped = best_worst_pairs(prompt_of, responses, q)
        made = []
        for w, l in zip(best.tolist(), worst.tolist()):
            made.append(Pair(rows.prompts[w], responses[w], responses[l]))
        return to_train_on(policies, made + given.pairs[half:], against=t - 1)

    return Variant("DICE", review=review)


def length_price(rewards: Tensor, lengths: Tensor, prompt_of: list[int]) -> float:
    """Of α = 0, 0.001, …, 1 that at which best and worst differ least in length, on average over the prompts; (R,)."""
    if not prompt_of:
        return 0.0
    of_prompt: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompt_of):
        of_prompt.setdefault(prompt, []).append(row)
    rows = pad_sequence([torch.tensor(some) for some in of_prompt.values()], batch_first=True, padding_value=-1)
    r, length = rewards[rows], lengths[rows]  # (P, n)
    there = rows >= 0

    def gap(alpha: float) -> float:
        q = r - alpha * length
        best = q.where(there, -math.inf).argmax(1)
        worst = q.where(there, math.inf).argmin(1)
        longer = length.gather(1, best[:, None]) - length.gather(1, worst[:, None])
        return abs(longer.double().mean().item())

    return min((k / 1000 for k in range(1001)), key=gap)


def spin() -> Variant:
    """SPIN (arXiv:2401.01335 and its code). The chosen responses against own samples; the rejected ones are not used:

        −log σ(βm),    y_w: the chosen response of D,    y_l ~ π_θ(t−1)(·|x),    reference π_θ(t−1)
    The round before's pairs stay. Two samples a prompt, not one; and all rounds have one β and one learning rate.
    """

    def review(t: int, given: Preferences, policies: Policies, config: Resolved, _: Variant) -> Review:
        prompts = [pair.prompt for pair in given.pairs]
        made = []
        for i in range(max(t - 1, 1), t + 1):  # samples of the round before are on disk
            for pair, samples in zip(given.pairs, drawn(i, prompts, policies, config)):
                for y, ended in samples:
                    if ended and y != pair.chosen:
                        made.append(Pair(pair.prompt, pair.chosen, y))
        return to_train_on(policies, made, against=t - 1)

    return Variant("SPIN", review=review)


METHODS = {  # what makes it, and flags
    "DICE": (dice, {}),
    "SPIN": (spin, {"samples_per_prompt": 2}),
}
