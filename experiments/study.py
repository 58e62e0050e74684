"""What the studies of the playground share: runs in a pool of processes, one file of results, intervals, tables.

A study names its runs, each a method and flags of train.py, and hands them to `run_all`. A run is `train.main` with a
Variant, on one thread, from the SFT policy of its seed, which is made once. What the file of results holds is not run
again, so a study that was stopped resumes where it left off. A study that is killed leaves no process behind.
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import platform
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from scipy import stats
from tqdm import tqdm

import train
from sera_min import playground
from sera_min.machinery import folder, models
from sera_min.machinery.config import Config, Resolved
from sera_min.machinery.run import Run

RESULTS = Path(__file__).resolve().parent / "results"
WORLD = hashlib.sha1(Path(playground.__file__).read_bytes() + torch.__version__.encode()).hexdigest()[:8]
SFT = Path(tempfile.gettempdir()) / f"sera_min-sft-{WORLD}"  # the SFT policies of the seeds, for all studies

# ------------------------------------------------------------------------------------- a run


def make_sft(seed: int) -> None:
    """The SFT policy of a seed, once."""
    if not (SFT / str(seed)).exists():
        with quiet():
            policy, tokenizer = playground.make_sft_policy(seed, "cpu")
        with folder.writing(SFT / str(seed)) as beside:
            models.save_model(beside, policy, tokenizer)


def world_of(length_bias: float = 0.0, most_prompts: int | None = None) -> SimpleNamespace:
    """The playground with SFT policies that are there, labels that favour length, and so many evaluation prompts."""

    def make_sft_policy(seed: int, device: str) -> tuple:
        return models.load(SFT / str(seed), device)

    def preferences(n: int, part: str, **others: Any) -> list[dict[str, str]]:
        if part == "train":
            return playground.preferences(n, part, length_bias=length_bias, **others)
        return playground.preferences(n, part, **others)[:most_prompts]

    def prompts(part: str) -> list[str]:
        return playground.prompts(part)[:most_prompts]

    changed = {"make_sft_policy": make_sft_policy, "preferences": preferences, "prompts": prompts}
    return SimpleNamespace(**vars(playground) | changed)


def equal_steps(n: int, t: int, config: Resolved) -> list[list[int]]:
    """In place of `train.batches_of`: as many steps as an epoch of D has, however many pairs there are."""
    size = config.per_device_train_batch_size
    assert config.max_train_pairs is not None  # the playground has a number
    steps = math.ceil(config.max_train_pairs / size)
    epochs = math.ceil(steps / math.ceil(n / size))
    return train.batches_of(n, t, replace(config, epochs_per_iteration=epochs))[:steps]


def play(
    variant: train.Variant, iterations: int = 3, length_bias: float = 0.0, prompts: int | None = None, **flags: Any
) -> dict[str, Any]:
    """A run in the playground: iteration (as a text) -> what was measured; and the CPU's seconds.

    The policy is evaluated at the end, and in a run of more than three iterations after each: this takes time.
    """
    evaluated = [iterations]
    if iterations > 3:
        evaluated = list(range(1, iterations + 1))

    def evaluate(t: int, run: Run, config: Resolved) -> dict[str, Any]:
        if t in evaluated:
            return train.evaluate(t, run, config)
        return {}

    variant = replace(
        variant, batches_of=equal_steps, evaluate=evaluate, world=world_of(length_bias, prompts), report=False
    )
    result: dict[str, Any] = {"machine": machine()}
    began = time.process_time()
    with tempfile.TemporaryDirectory() as place, quiet():
        out = Path(place) / "run"
        flags = {"learning_rate": 1e-3, **flags}
        config = Config(output_dir=str(out), device="cpu", iterations=iterations, **flags)
        train.main(config, variant)
        for t in range(1, iterations + 1):
            result[str(t)] = facts_of(out / f"iteration-{t}")
        for line in folder.read_jsonl(out / "metrics.jsonl"):
            if line["phase"] != "train" and line["iteration"] in evaluated:
                result[str(line["iteration"])] |= line
    result["seconds"] = time.process_time() - began
    return result


def facts_of(iteration: Path) -> dict[str, float]:
    """What only this world knows of the pairs of an iteration: those given (offline), and those bootstrapped.

    auc: the area under the ROC curve of the margins as a test for flipped labels, over all of D. 0.5 is by chance.
    """
    pairs = pd.read_json(iteration / "pairs.jsonl", lines=True)
    facts = {}
    for source, some in pairs.groupby("source"):
        longer = some.chosen.str.split().str.len() - some.rejected.str.split().str.len()
        facts[f"{source}/right"] = playground.precision(some.to_dict("records"))
        facts[f"{source}/longer"] = float(longer.mean())  # words
    if (iteration / "dropped.jsonl").exists():
        given = with_dropped(pairs, iteration)
        flipped = np.array([playground.is_flipped(row) for row in given.to_dict("records")])
        if flipped.any():
            facts["auc"] = float(auc(given.margin[~flipped], given.margin[flipped]))
    return facts


def with_dropped(pairs: pd.DataFrame, iteration: Path) -> pd.DataFrame:
    """All given pairs of a review: those of `pairs`, which were kept, and those that were not."""
    dropped = pd.read_json(iteration / "dropped.jsonl", lines=True)
    return pd.concat([pairs[pairs.source == "offline"], dropped])


def auc(larger: pd.Series, smaller: pd.Series) -> float:
    """How often one of the first is larger than one of the second; a tie counts one half."""
    return stats.mannwhitneyu(larger, smaller).statistic / (len(larger) * len(smaller))


@contextlib.contextmanager
def quiet():
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# ------------------------------------------------------------------------------------ many runs


def begin_worker() -> None:
    """A worker computes with one thread, and ends when the study is killed."""
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def run_all(jobs: dict[str, tuple], file: Path, prepare: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Runs, on all cores and in this order, those jobs that `file` lacks, or has with other flags.

    Returns what it then holds: name -> result, with its flags. A job that fails ends all, but for what is saved.

    jobs: name -> a function and its arguments, of which the last are flags with a seed. prepare: what is done first for
    each seed; None: `make_sft`.
    """
    results = read(file)
    lacking = {}
    for name, job in jobs.items():
        if results.get(name, {}).get("flags") != job[-1]:
            lacking[name] = job
    if not lacking:
        return results
    seeds = {job[-1]["seed"] for job in lacking.values()}
    pool = workers()
    try:
        list(tqdm(pool.map(prepare or make_sft, seeds), "before the runs", len(seeds)))
        name_of = {pool.submit(*job): name for name, job in lacking.items()}
        for done in tqdm(as_completed(name_of), file.stem, len(name_of)):
            name = name_of[done]
            results[name] = {"flags": lacking[name][-1], **done.result()}
            write(file, results)
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    return results


@functools.cache
def workers() -> ProcessPoolExecutor:
    """A process a core, for all studies: to import everything takes a worker ten seconds."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(mp_context=context, initializer=begin_worker)


def write(file: Path, results: dict[str, Any]) -> None:
    lines = [f"{json.dumps(name)}: {json.dumps(result)}" for name, result in sorted(results.items())]
    folder.write(file, "{\n" + ",\n".join(lines) + "\n}\n")


def read(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    return folder.read_json(file)


def machine() -> str:
    """What decides how sums are rounded."""
    processor = platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        names = re.findall(r"^model name\s*: (.*)$", facts.read_text(), re.MULTILINE)
        processor += " " + "".join(names[:1])
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{processor} {instructions}, {os.cpu_count()} cores, one thread a run, torch {torch.__version__}"


def interval(values: list[float], comparisons: int = 1) -> tuple[float, float, float]:
    """Mean, and its 95 % interval by Student's t; of several comparisons, all of them at once (Bonferroni)."""
    mean = sum(values) / len(values)
    low, high = stats.t.interval(1 - 0.05 / comparisons, len(values) - 1, loc=mean, scale=stats.sem(values))
    return mean, low, high


def in_brackets(mean: float, low: float, high: float) -> str:
    """+0.031 [-0.002, +0.064]"""
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def spread(values: pd.Series, digits: int = 3) -> str:
    """Mean ± standard deviation of those that are known."""
    mean, deviation = values.astype(float).mean(), values.astype(float).std()
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}".replace("nan ± nan", "–").replace(" ± nan", "")


def markdown(table: pd.DataFrame) -> str:
    lines = [list(table.columns), ["---", *["--:"] * (len(table.columns) - 1)], *table.astype(str).values.tolist()]
    return "\n".join("|" + "|".join(line) + "|" for line in lines)


@contextlib.contextmanager
def figure(file: Path, x: str, y: str, legend: str = "best"):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    yield axes
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", loc=legend)
    drawn.savefig(file, dpi=100)
    plt.close(drawn)
