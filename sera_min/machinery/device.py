"""What a GPU asks for: the precision of products, and what to do when its memory runs out."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from tqdm import tqdm

from sera_min.bootstrap import CACHE_TOKENS
from sera_min.logprobs import sequence_logprobs
from sera_min.machinery.errors import InputError, one_line
from sera_min.pairs import padded_tokens

FEW_TOKENS = 8192  # a pass of fewer leaves a GPU idle: gradient checkpointing costs less
MOST_TOKENS = 32768  # with more, a pass is no faster
MOST_CACHED = 2**20  # tokens in the key-value cache: with more, sampling is no faster


def devices() -> list[str]:
    """The names of the devices that are there."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if not gpus:
        return ["cpu"]
    return ["cpu", *gpus, "cuda"]


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


def halve(layer: Any) -> None:
    """A frozen layer's weights in 16 bits, if that loses nothing: so most models are published."""
    for dtype in (torch.bfloat16, torch.float16):
        halved = layer.weight.data.to(dtype)
        if torch.equal(halved.float(), layer.weight.data):
            layer.weight.data = halved
            return


def prepare(device: str) -> None:
    """torch's settings for a GPU, set once."""
    if torch.device(device).type != "cuda":
        return
    # The head's float32 products, which autocast leaves alone, may use TF32: 10 bits, and fast.
    torch.backends.cuda.matmul.allow_tf32 = True
    # cuDNN's attention would build a plan, up to half a second of work, for every new shape, and
    # nearly every batch of ours has a shape of its own.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not has_bfloat16(device):
        name = torch.cuda.get_device_name(device)
        print(f"{name} has no bfloat16: all products are float32, which is slow")


def compile_layers(policy: Any, backend: str = "inductor") -> None:
    """The model's layers as compiled code: half of the kernels, and two thirds of the memory.

    All layers have the same code, so it is compiled once, for rows of any number and length, in
    about half a minute. The environment's TORCHDYNAMO_DISABLE=1 does without.
    """
    layers = policy._no_split_modules or []  # transformers' names for their classes
    for part in policy.modules():
        if type(part).__name__ in layers:
            part.compile(dynamic=True, backend=backend)


def can_compile(device: str) -> bool:
    """torch.compile needs Triton and a C compiler. On a CPU it gains little."""
    if torch.device(device).type != "cuda":
        return False
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except Exception as error:
        print(f"layers are not compiled, and a step takes longer: {one_line(error)}")
        return False
    return True


def uncompiled() -> Any:
    """While this is open, layers run uncompiled. In sampling each token's cache has another shape to compile for."""
    return torch.compiler.set_stance("force_eager")


def check_memory(policy: Any, device: str) -> None:
    """The GPU holds what training needs beside the activations. Raises InputError."""
    if torch.device(device).type != "cuda":
        return
    each = 16  # bytes a parameter that is trained: weight, gradient, AdamW's two moments
    if has_bfloat16(device):
        each = 18  # and autocast's copy
    needed = 0
    for p in policy.parameters():
        if p.requires_grad:
            needed += each * p.numel()
        else:
            needed += p.nbytes
    there = torch.cuda.get_device_properties(device).total_memory
    if needed > there:
        raise InputError(
            f"the model needs {needed / 1e9:.0f} GB, {each} bytes for each parameter that is trained, and room "
            f"for activations; the GPU has {there / 1e9:.0f} GB. Take --use_peft, a smaller model, or "
            "experiments/with_trl.py on several GPUs with FSDP"
        )


def training_tokens(policy: Any, length: int, device: str) -> int:
    """How many tokens a training pass has room for, by what two small ones of rows of this length take.

    0 where these do not fit.
    """
    policy.train()
    try:
        peak_of_pass(policy, 2, length, device)  # not counted: it compiles, and makes the gradients
        small = peak_of_pass(policy, 2, length, device)
        large = peak_of_pass(policy, 8, length, device)
    except torch.OutOfMemoryError:
        return 0
    finally:
        policy.zero_grad()
        policy.eval()
    each = (large - small) / (6 * length)  # bytes a token
    fixed = small - 2 * length * each
    optimizer = 12 * sum(p.numel() for p in policy.parameters() if p.requires_grad)  # gradients and two moments
    room = 0.9 * free_memory(device) - optimizer - fixed  # a tenth is lost between blocks
    return int(room / each)


def peak_of_pass(policy: Any, rows: int, length: int, device: str) -> int:
    """Bytes that a forward and backward pass takes beside what was there before."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    x, y = [0] * (length - length // 2), [0] * (length // 2)
    with autocast(device):
        logps, _lengths = sequence_logprobs(policy, [x] * rows, [y] * rows)
    logps.sum().backward()
    return torch.cuda.max_memory_allocated(device) - before


def sampling_tokens(policy: Any, longest: int, device: str) -> int:
    """How many tokens the key-value cache may hold while rows of at most `longest` are sampled."""
    if torch.device(device).type != "cuda":
        return CACHE_TOKENS["cpu"]
    config = policy.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    of_cache = 2 * 4 * config.num_hidden_layers * heads * size  # keys and values, float32 at most
    of_row = 40 * config.vocab_size  # logits, probabilities and their float64 sums
    tokens = int(0.5 * free_memory(device) / (of_cache + of_row / longest))
    return min(tokens, MOST_CACHED)


def free_memory(device: str) -> int:
    """Bytes that this process can still have."""
    free, _total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def retry_on_oom(attempt: Callable[..., Any], tokens: int, least: int) -> Any:
    """attempt(max_tokens=tokens); each time memory runs out with half as many, but never below `least`."""
    while True:
        try:
            return attempt(max_tokens=tokens)
        except torch.OutOfMemoryError:
            if tokens <= least:
                raise
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
            fitting[optimizer] = max_tokens  # should it not fit either, the next attempt overwrites it
            forget_gradients(optimizer)
            smaller = replace(config, max_tokens=max_tokens)
            return step(policy, optimizer, pairs, reference, smaller, variant)

        tokens = fitting.get(optimizer, config.max_tokens)
        longest = max(padded_tokens(pair) for pair in pairs)
        return retry_on_oom(attempt, tokens, longest)

    return wrapped


def forget_gradients(optimizer: torch.optim.Optimizer) -> None:
    """The gradients go, and the state of parameters for which memory ran out between AdamW's two moments."""
    optimizer.zero_grad()
    for p in list(optimizer.state):
        if "exp_avg_sq" not in optimizer.state[p]:
            del optimizer.state[p]
