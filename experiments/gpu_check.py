"""What sera_min does on a GPU: is it exact there, how fast beside TRL, how much memory. One JSON.

    python experiments/gpu_check.py                         seven minutes on an H200, by the sum of its parts
    python experiments/gpu_check.py --parts own step-3B lora    these are only done when named

A part that is not named, or of which nothing could be measured, keeps its figures, and where they are from. Without a
GPU all parts but the steps of larger models run in small form, to show that the program itself works, and nothing is
written. Beside sera_min's own packages it needs `trl`. Torch and transformers are taken as they are found.

Writes experiments/results/gpu.json, or --output, after each measurement. One that takes longer than four minutes, or
for which nothing is left of the eight (--limit) that all may take, is left out, and said to be. A rate counts real,
unpadded tokens; every step has new pairs, so nearly all of its batches have shapes that were not seen before, as in a
run. The utilisation is of 790 TFLOP/s, about what a large bfloat16 product reaches on an H100 or H200; the data
sheet says 989.
"""

import argparse
import contextlib
import copy
import gc
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import bench
import torch
import transformers
from bench import DEVICE, clock, made_model, made_pairs, mfu, tokens_of
from transformers import AutoConfig, AutoModelForCausalLM

import train
from sera_min import bootstrap, logprobs, playground
from sera_min.lora import add_lora, linear_layers
from sera_min.machinery import device
from sera_min.machinery.folder import write
from sera_min.pairs import rows_of

GPU = DEVICE == "cuda"
RESULT = ROOT / "experiments/results/gpu.json"
SHAPES = ("135M", "1.1B")
PAIRS = 32  # in a step
FORMS = {  # name, max_tokens, whether layers are compiled, gradient checkpointing
    "135M": [("compiled, 16384", 16384, True, False), ("compiled, 32768", 32768, True, False),
             ("as written, 16384", 16384, False, False)],
    "1.1B": [("compiled, 16384", 16384, True, False), ("compiled, 16384, checkpointing", 16384, True, True)],
    "3B": [("compiled, 16384, checkpointing", 16384, True, True)],
}  # fmt: skip
TRL_BATCHES = {"135M": (8, 16), "1.1B": (4, 8), "3B": ()}  # pairs a pass
LONGEST = 240  # seconds of a measurement
SAMPLED = 1024  # rows
NEW = 64  # tokens of a sample
FAMILIES = """llama qwen2 qwen3 mistral gemma gemma2 phi phi3 gpt2 gpt_neox opt cohere granite stablelm olmo2""".split()
COMPILED = ("llama", "gemma2", "gpt2")  # of these: it takes seconds each
SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "n_embd": 64, "n_layer": 2, "n_head": 4, "ffn_dim": 128,
    "word_embed_proj_dim": 64, "max_position_embeddings": 1024, "n_positions": 1024, "pad_token_id": 0,
    "bos_token_id": 2, "eos_token_id": 1, "initializer_range": 0.05,
}  # fmt: skip
if not GPU:
    bench.PROMPT, bench.RESPONSE, PAIRS, SAMPLED, NEW = 20, 30, 4, 8, 6
    bench.SHAPES.update(dict.fromkeys([*FORMS, "8B"], (64, 96, 2, 2, 2, 500)))
    FORMS = {"135M": FORMS["135M"][1:]}
    TRL_BATCHES = {"135M": (2,)}
    FAMILIES = FAMILIES[:3]
bench.PAIRS = PAIRS


def forget() -> None:
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def gigabytes() -> float | None:
    return torch.cuda.max_memory_allocated() / 1e9 if GPU else None


def busy(work: Any) -> dict[str, Any]:
    """Kernels that `work` launches, and the share of its time in which they run."""
    if not GPU:
        return {}
    from torch.profiler import ProfilerActivity, profile

    work()
    began = clock()
    work()
    seconds = clock() - began  # without the profiler, which slows the host
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        work()
        clock()
    kernels = [e for e in profiled.key_averages() if e.self_device_time_total > 0]
    running = sum(e.self_device_time_total for e in kernels) / 1e6  # one stream: none runs beside another
    milliseconds: Counter[str] = Counter()
    for kernel in kernels:  # long names begin alike
        milliseconds[f"{kernel.key[:60]} … {kernel.key[-60:]}"] += kernel.self_device_time_total / 1e3
    return {
        "kernels": sum(e.count for e in kernels), "seconds": seconds, "GPU seconds": running,
        "share": running / seconds, "largest, ms": dict(milliseconds.most_common(12)),
    }  # fmt: skip


# Parts


def environment() -> dict[str, Any]:
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if GPU else "CPU", "torch": torch.__version__,
        "transformers": transformers.__version__, "trl": version("trl"), "commit": commit.stdout.strip(),
        "host CPUs": os.cpu_count(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    if GPU:
        a, b = torch.randn(2, 8192, 8192, device=DEVICE, dtype=torch.bfloat16).unbind()
        seconds = statistics.median(timed(lambda: a @ b, 10))
        found["TFLOP/s of a bfloat16 product"] = 2 * 8192**3 / seconds / 1e12
        found["GB"] = torch.cuda.get_device_properties(0).total_memory / 1e9
    return found


def timed(work: Any, repeats: int) -> list[float]:
    work()
    seconds = []
    for _ in range(repeats):
        began = clock()
        work()
        seconds.append(clock() - began)
    return seconds


def exact_family(family: str) -> dict[str, float]:
    """Log-probs of a small model of a family against float64, one row at a time; and gradients."""
    torch.backends.cuda.matmul.allow_tf32 = False  # exactness is checked in float32
    known = vars(AutoConfig.for_model(family))
    torch.manual_seed(0)
    sizes = {name: size for name, size in SIZES.items() if name in known or name == "num_key_value_heads"}
    config = AutoConfig.for_model(family, **sizes)
    model = AutoModelForCausalLM.from_config(config).to(DEVICE).eval()
    double = copy.deepcopy(model).double()
    rng = random.Random(0)
    x, y = [[[rng.randrange(3, 512) for _ in range(n)] for n in lengths] for lengths in ((40, 90, 17), (60, 30, 90))]
    right = torch.stack([logprobs.plain_logprob(double, *row) for row in zip(x, y)])  # (3,)
    right.sum().backward()
    tokens = torch.tensor([len(ids) for ids in y], device=DEVICE)

    sums, _ = logprobs.sequence_logprobs(model, x, y)
    sums.sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    exact = torch.cat([p.grad.flatten() for p in double.parameters()])
    found = {"float32, relative": ((sums - right) / right).abs().max().item()}
    found["its gradient, relative"] = ((gradient - exact).norm() / exact.norm()).item()
    with device.autocast(DEVICE), torch.no_grad():
        rounded, _ = logprobs.sequence_logprobs(model, x, y)
        found["bfloat16, nats a token"] = ((rounded - right).abs() / tokens).max().item()
        if family in COMPILED:
            device.compile_layers(model)
            compiled, _ = logprobs.sequence_logprobs(model, x, y)
            found["bfloat16 and compiled, nats a token"] = ((compiled - right).abs() / tokens).max().item()
    torch._dynamo.reset()
    return found


class Steps:
    """train.py's own step, on new pairs each time."""

    def __init__(self, shape: str, max_tokens: int, compiled: bool, checkpointing: bool, lora: bool = False) -> None:
        forget()
        torch._dynamo.reset()
        self.model = made_model(shape).train()
        if lora:
            add_lora(self.model, 16, 32)
            if GPU:
                for layer in linear_layers(self.model).values():
                    layer.weight.data = layer.weight.data.bfloat16()
            forget()
        self.vocabulary = self.model.config.vocab_size
        if compiled:
            device.compile_layers(self.model)
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
        self.config = replace(bench.settings(), max_tokens=max_tokens)

    def step(self, seed: int = 0) -> float:
        """Tokens a second."""
        pairs = pairs_of(self.vocabulary, seed)
        reference = torch.full((PAIRS, 2), -1000.0)
        began = clock()
        train.train_step(self.model, self.optimizer, pairs, reference, self.config, train.SERA)
        return tokens_of(pairs) / (clock() - began)


def pairs_of(vocabulary: int, seed: int) -> list[Any]:
    return made_pairs((seed + 1) * PAIRS, vocabulary)[-PAIRS:]


def safely(work: Any, seconds: float) -> Any:
    """work(), or what kept it from an end within so many seconds."""
    if seconds < 10:
        return "no time was left"

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"not done in {seconds:.0f} seconds")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(int(seconds))
    try:
        return work()
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:
        traceback.print_exc()
        return repr(error)[:300]
    finally:
        signal.alarm(0)


def step_of(shape: str, max_tokens: int, compiled: bool, checkpointing: bool) -> dict[str, Any]:
    """A training step of 32 pairs, ours."""
    steps = Steps(shape, max_tokens, compiled, checkpointing)
    began = clock()
    for seed in range(3):
        steps.step(seed)
    first = clock() - began
    rates = [steps.step(seed) for seed in range(3, 9 if GPU else 4)]
    found = {"tokens/s": statistics.median(rates), "slowest": min(rates), "peak GB": gigabytes()}
    found["the first three, seconds"] = first
    found["utilisation"] = mfu(shape, found["tokens/s"])
    return found | {"busy": busy(lambda: steps.step(3))}


def step_of_trl(shape: str, batch: int) -> dict[str, Any]:
    """The same, TRL's, in passes of `batch` pairs."""
    forget()
    count = 8 if GPU else 3
    model = made_model(shape)
    pairs = made_pairs(count * PAIRS, model.config.vocab_size)
    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = clock()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(clock() - self.began)

    with bench.compact_head(not GPU):
        trainer = bench.trl_trainer(model, pairs, count, batch, **bench.FAIR)
        trainer.add_callback(Clock())
        trainer.train()
    steps = [pairs[i * PAIRS : (i + 1) * PAIRS] for i in range(count)]
    rates = [tokens_of(of_step) / s for of_step, s in zip(steps, seconds)][2:]
    found = {"tokens/s": statistics.median(rates), "slowest": min(rates), "peak GB": gigabytes()}
    return found | {"utilisation": mfu(shape, found["tokens/s"])}


def with_lora() -> dict[str, Any]:
    """A model of 8 billion parameters with LoRA: a training step, scoring and sampling."""
    steps = Steps("8B", 16384, compiled=True, checkpointing=True, lora=True)
    for seed in range(3):
        steps.step(seed)
    rates = [steps.step(seed) for seed in range(3, 7)]
    found = {"step, tokens/s": statistics.median(rates), "step, peak GB": gigabytes()}
    model = steps.model.eval()
    del steps
    forget()
    pairs = pairs_of(model.config.vocab_size, 9)

    def work() -> None:
        with device.autocast(DEVICE):
            logprobs.score(model, *rows_of(pairs), max_tokens=16384)

    found["score, tokens/s"] = tokens_of(pairs) / statistics.median(timed(work, 3))
    found["score, peak GB"] = gigabytes()
    forget()
    prompts = [pair.prompt[:256] for pair in pairs]
    settings = {"max_new_tokens": NEW, "eos_token_id": 1, "max_tokens": device.MOST_CACHED}
    began = clock()
    with device.uncompiled():
        tokens = bench.sample_ours(model, prompts, **settings)
    found["sample, tokens/s"] = tokens / (clock() - began)
    found["sample, peak GB"] = gigabytes()
    return found


def score_of(shape: str) -> dict[str, Any]:
    forget()
    model = made_model(shape).eval()
    device.compile_layers(model)
    pairs = made_pairs(4 * PAIRS, model.config.vocab_size)

    def work() -> None:
        with device.autocast(DEVICE):
            logprobs.score(model, *rows_of(pairs), max_tokens=16384)

    rate = tokens_of(pairs) / statistics.median(timed(work, 3))
    return {"tokens/s": rate, "peak GB": gigabytes(), "busy": busy(work)}


def sample_of(shape: str) -> dict[str, Any]:
    """New tokens a second: train.py's sampling, and `generate` with 8 prompts at a time; both 4 samples a prompt."""
    forget()
    model = made_model(shape).eval()
    prompts = [pair.prompt[:256] for pair in made_pairs(SAMPLED // 4, model.config.vocab_size)]

    def ours(prompts: list[list[int]], new: int = NEW) -> int:
        settings = {"max_new_tokens": new, "eos_token_id": 1, "max_tokens": device.MOST_CACHED}
        return bench.sample_ours(model, prompts, **settings)

    def theirs() -> None:
        with device.autocast(DEVICE):
            generated(model, prompts[:8])

    tokens = ours(prompts)
    [seconds] = timed(lambda: ours(prompts), 1)
    found = {"ours, tokens/s": tokens / seconds, "ours, peak GB": gigabytes()}
    found["a token of all rows, ms"] = 1e3 * seconds / NEW
    [seconds] = timed(theirs, 1)
    found["generate with 8 prompts, tokens/s"] = 4 * NEW * len(prompts[:8]) / seconds
    draw = bootstrap.DrawNext(1.0, 1.0)
    logits = torch.randn(SAMPLED, model.config.vocab_size, device=DEVICE)
    found["drawing a token, ms"] = 1e3 * statistics.median(timed(lambda: draw(logits[:, :1].long(), logits), 20))
    found["busy, 16 tokens"] = busy(lambda: ours(prompts, 16))
    return found


def generated(model: Any, prompts: list[list[int]]) -> None:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(x)) + x for x in prompts], device=DEVICE)
    mask = (ids != 0).long()
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 4, "pad_token_id": 0}
    model.generate(input_ids=ids, attention_mask=mask, min_new_tokens=NEW, max_new_tokens=NEW, **options)


def run() -> dict[str, Any]:
    """`python train.py`, as a newcomer runs it."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place, "run")
        began = time.perf_counter()
        if GPU:
            subprocess.run([sys.executable, ROOT / "train.py", "--output_dir", out], check=True)
        else:  # in small form
            world = {**vars(playground), "make_sft_policy": lambda *a: playground.make_sft_policy(*a, steps=60)}
            variant = replace(train.SERA, world=SimpleNamespace(**world))
            train.main(train.Config(max_train_pairs=64, iterations=2, output_dir=str(out)), variant)
        seconds = time.perf_counter() - began
        last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    return {"seconds": seconds, **{name: last[name] for name in ("gold/reward", "gold/win_rate", "select/precision")}}


def own() -> dict[str, Any]:
    """`python train.py` on a model and data of one's own: 256 pairs, two iterations, seconds by phase."""
    return {name: seconds for name, seconds, *_ in bench.iteration_part("135M", 256 if GPU else 8, None)}


def step_forms(shape: str) -> dict[str, Any]:
    """Of a shape: a form of the step -> what measures it."""
    forms = {name: partial(step_of, shape, *form) for name, *form in FORMS[shape]}
    for batch in TRL_BATCHES[shape]:
        forms[f"TRL, {batch} pairs a pass"] = partial(step_of_trl, shape, batch)
    return forms


PARTS: dict[str, dict[str, Any]] = {  # part -> measurement -> what measures it
    "sample": {shape: partial(sample_of, shape) for shape in SHAPES},
    "run": {"train.py": run},
    "exact": {family: partial(exact_family, family) for family in FAMILIES},
    "score": {shape: partial(score_of, shape) for shape in SHAPES},
    **{f"step-{shape}": step_forms(shape) for shape in FORMS},
    "own": {"256 pairs": own},
    "lora": {"8B": with_lora},
}
WHEN_NAMED = ("step-3B", "own", "lora")


def rounded(value: Any) -> Any:
    """Four digits of every number."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    most = [part for part in PARTS if part not in WHEN_NAMED]
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=most)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--limit", type=int, default=470, help="seconds that all may take (470)")
    arguments = parser.parse_args()
    end = time.perf_counter() + arguments.limit
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    results: dict[str, Any] = {}
    if GPU and arguments.output.exists():
        results = json.loads(arguments.output.read_text())
    where = rounded(environment())
    failed = []
    for part in arguments.parts:
        found: dict[str, Any] = {"measured on": where}
        for name, work in PARTS[part].items():
            began = time.perf_counter()
            device.prepare(DEVICE)
            measured = safely(work, min(LONGEST, end - began))
            found[name] = rounded(measured)
            print(f"{time.perf_counter() - began:.0f} s: {part}, {name}: {found[name]}", flush=True)
            if isinstance(measured, str):
                failed.append(f"{part}, {name}: {measured}")
            else:
                results[part] = found
            if GPU:
                write(arguments.output, json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
