"""Preference bootstrapping: pairs that the policy writes and ranks itself. Copy this file alone: torch and tqdm.

    for each prompt x:  y_1 … y_N ~ π_θ(t−1)(·|x),     y_w = argmax_j r̄_t(x, y_j),     y_l = argmin_j r̄_t(x, y_j)

(SeRA, arXiv:2410.09362.) Sampling is one function and pairing another, so that samples may come from any engine. What
cannot be paired is dropped and counted, above all samples that were cut off by the length limit: do not append an end
of sequence to them; the model never wrote it, so its log-probability means nothing.

To understand the method read `sample_responses` and `best_worst_pairs`. The functions between them make sampling fast
and exact; you may skip them.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from tqdm import tqdm

TokenIds = list[int]
CACHE_TOKENS = {"cuda": 2**17, "cpu": 2**15}  # tokens of key-value cache at a time: what keeps the device busy
STRIDE = 32  # tokens after which samples that have ended leave the batch
KEYS_AND_VALUES = {"DynamicLayer", "DynamicSlidingWindowLayer"}  # transformers' caches of keys and values alone


def sample_responses(
    model, prompts: list[TokenIds], n: int, *, max_new_tokens: int, temperature: float, top_p: float,
    eos_token_id: int | list[int], pad_token_id: int, seed: int, max_tokens: int | None = None, desc: str | None = None,
) -> list[list[tuple[TokenIds, bool]]]:  # fmt: skip
    """n samples y ~ π(·|x) a prompt, as (token ids, ended): those that ended hold their end of sequence, others none.

    Prompts of similar length are sampled together, within `max_tokens` tokens of key-value cache (None: CACHE_TOKENS).
    For one seed, batch size and machine the result is the same; the random generators of the CPU and of the model's
    device are left as they were.
    """
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    broken: list[torch.Tensor] = []  # for every token of a batch: is a row's distribution no numbers?

    def draw_next(_, logits: torch.Tensor) -> torch.Tensor:
        """(B, V) -> (B, V): we draw a token, and give all others −∞, so that the greedy `generate` takes it."""
        p, tokens = (logits.float() / temperature).softmax(-1), None
        broken.append(p[:, 0].isnan().any())  # one NaN or ∞ among the logits makes all of a softmax NaN
        if top_p < 1:  # the fewest tokens that together have probability top_p
            p, tokens = p.sort(-1, descending=True)
            p = p * (p.cumsum(-1) - p < top_p)
        drawn = draw_tokens(p) if tokens is None else tokens.gather(1, draw_tokens(p))  # (B, 1)
        return torch.full_like(logits, -torch.inf).scatter_(1, drawn, 0.0)

    samples: list[list[tuple[TokenIds, bool]]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    longest = max(map(len, prompts), default=0) + max_new_tokens
    size = max(1, (max_tokens or CACHE_TOKENS.get(model.device.type, 2**15)) // (n * longest))  # prompts of a batch
    gpus = [model.device] if model.device.type == "cuda" else []
    bar = tqdm(total=len(prompts), desc=desc, unit="prompt", disable=desc is None)
    with only_our_settings(model, ends, pad_token_id), torch.random.fork_rng(gpus), bar:
        torch.manual_seed(seed)
        for batch in (order[start : start + size] for start in range(0, len(order), size)):
            written = continue_all(model, [prompts[i] for i in batch], n, max_new_tokens, ends, pad_token_id, draw_next)
            if torch.stack(broken).any():  # asked once a batch: a GPU need not wait for it at every token
                raise FloatingPointError("sampling: the model's probabilities are not finite numbers")
            broken.clear()
            for row, tokens in enumerate(written):
                samples[batch[row // n]].append((tokens, tokens[-1] in ends))
            bar.update(len(batch))
    return samples


@contextmanager
def only_our_settings(model, ends: list[int], pad: int) -> Iterator[None]:
    """In eval mode, and without the model's `generation_config`, whose default top_k = 50 changes the distribution."""
    before, modes = model.generation_config, [(part, part.training) for part in model.modules()]
    model.generation_config = type(before)(do_sample=False, repetition_penalty=1.0, num_beams=1, eos_token_id=ends,
                                           pad_token_id=pad, return_dict_in_generate=True)  # fmt: skip
    model.eval()
    try:
        yield
    finally:
        model.generation_config = before
        for part, mode in modes:
            part.training = mode


def draw_tokens(p: torch.Tensor) -> torch.Tensor:
    """For speed: one token a row, as likely as p (B, V) says, (B, 1), by the inverse of the distribution function.

    `torch.multinomial` draws a random number for every token of the vocabulary, this draws one a row. In float64: the
    float32 sum of 100,000 probabilities loses the small ones. Where p is NaN it is some token.
    """
    cdf = p.cumsum(-1, dtype=torch.float64)  # (B, V)
    u = 1 - torch.rand(len(p), 1, dtype=torch.float64, device=p.device)  # in (0, 1]: no token of probability 0
    return torch.searchsorted(cdf, cdf[:, -1:] * u).clamp(max=p.shape[1] - 1)


@torch.no_grad()
def continue_all(
    model, prompts: list[TokenIds], n: int, max_new_tokens: int, ends: list[int], pad: int, draw_next: Callable
) -> list[TokenIds]:
    """For speed: n continuations of each of b prompts side by side, as (b·n) lists, each up to its end of sequence.

    A prompt is read once for its n continuations; every STRIDE tokens those that have ended leave the batch.
    """
    width = max(map(len, prompts))  # padded on the left, so that all rows go on from the same column, and masked
    ids = torch.tensor([[pad] * (width - len(x)) + x for x in prompts], device=model.device)  # (b, P)
    mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in prompts], device=model.device)  # (b, P)
    cache = {}
    if width > 1:  # all but the last token are read; the token that is written after them is thrown away
        cache = cache_of(model.generate(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], max_new_tokens=1))
        for keys_and_values in cache.values():
            keys_and_values.batch_repeat_interleave(n)
    ids, mask = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)  # (b·n, P)
    written: list[TokenIds] = [[] for _ in ids]
    rows = list(range(len(ids)))  # those that go on, B of them
    with keys_like_values(cache):
        for start in range(0, max_new_tokens, STRIDE):
            stride = min(STRIDE, max_new_tokens - start)
            read = {"input_ids": ids, "attention_mask": mask, **cache}
            output = model.generate(**read, max_new_tokens=stride, logits_processor=[draw_next])
            ids, cache = output.sequences, cache_of(output)  # (B, P) -> (B, P + stride)
            for row, tokens in zip(rows, ids[:, mask.shape[1] :].tolist()):
                end = next((j + 1 for j, token in enumerate(tokens) if token in ends), None)
                written[row] += tokens[:end]
            alive = [k for k, row in enumerate(rows) if written[row][-1] not in ends]
            if not alive:
                break
            rows, ids = [rows[k] for k in alive], ids[alive]
            mask = torch.cat([mask[alive], mask.new_ones(len(alive), ids.shape[1] - mask.shape[1])], 1)
            for keys_and_values in cache.values():
                keys_and_values.batch_select_indices(torch.tensor(alive, device=model.device))
    return written


@contextmanager
def keys_like_values(cache: dict) -> Iterator[None]:
    """For memory and speed: meanwhile the keys of this cache are kept in the type of its values.

    Under autocast rotary positions leave keys in float32, beside values in bfloat16; attention would take all of them
    to bfloat16 again at every token, so this changes no number.
    """
    layers = [layer for keys_and_values in cache.values() for layer in keys_and_values.layers]
    with ExitStack() as patches:
        for kind in {type(layer) for layer in layers}:

            def update(layer, keys, values, *args, plain=kind.update, **kwargs):
                return plain(layer, keys.to(values.dtype), values, *args, **kwargs)

            patches.enter_context(patch.object(kind, "update", update))
        for layer in layers:
            layer.keys = layer.keys.to(layer.values.dtype)
        yield


def cache_of(output) -> dict:
    """The cache by the name that this version of transformers gives it, if keys and values are all that it holds.

    Rows of recurrent and convolution states (Mamba, LFM2, Qwen3-Next, …) cannot be repeated or taken out: without a
    cache, `generate` reads again what is written so far.
    """
    name = "cache" if "cache" in output else "past_key_values"
    kinds = {type(layer).__name__ for layer in getattr(output.get(name), "layers", [])}
    return {name: output[name]} if kinds and kinds <= KEYS_AND_VALUES and output[name].get_seq_length() else {}


def best_worst_pairs(
    rewards: list[list[float]], ended: list[list[bool]], responses: list[list[TokenIds]],
    usable: list[list[bool]] | None = None,
) -> tuple[list[tuple[int, int, int]], torch.Tensor, Counter]:  # fmt: skip
    """(prompt, best, worst) index triples, their float32 (P,) margins r̄(best) − r̄(worst) > 0 in nats, and the drops.

    rewards, ended, responses: one list a prompt, one entry a sample; `usable`, where given, bars samples too. Never
    paired, and counted: samples that were cut off, that are not usable, that repeat an earlier one; prompts left with
    fewer than two different rewards. Raises ValueError where the reward of a sample to be paired is not finite.
    """
    pairs: list[tuple[int, int, int]] = []
    dropped: Counter = Counter()
    for i, values in enumerate(rewards):
        seen: dict[tuple[int, ...], int] = {}  # response -> its first sample
        for j, tokens in enumerate(map(tuple, responses[i])):
            if not ended[i][j]:
                dropped["cut-off samples"] += 1
            elif usable is not None and not usable[i][j]:
                dropped["samples below --token_floor"] += 1
            elif tokens in seen:
                dropped["identical samples"] += 1
            elif not math.isfinite(values[j]):
                raise ValueError(f"prompt {i}, sample {j}: the reward is {values[j]}")
            else:
                seen[tokens] = j
        if len({values[j] for j in seen.values()}) < 2:
            dropped["prompts without a pair"] += 1
            continue
        best = max(seen.values(), key=lambda j: values[j])
        worst = min(seen.values(), key=lambda j: values[j])
        pairs.append((i, best, worst))
    return pairs, torch.tensor([rewards[i][best] - rewards[i][worst] for i, best, worst in pairs]), dropped


def read_responses(path: str | Path, encode: Callable[[str], TokenIds], eos_token_id: int):
    """Samples that another engine wrote: JSONL of `prompt`, `response` and, where known, `finish_reason`.

    Returns the prompts, each once, in the file's order, and their samples as `sample_responses` gives them.
    `finish_reason` "stop", or none at all, means that the response ended: it gets its EOS. Any other is a cut-off.
    Raises ValueError naming the line and the field that is not as said.
    """
    samples: dict[str, list[tuple[TokenIds, bool]]] = {}
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            row = response_row(line, f"{path}, line {number}")
            ended = row.get("finish_reason") in (None, "stop")
            tokens = encode(row["response"]) + [eos_token_id] * ended
            samples.setdefault(row["prompt"], []).append((tokens, ended))
    return list(samples), list(samples.values())


def response_row(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    for field in ("prompt", "response"):
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise ValueError(f"{where}: the field '{field}' must be a string")
    return row
