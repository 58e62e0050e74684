"""LoRA beside full fine-tuning: in the playground, on a real model, and what bfloat16 leaves of a small step.

    python experiments/lora_study.py playground                        a quarter of an hour on two cores
    python experiments/lora_study.py real --model DIR --data FILE      seconds and memory of a run on 64 pairs
    python experiments/lora_study.py precision --model DIR --data FILE
    python experiments/lora_study.py write                             run nothing: lora.md anew

playground: both at several learning rates, two tuning seeds each, on validation prompts; then, each at its best, five
other seeds on test prompts. real: each run is a process of its own. precision: margins of 32 pairs after four steps
that were taken in float32, computed with the frozen weights in bfloat16; see `precision`.
Writes experiments/results/lora.json, in which what is there is not run again, and lora.md.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT)]

import pandas as pd
import study
import torch
from scipy import stats
from torch import Tensor

import train
from sera_min import lora
from sera_min.logprobs import score
from sera_min.machinery import folder, models
from sera_min.machinery.config import Config, resolve
from sera_min.machinery.data import encode
from sera_min.machinery.rows import read_rows
from sera_min.pairs import Pair, rows_of

RESULTS = study.RESULTS / "lora.json"
METHODS: dict[str, dict[str, Any]] = {"full": {}, "LoRA": {"use_peft": True}}
RATES = [3e-4, 1e-3, 3e-3]
TUNING_SEEDS = [10, 11]
SEEDS = [0, 1, 2, 3, 4]
REAL_RATES = {"full": 1e-5, "LoRA": 1e-4}
WAYS = ("float32 sum", "rounded sum", "merged, rounded")


# In the playground


def play(method: str, flags: dict[str, Any]) -> dict[str, Any]:
    """SeRA, at the playground's own β."""
    return study.play(train.SERA, **METHODS[method], **flags)


def name_of(method: str, rate: float, seed: int, split: str) -> str:
    return f"{method}, {rate:g}, seed {seed}, {split}"


def jobs_of(method: str, rate: float, seeds: list[int], split: str) -> dict[str, tuple]:
    jobs = {}
    for seed in seeds:
        flags = {"learning_rate": rate, "seed": seed, "eval_split": split}
        jobs[name_of(method, rate, seed, split)] = (play, method, flags)
    return jobs


def rewards_of(results: dict[str, Any], method: str, rate: float, seeds: list[int], split: str) -> list[float]:
    return [results[name_of(method, rate, seed, split)]["3"]["gold/reward"] for seed in seeds]


def best_rate(results: dict[str, Any], method: str) -> float:
    """That of the largest mean true reward over the tuning seeds."""
    return max(RATES, key=lambda rate: statistics.mean(rewards_of(results, method, rate, TUNING_SEEDS, "validation")))


def in_playground() -> None:
    tuning: dict[str, tuple] = {}
    for method in METHODS:
        for rate in RATES:
            tuning |= jobs_of(method, rate, TUNING_SEEDS, "validation")
    results = study.run_all(tuning, RESULTS)
    final: dict[str, tuple] = {}
    for method in METHODS:
        final |= jobs_of(method, best_rate(results, method), SEEDS, "test")
    study.run_all(final, RESULTS)


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
                learning_rate=REAL_RATES[method],
                **METHODS[method],
            )
        )
        left = sum(file.stat().st_size for file in Path(place, "run").rglob("*") if file.is_file())
    grew = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": time.monotonic() - began, "peak MiB": grew / 1024, "left on disk, MiB": left / 2**20, **final}


def with_real(model: str, data: str) -> None:
    """Each run is a process of its own, for its peak memory."""
    context = multiprocessing.get_context("spawn")
    for method in METHODS:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            save(f"real, {method}", pool.submit(real_run, method, model, data).result())


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


def precision(model: str, data: str) -> None:
    """Noise and rank correlation, against float32, of the margins after four steps of 8 pairs at a rate of 1e-5.

    Three ways to compute them under autocast, beside frozen weights in bfloat16: with our float32 sum; with the sum
    rounded to bfloat16; and with the matrices merged into the weights, rounded to bfloat16.
    """
    policy, tokenizer = models.load(model, "cpu")
    round_weights(policy)  # as published
    rows = read_rows(data, "train", 40)
    ends = models.eos_ids_of(policy, tokenizer)
    given, _ = encode(rows, tokenizer, name=data, eos_ids=ends, max_length=128, max_prompt_length=64)
    pairs = [one.pair for one in given[:32]]
    lora.add_lora(policy, 16, 32)
    reference = {exact: log_ratios(policy, pairs, None, not exact) for exact in (True, False)}
    four_steps(policy, pairs, reference[True])
    got = {"float32": log_ratios(policy, pairs, reference[True], False)}
    got["float32 sum"] = log_ratios(policy, pairs, reference[False], True)
    for part in lora.lora_parts(policy).values():
        part.__class__ = Rounded
    got["rounded sum"] = log_ratios(policy, pairs, reference[False], True)
    for part in lora.lora_parts(policy).values():
        part.__class__ = lora.LoRA
    lora.merge_lora(policy)
    round_weights(policy)
    got["merged, rounded"] = log_ratios(policy, pairs, reference[False], True)

    margins = {way: logps[0::2] - logps[1::2] for way, logps in got.items()}
    exact = margins.pop("float32")
    found: dict[str, Any] = {"spread": exact.std().item()}
    for way, m in margins.items():
        found[way] = {"noise": (m - exact).std().item(), "rank correlation": stats.spearmanr(m, exact).statistic}
    save("precision, 1e-05", found)


@torch.no_grad()
def round_weights(policy) -> None:
    """To bfloat16, and they stay float32."""
    for p in policy.parameters():
        p.copy_(p.bfloat16())


def four_steps(policy, pairs: list[Pair], reference: Tensor) -> None:
    flags = Config(model_name_or_path="m", dataset_name="d", max_tokens=2048, device="cpu")
    config = resolve(flags)
    weights = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, weight_decay=0.0)
    for step in range(4):
        batch = slice(8 * step, 8 * step + 8)
        train.train_step(policy, optimizer, pairs[batch], reference.view(-1, 2)[batch], config, train.SERA)


# Results


def save(name: str, result: dict[str, Any]) -> None:
    study.write(RESULTS, study.read(RESULTS) | {name: {"machine": study.machine(), **result}})


def half_width(values: list[float], digits: int = 3) -> str:
    mean, low, _ = study.interval(values)
    return f"{mean:.{digits}f} ± {mean - low:.{digits}f}"


def tuning_table(results: dict[str, Any]) -> str:
    lines = []
    for method in METHODS:
        line = {"true reward, mean of two tuning seeds": method}
        for rate in RATES:
            line[f"rate {rate:g}"] = (
                f"{statistics.mean(rewards_of(results, method, rate, TUNING_SEEDS, 'validation')):.3f}"
            )
        lines.append(line)
    return study.markdown(pd.DataFrame(lines))


def playground_table(results: dict[str, Any]) -> str:
    lines, rewards = [], {}
    for method in METHODS:
        rate = best_rate(results, method)
        line = {"five other seeds": method, "learning rate": f"{rate:g}"}
        for title, key in (("true reward", "gold/reward"), ("win rate", "gold/win_rate"), ("KL", "kl")):
            values = [results[name_of(method, rate, seed, "test")]["3"][key] for seed in SEEDS]
            line[title] = half_width(values)
        lines.append(line)
        rewards[method] = rewards_of(results, method, rate, SEEDS, "test")
    less = half_width([ours - full for ours, full in zip(rewards["LoRA"], rewards["full"])])
    words = f"True reward of LoRA less that of full fine-tuning, paired by seed: {less}."
    return study.markdown(pd.DataFrame(lines)) + "\n\n" + words


def real_table(results: dict[str, Any]) -> str:
    lines = []
    for method in METHODS:
        got = results[f"real, {method}"]
        line = {"method": method}
        for name in ("seconds", "peak MiB", "left on disk, MiB"):
            line[name] = f"{got[name]:.0f}"
        lines.append({**line, "KL": f"{got['kl']:.3f}"})
    return study.markdown(pd.DataFrame(lines))


def precision_table(results: dict[str, Any]) -> str:
    got = results["precision, 1e-05"]
    lines = []
    for way in WAYS:
        noise, correlation = got[way]["noise"], got[way]["rank correlation"]
        lines.append({"margins of": f"± {got['spread']:.2f} nats", "way": way, "noise, nats": f"{noise:.3f}",
                      "rank correlation": f"{correlation:.2f}"})  # fmt: skip
    return study.markdown(pd.DataFrame(lines))


TABLES = {  # what a table needs -> title and table; 95 % intervals of Student's t
    "full, 0.001, seed 10, validation": ("In the playground, by learning rate", tuning_table),
    "LoRA, 0.001, seed 4, test": ("In the playground, each at its best", playground_table),
    "real, LoRA": ("SmolLM2-135M-Instruct, 64 pairs, two iterations", real_table),
    "precision, 1e-05": ("Margins after four steps, frozen weights in bfloat16, against float32", precision_table),
}


def write(results: dict[str, Any]) -> None:
    parts = ["# LoRA beside full fine-tuning\n\nWritten by `lora_study.py`; ± are 95 % intervals of Student's t.\n"]
    for needed, (title, table) in TABLES.items():
        if needed in results:
            parts.append(f"## {title}\n\n{table(results)}\n")
    folder.write(RESULTS.with_suffix(".md"), "\n".join(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["playground", "real", "precision", "write"])
    parser.add_argument("--model", help="folder of a real model")
    parser.add_argument("--data", help="file of preferences")
    flags = parser.parse_args()
    if flags.part in ("real", "precision") and not (flags.model and flags.data):
        sys.exit(f"error: {flags.part} needs --model and --data")
    if flags.part == "playground":
        in_playground()
    if flags.part == "real":
        with_real(flags.model, flags.data)
    if flags.part == "precision":
        precision(flags.model, flags.data)
    write(study.read(RESULTS))


if __name__ == "__main__":
    main()
