"""DPO, robust DPO, IPO, SLiC-HF and SimPO as functions of one number, the implicit reward margin. Needs torch only.

    m = r(x, y_w) − r(x, y_l)        chosen less rejected, (B,), see `implicit_reward` in logprobs.py

Each loss maps (B,) margins to (B,) losses, unreduced. Where TRL has the loss, the values are TRL's.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo_loss(margin: Tensor, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """−(1−ε) log σ(βm) − ε log σ(−βm): cross-entropy of the smoothed label in a Bradley-Terry model of rewards βr.

    margin: (B,) in nats, summed rewards. ε = label_smoothing is the share of labels taken to be flipped (cDPO).
    Source: DPO, arXiv:2305.18290, eq. 7; TRL's `sigmoid`. At m = 0 it is ln 2 for every β and ε.
    """
    return -(1 - label_smoothing) * F.logsigmoid(beta * margin) - label_smoothing * F.logsigmoid(-beta * margin)


def robust_loss(margin: Tensor, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """[(1−ε) L(m) − ε L(−m)] / (1−2ε), where L is DPO's loss: an unbiased estimate of L on the right labels.

    If a share ε of the labels is flipped at random, its expected value is that of L on the right labels.
    margin: (B,) in nats, summed rewards. ε = label_smoothing < ½. Its minimum is −∞ where ε > 0.
    Source: robust DPO, arXiv:2403.00409; TRL's `robust`.
    """
    as_labelled, if_flipped = -F.logsigmoid(beta * margin), -F.logsigmoid(-beta * margin)
    return ((1 - label_smoothing) * as_labelled - label_smoothing * if_flipped) / (1 - 2 * label_smoothing)


def ipo_loss(margin: Tensor, beta: float = 0.1) -> Tensor:
    """(m − 1/(2β))²: regress the margin to a finite target, so that a sure label cannot push it without bound.

    margin: (B,) in nats per token: the paper sums, but TRL asked its authors and averages, and we follow TRL.
    Source: IPO, arXiv:2310.12036, eq. 17 (its τ is β); TRL's `ipo`.
    """
    return (margin - 1 / (2 * beta)) ** 2


def slic_loss(margin: Tensor, beta: float = 0.1, delta: float = 1.0) -> Tensor:
    """max(0, δ − βm): a hinge, silent once the pair is apart by δ/β nats.

    margin: (B,) in nats, summed rewards against the reference, as TRL's `hinge` has it (δ = 1).
    Source: SLiC-HF, arXiv:2305.10425, whose own regulariser is left out, as TRL does.
    """
    return torch.relu(delta - beta * margin)


def simpo_loss(margin: Tensor, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """−log σ(βm − γ): DPO's loss without a reference, on per-token log-probs, with a target margin γ/β.

    margin: (B,) in nats per token, of rewards log π(y|x)/|y|. γ = 1 goes with β = 2: for another β give both, as
    train.py does, whose γ is β/2. Source: SimPO, arXiv:2405.14734, eq. 6; TRL's `simpo`.
    """
    return F.logsigmoid(beta * margin - gamma).neg()


class Loss(NamedTuple):
    """A loss and the implicit reward whose margin it is a function of. Training and review both read it here."""

    function: Callable[..., Tensor]
    beta: float  # its default
    per_token: bool  # True: r is divided by the response's length
    against_reference: bool  # True: r = log π_θ − log π_ref; False: r = log π_θ alone


LOSSES = {
    "dpo": Loss(dpo_loss, beta=0.1, per_token=False, against_reference=True),
    "robust": Loss(robust_loss, beta=0.1, per_token=False, against_reference=True),
    "ipo": Loss(ipo_loss, beta=0.1, per_token=True, against_reference=True),
    "slic": Loss(slic_loss, beta=0.1, per_token=False, against_reference=True),
    "simpo": Loss(simpo_loss, beta=2.0, per_token=True, against_reference=False),
}
