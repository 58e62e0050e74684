"""Self-reviewing: which pairs the policy itself finds least ambiguous. Copy this file alone: torch only.

    r̄_t = (1−γ)·r_{t−1} + γ·r_{t−2}             SeRA, arXiv:2410.09362, eq. 7: rewards of the last two policies
    m̄_t = r̄_t(x, y_w) − r̄_t(x, y_l)             the implicit reward margin (IRM) of a pair
    keep the K pairs with the largest m̄_t

A large margin means that both policies already prefer y_w clearly: a label they learnt from the other pairs too.
A flipped label has to be memorised against those, so its margin is small or negative, and it goes.
"""

import torch
from torch import Tensor


def ensemble_margin(newest: Tensor, previous: Tensor | None = None, gamma: float = 0.5) -> Tensor:
    """(1−γ)·newest + γ·previous, of margins or, since it is linear, of rewards; any one shape, in nats.

    newest: under π_θ(t−1). previous: under π_θ(t−2); None at t = 2, where π_θ(t−2) = π_ref, whose reward is 0
    everywhere (but SimPO's, which has no reference: there it is our choice): the newest orders alone, whatever γ.
    Source: SeRA, arXiv:2410.09362, eq. 7; γ = 0.5 is our choice.
    """
    return newest if previous is None else (1 - gamma) * newest + gamma * previous


def length_free(rewards: Tensor, lengths: Tensor) -> Tensor:
    """r − b·|y|: the rewards less what a straight line through them explains by length alone. Not the paper's: ours.

    rewards: float (P, n) in nats, n responses to each of P prompts, NaN where there is none; lengths: int (P, n).
    b is the slope, in nats a token, of the least-squares line within prompts: Σ δr·δ|y| / Σ δ|y|², where δ is the
    difference from the prompt's mean. A bias for length is shared by labels and samples alike, so no margin shows it.
    """
    counted = lengths.where(~rewards.isnan(), torch.nan)  # (P, n)
    dr, dl = (v - v.nanmean(1, keepdim=True) for v in (rewards, counted))
    slope = (dr * dl).nansum() / (dl * dl).nansum().clamp(min=1e-12)
    return rewards - slope * lengths


def select_top(margins: Tensor, k: int) -> Tensor:
    """argtop-K: int64 (k,) indices of the k largest of (N,) margins, largest first, ties by index.

    Raises ValueError where k is not in 0..N or a margin is NaN (a NaN sorts first: it would be the best pair of all).
    Source: SeRA, arXiv:2410.09362; K = 0.7·|D| is our choice.
    """
    if margins.ndim != 1:
        raise ValueError(f"margins must be (N,), not {tuple(margins.shape)}")
    if not 0 <= k <= len(margins):
        raise ValueError(f"cannot keep {k} of {len(margins)} pairs")
    if margins.isnan().any():
        raise ValueError(f"the margin of pair {int(margins.isnan().nonzero()[0])} is NaN")
    return torch.sort(margins, descending=True, stable=True).indices[:k]
