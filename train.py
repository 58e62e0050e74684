"""SeRA: Self-Reviewing and Alignment (Ko et al., arXiv:2410.09362), on one GPU. Without arguments: the playground.

The algorithm, for preferences D = {(x, y_w, y_l)}, a reference π_ref (the SFT model) and a loss of the margin m:
     r_t(x,y) = log π_θt(y|x) − log π_ref(y|x)                 the implicit reward                   logprobs.py
     m        = r(x,y_w) − r(x,y_l)                            its margin; the loss is a function of it, losses.py
  1. train π_θ1 on all of D, from π_ref.
  2. for t = 2 … T:
  3.     r̄_t = (1−γ) r_{t−1} + γ r_{t−2}                       the mean reward of two policies       select.py
  4.     select the K pairs of D with the largest margin under r̄_t
  5.     sample N responses to each pair's prompt from π_θ(t−1); best and worst under r̄_t are a pair  bootstrap.py
  6.     keep the K̃ of these pairs with the largest margin
  7.     train π_θt on the union, from π_θ(t−1), against the same π_ref.

Choices of ours, where the paper is silent or was not known to us:
  1. The form of step 3 (at t = 2 only r_1), the K largest margins of step 4, always from all of D, and step 7.
  2. T = 3, K = 0.7·|D|, K̃ = 0.3·|D|, N = 4, γ = 0.5, sampling at temperature 1 from the whole distribution.
  3. One epoch an iteration: fresh AdamW without weight decay, 10 % warm-up, linear decay, gradients clipped to norm 1.
  4. IPO's and SimPO's reward is per token, as in TRL; SimPO's γ is half its β. The review uses the loss's reward.
  5. Samples that were cut off by the length limit, or repeat another, are never paired.
  6. `--select random`: which pairs are kept is random, the control. `--keep 1 --bootstrap 0` is plain training.
  7. Two remedies that are not the paper's, off unless asked for: `--length_free` and `--token_floor`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sera_min import folder, playground, report
from sera_min.bootstrap import best_worst_pairs
from sera_min.compute import amp, retry_on_oom, take_step
from sera_min.config import Config, Resolved, command_line, seed_of
from sera_min.files import in_one_line
from sera_min.logprobs import implicit_reward, sequence_logprobs, token_batches
from sera_min.losses import LOSSES
from sera_min.pairs import Ids, Pair, Review, Samples, TrainingSet, format_counts, lengths_of, rows_of, tokens_of
from sera_min.prepare import opened
from sera_min.run import Run, batches_of
from sera_min.select import ensemble_margin, length_free, select_top


def reward_of(logps: Tensor, reference: Tensor, lengths: Tensor, config: Resolved) -> Tensor:
    """The implicit reward that goes with the loss in use, see losses.py; all of one shape."""
    loss, nothing = LOSSES[config.loss_type], torch.zeros_like(reference)
    return implicit_reward(logps, reference if loss.against_reference else nothing, lengths if loss.per_token else None)


def pair_losses(r: Tensor, config: Resolved) -> Tensor:  # (N, 2) -> (N,)
    margin, loss = r[:, 0] - r[:, 1], LOSSES[config.loss_type].function
    if config.loss_type in ("dpo", "robust"):
        return loss(margin, config.beta, label_smoothing=config.label_smoothing)
    if config.loss_type == "simpo":
        return loss(margin, config.beta, gamma=0.5 * config.beta)
    return loss(margin, config.beta)


def all_pairs(run: Run) -> Review:
    """What π_θ1 is trained on, step 1: all of D, of which nothing is left out."""
    reference = run.log_prob(0, *rows_of(run.offline), "pairs")[:, 0].view(-1, 2)  # (2|D|,) -> (|D|, 2)
    return Review(TrainingSet.given(run.offline, reference, torch.zeros(len(reference)), list(range(len(reference)))))


def review(t: int, offline: list[Pair], log_prob: Callable, sample: Callable, config: Resolved) -> Review:
    """Steps 3 to 6: the TrainingSet of π_θt, the given pairs that it leaves out, and the samples that it used.

    log_prob(i, prompts, responses, what): log π_θi(y|x) and the log-prob of its least likely token, (R, 2); i = 0 is
    the reference. `what` is the name of these rows: what was computed under a name is read, not computed again.
    sample(i, prompts): n samples (token ids, ended) of each prompt, from π_θi. How both are computed is the caller's.
    """
    generator = torch.Generator().manual_seed(seed_of(config.seed, t, "random"))

    def reward(prompts: list[Ids], responses: list[Ids], what: str) -> tuple[Tensor, Tensor, Tensor]:
        """r̄_t(x,y), log π_ref(y|x), and the log-prob under π_ref of y's least likely token: (R,) each."""
        reference, least_likely = log_prob(0, prompts, responses, what).unbind(-1)
        lengths = torch.tensor([len(y) for y in responses])
        newest, *older = [reward_of(log_prob(i, prompts, responses, what)[:, 0], reference, lengths, config)
                          for i in (t - 1, t - 2) if i > 0]  # at t = 2 there is no older one  # fmt: skip
        return ensemble_margin(newest, older[0] if older else None, config.ensemble_gamma), reference, least_likely

    def pick(margins: Tensor, k: int) -> list[int]:
        by = margins if config.select == "margin" else torch.rand(len(margins), generator=generator)
        return select_top(by, min(k, len(margins))).tolist()

    # Self-review: of the given pairs, the K with the largest margin.
    r, reference, least_likely = reward(*rows_of(offline), "pairs")  # (2|D|,)
    r, reference = r.view(-1, 2), reference.view(-1, 2)  # (|D|, 2): chosen, rejected
    if config.length_free:
        r = length_free(r, lengths_of(offline))
    margins = r[:, 0] - r[:, 1]  # (|D|,)
    kept = pick(margins, round(config.keep * len(offline)))
    left_out = sorted({*range(len(offline))} - {*kept}, key=lambda i: margins[i].item())  # smallest margin first
    selected, dropped = (TrainingSet.given(offline, reference, margins, numbers) for numbers in (kept, left_out))
    if (wanted := round(config.bootstrap * len(offline))) == 0:  # K̃
        return Review(selected, dropped)

    # Bootstrapping: sample, rank by the same reward, best against worst; of these pairs the K̃ with the largest margin.
    # --token_floor: a quantile of the log-prob, under π_ref, of the least likely token of D's responses
    floor = least_likely.sort().values[int(config.token_floor * len(least_likely))] if config.token_floor else -math.inf
    samples = rank_samples(t, [pair.prompt for pair in offline], sample, reward, floor, config)
    bootstrapped, counts = pair_samples(offline, samples, pick, wanted)
    print(f"iteration {t}: {len(bootstrapped.pairs)} of {wanted} bootstrapped pairs; dropped:", format_counts(counts))
    return Review(selected.union(bootstrapped), dropped, samples)


def rank_samples(t: int, prompts: list[Ids], sample: Callable, reward: Callable, floor, config: Resolved) -> Samples:
    """n samples of each of P prompts from π_θ(t−1), with the rewards (P, n) that rank them."""
    written = sample(t - 1, prompts)
    responses = [[y for y, _ in row] for row in written]
    ended = torch.tensor([[end for _, end in row] for row in written])  # (P, n): only those that ended are scored
    x = [prompt for prompt, row in zip(prompts, written) for _, end in row if end]
    y = [y for row in written for y, end in row if end]
    r, reference, least_likely = (torch.full(ended.shape, math.nan) for _ in range(3))  # (P, n)
    r[ended], reference[ended], least_likely[ended] = reward(x, y, f"samples-{t}")
    usable = ended & (least_likely >= floor)
    r = r.where(usable, math.nan)
    if config.length_free:
        r = length_free(r, torch.tensor([[len(y) for y in row] for row in responses]))
    return Samples(responses, ended, usable, r, reference)


def pair_samples(offline: list[Pair], samples: Samples, pick: Callable, wanted: int) -> tuple[TrainingSet, Any]:
    """Best against worst, and of these pairs those that are picked; and what was dropped."""
    rewards, ended, usable = samples.rewards.tolist(), samples.ended.tolist(), samples.usable.tolist()
    triples, margins, counts = best_worst_pairs(rewards, ended, samples.responses, usable)
    taken = pick(margins, wanted)
    return TrainingSet.bootstrapped(offline, samples, [triples[p] for p in taken], margins[taken]), counts


def train_step(
    policy: Any, optimizer: Any, training_set: TrainingSet, batch: list[int], config: Resolved, max_tokens: int
) -> dict[str, float]:
    """One optimizer step on the mean loss of the b pairs numbered `batch`; what came of it, by TRL's names.

    In micro-batches of `max_tokens` tokens: the mean is the same. Raises FloatingPointError where it is not finite.
    """
    optimizer.zero_grad()
    pairs, reference, b = [training_set.pairs[i] for i in batch], training_set.reference[batch], len(batch)
    r, logps = torch.empty(2, b, 2)  # (b, 2) each, as reference: chosen, rejected
    for some in token_batches([tokens_of(pair) for pair in pairs], max_tokens):
        r[some], logps[some] = backward(policy, [pairs[i] for i in some], reference[some], b, config, max_tokens)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item()
    losses = pair_losses(r, config)  # (b,)
    if not (losses.isfinite().all() and math.isfinite(norm)):
        lines = [i + 1 for i, loss in zip(batch, losses) if not loss.isfinite()] or [i + 1 for i in batch]
        raise FloatingPointError(f"pairs.jsonl lines {lines}: the loss is {losses.mean():.3g}, its gradient {norm:.3g}")
    take_step(optimizer)
    return {**report.preference_metrics(losses, r, config.beta), **report.means("rewards", config.beta * r),
            **report.means("logps", logps), "grad_norm": norm}  # fmt: skip


def backward(policy, pairs: list[Pair], reference: Tensor, b: int, config: Resolved, max_tokens: int) -> list[Tensor]:
    """Adds the gradient of the losses of m pairs of a batch of b. Returns their rewards and log π(y|x), (m, 2) each."""
    x, y = rows_of(pairs)  # 2m rows: chosen, rejected, chosen, …
    # For speed, in passes of rows of like length, a quarter of the tokens each: there is little padding.
    passes = token_batches([len(prompt) + len(response) for prompt, response in zip(x, y)], max_tokens // 4)
    with amp(config.device), in_one_line("the model fails"):
        sums = [sequence_logprobs(policy, [x[i] for i in rows], [y[i] for i in rows])[0] for rows in passes]
    by_length = torch.cat(sums).detach().requires_grad_()  # (2m,), a leaf: the gradient of the losses ends here
    order = torch.tensor([i for rows in passes for i in rows]).argsort()  # back from the order of the passes
    logps = by_length[order].view(-1, 2)  # (2m,) -> (m, 2)
    r = reward_of(logps, reference.to(logps.device), lengths_of(pairs).to(logps.device), config)
    (pair_losses(r, config).sum() / b).backward()  # d loss / d log π(y|x), into by_length.grad
    for one, gradient in zip(sums, by_length.grad.split([len(rows) for rows in passes])):  # type: ignore[union-attr]
        one.backward(gradient)  # through the model: of each pass before the next, so that one is in memory
    return [r.detach().cpu(), logps.detach().cpu()]


@report.timed("training")
def train(run: Run, t: int, training_set: TrainingSet) -> None:
    """π_θt, from π_θ(t−1) or from a checkpoint of this iteration. Done when policy-<t>/ exists."""
    config, max_tokens = run.config, run.config.max_tokens
    batches = batches_of(len(training_set.pairs), t, config)
    policy, saved = run.policies.to_train(t)
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
    first, lines, warm_up = saved.get("step", 0), saved.get("lines", []), math.ceil(0.1 * len(batches))
    report.log(run.out, *lines)
    bar = tqdm(batches[first:], f"iteration {t}: train", initial=first, total=len(batches), unit="step")
    with folder.stop_after_step() as signals:
        for step, batch in enumerate(bar, first + 1):
            rate = config.learning_rate * min(step / warm_up, (len(batches) - step + 1) / (len(batches) - warm_up + 1))
            optimizer.param_groups[0]["lr"] = rate  # up for a tenth of the steps, then down
            attempt = partial(train_step, policy, optimizer, training_set, batch, config)
            longest = max(tokens_of(training_set.pairs[i]) for i in batch)
            metrics, max_tokens = retry_on_oom(attempt, max_tokens, longest, f"iteration {t}, step {step}, ")
            lines.append({"phase": "train", "iteration": t, "step": step, "learning_rate": rate, **metrics})
            report.log(run.out, lines[-1])
            bar.set_postfix_str(report.POSTFIX.format_map(metrics))
            if signals or (step % config.save_steps == 0 and step < len(batches)):
                folder.save_checkpoint(run.out, t, step, policy, run.tokenizer, lines, optimizer)
            if signals:
                raise KeyboardInterrupt
    folder.write_jsonl(run.out / "state" / f"steps-{t}.jsonl", lines)
    run.policies.put(t, policy, run.tokenizer)


def evaluate(run: Run, t: int) -> dict[str, Any]:
    """A line of metrics.jsonl: π_θt on the evaluation pairs, and its answers against those of the SFT policy."""
    config = run.config
    line: dict[str, Any] = {"phase": "final" if t == config.iterations else "eval", "iteration": t}
    if run.held_out:
        logps, reference = (run.log_prob(i, *rows_of(run.held_out), "evaluation pairs")[:, 0] for i in (t, 0))  # (2N,)
        r = reward_of(logps.view(-1, 2), reference.view(-1, 2), lengths_of(run.held_out), config)  # (N, 2)
        metrics = report.preference_metrics(pair_losses(r, config), r, config.beta)
        line |= {f"eval_{name}": value for name, value in metrics.items()}
    before = run.answer(0, run.eval_prompts, "reference answers")  # drawn at t = 0, read later
    answers = run.answer(t, run.eval_prompts, "answers")
    # KL(π_θ ‖ π_ref), the mean over y ~ π_θ: of these answers an estimate, at --temperature 1 and --top_p 1
    logps, reference = (run.log_prob(i, run.eval_prompts, answers, f"answers-{t}")[:, 0] for i in (t, 0))  # (N,)
    line["kl"] = (logps - reference).mean().item()
    texts = run.write_answers(t, before, answers)
    if config.in_playground:
        line |= playground.judge(*texts)
    return line | run.count_pairs(t)


def iterate(run: Run, t: int) -> dict[str, Any]:
    """One iteration and its evaluation, a line of metrics.jsonl; t = 0 only evaluates. What is done is read."""
    with report.timed(f"iteration {t}"):
        if t > run.policies.newest():  # π_θt is not there yet
            reviewed = all_pairs(run) if t == 1 else review(t, run.offline, run.log_prob, run.sample, run.config)
            run.write_review(t, reviewed)
            train(run, t, reviewed.training_set)
        elif t > 0:
            report.log(run.out, *folder.read_jsonl(run.out / "state" / f"steps-{t}.jsonl"))
        line = folder.phase(run.out, f"evaluation-{t}", partial(evaluate, run, t))
        report.log(run.out, line)
    return line


def main(flags: Config) -> dict[str, Any]:
    """Run it all; returns the last evaluation, the line of metrics.jsonl whose phase is "final"."""
    with opened(flags) as run:
        print(f"check: at margin 0 the loss is {pair_losses(torch.zeros(1, 2), run.config).item():.4f}")
        for t in range(run.config.iterations + 1):
            evaluation = iterate(run, t)
        run.finish()
    return evaluation


if __name__ == "__main__":
    command_line(main, __doc__)
