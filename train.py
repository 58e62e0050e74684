"""SeRA: Self-Reviewing and Alignment (Ko et al., arXiv:2410.09362), on one GPU. Without arguments: the playground.

Given preferences D = {(x, y_w, y_l)}, a reference π_ref (the SFT model) and a loss of the margin m:
     r_i(x,y) = log π_θi(y|x) − log π_ref(y|x)              the implicit reward      logprobs.py
     m        = r(x,y_w) − r(x,y_l)                         its margin               margins_of
     loss     = a function of m: DPO, IPO, SLiC or SimPO                             losses.py
  1. train π_θ1 on all of D, from π_ref.
  2. for t = 2 … T:
  3.     r̄_t = (1−γ) r_{t−1} + γ r_{t−2}                    at t = 2 it is r_1       select.py
  4.     select the K pairs of D with the largest margin under r̄_t
  5.     sample N responses to the prompt of every pair of D, from π_θ(t−1);
         the best and the worst of the N under r̄_t are a pair                        bootstrap.py
  6.     of these pairs take the K̃ with the largest margin
  7.     train π_θt on both, from π_θ(t−1), against the same π_ref.

Choices of ours, where the paper is silent or was not known to us:
  1. The form of step 3, and that step 4 takes the K largest margins, always from all of D.
  2. T = 3, K = 0.7·|D|, K̃ = 0.3·|D|, N = 4, γ = 0.5; samples are drawn at temperature 1.
  3. One epoch an iteration: fresh AdamW without weight decay, 10 % warm-up, linear decay,
     gradients clipped to norm 1.
  4. IPO's and SimPO's reward is per token, as in TRL; SimPO's target margin is ½.
     The review ranks with the same reward that the loss is defined on.
  5. Samples that were cut off by the length limit are never paired; of identical ones only the first is.
Plain training, the baseline, is `--keep 1 --bootstrap 0`. Variants are in experiments/variants.py.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sera_min import playground
from sera_min.bootstrap import best_worst_pairs, ended_responses
from sera_min.logprobs import implicit_reward, sequence_logprobs, token_batches
from sera_min.losses import dpo_loss, ipo_loss, simpo_loss, slic_loss
from sera_min.machinery.config import Config, Resolved, command_line, seed_of
from sera_min.machinery.device import autocast, halve_if_out_of_memory
from sera_min.machinery.errors import format_counts
from sera_min.machinery.policies import Policies
from sera_min.machinery.run import Run, open_run
from sera_min.pairs import Pair, Preferences, Review, Rows, Samples, TrainingSet, padded_tokens, rows_of
from sera_min.select import ensemble_margin, select_top

# ---------------------------------------------------------------------------- reward and loss


def reward(logps: Tensor, reference: Tensor, lengths: Tensor, config: Resolved) -> Tensor:
    """The implicit reward that goes with the loss in use: nats, or nats per token. All of one shape."""
    if config.loss_type == "simpo":
        return logps / lengths
    if config.loss_type == "ipo":
        return implicit_reward(logps, reference, lengths)
    return implicit_reward(logps, reference)


def margins_of(r: Tensor) -> Tensor:
    """Rewards (n, 2) of chosen and rejected responses -> their margins (n,)."""
    return r[:, 0] - r[:, 1]


def loss_of(margins: Tensor, config: Resolved) -> Tensor:
    """(n,) margins -> (n,) losses."""
    if config.loss_type == "dpo":
        return dpo_loss(margins, config.beta, config.label_smoothing)
    if config.loss_type == "ipo":
        return ipo_loss(margins, config.beta)
    if config.loss_type == "slic":
        return slic_loss(margins, config.beta)
    return simpo_loss(margins, config.beta, gamma=config.beta / 2)


# ------------------------------------------------------------------ the review, steps 3 to 6
#
# policies.log_prob(i, rows) is log π_θi(y|x) of R rows, (R,), computed once; π_θ0 is the reference, and
# older policies are read from disk.
# policies.sample(i, prompts, n, seed) draws n responses to each prompt from π_θi.
# config has every flag, with defaults filled in.
# variant.f is the function `f` of this file or of its imports, unless an experiment has replaced it
# (class Variant, below).


def mean_reward(t: int, rows: Rows, policies: Policies, config: Resolved) -> Tensor:
    """Step 3: r̄_t(x,y) of R rows, (R,)."""
    newest = policies.log_prob(t - 1, rows)
    reference = policies.log_prob(0, rows)
    r_newest = reward(newest, reference, rows.lengths, config)
    r_previous = None  # at t = 2 there is no other
    if t > 2:
        previous = policies.log_prob(t - 2, rows)
        r_previous = reward(previous, reference, rows.lengths, config)
    return ensemble_margin(r_newest, r_previous, config.ensemble_gamma)


def select(
    t: int, given: Preferences, policies: Policies, config: Resolved, variant: "Variant"
) -> tuple[TrainingSet, TrainingSet]:
    """Step 4: the K given pairs with the largest margin; and the others, smallest first."""
    r_bar = variant.mean_reward(t, given.rows, policies, config)  # (2|D|,): chosen, rejected, …
    margins = margins_of(r_bar.view(-1, 2))  # (|D|,)
    kept = variant.select_top(margins, round(config.keep * len(margins)))  # (K,)

    ascending = margins.argsort(stable=True)
    others = ascending[~torch.isin(ascending, kept)]  # (|D| − K,)
    reference = policies.log_prob(0, given.rows)  # (2|D|,)
    selected = given.subset(kept, margins, reference)
    return selected, given.subset(others, margins, reference)


def bootstrap(
    t: int, given: Preferences, policies: Policies, config: Resolved, variant: "Variant"
) -> tuple[TrainingSet, Samples, Tensor]:
    """Steps 5 and 6: of the pairs that the policy writes and ranks itself, the K̃ with the largest margin.

    Also returns all samples, and the rewards r̄_t of those that ended.
    """
    prompts = [pair.prompt for pair in given.pairs]  # prompt i is that of pair i
    seed = seed_of(config.seed, t, "samples")
    samples = policies.sample(t - 1, prompts, config.samples_per_prompt, seed)  # of each prompt N (ids, ended)

    # A sample that was cut off is only the beginning of a response: it is left out.
    prompt_of, responses, cut_off = ended_responses(samples)  # R rows
    rows = Rows([prompts[i] for i in prompt_of], responses, pair_index=prompt_of)
    r_bar = variant.mean_reward(t, rows, policies, config)  # (R,)

    best, worst, dropped = variant.best_worst_pairs(prompt_of, responses, r_bar)  # rows, (P,)
    margins = r_bar[best] - r_bar[worst]  # (P,)
    wanted = round(config.bootstrap * len(prompts))
    top = variant.select_top(margins, min(wanted, len(margins)))  # (K̃,)

    # Prompts of which no sample ended never reached best_worst_pairs.
    dropped["prompts without a pair"] += len(prompts) - len(set(prompt_of))
    counts = Counter({"cut-off samples": cut_off}) + dropped
    print(f"iteration {t}: {len(top)} of {wanted} bootstrapped pairs;", end=" ")
    print(f"dropped: {format_counts(counts)}")
    if cut_off > len(responses):
        limit = f"--max_new_tokens {config.max_new_tokens}"
        print(f"most samples reach {limit} without an end, and cannot be paired: a larger one helps")

    reference = policies.log_prob(0, rows)  # (R,)
    bootstrapped = rows.paired(best[top], worst[top], margins[top], reference)
    return bootstrapped, samples, r_bar


def review(t: int, given: Preferences, policies: Policies, config: Resolved, variant: "Variant") -> Review:
    """What π_θt is trained on: at t = 1 all of D, then what steps 3 to 6 make of it."""
    if t == 1:
        everything = torch.arange(len(given.pairs))
        no_margins = torch.zeros(len(given.pairs))
        return Review(given.subset(everything, no_margins, policies.log_prob(0, given.rows)))
    selected, others = select(t, given, policies, config, variant)
    if round(config.bootstrap * len(given.pairs)) == 0:
        return Review(selected, others)
    bootstrapped, samples, rewards = bootstrap(t, given, policies, config, variant)
    return Review(selected.and_also(bootstrapped), others, samples, rewards)


# --------------------------------------------------------------------- training, steps 1 and 7


def pair_losses(policy: Any, pairs: list[Pair], reference: Tensor, config: Resolved) -> tuple[Tensor, Tensor]:
    """The losses (n,) of n pairs, with gradients; and log π_θ of their responses, (n, 2).

    reference: (n, 2), log π_ref of chosen and rejected.
    """
    prompts, responses = rows_of(pairs)  # 2n rows: chosen, rejected, …
    with autocast(config.device):
        logps, lengths = sequence_logprobs(policy, prompts, responses)  # (2n,)
    logps = logps.view(-1, 2)  # (n, 2)
    r = reward(logps, reference.to(logps.device, non_blocking=True), lengths.view(-1, 2), config)
    return loss_of(margins_of(r), config), logps


# Where the GPU's memory runs out, gradients are cleared and the step is taken again in smaller micro-batches.
@halve_if_out_of_memory
def train_step(
    policy: Any,
    optimizer: torch.optim.Optimizer,
    pairs: list[Pair],
    reference: Tensor,
    config: Resolved,
    variant: "Variant",
) -> dict[str, Any]:
    """One optimizer step on the mean loss of b pairs, in micro-batches of `max_tokens` tokens.

    reference: (b, 2), log π_ref of chosen and rejected, on the CPU, nats. Returns what is logged: means over
    the pairs, the gradient's norm, and under "losses" each pair's loss.
    """
    b = len(pairs)
    losses = torch.empty(b)
    logps = torch.empty(b, 2)
    tokens = [padded_tokens(pair) for pair in pairs]
    for part in token_batches(tokens, config.max_tokens):  # of pairs, not rows
        micro_batch = [pairs[i] for i in part]
        loss, logp = variant.pair_losses(policy, micro_batch, reference[part], config)
        (loss.sum() / b).backward()
        losses[part] = loss.detach().cpu()
        logps[part] = logp.detach().cpu()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()

    lengths = torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
    r = reward(logps, reference, lengths, config)  # (b, 2)
    return summary(losses, r, config) | {
        "rewards/chosen": config.beta * r[:, 0].mean().item(),
        "rewards/rejected": config.beta * r[:, 1].mean().item(),
        "logps/chosen": logps[:, 0].mean().item(),
        "logps/rejected": logps[:, 1].mean().item(),
        "grad_norm": norm.item(),
        "losses": losses.tolist(),  # to name the pair whose loss is not a number
    }


def train(t: int, data: TrainingSet, run: Run, config: Resolved, variant: "Variant") -> None:
    """π_θ(t−1) becomes π_θt, which is saved."""
    policy = run.policies.get(t - 1)
    run.policies.forget()  # this copy is changed in place; π_θ(t−1) stays on disk
    policy.train()  # gradient checkpointing needs it; dropout was removed when the model was read
    # With LoRA only its matrices have gradients, and change.
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)
    batches = variant.batches_of(len(data.pairs), t, config)
    # If there is a checkpoint, as after a kill, run.steps first loads it, and then yields the steps that remain.
    for step, batch in run.steps(t, batches, policy, optimizer):
        rate = learning_rate(step, len(batches), config)
        optimizer.param_groups[0]["lr"] = rate
        pairs = [data.pairs[i] for i in batch]
        metrics = train_step(policy, optimizer, pairs, data.reference[batch], config, variant)
        run.log_step(t, step, batch, {"learning_rate": rate, **metrics})
    run.policies.save(t, policy)


def learning_rate(step: int, steps: int, config: Resolved) -> float:
    """Up for a tenth of the steps, then down; the first step is number 1."""
    warm_up = math.ceil(0.1 * steps)
    rising = step / warm_up
    falling = (steps - step + 1) / (steps - warm_up + 1)
    return config.learning_rate * min(rising, falling)


def batches_of(n: int, t: int, config: Resolved) -> list[list[int]]:
    """The indices of every step's pairs: epoch after epoch, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed_of(config.seed, t, "order"))
    batches = []
    for _ in range(config.epochs_per_iteration):
        order = torch.randperm(n, generator=generator)
        for batch in order.split(config.per_device_train_batch_size):
            batches.append(batch.tolist())
    return batches


# ---------------------------------------------------------------------------------- evaluation


def summary(losses: Tensor, r: Tensor, config: Resolved) -> dict[str, float]:
    """Means over pairs, of losses (b,) and rewards (b, 2), by TRL's names; a tie is half right."""
    margins = margins_of(r)
    right = (margins > 0).float() + 0.5 * (margins == 0)
    return {
        "loss": losses.mean().item(),
        "rewards/accuracies": right.mean().item(),
        "rewards/margins": config.beta * margins.mean().item(),
    }


def evaluate(t: int, run: Run, config: Resolved) -> dict[str, Any]:
    """π_θt on the evaluation pairs, and its answers to the evaluation prompts."""
    policies = run.policies
    metrics = {}
    if run.held_out.pairs:
        rows = run.held_out.rows
        logps = policies.log_prob(t, rows)
        r = reward(logps, policies.log_prob(0, rows), rows.lengths, config).view(-1, 2)
        losses = loss_of(margins_of(r), config)
        for name, value in summary(losses, r, config).items():
            metrics[f"eval_{name}"] = value

    seed = seed_of(config.seed, t, "answers")
    answers = []
    for of_prompt in policies.sample(t, run.prompts, 1, seed):
        ids, _ended = of_prompt[0]
        answers.append(ids)
    answered = Rows(run.prompts, answers)
    # Its mean over y ~ π_θ estimates KL(π_θ ‖ π_ref), if temperature and top_p are 1.
    log_ratio = policies.log_prob(t, answered) - policies.log_prob(0, answered)
    metrics["kl"] = log_ratio.mean().item()
    # Writes answers.jsonl. Also returns counts of the iteration's pairs and, in the playground, true rewards.
    return metrics | run.write_answers(t, answers)


# ------------------------------------------------------------------------------------ the loop


@dataclass(frozen=True)
class Variant:
    """The functions that a variant of the method may replace; these are SeRA's own."""

    name: str = "SeRA"
    mean_reward: Callable[..., Tensor] = mean_reward
    select_top: Callable[..., Tensor] = select_top
    best_worst_pairs: Callable[..., tuple] = best_worst_pairs
    pair_losses: Callable[..., tuple[Tensor, Tensor]] = pair_losses
    review: Callable[..., Review] = review
    batches_of: Callable[..., list[list[int]]] = batches_of
    evaluate: Callable[..., dict[str, Any]] = evaluate
    world: Any = playground  # where prompts, pairs and π_ref come from if the user gives none
    report: bool = True  # whether report.md and figures are written


SERA = Variant()


def main(flags: Config, variant: Variant = SERA) -> dict[str, Any]:
    """Run it all. Returns the last evaluation, which is the last line of metrics.jsonl."""
    with open_run(flags, variant) as run:
        config, policies = run.config, run.policies
        if config.loss_type != "simpo" and policies.newest() == 0:
            at_zero = loss_of(torch.zeros(1), config).item()
            print(f"iteration 1 should begin at a loss of {at_zero:.4f}: all margins are 0")
        for t in range(config.iterations + 1):
            if t > policies.newest():  # π_θt is not on disk yet; π_θ0 always is
                # After an interruption a review is repeated, from log-probs and samples that are on disk.
                reviewed = variant.review(t, run.given, policies, config, variant)
                run.write_review(t, reviewed)  # pairs.jsonl and others, to be read by people
                train(t, reviewed.training_set, run, config, variant)
            # After a resume the evaluation of a finished iteration is made again from files, and not logged twice.
            evaluation = run.log_evaluation(t, variant.evaluate(t, run, config))
        run.finish()
    return evaluation


if __name__ == "__main__":
    command_line(main, __doc__)
