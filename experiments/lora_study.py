"""LoRA beside full fine-tuning: in the playground, on a real model, and what bfloat16 leaves of a small step.

    python experiments/lora_study.py playground                        a quarter of an hour on two cores
    python experiments/lora_study.py real --model DIR --data FILE      seconds and memory of a run on 64 pairs
    python experiments/lora_study.py precision --model DIR --data FILE

playground: both at several learning rates, two tuning seeds each, on validation prompts; then, each at its best, five
other seeds on test prompts. real: each run is a process of its own. precision: margins of 32 pairs after four steps
that were taken in float32, computed with the frozen weights in bfloat16; see `precision`.
Writes experiments/results/lora.json, in which what is there is not run again, and lora.md.
"""

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

import train
from sera_min import lora, playground
from sera_min.logprobs import score
from sera_min.machinery import models
from sera_min.machinery.config import Config, resolve
from sera_min.machinery.data import encode
from sera_min.machinery.folder import writing
from sera_min.machinery.rows import read_rows
from sera_min.pairs import Pair, rows_of

RESULTS = ROOT / "experiments/results/lora.json"
METHODS = {
    "full": {"learning_rate": [3e-4, 1e-3, 3e-3]},
    "LoRA": {"learning_rate": [3e-4, 1e-3, 3e-3], "use_peft": True},
}
TUNING_SEEDS = [10, 11]
SEEDS = [0, 1, 2, 3, 4]
REAL = {"full": {"learning_rate": 1e-5}, "LoRA": {"learning_rate": 1e-4, "use_peft": True}}
T_OF_4 = 2.776  # Student's t, 95 %, five seeds


# The playground


def die_with_parent() -> None:
    """A worker ends when the study is killed."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def make_sft(folder: Path, seed: int) -> None:
    if (folder / f"sft-{seed}").exists():
        return
    torch.set_num_threads(1)
    with contextlib.redirect_stderr(io.StringIO()):
        policy, tokenizer = playground.make_sft_policy(seed, "cpu")
    with writing(folder / f"sft-{seed}") as beside:
        policy.save_pretrained(beside)
        tokenizer.save_pretrained(beside)


def playground_run(folder: Path, method: str, rate: float, seed: int, split: str) -> dict:
    """The last evaluation of SeRA in the playground."""

    def make_sft_policy(seed: int, device: str):
        return models.load(folder / f"sft-{seed}", device)

    torch.set_num_threads(1)
    world = SimpleNamespace(**vars(playground) | {"make_sft_policy": make_sft_policy})
    flags = Config(
        output_dir=tempfile.mkdtemp(dir=folder) + "/run",
        use_peft=METHODS[method].get("use_peft", False),
        learning_rate=rate,
        seed=seed,
        eval_split=split,
        device="cpu",
    )
    quiet = io.StringIO()
    with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
        final = train.main(flags, replace(train.SERA, world=world, report=False))
    return {name: final[name] for name in ("gold/reward", "gold/win_rate", "kl", "select/precision")}


def name_of(method: str, rate: float, seed: int, split: str) -> str:
    return f"{method}, {rate:g}, seed {seed}, {split}"


def best_rate(results: dict, method: str) -> float:
    """That of the largest mean true reward over the tuning seeds."""
    means = {}
    for rate in METHODS[method]["learning_rate"]:
        rewards = [results[name_of(method, rate, seed, "validation")]["gold/reward"] for seed in TUNING_SEEDS]
        means[rate] = statistics.mean(rewards)
    return max(means, key=lambda rate: means[rate])


def in_playground(results: dict) -> None:
    context = multiprocessing.get_context("spawn")
    folder = Path(tempfile.gettempdir()) / "sera_min-lora"  # what was made there is not made again
    folder.mkdir(exist_ok=True)
    with ProcessPoolExecutor(2, mp_context=context, initializer=die_with_parent) as pool:
        seeds = SEEDS + TUNING_SEEDS
        list(pool.map(make_sft, [folder] * len(seeds), seeds))
        tuning = []
        for method, settings in METHODS.items():
            for rate in settings["learning_rate"]:
                tuning += [(method, rate, seed, "validation") for seed in TUNING_SEEDS]
        run_all(pool, folder, results, tuning)
        final = []
        for method in METHODS:
            final += [(method, best_rate(results, method), seed, "test") for seed in SEEDS]
        run_all(pool, folder, results, final)


def run_all(pool: ProcessPoolExecutor, folder: Path, results: dict, runs: list[tuple]) -> None:
    waiting = {}
    for run in runs:
        if name_of(*run) not in results:
            waiting[name_of(*run)] = pool.submit(playground_run, folder, *run)
    for name, future in waiting.items():
        results[name] = future.result()
        print(name, results[name], flush=True)
        save(results)


# A real model


def real_run(method: str, model: str, data: str) -> dict:
    """Two iterations on 64 pairs: seconds without loading packages, and the process's peak memory above those."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        final = train.main(
            Config(
                model_name_or_path=model,
                dataset_name=data,
                output_dir=f"{place}/run",
                iterations=2,
                max_train_pairs=70,
                max_length=256,
                max_prompt_length=128,
                max_new_tokens=64,
                max_tokens=2048,
                device="cpu",
                **REAL[method],
            )
        )
        left = sum(file.stat().st_size for file in Path(place, "run").rglob("*") if file.is_file())
    grew = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": time.monotonic() - began, "peak MiB": grew / 1024, "left on disk, MiB": left / 2**20, **final}


def with_real(results: dict, model: str, data: str) -> None:
    context = multiprocessing.get_context("spawn")
    for method in REAL:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            results[f"real, {method}"] = pool.submit(real_run, method, model, data).result()
        save(results)


# What bfloat16 leaves


class Rounded(lora.LoRA):
    """As PEFT has it: B A x is rounded to the type of W x before they are added, and the sum is of this type."""

    def forward(self, x: Tensor) -> Tensor:
        together = super().forward(x)
        return together.bfloat16()


def log_ratios(policy, pairs: list[Pair], before: Tensor | None, autocast: bool) -> Tensor:
    prompts, responses = rows_of(pairs)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logps, _ = score(policy, prompts, responses, max_tokens=4096)
    if before is not None:  # those of the reference
        logps = logps - before
    return logps


def precision(results: dict, model: str, data: str) -> None:
    """Noise and rank correlation, against float32, of the margins after four steps of 8 pairs.

    Three ways to compute them under autocast, beside frozen weights in bfloat16: with our float32 sum; with the sum
    rounded to bfloat16; and with the matrices merged into the weights, rounded to bfloat16.
    """
    policy, tokenizer = models.load(model, "cpu")
    with torch.no_grad():
        for p in policy.parameters():
            p.copy_(p.bfloat16())  # as published
    limits = {"eos_ids": models.eos_ids_of(policy, tokenizer), "max_length": 128, "max_prompt_length": 64}
    pairs, _ = encode(read_rows(data, "train", 40), tokenizer, name=data, **limits)
    pairs = pairs[:32]
    lora.add_lora(policy, 16, 32)
    start = {name: matrix.clone() for name, matrix in lora.lora_state(policy).items()}
    reference = {exact: log_ratios(policy, pairs, None, not exact) for exact in (True, False)}
    for rate in (1e-5, 1e-4):
        lora.load_lora(policy, start)
        four_steps(policy, pairs, reference[True], rate)
        got = {"float32": log_ratios(policy, pairs, reference[True], False)}
        got["float32 sum"] = log_ratios(policy, pairs, reference[False], True)
        for part in lora.lora_parts(policy).values():
            part.__class__ = Rounded
        got["rounded sum"] = log_ratios(policy, pairs, reference[False], True)
        for part in lora.lora_parts(policy).values():
            part.__class__ = lora.LoRA
        trained = {name: matrix.clone() for name, matrix in lora.lora_state(policy).items()}
        weights = {name: layer.weight.data for name, layer in lora.linear_layers(policy).items()}
        for part in lora.lora_parts(policy).values():
            with torch.no_grad():
                change = part.scale * part.B @ part.A
                part.layer.weight.data = (part.layer.weight.data + change).bfloat16().float()
        lora.load_lora(policy, None)
        got["merged, rounded"] = log_ratios(policy, pairs, reference[False], True)
        for name, layer in lora.linear_layers(policy).items():
            layer.weight.data = weights[name]
        lora.load_lora(policy, trained)
        margins = {way: logps.view(-1, 2) @ torch.tensor([1.0, -1.0]) for way, logps in got.items()}
        exact = margins.pop("float32")
        results[f"precision, {rate:g}"] = {"spread": exact.std().item()} | {
            way: {"noise": (m - exact).std().item(), "rank correlation": rank_correlation(m, exact)}
            for way, m in margins.items()
        }
        print(rate, results[f"precision, {rate:g}"], flush=True)
        save(results)


def four_steps(policy, pairs: list[Pair], reference: Tensor, rate: float) -> None:
    flags = Config(model_name_or_path="m", dataset_name="d", learning_rate=rate, max_tokens=2048, device="cpu")
    config = resolve(flags)
    weights = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    for step in range(4):
        batch = slice(8 * step, 8 * step + 8)
        train.train_step(policy, optimizer, pairs[batch], reference.view(-1, 2)[batch], config, train.SERA)


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's."""
    places = torch.stack([one.argsort().argsort(), other.argsort().argsort()]).double()
    return torch.corrcoef(places)[0, 1].item()


# Results


def save(results: dict) -> None:
    results["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    RESULTS.with_suffix(".md").write_text(tables(results))


def interval(values: list[float]) -> str:
    half = T_OF_4 * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def tables(results: dict) -> str:
    lines = ["# LoRA beside full fine-tuning", "", "Written by `lora_study.py`.", "", results["machine"]]
    lines += ["", "## In the playground: true reward by learning rate, mean of two tuning seeds", ""]
    lines += ["|method|learning rate|true reward|", "|---|--:|--:|"]
    for method, settings in METHODS.items():
        for rate in settings["learning_rate"]:
            names = [name_of(method, rate, seed, "validation") for seed in TUNING_SEEDS]
            if all(name in results for name in names):
                mean = statistics.mean(results[name]["gold/reward"] for name in names)
                lines.append(f"|{method}|{rate:g}|{mean:.3f}|")
    lines += ["", "## Each at its best, five other seeds, 95 % intervals of Student's t", ""]
    lines += ["|method|learning rate|true reward|win rate|KL|", "|---|--:|--:|--:|--:|"]
    rewards = {}
    for method, settings in METHODS.items():
        for rate in settings["learning_rate"]:
            names = [name_of(method, rate, seed, "test") for seed in SEEDS]
            if all(name in results for name in names):
                of = {key: [results[name][key] for name in names] for key in ("gold/reward", "gold/win_rate", "kl")}
                rewards[method] = of["gold/reward"]
                cells = " | ".join(interval(values) for values in of.values())
                lines.append(f"|{method}|{rate:g}|{cells}|")
    if len(rewards) == 2:
        differences = [a - b for a, b in zip(rewards["LoRA"], rewards["full"])]
        lines += ["", f"True reward of LoRA less that of full fine-tuning, paired by seed: {interval(differences)}."]
    if "real, LoRA" not in results:
        lines += ["", "A real model's seconds and memory (`lora_study.py real`) are not measured yet."]
    else:
        lines += real_table(results)
    lines += ["", "## Margins after four steps, with frozen weights in bfloat16, against float32", ""]
    lines += ["|learning rate|margins, nats|way|noise, nats|rank correlation|", "|--:|--:|---|--:|--:|"]
    for name, got in results.items():
        if name.startswith("precision"):
            for way in ("float32 sum", "rounded sum", "merged, rounded"):
                cells = f"{got[way]['noise']:.3f}|{got[way]['rank correlation']:.2f}"
                lines.append(f"|{name.split(', ')[1]}|± {got['spread']:.2f}|{way}|{cells}|")
    return "\n".join(lines) + "\n"


def real_table(results: dict) -> list[str]:
    lines = ["", "## SmolLM2-135M-Instruct, 64 pairs, two iterations", ""]
    lines += ["|method|seconds|peak memory, MiB|left on disk, MiB|KL|", "|---|--:|--:|--:|--:|"]
    for method in REAL:
        got = results[f"real, {method}"]
        values = [got["seconds"], got["peak MiB"], got["left on disk, MiB"]]
        cells = "|".join(f"{value:.0f}" for value in values)
        lines.append(f"|{method}|{cells}|{got['kl']:.3f}|")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["playground", "real", "precision"])
    parser.add_argument("--model", help="folder of a real model")
    parser.add_argument("--data", help="file of preferences")
    flags = parser.parse_args()
    if flags.part != "playground" and not (flags.model and flags.data):
        sys.exit(f"error: {flags.part} needs --model and --data")
    results = {}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text())
    if flags.part == "playground":
        in_playground(results)
    elif flags.part == "real":
        with_real(results, flags.model, flags.data)
    else:
        precision(results, flags.model, flags.data)


if __name__ == "__main__":
    main()
