"""Where the method meets the device: precision, memory, and log-probs and samples by the flags."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sera_min import bootstrap, report
from sera_min.config import Resolved
from sera_min.files import in_one_line
from sera_min.forms import InputError
from sera_min.logprobs import score, sum_and_least
from sera_min.pairs import Ids


def amp(device: str) -> torch.autocast:
    """Weights stay float32; on a GPU products are bfloat16. End it before a step: it keeps copies of the weights."""
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=has_bfloat16(device))


def has_bfloat16(device: str) -> bool:
    """Whether `device` is a GPU that multiplies in bfloat16: of NVIDIA's those since Ampere (A100, RTX 30)."""
    if torch.device(device).type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def set_precision(device: str) -> None:
    """On a GPU the head's float32 products, which are in no autocast, are TF32: as exact as 10 bits, and fast."""
    if torch.device(device).type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        if not has_bfloat16(device):
            print(f"{torch.cuda.get_device_name(device)} has no bfloat16: all products are float32, which is slow")


def retry_on_oom(attempt: Callable[[int], Any], tokens: int, least: int, name: str = "") -> tuple[Any, int]:
    """Returns attempt(tokens) and the tokens that fitted: where memory runs out, again with half, not below `least`.

    `name` is put before what is said of an error.
    """
    while True:
        try:
            return attempt(tokens), tokens
        except torch.OutOfMemoryError:
            if tokens <= least:
                raise
        except (FloatingPointError, InputError) as error:
            raise type(error)(f"{name}{error}") from error
        tokens = max(tokens // 2, least)
        tqdm.write(f"out of memory: again, with {tokens} tokens at a time")


@report.timed("scoring")
def score_rows(model: Any, prompts: list[Ids], responses: list[Ids], config: Resolved, desc: str | None) -> Tensor:
    """log π(y|x) of R rows and the log-prob of each one's least likely token, nats: float32 (R, 2), on the CPU."""

    def attempt(max_tokens: int) -> Tensor:
        with amp(config.device), in_one_line("the model fails"):
            return score(model, prompts, responses, max_tokens=max_tokens, of=sum_and_least, desc=desc)[0]

    longest = max((len(x) + len(y) for x, y in zip(prompts, responses)), default=0)
    logps = retry_on_oom(attempt, config.max_tokens, longest)[0]
    if not logps.isfinite().all():
        row = int((~logps.isfinite()).nonzero()[0, 0])
        raise FloatingPointError(f"{desc or 'check'}: log π(y|x) of response {row} is {logps[row, 0]}")
    return logps


def draw_samples(
    model: Any, prompts: list[Ids], n: int, config: Resolved, *, ends: list[int], pad: int, seed: int, desc: str | None
) -> list[list[tuple[Ids, bool]]]:
    """n samples of each prompt, by the flags. Where memory runs out others are drawn, in smaller batches."""

    def attempt(max_tokens: int) -> list[list[tuple[Ids, bool]]]:
        with amp(config.device), in_one_line("the model fails"):
            return bootstrap.sample_responses(
                model, prompts, n, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                top_p=config.top_p, eos_token_id=ends, pad_token_id=pad, seed=seed, max_tokens=max_tokens, desc=desc,
            )  # fmt: skip

    cache = bootstrap.CACHE_TOKENS[torch.device(config.device).type]
    least = n * (config.max_prompt_length + config.max_new_tokens)  # longest prompts come first: it fails at once
    return retry_on_oom(attempt, cache, least, f"{desc or 'sampling'}: ")[0]


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's step, after which gradients go. Where memory runs out, an InputError: it is not repeated."""
    try:
        optimizer.step()
    except torch.OutOfMemoryError:
        raise InputError("AdamW's two moments of every weight do not fit the GPU beside the model") from None
    optimizer.zero_grad()  # gradients need not wait in memory for the next step


def check_memory(policy: Any, device: str) -> None:
    """The GPU holds what training needs beside the activations. Raises InputError."""
    if torch.device(device).type != "cuda":
        return
    count = sum(p.numel() for p in policy.parameters())
    each = 18 if has_bfloat16(device) else 16  # bytes
    needed, there = each * count / 1e9, torch.cuda.get_device_properties(policy.device).total_memory / 1e9
    if needed > there:
        parts = f"{each} bytes each: weight, gradient, AdamW's two moments{', bfloat16 copy' * (each == 18)}"
        raise InputError(f"training {count / 1e9:.1f} billion parameters needs {needed:.0f} GB ({parts}) and room for "
                         f"activations; the GPU has {there:.0f} GB. Take a smaller model, or experiments/with_trl.py "
                         "on several GPUs with FSDP")  # fmt: skip
