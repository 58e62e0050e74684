"""Preference bootstrapping: pairs that the policy writes and ranks itself. Copy this file alone: torch and tqdm.

    for each prompt x:  y_1 … y_N ~ π_θ(t−1)(·|x),     y_w = argmax_j r̄_t(x, y_j),     y_l = argmin_j r̄_t(x, y_j)

(SeRA, arXiv:2410.09362.) Sampling is one function and pairing another, so that the samples may come from any engine:
`read_responses` takes its JSONL. What cannot be paired is dropped and counted, never mended:
a sample cut off by the length limit has no end, and the end of sequence that it never said would get an absurd reward.
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

TokenIds = list[int]
CACHE_TOKENS = {"cuda": 2**17, "cpu": 2**15}  # sampled side by side, key-value cache: what keeps the device busy
STRIDE = 32


def sample_responses(
    model,
    prompts: list[TokenIds],
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
) -> list[list[tuple[TokenIds, bool]]]:
    """n samples y ~ π(·|x) a prompt, as (token ids, ended): ended samples hold their end of sequence, others none.

    Prompts of like length are sampled together, within `max_tokens` tokens of key-value cache (None: CACHE_TOKENS).
    The result depends on the seed and on nothing drawn before, and torch's generators are left as they were. Every
    setting is ours: the model's own `generation_config` (top_k = 50 where it says nothing!) is put aside meanwhile.
    """
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    own_settings, was_training = model.generation_config, model.training
    model.generation_config = type(own_settings)(
        do_sample=False, repetition_penalty=1.0, num_beams=1, eos_token_id=ends, pad_token_id=pad_token_id,
        return_dict_in_generate=True,
    )  # fmt: skip
    model.eval()
    samples: list[list[tuple[TokenIds, bool]]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    longest = max(map(len, prompts), default=0) + max_new_tokens
    size = max(1, (max_tokens or CACHE_TOKENS.get(model.device.type, 2**15)) // (n * longest))  # prompts of a batch

    def pick(_, logits: torch.Tensor) -> torch.Tensor:  # the one of each row that `generate` may choose
        p, words = (logits.float() / temperature).softmax(-1), None  # (B, V)
        if top_p < 1:  # the fewest words that hold top_p of the probability
            p, words = p.sort(-1, descending=True)
            p = p * (p.cumsum(-1) - p < top_p)
        drawn = draw(p) if words is None else words.gather(1, draw(p))  # (B, 1)
        return torch.full_like(logits, -torch.inf).scatter_(1, drawn, 0.0)

    try:
        gpus = [model.device] if model.device.type == "cuda" else []
        bar = tqdm(total=len(prompts), desc=desc, unit="prompt", disable=desc is None)
        with torch.random.fork_rng(gpus), bar:
            torch.manual_seed(seed)
            for batch in (order[start : start + size] for start in range(0, len(order), size)):
                written = continue_all(model, [prompts[i] for i in batch], n, max_new_tokens, ends, pad_token_id, pick)
                for row, tokens in enumerate(written):
                    samples[batch[row // n]].append((tokens, tokens[-1] in ends))
                bar.update(len(batch))
    finally:
        model.generation_config = own_settings
        model.train(was_training)
    return samples


def draw(p: torch.Tensor) -> torch.Tensor:
    """One word a row, as likely as p (B, V) says: (B, 1), by the inverse of its distribution function.

    torch.multinomial draws a random number for every word of the vocabulary; this, one a row. In float64: in float32
    a sum of 100,000 words loses the improbable ones. Raises FloatingPointError where p is not numbers.
    """
    cdf = p.cumsum(-1, dtype=torch.float64)  # (B, V)
    if not cdf[:, -1].isfinite().all():
        raise FloatingPointError("sampling: the model's probabilities are not finite numbers")
    u = 1 - torch.rand(len(p), 1, dtype=torch.float64, device=p.device)  # in (0, 1]: no word of probability 0
    return torch.searchsorted(cdf, cdf[:, -1:] * u)


@torch.no_grad()
def continue_all(model, prompts: list[TokenIds], n: int, max_new_tokens: int, ends, pad: int, pick) -> list[TokenIds]:
    """n continuations of each of b prompts, side by side: (b·n) lists, each up to its end of sequence.

    A prompt is read once for all its n continuations, and those that have ended leave the batch, every STRIDE tokens.
    """
    width = max(map(len, prompts))
    # Left padding, so that all rows go on from the same column; masked, hence without effect.
    ids = torch.tensor([[pad] * (width - len(x)) + x for x in prompts], device=model.device)  # (b, P)
    mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in prompts], device=model.device)  # (b, P)
    cache = {}
    if width > 1:  # all but the last token, which `generate` reads
        read = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        body = model.get_decoder() or model.base_model
        cache = cache_of(body(**{name: value[:, :-1] for name, value in read.items()}, use_cache=True))
        for keys_and_values in cache.values():
            keys_and_values.batch_repeat_interleave(n)
    ids, mask = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)  # (b·n, P)
    written: list[TokenIds] = [[] for _ in ids]
    rows = list(range(len(ids)))  # of those that go on, B of them
    for start in range(0, max_new_tokens, STRIDE):
        stride = min(STRIDE, max_new_tokens - start)
        read = {"input_ids": ids, "attention_mask": mask, **cache}
        output = model.generate(**read, max_new_tokens=stride, logits_processor=[pick])
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


def cache_of(output) -> dict:
    """The key-value cache, by the name that this version of transformers gives it."""
    name = "cache" if "cache" in output else "past_key_values"
    return {name: output[name]}


def best_worst_pairs(
    rewards: list[list[float]], ended: list[list[bool]], responses: list[list[TokenIds]]
) -> tuple[list[tuple[int, int, int]], torch.Tensor, Counter]:
    """(prompt, best, worst) index triples, their float32 (P,) margins r̄(best) − r̄(worst) > 0 in nats, and the drops.

    rewards, ended, responses: one list a prompt, one entry a sample. Samples that were cut off or say the same as an
    earlier one are never paired, and a prompt left with fewer than two different rewards has no pair: each is counted.
    Raises ValueError where the reward of a finished sample is not a finite number.
    """
    pairs: list[tuple[int, int, int]] = []
    margins: list[float] = []
    dropped: Counter = Counter()
    for i, (values, finished, texts) in enumerate(zip(rewards, ended, responses, strict=True)):
        seen: dict[tuple[int, ...], int] = {}  # response -> its first sample
        for j, (reward, is_whole, tokens) in enumerate(zip(values, finished, texts, strict=True)):
            if not is_whole:
                dropped["cut-off samples"] += 1
            elif tuple(tokens) in seen:
                dropped["identical samples"] += 1
            elif not math.isfinite(reward):
                raise ValueError(f"prompt {i}, sample {j}: the reward is {reward}")
            else:
                seen[tuple(tokens)] = j
        best = max(seen.values(), key=lambda j: values[j], default=None)
        worst = min(seen.values(), key=lambda j: values[j], default=None)
        if best is None or worst is None or values[best] == values[worst]:  # fewer than two, or all of one reward
            dropped["prompts without a pair"] += 1
            continue
        pairs.append((i, best, worst))
        margins.append(values[best] - values[worst])
    return pairs, torch.tensor(margins), dropped


def read_responses(
    path: str | Path, encode: Callable[[str], TokenIds], eos_token_id: int
) -> tuple[list[str], list[list[tuple[TokenIds, bool]]]]:
    """Samples that another engine wrote: JSONL of `prompt`, `response` and, where known, `finish_reason`.

    Returns the prompts, each once, in the file's order, and their samples as `sample_responses` gives them.
    `finish_reason` "stop", or none at all, means that the response ended: it gets its EOS. Any other is a cut-off.
    Raises ValueError naming the line and field that is not as said.
    """
    samples: dict[str, list[tuple[TokenIds, bool]]] = {}
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            for field in ("prompt", "response"):
                if not isinstance(row, dict) or not isinstance(row.get(field), str):
                    raise ValueError(f"{path}, line {number}: the field '{field}' must be a string")
            ended = row.get("finish_reason") in (None, "stop")
            tokens = encode(row["response"]) + [eos_token_id] * ended
            samples.setdefault(row["prompt"], []).append((tokens, ended))
    return list(samples), list(samples.values())
