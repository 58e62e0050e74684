"""Four losses, DPO, IPO, SLiC-HF and SimPO, as functions of one number: the margin of a pair.

    m = r(x, y_w) − r(x, y_l)        the reward of the chosen response less that of the rejected one

Each maps (B,) margins to (B,) losses, unreduced. r is the implicit reward, see `implicit_reward`
in logprobs.py: IPO and SimPO take it per token, and SimPO's has no reference. TRL has all four
losses, and the values are TRL's.

β is above 0, and label_smoothing a share, not per cent: nothing here checks it.

Copy this file alone: it needs torch.
From sera_min 0.1.0, Apache-2.0; SeRA, arXiv:2410.09362.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo_loss(margin: Tensor, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """−(1−ε) log σ(βm) − ε log σ(−βm): cross-entropy of the label in a Bradley-Terry model.

    margin: (B,) in nats, of summed rewards. ε = label_smoothing, 0 ≤ ε < ½, is the share of labels
    that are taken to be flipped (cDPO). At m = 0 the loss is ln 2 for every β and ε.
    Source: DPO, arXiv:2305.18290, eq. 7; TRL's `sigmoid`.
    """
    as_labelled = -F.logsigmoid(beta * margin)
    if_flipped = -F.logsigmoid(-beta * margin)
    return (1 - label_smoothing) * as_labelled + label_smoothing * if_flipped


def ipo_loss(margin: Tensor, beta: float = 0.1) -> Tensor:
    """(m − 1/(2β))²: the margin has a finite target, so no label can push it without bound.

    margin: (B,) in nats per token. IPO's formula sums over tokens, but TRL averages, as IPO's
    authors advised, and we follow TRL.
    Source: IPO, arXiv:2310.12036, eq. 17 (its τ is β); TRL's `ipo`.
    """
    return (margin - 1 / (2 * beta)) ** 2


def slic_loss(margin: Tensor, beta: float = 0.1, delta: float = 1.0) -> Tensor:
    """max(0, δ − βm): a hinge, zero once the margin is δ/β nats or more.

    margin: (B,) in nats, of summed rewards against the reference, as in TRL's `hinge` (δ = 1).
    Source: SLiC-HF, arXiv:2305.10425, without the regulariser of that paper, as in TRL.
    """
    return torch.relu(delta - beta * margin)


def simpo_loss(margin: Tensor, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """−log σ(βm − γ): DPO's loss without a reference, per token, with a target margin of γ/β.

    margin: (B,) in nats per token, of rewards log π(y|x)/|y|. This γ is SimPO's own, not the
    ensemble's. The defaults belong together: with another β give γ too (train.py: γ = β/2).
    Source: SimPO, arXiv:2405.14734, eq. 6; `simpo` in TRL's CPOTrainer, with other defaults.
    """
    return -F.logsigmoid(beta * margin - gamma)
