"""What a GPU asks for: the precision of products, and what to do when its memory runs out."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from tqdm import tqdm

from sera_min.machinery.errors import InputError, in_one_line
from sera_min.pairs import padded_tokens


def autocast(device: str) -> torch.autocast:
    """Weights stay float32; on a GPU matrix products are computed in bfloat16."""
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=has_bfloat16(device))


def has_bfloat16(device: str) -> bool:
    """Of NVIDIA's GPUs those since Ampere (A100, RTX 30) multiply in bfloat16."""
    if torch.device(device).type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def set_precision(device: str) -> None:
    """The head's float32 products, which autocast leaves alone, may use TF32: 10 bits, and fast."""
    if torch.device(device).type != "cuda":
        return
    torch.backends.cuda.matmul.allow_tf32 = True
    if not has_bfloat16(device):
        name = torch.cuda.get_device_name(device)
        print(f"{name} has no bfloat16: all products are float32, which is slow")


def check_memory(policy: Any, device: str) -> None:
    """The GPU holds what training needs beside the activations. Raises InputError."""
    if torch.device(device).type != "cuda":
        return
    each = 16  # bytes a parameter
    parts = "weight, gradient, AdamW's two moments"
    if has_bfloat16(device):
        each, parts = 18, parts + ", bfloat16 copy"
    count = sum(p.numel() for p in policy.parameters())
    needed = each * count
    there = torch.cuda.get_device_properties(policy.device).total_memory
    if needed > there:
        raise InputError(
            f"training {count / 1e9:.1f} billion parameters needs {needed / 1e9:.0f} GB "
            f"({each} bytes each: {parts}) and room for activations; the GPU has "
            f"{there / 1e9:.0f} GB. Take a smaller model, or experiments/with_trl.py on several "
            "GPUs with FSDP"
        )


def retry_on_oom(attempt: Callable[[int], Any], tokens: int, least: int, where: str = "") -> tuple[Any, int]:
    """attempt(tokens), and the tokens that fitted: each time memory runs out, half as many.

    Never below `least`. `where` is put before the message of an error.
    """
    while True:
        try:
            return attempt(tokens), tokens
        except torch.OutOfMemoryError:
            if tokens <= least:
                raise
        except (FloatingPointError, InputError) as error:
            raise type(error)(f"{where}{error}") from error
        tokens = max(tokens // 2, least)
        tqdm.write(f"out of memory: again, with {tokens} tokens at a time")


def halve_if_out_of_memory(step: Callable) -> Callable:
    """Decorates train.train_step: where memory runs out, the step is taken again from the start.

    It then has micro-batches of half as many tokens, as have the later steps of its optimizer.
    """
    fitting: WeakKeyDictionary = WeakKeyDictionary()  # optimizer -> max_tokens

    @functools.wraps(step)
    def wrapped(policy, optimizer, pairs, reference, config, variant):
        def attempt(max_tokens: int) -> Any:
            forget_gradients(optimizer)
            smaller = replace(config, max_tokens=max_tokens)
            with in_one_line("the model fails"):
                return step(policy, optimizer, pairs, reference, smaller, variant)

        tokens = fitting.get(optimizer, config.max_tokens)
        longest = max(padded_tokens(pair) for pair in pairs)
        metrics, fitting[optimizer] = retry_on_oom(attempt, tokens, longest)
        return metrics

    return wrapped


def forget_gradients(optimizer: torch.optim.Optimizer) -> None:
    """And moments of which memory held only the first."""
    optimizer.zero_grad()
    for p in list(optimizer.state):
        if "exp_avg_sq" not in optimizer.state[p]:
            del optimizer.state[p]
