"""Variants of train.py that are not the paper's: the method with a part exchanged.

    python experiments/variants.py NAME …                                   NAME, then any of train.py's flags
    python experiments/variants.py NAME --resume_from_checkpoint OUT        go on with an interrupted run

    robust              the unbiased loss of arXiv:2403.00409, told the share of flipped labels: --label_smoothing
    length_free         the reward less what a straight line in the length explains of it
    token_floor         samples with a token that is very unlikely under the reference are never paired
    both_remedies       token_floor and length_free together
    random_pairs        which pairs are taken is random: the control
    smallest_margins    the pairs with the smallest margins, as in arXiv:2508.04149
    middle_margins      those in the middle

Everything else is train.py's, and the run's config.json names the variant.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

import train
from sera_min.logprobs import eval_mode, implicit_reward, token_batches, token_logprobs
from sera_min.machinery.config import Config, Resolved, command_line, seed_of
from sera_min.machinery.device import autocast, retry_on_oom
from sera_min.machinery.errors import InputError
from sera_min.machinery.policies import Policies
from sera_min.pairs import Pair, Preferences, Review, Rows
from sera_min.select import select_top
from train import Variant

TOKEN_FLOOR = 0.01  # the share of D's responses whose least likely token is below the floor

# ------------------------------------------------------------------------------- another loss


def robust_loss(margin: Tensor, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """[(1−ε) L(m) − ε L(−m)] / (1−2ε), where L is DPO's loss: an unbiased estimate of L on the right labels.

    If a share ε of the labels is flipped at random, its expected value is that of L on the right labels.
    margin: (B,) in nats, of summed rewards. ε = label_smoothing < ½. Its minimum is −∞ where ε > 0.
    Source: robust DPO, arXiv:2403.00409; TRL's `robust`.
    """
    as_labelled = -F.logsigmoid(beta * margin)
    if_flipped = -F.logsigmoid(-beta * margin)
    return ((1 - label_smoothing) * as_labelled - label_smoothing * if_flipped) / (1 - 2 * label_smoothing)


def robust_pair_losses(policy: Any, pairs: list[Pair], reference: Tensor, config: Resolved) -> tuple[Tensor, Tensor]:
    """`train.pair_losses` with the robust loss. The loss of an evaluation stays DPO's."""
    _losses, logps = train.pair_losses(policy, pairs, reference, config)  # (m, 2)
    r = implicit_reward(logps, reference.to(logps.device))
    return robust_loss(r[:, 0] - r[:, 1], config.beta, config.label_smoothing), logps


def robust() -> Variant:
    return Variant("robust", pair_losses=robust_pair_losses)


# ------------------------------------------------------------------------- a reward without length


def without_length(rewards: Tensor, lengths: Tensor, numbers: list[int]) -> Tensor:
    """r − b·|y|: the part of the rewards that a straight line in the length does not explain.

    rewards (R,) in nats, NaN where there is none; lengths int64 (R,); numbers: rows of one prompt have the same.
    b, in nats a token, is the slope of the least-squares line within prompts: Σ δr·δ|y| / Σ δ|y|², where δ is the
    difference from the prompt's mean. Source: ours. Where labels favour length, so does the reward that was learned
    from them, and the pairs that it selects and makes favour length still more.
    """
    known = ~rewards.isnan()
    group = torch.tensor(numbers, dtype=torch.int64)[known]
    r = rewards[known]
    length = lengths[known].to(r.dtype)
    r_within = r - group_means(r, group)
    length_within = length - group_means(length, group)
    slope = (r_within * length_within).sum() / (length_within**2).sum().clamp(min=1e-12)
    return rewards - slope * lengths


def group_means(values: Tensor, group: Tensor) -> Tensor:
    """Of every row the mean over the rows of its group: (R,), int64 (R,) -> (R,)."""
    groups = max(group.tolist(), default=-1) + 1
    sums = torch.zeros(groups, dtype=values.dtype).index_add(0, group, values)
    counts = torch.zeros(groups, dtype=values.dtype).index_add(0, group, torch.ones_like(values))
    return (sums / counts)[group]


def length_free_reward(t: int, rows: Rows, policies: Policies, config: Resolved) -> Tensor:
    r = train.mean_reward(t, rows, policies, config)
    return without_length(r, rows.lengths, rows.pair_index)


def length_free() -> Variant:
    return Variant("length_free", mean_reward=length_free_reward)


# ---------------------------------------------------------------------------------- a token floor


def least_likely(rows: Rows, policies: Policies, config: Resolved) -> Tensor:
    """min_i log π_ref(y_i|x, y_<i): the log-prob of each response's least likely token, (R,), nats."""
    policy = policies.get(0)
    lengths = [len(x) + len(y) for x, y in zip(rows.prompts, rows.responses)]

    def attempt(max_tokens: int) -> Tensor:
        least = torch.empty(len(lengths))
        for batch in token_batches(lengths, max_tokens):
            prompts = [rows.prompts[i] for i in batch]
            responses = [rows.responses[i] for i in batch]
            logps = token_logprobs(policy, prompts, responses)  # (|y|,) of each response
            least[batch] = torch.stack([of_response.min() for of_response in logps]).cpu()
        return least

    with torch.no_grad(), autocast(config.device), eval_mode(policy):
        return retry_on_oom(attempt, config.max_tokens, max(lengths, default=0))


def floored_reward(given: Preferences, policies: Policies, config: Resolved) -> Callable[..., Tensor]:
    """`train.mean_reward`, NaN for a sample with a token below the floor: such a sample is never paired.

    The floor is the TOKEN_FLOOR quantile of `least_likely` over D's responses. Source: ours. What the reference
    would hardly write, no given pair has taught the reward, so a large reward there means little.
    """
    ascending = least_likely(given.rows, policies, config).sort().values
    floor = ascending[int(TOKEN_FLOOR * len(ascending))]

    def mean_reward(t: int, rows: Rows, policies: Policies, config: Resolved) -> Tensor:
        r = train.mean_reward(t, rows, policies, config)
        if rows is given.rows:
            return r
        likely = least_likely(rows, policies, config) >= floor
        return r.where(likely, math.nan)

    return mean_reward


def with_floor(t: int, given: Preferences, policies: Policies, config: Resolved, variant: Variant) -> Review:
    if t == 1:
        return train.review(t, given, policies, config, variant)
    floored = floored_reward(given, policies, config)
    return train.review(t, given, policies, config, replace(variant, mean_reward=floored))


def token_floor() -> Variant:
    return Variant("token_floor", review=with_floor)


def with_both(t: int, given: Preferences, policies: Policies, config: Resolved, variant: Variant) -> Review:
    """The floor comes first: the line in the length is drawn through the rewards that are left."""
    if t == 1:
        return train.review(t, given, policies, config, variant)
    floored = floored_reward(given, policies, config)

    def mean_reward(t: int, rows: Rows, policies: Policies, config: Resolved) -> Tensor:
        r = floored(t, rows, policies, config)
        return without_length(r, rows.lengths, rows.pair_index)

    return train.review(t, given, policies, config, replace(variant, mean_reward=mean_reward))


def both_remedies() -> Variant:
    return Variant("both_remedies", review=with_both)


# ----------------------------------------------------------------------------- other pairs are taken


def at_random(t: int, given: Preferences, policies: Policies, config: Resolved, variant: Variant) -> Review:
    """`train.review`, where K pairs of D, and K̃ of the bootstrapped ones, are drawn at random."""
    generator = torch.Generator().manual_seed(seed_of(config.seed, t, "random"))

    def select_random(margins: Tensor, k: int) -> Tensor:
        drawn = torch.rand(len(margins), generator=generator)
        return select_top(drawn, k)

    return train.review(t, given, policies, config, replace(variant, select_top=select_random))


def random_pairs() -> Variant:
    return Variant("random_pairs", review=at_random)


def select_smallest(margins: Tensor, k: int) -> Tensor:
    """The k smallest of (N,) margins, smallest first: what arXiv:2508.04149 keeps."""
    return select_top(-margins, k)


def smallest_margins() -> Variant:
    return Variant("smallest_margins", select_top=select_smallest)


def select_middle(margins: Tensor, k: int) -> Tensor:
    """The k in the middle of (N,) margins, largest first."""
    first = (len(margins) - k) // 2
    return select_top(margins, len(margins))[first : first + k]


def middle_margins() -> Variant:
    return Variant("middle_margins", select_top=select_middle)


# ---------------------------------------------------------------------------------- the command line

VARIANTS: dict[str, Callable[[], Variant]] = {
    "robust": robust,
    "length_free": length_free,
    "token_floor": token_floor,
    "both_remedies": both_remedies,
    "random_pairs": random_pairs,
    "smallest_margins": smallest_margins,
    "middle_margins": middle_margins,
}


def make_variant(name: str) -> Variant:
    return VARIANTS[name]()


def check(flags: Config, name: str) -> None:
    """Flags that the variant would not heed. Raises InputError."""
    if flags.resume_from_checkpoint:
        return  # its flags are those that the run began with
    if name == "robust" and flags.loss_type != "dpo":
        raise InputError(f"robust is a variant of DPO's loss, and --loss_type is {flags.loss_type}")
    if name in ("token_floor", "both_remedies") and flags.bootstrap == 0:
        raise InputError(f"{name} is for bootstrapped pairs, and --bootstrap is 0")


def run(name: str, flags: Config) -> None:
    check(flags, name)
    train.main(flags, make_variant(name))


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    name = arguments[0]
    if name not in VARIANTS:
        sys.exit(f"error: {name!r} is no variant: expected one of {', '.join(VARIANTS)}")
    command_line(lambda flags: run(name, flags), __doc__, arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
