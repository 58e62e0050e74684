"""SeRA: Self-Reviewing and Alignment (Ko et al., arXiv:2410.09362), on one GPU. Without arguments: the playground.

The algorithm, for preferences D = {(x, y_w, y_l)}, a reference π_ref (the SFT model) and a loss of the margin m:
     r_t(x,y) = log π_θt(y|x) − log π_ref(y|x)                 the implicit reward                   logprobs.py
     m        = r(x,y_w) − r(x,y_l)                            its margin; the loss is a function of it, losses.py
  1. train π_θ1 on all of D, from π_ref.
  2. for t = 2 … T:
  3.     r̄_t = (1−γ) r_{t−1} + γ r_{t−2}                       the reward of two policies            select.py
  4.     select the K pairs of D with the largest margin under r̄_t
  5.     for each prompt sample N responses from π_θ(t−1): best and worst under r̄_t are a pair        bootstrap.py
  6.     keep the K̃ of these pairs with the largest margin
  7.     train π_θt on the union, from π_θ(t−1), against the same π_ref.

Choices of ours, where the paper is silent or was not known to us:
  1. T = 3, K = 0.7·|D|, K̃ = 0.3·|D|, N = 4, γ = 0.5, sampling at temperature 1 from the whole distribution.
  2. One epoch an iteration, warm start from the previous policy, a fresh AdamW without weight decay, and a linear
     schedule with 10 % warm-up for every iteration; gradient norms are clipped at 1.
  3. IPO's reward is per token, as in TRL; SimPO's is per token and without reference. Selection and bootstrapping
     use the reward of the loss in use. SimPO's γ is half its β: a target margin of 0.5 nats a token.
     At t = 2 only θ_1's reward counts, though SimPO's reward of π_ref, being without reference, is not 0.
  4. Samples cut off by the length limit are never paired, identical ones neither.
  5. `--select random` takes random pairs, offline and bootstrapped: the control.
     `--keep 1 --bootstrap 0` is the loss alone: as many steps on all of D, whose margins are still told.
  6. Every pair's prompt is sampled for, so a prompt that D holds twice is sampled for twice.
  7. Two remedies that are not the paper's, off unless asked for: `--length_free`, rewards less what a response's
     length explains, and `--token_floor`, no own pairs of text that the reference finds too unlikely.
"""

import json
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import HfArgumentParser

from sera_min import bootstrap, data, playground, run
from sera_min.data import InputError, Pair
from sera_min.logprobs import implicit_reward, score, sequence_logprobs, sum_and_least, token_batches
from sera_min.losses import LOSSES
from sera_min.select import ensemble_margin, length_free, select_top

OWN_BETA = {name: loss.__defaults__[0] for name, (loss, _, _) in LOSSES.items()}  # type: ignore[attr-defined, index]
DEFAULTS: dict[str, tuple] = {  # of flags that are not given: with a model of your own, and in the playground
    "max_train_pairs": (None, 2000),
    "max_length": (1024, playground.MAX_LENGTH),
    "max_prompt_length": (512, playground.MAX_PROMPT_LENGTH),
    "max_new_tokens": (None, playground.MAX_NEW_TOKENS),
    "learning_rate": (1e-6, playground.LEARNING_RATE),
}
HEADINGS = {  # of --help, by the flag that begins each
    "model_name_or_path": "the data D, and the SFT model π_ref",
    "iterations": "the review, steps 2 to 6",
    "loss_type": "training, steps 1 and 7",
    "output_dir": "the run",
}


def flag(default, text: str):
    return field(default=default, metadata={"help": text})


def said_of(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


@dataclass(frozen=True)
class Config:
    model_name_or_path: str | None = flag(None, "SFT model, a hub name or folder (without: the playground)")
    dataset_name: str | None = flag(None, "preferences: a hub name, a .json, .jsonl or .parquet file, or a folder")
    dataset_train_split: str = flag("train", "the split of dataset_name to train on")
    max_train_pairs: int | None = flag(None, "read the first so many rows (all; playground: makes 2000 pairs)")
    eval_dataset_name: str | None = flag(None, "preferences to evaluate on, as dataset_name")
    eval_split: str | None = flag(
        None, "the split to evaluate on, of eval_dataset_name (test) or of dataset_name (without either: eval_fraction "
        "is held out); playground: test or validation prompts (test)")  # fmt: skip
    eval_fraction: float = flag(0.05, "without the two above: share of the prompts, with their pairs, that is held out")
    prompt_file: str | None = flag(
        None, "JSON rows of instruction (templated as dialogues are) or prompt, which the final policy answers in "
        "samples.json, AlpacaEval's format; its generator is output_dir")  # fmt: skip
    max_length: int | None = flag(None, "prompt and response, in tokens: more loses its end (1024; playground: 64)")
    max_prompt_length: int | None = flag(None, "in tokens: a longer prompt loses its beginning (512; playground: 16)")
    label_noise: float = flag(0.3, "playground: share of flipped labels")
    length_bias: float = flag(0.0, "playground: share of pairs whose longer response is preferred, whatever it says")
    iterations: int = flag(3, "T: the first trains on all of D, each later one reviews it first")
    keep: float = flag(0.7, "share of the given pairs that selection keeps (K)")
    bootstrap: float = flag(0.3, "pairs that the policy writes and ranks itself, as a share of those given (K̃)")
    samples_per_prompt: int = flag(4, "N: samples of which the best and the worst become a pair")
    ensemble_gamma: float = flag(0.5, "γ: the weight of the older policy's reward")
    select: str = flag("margin", "what K and K̃ are chosen by: margin, or random (the control)")
    length_free: bool = flag(False, "ours: select and pair by the reward that the response's length does not explain")
    token_floor: float = flag(
        0.0, "ours: a sample is never paired if its least likely token under π_ref is below this quantile of the same "
        "over D's responses; 0.01 keeps out broken text")  # fmt: skip
    temperature: float = flag(1.0, "samples are drawn at this temperature")
    top_p: float = flag(1.0, "samples are drawn from the likeliest words that together have this probability")
    max_new_tokens: int | None = flag(None, "longest sample (max_length - max_prompt_length; playground: 32)")
    loss_type: str = flag("dpo", "function of the margin: dpo, ipo, slic or simpo")
    beta: float | None = flag(None, f"β of the loss ({said_of(OWN_BETA)}; playground: {said_of(playground.BETA)})")
    label_smoothing: float = flag(0.0, "ε, dpo only: the share of labels that the loss takes to be flipped")
    learning_rate: float | None = flag(None, f"at its peak (1e-6; playground: {playground.LEARNING_RATE:g})")
    epochs_per_iteration: int = flag(1, "passes over an iteration's pairs")
    steps_per_iteration: int | None = flag(None, "so many optimizer steps instead, whatever K and K̃ (for comparisons)")
    per_device_train_batch_size: int = flag(32, "pairs per optimizer step")
    max_tokens: int = flag(16384, "tokens held at a time, padding included: lower it if memory runs out")
    gradient_checkpointing: bool = flag(False, "recompute activations in backward: less memory, a third more time")
    output_dir: str = flag("runs/sera", "where all of it goes")
    save_steps: int = flag(500, "steps between checkpoints within an iteration; the end of each is always one")
    resume_from_checkpoint: str | None = flag(None, "output_dir of a run to go on with, under the same flags")
    device: str | None = flag(None, "cuda or cpu (cuda where there is one)")
    seed: int = flag(0, "of the order of pairs, of sampling, and of the playground")


EXPECTED = [  # of flags, where they are given: names, check, what it expects
    ("eval_fraction label_noise length_bias keep bootstrap ensemble_gamma", lambda v: 0 <= v <= 1, "between 0 and 1"),
    ("token_floor", lambda v: 0 <= v < 1, "at least 0 and below 1"),
    ("iterations", lambda v: 1 <= v < 1000, "at least 1 and below 1000"),
    ("seed", lambda v: 0 <= v < 2**40, "at least 0 and below 2^40"),
    ("epochs_per_iteration per_device_train_batch_size max_tokens max_prompt_length max_new_tokens "
     "max_length max_train_pairs save_steps steps_per_iteration", lambda v: v >= 1, "at least 1"),
    ("beta learning_rate temperature", lambda v: 0 < v < math.inf, "above 0"),
    ("top_p", lambda v: 0 < v <= 1, "above 0 and at most 1"),
    ("samples_per_prompt", lambda v: v >= 2, "at least 2"),
    ("label_smoothing", lambda v: 0 <= v < 0.5, "at least 0 and below 0.5"),
    ("loss_type", LOSSES.__contains__, "one of " + ", ".join(LOSSES)),
    ("select", ("margin", "random").__contains__, "margin or random"),
    ("device", ("cpu", "cuda").__contains__, "cpu or cuda"),
]  # fmt: skip


def resolve(config: Config) -> Config:
    """Every None that stands for a choice becomes that choice; what cannot be is an InputError."""
    for names, holds, what in EXPECTED:
        for name in names.split():
            if (value := getattr(config, name)) is not None and not holds(value):
                raise InputError(f"--{name} is {value!r}: expected {what}")
    in_playground = config.model_name_or_path is None
    c = replace(config, **{n: both[in_playground] for n, both in DEFAULTS.items() if getattr(config, n) is None})
    file, resumed = not in_playground and Path(c.dataset_name or "").is_file(), c.resume_from_checkpoint
    for wrong, message in [
        (c.keep + c.bootstrap == 0, "--keep and --bootstrap are both 0: nothing would be left to train on"),
        (c.max_length <= c.max_prompt_length, "--max_length is not above --max_prompt_length: no room for a response"),
        (c.label_smoothing > 0 and c.loss_type != "dpo", f"--label_smoothing is dpo's: {c.loss_type} has none"),
        ((c.dataset_name is None) != in_playground, "--model_name_or_path and --dataset_name go together"),
        (in_playground and c.eval_split not in (None, "test", "validation"),
         f"--eval_split is {c.eval_split!r}: the playground has test and validation prompts"),
        (in_playground and (c.eval_dataset_name or c.prompt_file) is not None,
         "--eval_dataset_name and --prompt_file are for a model of your own: the playground has its own prompts"),
        (not in_playground and (c.label_noise, c.length_bias) != (Config.label_noise, Config.length_bias),
         "--label_noise and --length_bias are the playground's: data of your own has what it has"),
        (file and (c.dataset_train_split != "train" or (c.eval_split and not c.eval_dataset_name)),
         f"--dataset_name {c.dataset_name} is a file, which has no splits: --eval_dataset_name takes another file"),
        (c.steps_per_iteration and c.epochs_per_iteration != Config.epochs_per_iteration,
         "--steps_per_iteration and --epochs_per_iteration: give one of them"),
        (c.token_floor > 0 and c.bootstrap == 0, "--token_floor is for own pairs, and --bootstrap is 0"),
        (c.eval_fraction != Config.eval_fraction and (in_playground or c.eval_split or c.eval_dataset_name),
         "--eval_fraction holds out pairs of your own data, where no others are given to evaluate on"),
        (in_playground and c.dataset_train_split != "train", "--dataset_train_split is of --dataset_name"),
        (resumed and Path(c.output_dir).resolve() not in [Path(p).resolve() for p in (Config.output_dir, resumed)],
         "--output_dir: a run that is resumed stays where it is"),
        (c.device == "cuda" and not torch.cuda.is_available(), "--device is cuda, and there is no CUDA GPU"),
    ]:
        if wrong:
            raise InputError(message)
    return replace(
        c,
        eval_split=c.eval_split or ("test" if in_playground or c.eval_dataset_name else None),
        beta=c.beta or (playground.BETA if in_playground else OWN_BETA)[c.loss_type],
        max_new_tokens=c.max_new_tokens or c.max_length - c.max_prompt_length,
        device=c.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        output_dir=str(Path(resumed or c.output_dir)),
        resume_from_checkpoint=None,
    )


def amp(config: Config):  # float32 weights, bfloat16 products on a GPU; per forward pass, for it caches cast weights
    return torch.autocast(config.device, dtype=torch.bfloat16, enabled=config.device == "cuda")


@run.timed("scoring")
def logps_of(model, prompts, responses, config: Config, desc: str | None, of=torch.sum) -> torch.Tensor:
    """log π(y|x) of N rows in nats, without gradients: float32 (N,), on the CPU; or (N, 2) by `sum_and_least`."""
    with amp(config):
        logps = score(model, prompts, responses, max_tokens=config.max_tokens, of=of, desc=desc)[0]
    if not logps.isfinite().all():
        row = int((~logps.isfinite()).nonzero()[0, 0])
        raise FloatingPointError(f"{desc or 'check'}: log π(y|x) of response {row} is {logps[row]}")
    return logps


def rows_of(pairs: list[Pair]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses of N pairs as 2N rows: chosen, rejected, chosen, rejected, …"""
    return [x for x, _, _ in pairs for _ in "wl"], [y for _, *both in pairs for y in both]


def pair_logps(model, pairs: list[Pair], config: Config, desc: str | None, of=torch.sum) -> torch.Tensor:
    """log π(y|x) of each pair's chosen and rejected response, in nats: float32 (N, 2), on the CPU; or (N, 2, 2)."""
    return logps_of(model, *rows_of(pairs), config, desc, of).unflatten(0, (-1, 2))  # (2N, …) -> (N, 2, …)


def rewards(logps: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor, config: Config) -> torch.Tensor:
    """The implicit reward that goes with the loss in use, see losses.py; all of one shape."""
    _, per_token, against_reference = LOSSES[config.loss_type]
    return implicit_reward(logps, reference * against_reference, lengths.to(logps.device) if per_token else None)


def lengths_of(pairs: list[Pair]) -> torch.Tensor:
    return torch.tensor([[len(w), len(l)] for _, w, l in pairs])  # (N, 2)


def pair_losses(r: torch.Tensor, config: Config) -> torch.Tensor:  # (N, 2) -> (N,)
    own = {"dpo": {"label_smoothing": config.label_smoothing}, "simpo": {"gamma": 0.5 * config.beta}}
    return LOSSES[config.loss_type][0](r[:, 0] - r[:, 1], config.beta, **own.get(config.loss_type, {}))


def preflight(policy, pairs: list[Pair], config: Config) -> None:
    """Before training, π_θ = π_ref: log-probs must be the logits', and alike scored and training."""
    x, *ys = pairs[0]
    scored = pair_logps(policy, pairs[:1], config, desc=None)  # (1, 2), as the reference is scored
    policy.train()
    with torch.no_grad(), amp(config):
        trained = sequence_logprobs(policy, [x, x], ys)[0][None].cpu()  # (1, 2), as the policy is trained
        ids = torch.tensor([x + ys[0]], device=config.device)
        logits = policy(input_ids=ids).logits[0, len(x) - 1 : -1]  # (1, T, V) -> (|y|, V)
        plain = -cross_entropy(logits.float(), torch.tensor(ys[0], device=config.device), reduction="sum").cpu()
    allowed = (1e-4 if config.device == "cpu" else 2e-2) * max(map(len, ys))  # nats; bfloat16 keeps 8 bits
    for what, error in {
        "log π(y|x) differs from its logits'": scored[0, 0] - plain,
        "log π_θ as it trains differs from log π_ref as it is scored": trained - scored,
    }.items():
        if not error.abs().max() <= allowed:
            raise InputError(f"{what}, by {error.abs().max():.3g} nats: this model cannot be trained here")
    loss = pair_losses(rewards(trained, scored, lengths_of(pairs[:1]), config), config).item()
    zero = pair_losses(torch.zeros(1, 2), config).item()
    print(f"check: log π(y|x) is the logits', π_θ scores as π_ref; the loss is {loss:.4f} (at margin 0: {zero:.4f})")


def train_step(policy, optimizer, pairs: list[Pair], reference: torch.Tensor, config: Config) -> dict[str, float]:
    """One optimizer step on the mean loss of the pairs, against their reference log-probs (b, 2). Returns metrics.

    `max_tokens` tokens' activations are held at a time: a micro-batch of pairs. Within it chosen and rejected go
    through the model by their length, whichever they are, a quarter of it at a time: there is little padding.
    """
    optimizer.zero_grad()
    parts = []  # of the micro-batches: losses, rewards and log-probs, (m, 1 + 2 + 2)
    micros = token_batches([2 * len(x) + len(w) + len(l) for x, w, l in pairs], config.max_tokens)
    for micro in micros:
        some = [pairs[i] for i in micro]
        x, y = rows_of(some)  # 2m rows
        passes = token_batches([len(a) + len(b) for a, b in zip(x, y)], config.max_tokens // 4)
        with amp(config):
            sums = [sequence_logprobs(policy, [x[i] for i in rows], [y[i] for i in rows])[0] for rows in passes]
            back = torch.tensor([i for rows in passes for i in rows]).argsort()
            leaf = torch.cat(sums).detach().requires_grad_()  # (2m,)
            logps = leaf[back].view(-1, 2)  # (2m,) -> (m, 2)
            r = rewards(logps, reference[micro].to(logps.device), lengths_of(some), config)
            losses = pair_losses(r, config)
        (losses.sum() / len(pairs)).backward()  # the mean over the step's pairs, however they are split
        for part, gradient in zip(sums, leaf.grad.split([len(rows) for rows in passes])):  # type: ignore[union-attr]
            part.backward(gradient)  # a pass at a time: its (V, H) gradients do not wait for the next one's
        parts.append(torch.cat([losses[:, None], r, logps], 1).detach())
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item()
    losses, r, logps = torch.cat(parts).cpu().split([1, 2, 2], 1)  # (b, 1), (b, 2), (b, 2)
    metrics = preference_metrics(losses, r, config) | {"grad_norm": norm}
    if not (math.isfinite(metrics["loss"]) and math.isfinite(norm)):
        wrong = [i for i, value in zip((i for micro in micros for i in micro), losses) if not value.isfinite()]
        raise FloatingPointError(f"the loss is {metrics['loss']:.3g}, its gradient {norm:.3g}", wrong)
    try:
        optimizer.step()
    except torch.OutOfMemoryError:
        raise InputError("AdamW's two moments of every weight do not fit the GPU beside the model") from None
    optimizer.zero_grad()  # gradients need not wait in memory for the next step
    for name, of_both in {"rewards": config.beta * r, "logps": logps}.items():
        metrics |= dict(zip((f"{name}/chosen", f"{name}/rejected"), of_both.mean(0).tolist()))
    return metrics


def preference_metrics(losses: torch.Tensor, r: torch.Tensor, config: Config) -> dict[str, float]:
    """Means over the pairs' losses and rewards (b, 2), by TRL's names; a tied reward is half right, as a guess is."""
    margins = r[:, 0] - r[:, 1]  # (b,)
    return {
        "loss": losses.mean().item(),
        "rewards/accuracies": ((margins > 0).float() + 0.5 * (margins == 0)).mean().item(),
        "rewards/margins": config.beta * margins.mean().item(),
    }


@run.timed("training")
def train_on(policy, pairs: list[Pair], reference: torch.Tensor, t: int, resume, config: Config, log, save) -> None:
    """One iteration's gradient descent on the mean loss of the pairs, against their reference log-probs (N, 2)."""
    order = torch.Generator().manual_seed(run.seed_of(config.seed, t, "order"))
    size, n = config.per_device_train_batch_size, len(pairs)
    steps = config.steps_per_iteration or config.epochs_per_iteration * math.ceil(n / size)
    passes = range(math.ceil(steps / math.ceil(n / size)))
    batches = [b for _ in passes for b in torch.randperm(n, generator=order).split(size)][:steps]
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)
    if resume.get("optimizer"):
        optimizer.load_state_dict(resume.pop("optimizer"))
    first, warm_up, max_tokens = resume["step"] or 0, math.ceil(0.1 * len(batches)), config.max_tokens
    lengths = [2 * len(x) + len(w) + len(l) for x, w, l in pairs]

    def step_on(batch: torch.Tensor, max_tokens: int) -> dict[str, float]:
        fitting = replace(config, max_tokens=max_tokens)
        return train_step(policy, optimizer, [pairs[i] for i in batch], reference[batch], fitting)

    policy.train()
    bar = tqdm(batches[first:], f"iteration {t}: train", initial=first, total=len(batches), unit="step")
    with run.stop_after_step() as asked:
        for step, batch in enumerate(bar, first):
            rise, fall = (step + 1) / warm_up, (len(batches) - step) / (len(batches) - warm_up + 1)
            rate = optimizer.param_groups[0]["lr"] = config.learning_rate * min(rise, fall)
            began = time.monotonic()
            try:
                tokens = [lengths[i] for i in batch]
                metrics, max_tokens = run.halving(partial(step_on, batch), max_tokens, least=max(tokens))
            except FloatingPointError as error:
                what, wrong = error.args
                lines = f"pairs.jsonl lines {[int(batch[i]) + 1 for i in wrong or range(len(batch))]}"
                stays = "state/ holds the last good checkpoint"
                raise FloatingPointError(f"iteration {t}, step {step + 1}, {lines}: {what}; {stays}") from None
            log(phase="train", iteration=t, step=step + 1, learning_rate=rate, **metrics)
            rates = f"{sum(tokens) / (time.monotonic() - began):,.0f} tokens/s"
            bar.set_postfix_str("loss {loss:.3f}, accuracy {rewards/accuracies:.3f}, margin {rewards/margins:.3f}, "
                                .format_map(metrics) + rates)  # fmt: skip
            stop = bool(asked)
            if stop or ((step + 1) % config.save_steps == 0 and step + 1 < len(batches)):
                save(step=step + 1, optimizer=optimizer.state_dict())
            if stop:
                raise KeyboardInterrupt


def review(t: int, policy, tokenizer, offline: list[Pair], state, eos_ids: list[int], config: Config, out: Path):
    """Steps 3 to 6 of the algorithm. Returns the pairs to train on, their reference log-probs, margins and sources."""
    random = torch.Generator().manual_seed(run.seed_of(config.seed, t, "random"))

    def choose(margins: torch.Tensor, k: int) -> list[int]:
        by = margins if config.select == "margin" else torch.rand(len(margins), generator=random)
        return select_top(by, min(k, len(margins))).tolist()

    # 3, 4: the margins of D under the last two policies, and the K pairs with the largest
    score_pairs = partial(pair_logps, policy, offline, config, f"iteration {t}: score pairs")
    newest = rewards(run.once(out, t, "pairs", score_pairs), state["reference"], lengths_of(offline), config)  # (N, 2)
    r = ensemble_margin(newest, state["previous"], config.ensemble_gamma)
    state["previous"] = newest
    if config.length_free:
        r = length_free(r, lengths_of(offline))
    margins = r[:, 0] - r[:, 1]  # (N,)
    kept = choose(margins, round(config.keep * len(offline)))
    pairs, reference, margins = [offline[i] for i in kept], state["reference"][kept], margins[kept]
    if not (wanted := round(config.bootstrap * len(offline))):
        return pairs, reference, margins, ["offline"] * len(pairs)

    # 5, 6: samples, best against worst, and the K̃ pairs with the largest margin
    prompts = [x for x, _, _ in offline]
    samples, whole, r, logps = sampled_rewards(t, policy, tokenizer, prompts, state, eos_ids, config, out)  # (P, N)
    responses = [[y for y, _ in row] for row in samples]
    triples, own_margins, dropped = bootstrap.best_worst_pairs(r.tolist(), whole.tolist(), responses)
    own = choose(own_margins, wanted)
    ended = sum(ended for row in samples for _, ended in row)
    dropped["samples below --token_floor"] = ended - int(whole.sum())  # the rest of what was not whole was cut off
    dropped["cut-off samples"] -= dropped["samples below --token_floor"]
    print(f"iteration {t}: {len(triples)} pairs of samples, {len(own)} kept of the {wanted} wanted; dropped:",
          ", ".join(f"{count} {what}" for what, count in dropped.items() if count) or "none")  # fmt: skip
    taken = [triples[p] for p in own]
    pairs = pairs + [(prompts[i], responses[i][best], responses[i][worst]) for i, best, worst in taken]
    index = torch.tensor(taken, dtype=torch.int64).view(-1, 3)  # (K̃, 3): prompt, best, worst
    reference = torch.cat([reference, logps[index[:, :1], index[:, 1:]]])  # (K, 2) and (K̃, 2)
    sources = ["offline"] * len(kept) + ["bootstrap"] * len(own)
    return pairs, reference, torch.cat([margins, own_margins[own]]), sources


def sampled_rewards(t: int, policy, tokenizer, prompts, state, eos_ids: list[int], config: Config, out: Path):
    """N responses y ~ π_θ(t−1) to each of P prompts; whether each may be paired, its r̄_t and log π_ref, all (P, N).

    A sample that was cut off may not be paired and has neither, they are NaN; one below --token_floor may not either.
    What the policy has written or scored is asked for `once`: a run resumed within the iteration reads it again.
    """
    once, n = partial(run.once, out, t), config.samples_per_prompt
    desc = f"iteration {t}: sample"
    seed = run.seed_of(config.seed, t, "samples")
    samples = once("samples", lambda: sample(policy, tokenizer, prompts, n, eos_ids, seed, config, desc))
    whole = torch.tensor([[ended for _, ended in row] for row in samples])  # (P, N): those that ended are scored
    flat_x = [x for x, row in zip(prompts, samples) for _, ended in row if ended]
    flat_y = [y for row in samples for y, ended in row if ended]
    lengths = torch.tensor([[len(y) for y, _ in row] for row in samples])  # (P, N)

    def logps_under(i: int, who: str, of=torch.sum) -> torch.Tensor:  # of π_θi, (P, N) or (P, N, 2)
        def scored() -> torch.Tensor:
            model = policy if i == t - 1 else run.load(out / "state" / f"{i:03d}-done", config.device)[0]
            return logps_of(model, flat_x, flat_y, config, f"iteration {t}: {who} scores", of)

        logps = once(f"samples-under-{i}", scored)  # (W, …)
        every = torch.full((*whole.shape, *logps.shape[1:]), math.nan)
        every[whole] = logps
        return every

    reference, least = logps_under(0, "reference", sum_and_least).unbind(-1)  # (P, N)
    r = rewards(logps_under(t - 1, "policy"), reference, lengths, config)
    if t > 2:
        older = rewards(logps_under(t - 2, "older policy"), reference, lengths, config)
        r = ensemble_margin(r, older, config.ensemble_gamma)
    usable = whole  # (P, N)
    if config.token_floor:
        floor = state["least"].flatten().sort().values[int(config.token_floor * state["least"].numel())]
        usable = whole & (least >= floor)
    if config.length_free:
        r = length_free(r.where(usable, math.nan), lengths)  # what may not be paired shapes no slope
    run.write_jsonl(out / f"iteration-{t}" / "samples.jsonl", (
        {"prompt": data.decode(tokenizer, x, eos_ids), "response": data.decode(tokenizer, y, eos_ids, x),
         "finish_reason": "stop" if ended else "length", "usable": ok,
         "reward": None if math.isnan(reward) else reward}
        for x, row, *others in zip(prompts, samples, usable.tolist(), r.tolist())
        for (y, ended), ok, reward in zip(row, *others)
    ))  # fmt: skip
    return samples, usable, r, reference


@run.timed("sampling")
def sample(policy, tokenizer, prompts, n: int, eos_ids: list[int], seed: int, config: Config, desc: str):
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def attempt(max_tokens: int):
        with amp(config):
            return bootstrap.sample_responses(
                policy, prompts, n, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                top_p=config.top_p, eos_token_id=eos_ids, pad_token_id=pad, seed=seed,
                max_tokens=max_tokens, desc=desc,
            )  # fmt: skip

    least = n * (config.max_prompt_length + config.max_new_tokens)  # longest prompts come first: it fails at once
    return run.halving(attempt, bootstrap.CACHE_TOKENS[config.device], least)[0]


def playground_pairs(config: Config, tokenizer, limits: dict) -> tuple[list[Pair], list[Pair], list[list[int]]]:
    """D, held-out pairs without wrong labels, and the held-out prompts, twice each, to be answered."""
    noise = {"label_noise": config.label_noise, "length_bias": config.length_bias}
    rows = playground.preferences(config.max_train_pairs, "train", seed=config.seed, **noise)
    test = playground.preferences(512, config.eval_split, seed=config.seed, label_noise=0, length_bias=0)
    offline, counts = data.encode(rows, tokenizer, name="playground", **limits)
    held, _ = data.encode(test, tokenizer, name=f"playground {config.eval_split}", **limits)
    print(f"data: {data.said(counts)}; {len(held)} held out")
    return offline, held, tokenizer(playground.prompts(config.eval_split) * 2).input_ids


def own_pairs(config: Config, tokenizer, limits: dict) -> tuple[list[Pair], list[Pair], list[list[int]]]:
    """D, held-out pairs, none of whose prompts is in D, and up to five of their prompts, to be answered."""
    rows = data.read_rows(config.dataset_name, config.dataset_train_split, config.max_train_pairs)
    if tokenizer.chat_template is None:
        print("template: the tokenizer has none, so dialogues read '\\n\\nHuman: … \\n\\nAssistant: …'")
    offline, counts = data.encode(rows, tokenizer, name=config.dataset_name, **limits)
    if config.eval_split is None:
        offline, held = data.split_by_prompt(offline, config.eval_fraction, config.seed)
        few = " (--eval_fraction of the prompts is less than one)" if config.eval_fraction and not held else ""
        print(f"data: {data.said(counts)}; {len(held)} of them held out{few}")
    else:
        name = config.eval_dataset_name or config.dataset_name
        held, held_counts = data.encode(data.read_rows(name, config.eval_split), tokenizer, name=name, **limits)
        n, asked_there = len(offline), {tuple(x) for x, _, _ in held}
        offline = [pair for pair in offline if tuple(pair[0]) not in asked_there]
        counts["kept"], counts["dropped: the prompt is in the evaluation data"] = len(offline), n - len(offline)
        print(f"data: {data.said(counts)}\nevaluation data: {data.said(held_counts)}")
        if not held:
            raise InputError(f"{name}, split '{config.eval_split}': no pair is left to evaluate on")
    return offline, held, [list(x) for x in dict.fromkeys(tuple(x) for x, _, _ in held or offline)][:5]


def main(config: Config) -> dict:
    """Run it all; returns the last evaluation, the line of metrics.jsonl whose phase is "final"."""
    run.SECONDS.clear()
    resuming, config = config.resume_from_checkpoint is not None, resolve(config)
    out, in_playground = Path(config.output_dir), config.model_name_or_path is None
    run.check(out, asdict(config), resuming)
    folder, state = (resuming and run.latest_checkpoint(out)) or (None, {})

    asked_there = data.read_rows(config.prompt_file, "train") if config.prompt_file else []  # before what takes long

    # The policy, its tokenizer, and the pairs D as token ids, some of them held out.
    source = folder or config.model_name_or_path
    if source is not None:
        policy, tokenizer = run.load(source, config.device)
    else:
        policy, tokenizer = run.timed("SFT")(playground.make_sft_policy)(config.seed, config.device)
    longest = max(config.max_length, config.max_prompt_length + config.max_new_tokens)
    run.check_positions(policy, longest, "--max_length or --max_prompt_length + --max_new_tokens")
    eos_ids = run.eos_ids_of(policy, tokenizer)
    limits: dict = {"eos_ids": eos_ids, "max_length": config.max_length, "max_prompt_length": config.max_prompt_length}
    offline, held, asked = (playground_pairs if in_playground else own_pairs)(config, tokenizer, limits)
    if not offline:
        raise InputError(f"--dataset_name {config.dataset_name}: no pair is left to train on")
    asked_texts: list[str] = []
    to_answer: list[list[int]] = []
    if config.prompt_file:
        asked_texts, to_answer = data.encode_prompts(asked_there, tokenizer, name=config.prompt_file, **limits)
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    questions = [data.decode(tokenizer, x, eos_ids) for x in asked]

    def readable(some: list[Pair]) -> list[tuple[str, ...]]:
        return [(data.decode(tokenizer, x, eos_ids), *(data.decode(tokenizer, y, eos_ids, x) for y in both))
                for x, *both in some]  # fmt: skip

    def precision(some: list[Pair]) -> float | None:
        return playground.precision(readable(some)) if in_playground and some else None

    label_accuracy = precision(offline)

    def answer(prompts: list[list[int]], t: int, phase: str) -> list[str]:
        seed = run.seed_of(config.seed, t, phase)
        samples = sample(policy, tokenizer, prompts, 1, eos_ids, seed, config, f"iteration {t}: {phase}")
        return [data.decode(tokenizer, y, eos_ids, x) for x, [(y, _)] in zip(prompts, samples)]

    def evaluate(t: int) -> tuple[dict, list[str]]:
        """Held-out pairs, and one fresh answer to every prompt of `asked`."""
        result: dict = {"phase": "final" if t == config.iterations else "eval", "iteration": t}
        if held:
            logps = pair_logps(policy, held, config, f"iteration {t}: evaluate")
            r = rewards(logps, state["held_reference"], lengths_of(held), config)
            result |= {f"eval_{k}": v for k, v in preference_metrics(pair_losses(r, config), r, config).items()}
        answers = answer(asked, t, "answers") if in_playground or t == config.iterations else []
        if answers:
            run.write_jsonl(out / f"iteration-{t}" / "answers.jsonl", (
                {"prompt": x, "reference": before, "answer": now}
                for x, before, now in zip(questions, state["before"], answers)
            ))  # fmt: skip
        if in_playground:
            result |= playground.judge(questions, answers, state["before"])
            result |= {"data/label_accuracy": label_accuracy, **state.get("precisions", {})}
        return result, answers

    if not state:  # Iteration 0. The reference's log-probs are computed once, by the policy, which it still is.
        preflight(policy, offline, config)
    run.begin(out, asdict(config), data.fingerprint(offline, held, to_answer), policy)
    if not state:
        once = partial(run.once, out, 0)
        desc = "reference: score"
        scored = once("pairs", lambda: pair_logps(policy, offline, config, f"{desc} pairs", sum_and_least))
        state["reference"], state["least"] = scored.unbind(-1)  # (N, 2)
        state["held_reference"] = once("held", lambda: pair_logps(policy, held, config, f"{desc} held-out pairs"))
        state |= {"before": answer(asked, 0, "reference answers"), "previous": None, "table": [], "kept": None}
        run.save_checkpoint(out, 0, policy, tokenizer, state)
        state |= {"iteration": 0, "step": None}

    t, began = state["iteration"], time.monotonic()
    while True:  # from the end of iteration t, or from a step within it
        if state["step"] is None:
            result, answers = evaluate(t)
            state["table"].append(run.row(run.log(out, **result), state["kept"], time.monotonic() - began))
            if t == 0 and in_playground:
                print(f"check: the SFT policy's true reward is {result['gold/reward']:.3f}, its data's 0.25")
            if t == config.iterations:
                break
            t, began = t + 1, time.monotonic()
        resume = {key: state.pop(key, None) for key in ("step", "optimizer")}
        save = partial(run.save_checkpoint, out, t, policy=policy, tokenizer=tokenizer)
        save_step = partial(save, state=dict(state))  # before the review, which a resumed run does again
        if t == 1:
            pairs, reference, margins = offline, state["reference"], torch.zeros(len(offline))
            sources = ["offline"] * len(pairs)
        else:
            reviewed = review(t, policy, tokenizer, offline, state, eos_ids, config, out)
            pairs, reference, margins, sources = reviewed
            if not pairs:
                raise InputError(f"iteration {t}: no pair is left to train on; --keep and --bootstrap take too few")
        run.write_jsonl(out / f"iteration-{t}" / "pairs.jsonl", (
            {"prompt": x, "chosen": w, "rejected": l, "margin": margin, "source": source}
            for (x, w, l), margin, source in zip(readable(pairs), margins.tolist(), sources)
        ))  # fmt: skip
        k = sources.count("offline")
        state["kept"] = [k, len(pairs) - k]
        state["precisions"] = {"select/precision": precision(pairs[:k]), "bootstrap/precision": precision(pairs[k:])}
        train_on(policy, pairs, reference, t, resume, config, partial(run.log, out), save_step)
        save(state=state)
        state["step"] = None
    if config.prompt_file:
        answered = zip(asked_texts, answer(to_answer, t, "prompt file"))
        run.replace(out / "samples.json", json.dumps(
            [{"instruction": x, "output": y, "generator": str(out)} for x, y in answered], indent=1, ensure_ascii=False
        ) + "\n")  # fmt: skip
    run.finish(out, t, state["table"], list(zip(questions, state["before"], answers))[:5])
    return result


def command_line(arguments: list[str] | None = None) -> None:
    """`main` from flags; what the user can mend ends in one line and exit status 1."""
    usage = "python train.py [--flag value ...]"
    parser = HfArgumentParser(Config, usage=usage, description=__doc__, formatter_class=run.HelpFormatter)  # type: ignore
    run.group_help(parser, HEADINGS)
    parser.error = lambda message: sys.exit(f"error: {message}")  # type: ignore[method-assign]
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = Config(**vars(parser.parse_args(arguments)))
    out = Path(config.resume_from_checkpoint or config.output_dir)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(config)
    except (InputError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        less = "a smaller --max_tokens or --gradient_checkpointing takes less, and a resume accepts both"
        sys.exit(f"error: out of GPU memory: {less}")
    except KeyboardInterrupt:
        how = f"to go on from the last checkpoint: the same command with --resume_from_checkpoint {out}"
        print("interrupted;", how if (out / "config.json").exists() else "nothing is saved yet", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    command_line()
