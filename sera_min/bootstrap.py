"""Preference bootstrapping: pairs of responses that the policy writes and ranks itself.

    for each prompt x:     y_1 … y_N ~ π_θ(t−1)(·|x)
                           y_w = argmax_j r̄_t(x, y_j)      y_l = argmin_j r̄_t(x, y_j)

Sampling, flattening and pairing are three functions, so samples may come from any engine. A sample
that was cut off by the length limit is never paired. Do not append an end of sequence to it: the
model never wrote one there, so the log-probability of that token says nothing about the response.

Copy this file alone: it needs torch and tqdm, and a causal language model of transformers.
From sera_min 0.1.0, Apache-2.0; SeRA, arXiv:2410.09362.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

Ids = list[int]  # token ids
Sample = tuple[Ids, bool]  # token ids, and whether they end with an end of sequence


@torch.no_grad()
def plain_sample(model, prompt: Ids, max_new_tokens: int, temperature: float, end: int) -> Sample:
    """y ~ π(·|x), as one would first write it: right, but it reads x and y anew for every token of y.

    `sample_responses`, below, does the same for many prompts at a time, and for several end tokens.
    """
    y: Ids = []
    while len(y) < max_new_tokens and end not in y:
        ids = torch.tensor([prompt + y], device=model.device)  # (1, T)
        logits = model(input_ids=ids).logits[0, -1]  # (V,): what comes after the last token
        p = (logits.float() / temperature).softmax(-1)  # (V,)
        y.append(int(torch.multinomial(p, num_samples=1)))
    return y, end in y


def ended_responses(samples: list[list[Sample]]) -> tuple[list[int], list[Ids], int]:
    """Flattens what `sample_responses` returns, without the samples that were cut off.

    Returns, for the R responses that ended, the index of their prompt, list (R,), and their token
    ids, list (R,); and how many samples were cut off. Raises TypeError where `ended` is not a bool
    (a finish_reason such as "length" would count as true).
    """
    prompt_of: list[int] = []
    responses: list[Ids] = []
    cut_off = 0
    for i, of_prompt in enumerate(samples):
        for j, (y, ended) in enumerate(of_prompt):
            if not isinstance(ended, bool):
                raise TypeError(f"prompt {i}, sample {j}: ended is {ended!r}, expected a bool")
            if not ended:
                cut_off += 1
                continue
            prompt_of.append(i)
            responses.append(y)
    return prompt_of, responses, cut_off


def best_worst_pairs(prompt_of: list[int], responses: list[Ids], rewards: Tensor) -> tuple[Tensor, Tensor, Counter]:
    """Of each prompt's distinct responses the one with the highest and the one with the lowest reward.

    Row j of R has the prompt with index prompt_of[j], the token ids responses[j], and the reward
    rewards[j], a float tensor (R,), in nats. NaN means that a row has no reward: it is never paired
    (experiments/variants.py has such rows; the method has not).
    Returns the row numbers of the best and of the worst response, int64 (P,) each, the first of
    equals; and what was dropped: "identical samples" (only the first is used), "samples without a
    reward", and "prompts without a pair" (fewer than two different rewards are left).
    Raises ValueError where lengths differ or a reward is infinite, TypeError for a response that is
    no list.
    """
    values = rewards.tolist()
    rows_of_prompt: dict[int, dict[tuple, int]] = {}  # of each prompt: different response -> row
    dropped: Counter = Counter()
    for row, (i, y, reward) in enumerate(zip(prompt_of, responses, values, strict=True)):
        check_row(row, y, reward)
        different = rows_of_prompt.setdefault(int(i), {})
        if math.isnan(reward):
            dropped["samples without a reward"] += 1
        elif tuple(y) in different:
            dropped["identical samples"] += 1
        else:
            different[tuple(y)] = row

    best: list[int] = []
    worst: list[int] = []
    for different in rows_of_prompt.values():
        rows = list(different.values())
        if len({values[row] for row in rows}) < 2:
            dropped["prompts without a pair"] += 1
            continue
        best.append(max(rows, key=lambda row: values[row]))
        worst.append(min(rows, key=lambda row: values[row]))
    return torch.tensor(best, dtype=torch.int64), torch.tensor(worst, dtype=torch.int64), dropped


# ------------------------------------------------------------------------------------------------
# You may skip what follows: `sample_responses` draws from the distribution of `plain_sample`, many
# prompts at a time and fast; and arguments are checked.
#   - A prompt is read once for its n samples.
#   - Samples that have ended leave the batch.
#   - A token costs one random number, not one for every word of the vocabulary.
# The distribution is that of model.generate(do_sample=True, top_k=0, …).
# ------------------------------------------------------------------------------------------------

CACHE_TOKENS = {"cuda": 2**17, "cpu": 2**15}  # tokens in the key-value cache: enough to keep the device busy
STRIDE = 32  # tokens after which samples that have ended leave the batch
KEYS_AND_VALUES = {"DynamicLayer", "DynamicSlidingWindowLayer"}  # caches of nothing else


def sample_responses(
    model,
    prompts: list[Ids],
    n: int,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    eos_token_id: int | list[int],
    pad_token_id: int,
    seed: int,
    max_tokens: int | None = None,
    desc: str | None = None,
) -> list[list[Sample]]:
    """n samples y ~ π(·|x) for each prompt, as (token ids, ended).

    Those that ended hold their end of sequence; those that were cut off hold none. Tokens are drawn
    from softmax(logits / temperature), cut to the likeliest ones that reach top_p together; the
    model's generation_config has no say. Prompts of similar length are sampled together, with at
    most `max_tokens` tokens in the key-value cache (None: CACHE_TOKENS). The same seed, batch size
    and machine give the same samples; the random generators of the CPU and of the model's GPU are
    left as they were. Where pad and end are one token, or a prompt has one token alone, transformers may
    warn of right padding: there is none. Raises ValueError for an empty prompt and numbers that make
    no sense, FloatingPointError for probabilities of NaN.
    """
    check_sampling(prompts, n, max_new_tokens, temperature, top_p, eos_token_id, pad_token_id)
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    room = max_tokens or CACHE_TOKENS.get(model.device.type, 2**15)
    draw_next = DrawNext(temperature, top_p)
    samples: list[list[Sample]] = [[] for _ in prompts]
    bar = tqdm(total=len(prompts), desc=desc, unit="prompt", disable=desc is None)
    gpus = [model.device] if model.device.type == "cuda" else []
    with our_settings(model, ends, pad_token_id), torch.random.fork_rng(gpus), bar:
        torch.manual_seed(seed)
        for batch in prompt_batches(prompts, n, max_new_tokens, room):
            x = [prompts[i] for i in batch]
            written = continue_all(model, x, n, max_new_tokens, ends, pad_token_id, draw_next)
            draw_next.check()
            for row, y in enumerate(written):
                samples[batch[row // n]].append((y, y[-1] in ends))
            bar.update(len(batch))
    return samples


def check_sampling(prompts, n, max_new_tokens, temperature, top_p, eos_token_id, pad_token_id) -> None:
    if n < 1 or max_new_tokens < 1 or not temperature > 0 or not 0 < top_p <= 1:
        numbers = f"n {n}, max_new_tokens {max_new_tokens}, temperature {temperature}, top_p {top_p}"
        raise ValueError(f"{numbers}: expected numbers above 0, top_p at most 1")
    if eos_token_id in (None, []):
        raise ValueError("eos_token_id is missing: no sample could end")
    if pad_token_id is None:
        raise ValueError("pad_token_id is missing: any token will do, as an end of sequence")
    if [] in prompts:
        raise ValueError(f"prompt {prompts.index([])} is empty")


def check_row(row: int, response: Ids, reward: float) -> None:
    if not isinstance(response, list):
        kind = type(response).__name__
        raise TypeError(f"row {row}: the response is a {kind}, expected a list of token ids")
    if math.isinf(reward):
        raise ValueError(f"row {row}: the reward is {reward}")


def prompt_batches(prompts: list[Ids], n: int, max_new_tokens: int, room: int) -> list[list[int]]:
    """Numbers of prompts, longest first, in batches whose caches hold at most `room` tokens."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    longest = max(map(len, prompts), default=0) + max_new_tokens
    size = max(1, room // (n * longest))
    return [order[start : start + size] for start in range(0, len(order), size)]


@contextmanager
def our_settings(model, ends: list[int], pad: int) -> Iterator[None]:
    """Eval mode, and nothing of the model's generation_config, whose top_k may be 50 by default."""
    config = model.generation_config
    owners = [part for part in model.modules() if "generation_config" in vars(part)]  # with PEFT the base is one too
    configs = [part.generation_config for part in owners]
    modes = [(part, part.training) for part in model.modules()]
    greedy = {"do_sample": False, "repetition_penalty": 1.0, "num_beams": 1, "return_dict_in_generate": True}
    model.generation_config = type(config)(eos_token_id=ends, pad_token_id=pad, **greedy)
    model.eval()
    try:
        yield
    finally:
        model.generation_config = config
        for part, own in zip(owners, configs):
            part.generation_config = own
        for part, mode in modes:  # not model.train(): a part may have been in eval mode before
            part.training = mode


class DrawNext:
    """Draws the next token of every row, inside a greedy `generate`.

    `generate` calls this with the logits of the next token and then takes the largest. So we draw a
    token here, and return 0 for it and −∞ for all others: the largest is the one we drew.
    """

    def __init__(self, temperature: float, top_p: float) -> None:
        self.temperature = temperature
        self.top_p = top_p
        self.broken: list[Tensor] = []  # for each token of a batch: is a row's distribution NaN?

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:  # (B, T), (B, V) -> (B, V)
        p = (logits.float() / self.temperature).softmax(-1)  # (B, V)
        # One NaN or +∞ among the logits makes the whole softmax NaN.
        self.broken.append(p[:, 0].isnan().any())
        drawn = draw_from_nucleus(p, self.top_p) if self.top_p < 1 else draw_tokens(p)  # (B, 1)
        return torch.full_like(logits, -torch.inf).scatter_(1, drawn, 0.0)

    def check(self) -> None:
        """Once a batch: to ask at every token would make a GPU wait for the answer."""
        if torch.stack(self.broken).any():
            raise FloatingPointError("sampling: the model's probabilities are not finite numbers")
        self.broken.clear()


def draw_from_nucleus(p: Tensor, top_p: float) -> Tensor:
    """`draw_tokens` from the fewest tokens that together have probability top_p."""
    p, tokens = p.sort(-1, descending=True)  # (B, V) each
    before = p.cumsum(-1) - p  # probability of all likelier tokens
    drawn = draw_tokens(p * (before < top_p))  # (B, 1), places in the sorted row
    return tokens.gather(1, drawn)


def draw_tokens(p: Tensor) -> Tensor:
    """One token of each row, with probabilities in proportion to p: (B, V) -> (B, 1).

    By the inverse of the cumulative distribution, with one random number a row, where
    `torch.multinomial` draws one for each of V tokens. In float64: a float32 sum of 100,000
    probabilities loses the small ones. A row of NaN gives some token.
    """
    cdf = p.cumsum(-1, dtype=torch.float64)  # (B, V)
    u = 1 - torch.rand(len(p), 1, dtype=torch.float64, device=p.device)  # in (0, 1]
    drawn = torch.searchsorted(cdf, cdf[:, -1:] * u)  # u > 0: no token of probability 0
    return drawn.clamp(max=p.shape[1] - 1)


@torch.no_grad()
def continue_all(
    model, prompts: list[Ids], n: int, max_new_tokens: int, ends: list[int], pad: int, draw_next
) -> list[Ids]:
    """n responses to each of b prompts, (b·n) lists, each up to its end of sequence."""
    ids, mask = pad_left(prompts, pad, model.device)  # (b, P) each
    cache = read_prompts(model, ids, mask, n)
    ids = ids.repeat_interleave(n, 0)  # (b·n, P)
    mask = mask.repeat_interleave(n, 0)  # (b·n, P)
    written: list[Ids] = [[] for _ in ids]
    rows = list(range(len(ids)))  # those that have not ended, B of them
    for start in range(0, max_new_tokens, STRIDE):
        stride = min(STRIDE, max_new_tokens - start)
        inputs = {"input_ids": ids, "attention_mask": mask, **cache}
        output = model.generate(**inputs, max_new_tokens=stride, logits_processor=[draw_next])
        cache = cache_of(output)
        new = output.sequences[:, ids.shape[1] :]  # (B, stride)
        for row, tokens in zip(rows, new.tolist()):
            written[row] += up_to_end(tokens, ends)

        going_on = [k for k, row in enumerate(rows) if written[row][-1] not in ends]
        if not going_on:
            break
        rows = [rows[k] for k in going_on]
        kept = torch.tensor(going_on, device=model.device)
        ids = output.sequences[kept]  # (B, P + stride) of a smaller B
        mask = torch.cat([mask[kept], torch.ones_like(new[kept])], 1)
        if not cache:  # all is read again, but for columns that are padding in every row
            longest = int(mask.sum(1).max())
            ids, mask = ids[:, -longest:], mask[:, -longest:]
        for keys_and_values in cache.values():
            keys_and_values.batch_select_indices(kept)
    return written


def pad_left(prompts: list[Ids], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 (b, P): all rows go on from the same column."""
    rows = [torch.tensor(x) for x in prompts]
    ones = [torch.ones_like(row) for row in rows]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
    mask = pad_sequence(ones, batch_first=True, padding_value=0, padding_side="left")
    return ids.to(device), mask.to(device)


def read_prompts(model, ids: Tensor, mask: Tensor, n: int) -> dict:
    """The cache of all but the last token of b prompts, repeated for n samples of each."""
    if ids.shape[1] == 1:
        return {}
    # `generate` wants to write at least one token: it is thrown away.
    output = model.generate(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], max_new_tokens=1)
    cache = cache_of(output)
    for keys_and_values in cache.values():
        keys_and_values.batch_repeat_interleave(n)
    return cache


def up_to_end(tokens: Ids, ends: list[int]) -> Ids:
    for j, token in enumerate(tokens):
        if token in ends:
            return tokens[: j + 1]
    return tokens


def cache_of(output) -> dict:
    """The cache as an argument of `generate`, by the name that this version of transformers uses.

    Empty where it holds more than keys and values: recurrent and convolution states (Mamba, LFM2,
    Qwen3-Next, …) can be neither repeated nor selected. `generate` then reads all tokens again.
    """
    name = "cache" if "cache" in output else "past_key_values"
    cache = output.get(name)
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", [])}
    if not kinds or not kinds <= KEYS_AND_VALUES or not cache.get_seq_length():
        return {}
    return {name: cache}
