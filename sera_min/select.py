"""Self-review: which of the given pairs the policy itself finds clear. Copy this file alone: it needs torch.

    r̄_t = (1−γ)·r_{t−1} + γ·r_{t−2}             the weighted mean reward of the last two policies
    m̄_t = r̄_t(x, y_w) − r̄_t(x, y_l)             the implicit reward margin of a pair
    keep the K pairs with the largest m̄_t

The paper (SeRA, arXiv:2410.09362) gives an ensemble over two iterations (its eq. 7), and keeps the pairs whose chosen
response is strongly preferred. That the ensemble has just this form, and that "strongly" means the K largest margins,
is our reading.

A large margin means that the policies clearly prefer y_w: other pairs taught them the same. A label that contradicts
the other pairs gets a small or a negative margin, and its pair is left out of this iteration.

Give the copy another name, or keep it inside a package: beside a script, `select.py` hides Python's own module.
"""

import torch
from torch import Tensor


def ensemble_margin(newest: Tensor, previous: Tensor | None = None, gamma: float = 0.5) -> Tensor:
    """(1−γ)·newest + γ·previous, in nats, of one shape: of margins or, since it is linear, of rewards.

    newest: under π_θ(t−1). previous: under π_θ(t−2). At t = 2 that is π_ref, whose reward is 0, and the factor 1−γ
    alone changes no order (γ < 1): it is left out, None. (SimPO's reward of π_ref is not 0; leaving it out is ours.)
    """
    return newest if previous is None else (1 - gamma) * newest + gamma * previous


def length_free(rewards: Tensor, lengths: Tensor) -> Tensor:
    """r − b·|y|: the part of the rewards that a straight line in the length does not explain. Not the paper's: ours.

    rewards: float (P, n) in nats, n responses to each of P prompts, NaN where there is none; lengths: int (P, n).
    b, in nats a token, is the slope of the least-squares line within prompts: Σ δr·δ|y| / Σ δ|y|², where δ is the
    difference from the prompt's mean. Why: where labels favour length, so does the reward that was learned from them,
    and the pairs that it selects and makes favour length still more.
    """
    known = lengths.where(~rewards.isnan(), torch.nan)  # (P, n)
    dr = rewards - rewards.nanmean(1, keepdim=True)
    dl = known - known.nanmean(1, keepdim=True)
    slope = (dr * dl).nansum() / (dl * dl).nansum().clamp(min=1e-12)
    return rewards - slope * lengths


def select_top(margins: Tensor, k: int) -> Tensor:
    """argtop-K: int64 (k,) indices of the k largest of (N,) margins, largest first, ties by index.

    Raises ValueError where k is no count in 0..N, or a margin is NaN (it would be sorted as the largest).
    """
    if margins.ndim != 1:
        raise ValueError(f"margins must be (N,), not {tuple(margins.shape)}")
    if not isinstance(k, int) or not 0 <= k <= len(margins):
        raise ValueError(f"k is a count of pairs, 0 to {len(margins)}: cannot keep {k} of them")
    if margins.isnan().any():
        raise ValueError(f"the margin of pair {int(margins.isnan().nonzero()[0])} is NaN")
    return torch.sort(margins, descending=True, stable=True).indices[:k]
