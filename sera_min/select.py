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
    everywhere (but SimPO's, which has no reference: there it is our choice), and a positive factor changes no order.
    Source: SeRA, arXiv:2410.09362, eq. 7; γ = 0.5 is our choice.
    """
    return newest if previous is None else (1 - gamma) * newest + gamma * previous


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
