"""What SeRA does in the playground, when, and where it fails: the studies that docs/results.md is about.

    python experiments/claims.py                       every study, one process a core; stopped, it goes on where it was
    python experiments/claims.py --studies main noise  some of them
    python experiments/claims.py --quick               one seed, small: does it all still run?
    python experiments/claims.py --check 12            12 of its runs again, drawn at random: do they end alike?
    python experiments/claims.py --write               run nothing: tables, figures and sentences anew from claims.json

    main    SFT, plain DPO, random K, selection only, SeRA, SeRA with our two remedies; the other answers to wrong
            labels: cDPO and robust DPO, told the share of flipped labels; and selection of the smallest margins. Each
            method at every β of one grid (the frontier: true reward against KL), and at its own best β, ten seeds. An
            hour on two cores
    more    the same of bootstrapping only, cDPO and robust DPO told another share, and the middle margins
    losses  plain training, selection only and SeRA under IPO, SLiC and SimPO
    noise   0 to 40 % flipped labels; precision of what is selected against K
    length  labels of which half favour the longer response: the kept pairs' length and the policy's
    over    six iterations: where the policy begins to fool itself, and what mends it
    near    the same at the playground's own β and learning rate, which keep the policy near the reference
    asked   the reviewers' questions: all pairs of the samples, bootstrapped pairs alone, the ensemble's γ, N, cost

β is chosen on validation prompts with seeds of their own, results are on test prompts with other seeds. The studies
from `noise` on have every method at its best of `main`, tuned at 30 % flipped labels, whatever they change. Every run
is `train.main` with a Variant, and every iteration of every run takes as many optimizer steps. What runs share, the SFT
policy and iteration 1, is computed once: a run goes on from a copy of it (a "base"). Intervals are of the mean paired
difference over the seeds, by Student's t. Needs matplotlib. Writes experiments/results/claims.json (every run, each
iteration of it, and the machines they ran on), claims.md (the tables), PNG figures, and the sentences of
claims-in-words.md, see `filled`. What is in claims.json is not run again: delete it to have everything anew, as after a
change of the code that `--check` finds to matter.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import statistics
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
Runs = dict[str, dict]  # what was run, see `name_of` -> what was measured
RESULTS = ROOT / "experiments" / "results"
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT)]

import torch
import transformers
import variants
from tqdm import tqdm

import train
from sera_min import playground
from sera_min.machinery import config as configuration
from sera_min.machinery import folder, models
from sera_min.machinery.config import Config, seed_of

SEEDS = [*range(10)]  # of `main` and `more`; the other studies take the first five
TUNING_SEEDS = {"dpo": [10, 11, 12, 13, 14], "ipo": [10, 11], "slic": [10, 11], "simpo": [10, 11]}
GRID = {  # β × learning rate, the same for every method
    "dpo": ([0.01, 0.03, 0.1, 0.3, 1.0, 3.0], [1e-3]), "ipo": ([0.03, 0.1, 0.3, 1.0], [1e-3]),
    "slic": ([0.03, 0.1, 0.3, 1.0], [1e-3]), "simpo": ([0.25, 0.5, 1.0, 2.0], [1e-3]),
}  # fmt: skip
LOSSES = {"ipo": "IPO", "slic": "SLiC-HF", "simpo": "SimPO"}  # beside DPO
UNDER_LOSSES = "plain training", "selection only", "SeRA"  # the methods that are run there
UNDER_NOISE = *UNDER_LOSSES, "SeRA + both remedies"
METHODS: dict[str, dict] = {
    "plain training": {"keep": 1.0, "bootstrap": 0.0},
    "random K": {"keep": 0.7, "bootstrap": 0.0, "select": "random"},
    "bootstrapping only": {"keep": 1.0},
    "selection only": {"bootstrap": 0.0},
    "SeRA": {},
    "SeRA + both remedies": {"token_floor": 0.01, "length_free": True},
}
BASELINES: dict[str, dict] = {  # other answers to wrong labels, of which 30 % are; and the other ends of the margins
    **{f"cDPO, ε = {eps}": {"keep": 1.0, "bootstrap": 0.0, "label_smoothing": eps} for eps in (0.1, 0.3, 0.4)},
    **{f"robust DPO, ε = {eps}": {"keep": 1.0, "bootstrap": 0.0, "label_smoothing": eps, "loss_type": "robust"}
       for eps in (0.1, 0.3, 0.4)},
    "the smallest margins": {"bootstrap": 0.0, "patch": "smallest"},
    "the middle margins": {"bootstrap": 0.0, "patch": "middle"},
}  # fmt: skip
IN_FIGURE = {  # the methods of `main`, of its table and of the frontier's figure: colour, marker
    "plain training": ("black", "o"), "random K": ("#8C6D31", "+"), "selection only": ("#0072B2", "s"),
    "SeRA": ("#D55E00", "D"), "SeRA + both remedies": ("#009E73", "*"),
    "cDPO, ε = 0.3": ("#999999", "v"), "robust DPO, ε = 0.3": ("#CC79A7", "^"),
    "the smallest margins": ("#E69F00", "x"),
}  # fmt: skip
KLS = 1, 2, 4, 8  # nats, of the frontier's table
EVERY: dict = {"device": "cpu", "steps_per_iteration": 63}  # of all runs: 2,000 pairs by 32, whatever K and K̃ are
REMEDIES: dict[str, dict] = {
    "SeRA + floor": {"token_floor": 0.01}, "SeRA + length-free": {"length_free": True},
    "SeRA + both": METHODS["SeRA + both remedies"],
}  # fmt: skip
LONG, NOISE, BIASED = 6, (0.0, 0.2, 0.4), {"length_bias": 0.5, "label_noise": 0.15}
NEAR = {"beta": 1.0, "learning_rate": playground.LEARNING_RATE}  # as `python train.py` has them
STUDIES = {
    "main": ["main"], "more": ["more"], "over": ["over"], "near": ["near"],
    "noise": [f"noise {noise}" for noise in NOISE], "length": ["length"], "asked": ["asked"], "losses": list(LOSSES),
}  # fmt: skip
SHARED = (  # what decides the SFT policy and iteration 1
    "device", "seed", "loss_type", "beta", "learning_rate", "label_smoothing", "label_noise", "length_bias",
    "eval_split", "max_train_pairs", "steps_per_iteration", "samples_per_prompt", "neighbour",
)  # fmt: skip
TOLERANCE = 0.01  # of --check on another processor, see `check`
KINDS = "trained", "scored", "sampled"  # of tokens


# A run


def every_pair(prompt_of: list[int], responses: list[list[int]], rewards: torch.Tensor) -> tuple:
    """In the place of `best_worst_pairs`: all pairs of a prompt's different samples, of which the K̃ widest are kept."""
    different: dict[tuple, int] = {}  # prompt and response -> the row, of samples that have a reward
    for row, (prompt, response) in enumerate(zip(prompt_of, responses)):
        if not rewards[row].isnan():
            different[prompt, tuple(response)] = row
    rows_of: dict[int, list[int]] = {}
    for (prompt, _), row in different.items():
        rows_of.setdefault(prompt, []).append(row)
    pairs = [(a, b) for rows in rows_of.values() for a in rows for b in rows if rewards[a] > rewards[b]]
    best, worst = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
    return best, worst, Counter()


class Meter:
    """Counts the tokens that the review and the training of iteration t read and write. Evaluation is not counted."""

    def __init__(self, tokens: Counter | None = None) -> None:
        self.t = 0  # the iteration that is reviewed or trained now
        self.tokens = Counter(tokens)  # (t, kind) -> how many

    def add(self, kind: str, *rows: list[list[int]]) -> None:
        self.tokens[self.t, kind] += sum(len(ids) for some in rows for ids in some)


METER = Meter()  # of the run that this process makes now


class Counted:
    """The policies of a run; what they score and draw, and do not only read, is counted."""

    def __init__(self, policies) -> None:
        self.policies = policies

    def __getattr__(self, name: str):
        return getattr(self.policies, name)

    def log_prob(self, i: int, rows) -> torch.Tensor:
        before = self.policies.seconds["scoring"]
        logps = self.policies.log_prob(i, rows)
        if self.policies.seconds["scoring"] > before:
            METER.add("scored", rows.prompts, rows.responses)
        return logps

    def sample(self, i: int, *asked) -> list:
        before = self.policies.seconds["sampling"]
        samples = self.policies.sample(i, *asked)
        if self.policies.seconds["sampling"] > before:
            METER.add("sampled", [y for of_prompt in samples for y, _ in of_prompt])
        return samples


def counted(variant: train.Variant, reference_too: bool = False) -> train.Variant:
    """The same variant; METER counts its tokens, with or without the reference's one pass over D."""

    def review(t: int, given, policies, *others):
        METER.t = t
        if not reference_too:
            policies.log_prob(0, given.rows)
        return variant.review(t, given, Counted(policies), *others)

    def pair_losses(policy, pairs, *others):
        METER.add("trained", *zip(*((x, x, w, l) for x, w, l in pairs)))
        return variant.pair_losses(policy, pairs, *others)

    return replace(variant, review=review, pair_losses=pair_losses)


def equal_steps(steps: int, n: int, t: int, config) -> list[list[int]]:
    """In the place of `batches_of`: epoch after epoch, cut at `steps` steps, however many pairs there are."""
    generator = torch.Generator().manual_seed(seed_of(config.seed, t, "order"))
    size = config.per_device_train_batch_size
    batches: list[list[int]] = []
    while len(batches) < steps:
        order = torch.randperm(n, generator=generator)
        batches += [batch.tolist() for batch in order.split(size)]
    return batches[:steps]


def world_of(work: Path, length_bias: float = 0.0) -> SimpleNamespace:
    """The playground with SFT policies that are there, and with labels that favour length."""

    def make_sft_policy(seed: int, device: str):
        return models.load(work / f"sft-{seed}", device)

    def preferences(n: int, part: str, **others) -> list[dict[str, str]]:
        bias = length_bias if part == "train" else 0.0
        return playground.preferences(n, part, length_bias=bias, **others)

    return SimpleNamespace(**vars(playground) | {"make_sft_policy": make_sft_policy, "preferences": preferences})


NOT_FLAGS = "select", "token_floor", "length_free", "patch", "steps_per_iteration", "length_bias", "neighbour"
BY_PATCH = {"smallest": "smallest_margins", "middle": "middle_margins"}


def flags_of(spec: dict) -> dict:
    """Of a run's name, which keeps the flags that train.py once had, those that it has."""
    flags = {name: value for name, value in spec.items() if name not in NOT_FLAGS}
    return flags | {"loss_type": "dpo"} if flags.get("loss_type") == "robust" else flags


def variant_of(spec: dict, work: Path) -> train.Variant:
    """And the variant that the others stand for."""
    floor, free, patch = (spec.get(name) for name in ("token_floor", "length_free", "patch"))
    assert floor in (None, variants.TOKEN_FLOOR), spec
    chosen = [
        ("robust", spec.get("loss_type") == "robust"), ("random_pairs", spec.get("select") == "random"),
        ("both_remedies", floor and free), ("token_floor", floor and not free), ("length_free", free and not floor),
        (BY_PATCH.get(patch), patch in BY_PATCH),
    ]  # fmt: skip
    names = [name for name, is_meant in chosen if is_meant]
    assert len(names) <= 1, spec
    variant = variants.make_variant(names[0]) if names else train.SERA
    if patch == "every pair":
        variant = train.Variant(patch, best_worst_pairs=every_pair)
    if "steps_per_iteration" in spec:
        variant = replace(variant, batches_of=partial(equal_steps, spec["steps_per_iteration"]))
    return replace(variant, world=world_of(work, spec.get("length_bias", 0.0)), report=False)


class Done(Exception):
    """Iteration 1 is saved: the rest is each run's own."""


def until_done(variant: train.Variant) -> train.Variant:
    def review(t: int, *others):
        if t == 2:
            raise Done
        return variant.review(t, *others)

    return replace(variant, review=review)


def quiet(function, *args):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*args)


def sft(path: Path, seed: int) -> None:
    """The SFT policy of a seed, once."""
    if not path.exists():
        policy, tokenizer = quiet(playground.make_sft_policy, seed, "cpu")
        policy.save_pretrained(path)
        tokenizer.save_pretrained(path)


def runs_of_one_base(work: Path, runs: dict[str, dict], changes: dict | None = None) -> dict[str, dict]:
    """All runs that share SFT policy and iteration 1: name of the run -> what was measured, iteration by iteration.

    changes: functions that take the place of the variants' own.
    """
    return quiet(_runs_of_one_base, work, runs, changes or {})


def _runs_of_one_base(work: Path, runs: dict[str, dict], changes: dict) -> dict[str, dict]:
    shared = {name: value for name, value in next(iter(runs.values())).items() if name in SHARED}
    results = {}
    with tempfile.TemporaryDirectory() as place:
        base, out = Path(place) / "base", Path(place) / "run"
        METER.tokens = Counter()
        variant = until_done(counted(replace(variant_of(shared, work), **changes), bool(changes)))
        with contextlib.suppress(Done):
            train.main(Config(**flags_of(shared), output_dir=str(base)), variant)
        first = METER.tokens
        for name, spec in runs.items():
            shutil.copytree(base, out)
            variant = counted(replace(variant_of(spec, work), **changes), bool(changes))
            config = configuration.resolve(Config(**flags_of(spec), output_dir=str(out)))
            (out / "config.json").write_text(configuration.config_json(config, variant.name))
            METER.tokens = Counter(first)
            train.main(Config(resume_from_checkpoint=str(out)), variant)
            rows = measured(out, config)
            for t, row in enumerate(rows[1:], 1):
                row |= {f"tokens/{kind}": METER.tokens[t, kind] for kind in KINDS}
            results[name] = {"iterations": rows}
            shutil.rmtree(out)
    return results


def measured(out: Path, config: Config) -> list[dict]:
    """Of every iteration its evaluation, and what its pairs say that only the world knows."""
    rows = [row for row in folder.read_jsonl(out / "metrics.jsonl") if row["phase"] != "train"]
    for row in rows:
        for known in ("select/pairs", "bootstrap/pairs"):  # K and K̃: a run's flags say them
            row.pop(known, None)
    for t, row in enumerate(rows[1:], 1):
        pairs = folder.read_jsonl(out / f"iteration-{t}" / "pairs.jsonl") if t > 1 else []
        for source in ("offline", "bootstrap"):
            if some := [pair for pair in pairs if pair["source"] == source]:
                won, lost = ([playground.true_reward(p["prompt"], p[y]) for p in some] for y in ("chosen", "rejected"))
                words = [len(p["chosen"].split()) - len(p["rejected"].split()) for p in some]
                row[f"{source}/length"] = statistics.mean(words)
                row[f"{source}/reward"] = statistics.mean(won)
                row[f"{source}/margin"] = statistics.mean(p["margin"] for p in some)
                row[f"{source}/ties"] = statistics.mean(w == l for w, l in zip(won, lost))
        if t == 2 and config.keep == 1 and config.bootstrap == 0:  # all of D, sorted by margin: any K can be looked at
            right = [playground.precision([pair]) for pair in pairs]
            row["precision at K"] = [statistics.mean(right[: len(right) * k // 10]) for k in range(1, 11)]
    return rows


# What is run


class Missing(KeyError):
    """A run that a table needs and that has not been made."""


class Measured(dict):
    """Runs by name; what is not there is `Missing`."""

    def __missing__(self, name: str):
        raise Missing(name)


def name_of(spec: dict) -> str:
    return json.dumps(spec, sort_keys=True)


def at(loss: str, method: str, seed: int, **changed) -> dict:
    return {"loss_type": loss, "seed": seed, **(METHODS | BASELINES)[method], **changed}


def grid(loss: str) -> list[dict]:
    betas, rates = GRID[loss]
    return [{"beta": beta, "learning_rate": rate} for beta in betas for rate in rates]


def column(runs: Runs, row: list[dict], key: str, t: int = 3) -> list:
    """A figure of every seed after iteration t."""
    return [runs[name_of(spec)]["iterations"][t].get(key) for spec in row]


def validation(runs: Runs, loss: str, method: str, point: dict) -> float:
    """The win rate on validation prompts after T = 3, mean over the tuning seeds."""
    tried = [at(loss, method, seed, eval_split="validation", **point) for seed in TUNING_SEEDS[loss]]
    return statistics.mean(column(runs, tried, "gold/win_rate"))


def best(runs: Runs, loss: str, method: str) -> dict:
    """β and learning rate of the highest win rate on validation prompts."""
    tried = grid(loss)
    return tried[0] if len(tried) == 1 else max(tried, key=lambda point: validation(runs, loss, method, point))


def methods_of(part: str) -> dict[str, dict]:
    every = METHODS | BASELINES
    names = {"main": IN_FIGURE, "more": [method for method in every if method not in IN_FIGURE]}
    return {method: every[method] for method in names.get(part, UNDER_LOSSES)}


def tuning(part: str) -> list[dict]:
    """The grid's runs of a study's methods, with the labels of `main`."""
    loss = loss_of(part)
    methods = dict.fromkeys(method for method, _ in settings(part).values())
    return [at(loss, method, seed, eval_split="validation", **point) for seed in TUNING_SEEDS[loss]
            for point in grid(loss) for method in methods]  # fmt: skip


def settings(study: str) -> dict[str, tuple[str, dict]]:
    """The rows of a study: heading -> method, whose best β and learning rate it has, and what is changed."""
    long = {"iterations": LONG}
    sera = lambda **changed: ("SeRA", {**changed})  # noqa: E731
    return {
        **{part: {method: (method, {}) for method in methods_of(part)} for part in ("main", "more")},
        **{loss: {method: (method, {}) for method in UNDER_LOSSES} for loss in LOSSES},
        **{f"noise {noise}": {m: (m, {"label_noise": noise}) for m in UNDER_NOISE} for noise in NOISE},
        "length": {
            **{m: (m, BIASED) for m in UNDER_LOSSES},
            **{name: sera(**BIASED, **REMEDIES[name]) for name in ("SeRA + length-free", "SeRA + both")},
        },
        "over": {
            "plain training": ("plain training", long), "SeRA": ("SeRA", long),
            **{name: sera(**long, **REMEDIES[name]) for name in ("SeRA + floor", "SeRA + both")},
        },
        "near": {
            "SeRA": sera(**long, **NEAR), "SeRA + both": sera(**long, **NEAR, **REMEDIES["SeRA + both"]),
        },
        "asked": {
            "SeRA: γ = 0.5, N = 4, best against worst": sera(),
            "every pair of the samples": sera(patch="every pair"),
            "bootstrapped pairs alone (K = 0, K̃ = all)": sera(keep=0.0, bootstrap=1.0),
            "nothing removed (K = all: bootstrapping only)": ("bootstrapping only", {}),
            **{f"γ = {gamma}": sera(ensemble_gamma=gamma) for gamma in (0.0, 0.7)},
            **{f"N = {n}": sera(samples_per_prompt=n) for n in (2, 8)},
        },
    }[study]  # fmt: skip


def loss_of(study: str) -> str:
    return study if study in GRID else "dpo"


def seeds_of(study: str) -> list[int]:
    return SEEDS if study in ("main", "more") else SEEDS[:5]


def specs(runs: Runs, study: str) -> dict[str, list[dict]]:
    """The runs of a study's rows, a seed each."""
    loss = loss_of(study)
    rows = {}
    for row, (method, changed) in settings(study).items():
        point = best(runs, loss, method)
        rows[row] = [at(loss, method, seed, **{**point, **changed}) for seed in seeds_of(study)]
    return rows


def processor() -> str:
    """Its name, model and widest instructions, where the system tells: another processor rounds otherwise."""
    file = Path("/proc/cpuinfo")
    facts = dict(re.findall(r"^(.+?)\s*: (.*)$", file.read_text(), re.MULTILINE)) if file.exists() else {}
    known = [facts[name] for name in ("model name", "cpu family", "model") if name in facts]
    return " ".join([platform.machine(), *known, torch.backends.cpu.get_cpu_capability()])


def machine() -> str:
    """What decides how sums are rounded."""
    return f"{processor()}, one thread a run, torch {torch.__version__}"


def read(file: Path) -> tuple[Measured, set[str]]:
    """The runs that were made, and the machines that made them."""
    saved = json.loads(file.read_text()) if file.exists() else {"machines": [], "runs": {}}
    return Measured(saved["runs"]), set(saved["machines"])


def make(
    wanted: list[dict], runs: Runs, machines: set[str], file: Path, work: Path, desc: str, by=runs_of_one_base
) -> None:
    """Run what `runs` lacks, base by base, on all cores, and write `file` after each."""
    cores = os.cpu_count() or 1
    by_base: dict[str, list[dict[str, dict]]] = {}  # by what is shared, in parts of 6 runs, so that little is lost
    for name, spec in {name_of(spec): spec for spec in wanted if name_of(spec) not in runs}.items():
        parts = by_base.setdefault(name_of({key: value for key, value in spec.items() if key in SHARED}), [{}])
        if len(parts[-1]) == 6:
            parts.append({})
        parts[-1][name] = {**EVERY, **spec}
    rounds = range(max(map(len, by_base.values()), default=0))  # a part of each base in turn: early studies first
    together = [parts[i] for i in rounds for parts in by_base.values() if i < len(parts)]
    if together:
        machines.add(f"{cores} CPU cores, {machine()}")
    with ProcessPoolExecutor(cores, get_context("spawn")) as pool:  # a fork takes along what locks are held by threads
        seeds = {spec["seed"] for part in together for spec in part.values()}
        policies = pool.map(sft, [work / f"sft-{seed}" for seed in seeds], seeds)
        list(tqdm(policies, total=len(seeds), desc="SFT policies", unit="seed"))
        bar = tqdm(total=sum(map(len, together)), desc=desc, unit="run")
        for done in as_completed([pool.submit(by, work, part) for part in together]):
            runs |= done.result()
            bar.update(len(done.result()))
            file.parent.mkdir(exist_ok=True, parents=True)
            beside = file.with_suffix(".tmp")
            lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(one)}" for name, one in sorted(runs.items()))
            beside.write_text(f'{{"machines": {json.dumps(sorted(machines))}, "runs": {{\n{lines}\n}}}}\n')
            beside.replace(file)
        bar.close()


def check(runs: Runs, machines: set[str], count: int, work: Path) -> None:
    """Make `count` of the studies' runs again, drawn at random, and say how many end alike. Exits with 1 unless all do.

    On a machine that claims.json names, every figure of every iteration must be equal. On any other sums round
    otherwise, and runs part: there the win rates after one and two iterations must be as near as TOLERANCE (rounded
    otherwise on one machine they were within 0.001; later a run that collapses may be anywhere).
    """
    names = random.sample(sorted(runs), min(count, len(runs))) or sys.exit("claims.json holds no run: nothing to check")
    make([json.loads(name) for name in names], {}, set(), work / "again.json", work, "check")
    again = json.loads((work / "again.json").read_text())["runs"]
    known = any(one.endswith(f", {machine()}") for one in machines)
    others = []
    for name in names:
        was, now = ([row["gold/win_rate"] for row in of[name]["iterations"]] for of in (runs, again))
        if again[name] != runs[name] if known else any(abs(was[t] - now[t]) > TOLERANCE for t in (1, 2)):
            others.append(name)
            print("win rates", *(f"{a:.3f}" for a in was), "in claims.json,", *(f"{b:.3f}" for b in now), "now:", name)
    how = "in every figure of every iteration" if known else f"to {TOLERANCE} of the win rates of two iterations"
    print(f"{len(names) - len(others)} of {len(names)} runs end as in claims.json, {how}")
    if others:
        sys.exit(f"{len(others)} of {len(names)} runs end otherwise than in claims.json")


# What is shown


def spread(values: list[float | None], digits: int = 3) -> str:
    """Mean ± standard deviation."""
    numbers = [v for v in values if v is not None]
    if not numbers:
        return "–"
    more = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{more}"


def gain(ours: list[float], theirs: list[float], comparisons: int = 1) -> str:
    """The mean paired difference over the seeds, and its interval, see `interval`."""
    low, mean, high = interval(ours, theirs, comparisons)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" if len(ours) > 1 else f"{mean:+.3f}"


@functools.cache
def student_t(probability: float, freedom: int) -> float:
    """The two-sided quantile t of Student's distribution: |T| ≤ t with this probability. By bisection and Simpson."""
    total = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    density = lambda x: total * (1 + x * x / freedom) ** (-(freedom + 1) / 2)  # noqa: E731
    low, high = 0.0, 100.0
    while high - low > 1e-6:
        t, n = (low + high) / 2, 1000
        weights = [1, *[4, 2] * (n // 2 - 1), 4, 1]
        inside = 2 * t / n / 3 * sum(w * density(t * k / n) for k, w in enumerate(weights))
        low, high = (t, high) if inside < probability else (low, t)
    return high


def interval(ours: list[float], theirs: list[float], comparisons: int = 1) -> tuple[float, float, float]:
    """Of the mean paired difference, 95 %; of several comparisons, all of them at once (Bonferroni)."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, n = statistics.mean(differences), len(differences)
    if n == 1:
        return math.nan, mean, math.nan
    half = student_t(1 - 0.05 / comparisons, n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return mean - half, mean, mean + half


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---", *["--:"] * (len(headings) - 1)], *rows]
    return "\n".join("|" + "|".join(line) + "|" for line in lines)


def cost(runs: Runs, row: list[dict]) -> list[str]:
    """Million tokens trained on, scored and sampled in three iterations, without the reference's one pass over D."""
    every = [[sum(column(runs, row, f"tokens/{kind}", t)) for t in (1, 2, 3)] for kind in KINDS]
    return [f"{sum(by_t) / len(row) / 1e6:.2f}" for by_t in every]


def compared(study: str) -> int:
    """How many methods are compared with plain training at once: those of `main` and `more` are one table."""
    return len(METHODS | BASELINES if study == "main" else settings(study)) - 1


def methods_table(runs: Runs, *studies: str) -> str:
    """SFT and every method of these studies of one loss, after T = 3 iterations."""
    rows = {method: row for study in studies for method, row in specs(runs, study).items()}
    loss, comparisons = loss_of(studies[0]), compared(studies[0])
    plain = rows["plain training"]
    sft, alone = (column(runs, plain, key, t) for key, t in (("gold/reward", 0), ("gold/win_rate", 3)))
    lines = [["SFT", "–", spread(sft), middle_of(sft), "–", "0", spread(column(runs, plain, "gold/win_rate", 0)), "–"]]
    for method, row in rows.items():
        reward, win = column(runs, row, "gold/reward"), column(runs, row, "gold/win_rate")
        collapsed = sum(ours < theirs for ours, theirs in zip(reward, sft))
        difference = "–" if method == "plain training" else gain(win, alone, comparisons)
        lines.append([method, f"{best(runs, loss, method)['beta']:g}", spread(reward), middle_of(reward),
                      f"{collapsed} of {len(row)}", spread(column(runs, row, "kl"), 1), spread(win),
                      difference])  # fmt: skip
    return markdown(["method", "β", "true reward", "its median", "collapsed", "KL, nats", "win rate over SFT",
                     "win rate less plain training's"], lines)  # fmt: skip


def details_table(runs: Runs) -> str:
    """What else is known of the runs of `main` and `more`."""
    lines = [[method, middle_of(column(runs, row, "gold/win_rate")),
              spread(column(runs, row, "select/precision")), spread(column(runs, row, "bootstrap/precision")),
              spread(column(runs, row, "gold/length"), 1), *cost(runs, row)]
             for method, row in (specs(runs, "main") | specs(runs, "more")).items()]  # fmt: skip
    return markdown(["method", "median win rate", "precision",
                     "precision of the bootstrapped pairs", "words", *(f"M tokens {kind}" for kind in KINDS)],
                    lines)  # fmt: skip


def middle_of(values: list[float]) -> str:
    return f"{statistics.median(values):.3f}"


def rows_at(runs: Runs, noise: float) -> dict[str, list[dict]]:
    """The runs of `main`, with this share of flipped labels; 0.3 is the playground's, and no part of a run's name."""
    changed = {} if noise == 0.3 else {"label_noise": noise}
    return {method: [spec | changed for spec in row] for method, row in specs(runs, "main").items()}


def wide_table(runs: Runs, noise: float, given: dict[str, str]) -> str:
    """Result and cost of every method; given: method -> what it knows beside the pairs."""
    rows = rows_at(runs, noise)
    plain, lines = column(runs, rows["plain training"], "gold/win_rate"), []
    for method, row in rows.items():
        win = column(runs, row, "gold/win_rate")
        lead = "–" if method == "plain training" else gain(win, plain, len(rows) - 1)
        lines.append([method.replace("plain training", "plain DPO"), given.get(method, "nothing"),
                      f"{row[0]['beta']:g}", spread(column(runs, row, "gold/reward")), spread(win), lead,
                      spread(column(runs, row, "kl"), 1), spread(column(runs, row, "gold/broken"), 2),
                      spread(column(runs, row, "gold/length"), 1), *cost(runs, row)])  # fmt: skip
    return markdown([f"{noise:.0%} flipped", "given beside the pairs", "β", "true reward", "win rate over SFT",
                     "less plain DPO's", "KL, nats", "broken", "words", *(f"M tokens {kind}" for kind in KINDS)],
                    lines)  # fmt: skip


Points = list[list[tuple[float, float]]]  # of every β, of every seed: KL, true reward


def frontier(runs: Runs, method: str) -> Points:
    """Where a method ends after T = 3 iterations, at every β of the grid: on validation prompts, the tuning seeds."""
    rows = [[at("dpo", method, seed, eval_split="validation", **point) for seed in TUNING_SEEDS["dpo"]]
            for point in grid("dpo")]  # fmt: skip
    return [list(zip(column(runs, row, "kl"), column(runs, row, "gold/reward"))) for row in rows]


def reward_at(points: Points, kl: float, seeds: tuple[int, ...]) -> float | None:
    """The largest true reward at this KL on the straight lines through the means over the seeds at neighbouring β."""
    means = [[sum(of_beta[seed][k] for seed in seeds) / len(seeds) for k in (0, 1)] for of_beta in points]
    crossed = [low + (high - low) * (kl - a) / (b - a) for (a, low), (b, high) in itertools.pairwise(means)
               if a != b and min(a, b) <= kl <= max(a, b)]  # fmt: skip
    return max(crossed, default=None)  # None: nearer or farther than any β leads


def frontier_at(points: Points, kl: float, plain: Points | None = None) -> tuple[float, float, float] | None:
    """The true reward at this KL, or what it is more than that of `plain` there, with its 95 % interval.

    The interval comes from drawing the seeds anew 1,000 times, the same ones for both. None where they do not lead, or
    a tenth of the draws does not.
    """

    @functools.cache  # of five seeds only 126 draws differ
    def value(seeds: tuple[int, ...]) -> float | None:
        there = [reward_at(one, kl, seeds) for one in ((points, plain) if plain else (points,))]
        return None if None in there else there[0] - sum(there[1:])  # type: ignore[operator, arg-type]

    n, rng = len(points[0]), random.Random(0)
    mean = value(tuple(range(n)))
    known = sorted(v for _ in range(1000) if (v := value(tuple(sorted(rng.choices(range(n), k=n))))) is not None)
    if mean is None or len(known) < 900:
        return None
    return known[int(0.025 * len(known))], mean, known[int(0.975 * len(known))]


def in_brackets(found: tuple[float, float, float] | None, sign: str = "") -> str:
    return "{1:{s}.2f} [{0:{s}.2f}, {2:{s}.2f}]".format(*found, s=sign) if found else "–"


def frontier_table(runs: Runs) -> str:
    """The true reward at equal distance from the reference, and what it is more than plain DPO's."""
    every = {method: frontier(runs, method) for method in methods_of("main") | methods_of("more")}
    lines = []
    for method, points in every.items():
        cells = [in_brackets(frontier_at(points, kl)) for kl in KLS]
        against = every["plain training"] if method != "plain training" else None
        more = [frontier_at(points, kl, against) if against else None for kl in KLS]
        lines.append([method, *(f"{cell.split(' ')[0]}; {in_brackets(of, '+')}" if of else cell
                                for cell, of in zip(cells, more))])  # fmt: skip
    return markdown(["true reward at a KL of", *(f"{kl} nats" for kl in KLS)], lines)


def tuning_table(runs: Runs, loss: str) -> str:
    """Win rates on validation prompts, means over the tuning seeds, at every β with its best learning rate."""
    betas = GRID[loss][0]
    methods = methods_of("main") | methods_of("more") if loss == "dpo" else methods_of(loss)
    lines = [[method, *(f"{at_beta(runs, loss, method, beta):.3f}" for beta in betas)] for method in methods]
    return markdown(["win rate over SFT, validation", *(f"β = {beta:g}" for beta in betas)], lines)


def at_beta(runs: Runs, loss: str, method: str, beta: float) -> float:
    return max(validation(runs, loss, method, {"beta": beta, "learning_rate": rate}) for rate in GRID[loss][1])


def noise_tables(runs: Runs) -> str:
    levels = sorted([*NOISE, 0.3])
    rows, at_k, comparisons = [], [], len(levels) * (len(UNDER_NOISE) - 1)
    for noise in levels:
        rows_of = specs(runs, "main" if noise == 0.3 else f"noise {noise}")
        every = {method: rows_of[method][:5] for method in UNDER_NOISE}
        win = {method: column(runs, row, "gold/win_rate") for method, row in every.items()}
        plain, *others = win.values()
        rows.append([f"{noise:.0%}", spread(plain), *(f"{spread(w)}; {gain(w, plain, comparisons)}" for w in others)])
        ks = zip(*column(runs, every["plain training"], "precision at K", 2))
        at_k.append([f"{noise:.0%}", *(f"{statistics.mean(k):.3f}" for k in ks)])
    return (markdown(["flipped labels: win rate over SFT; less plain DPO's", *UNDER_NOISE], rows) + "\n\n"
            + markdown(["flipped labels: precision of the widest", *(f"{k}0 %" for k in range(1, 11))],
                       at_k))  # fmt: skip


def length_table(runs: Runs) -> str:
    rows, lines = specs(runs, "length"), []
    win = {name: column(runs, row, "gold/win_rate") for name, row in rows.items()}
    for name, row in rows.items():
        lead = "–" if name == "SeRA" else gain(win[name], win["SeRA"], len(rows) - 1)
        shown = ("select/precision", 3), ("bootstrap/precision", 3), ("gold/length", 1), ("offline/length", 2)
        lines.append([name, spread(column(runs, row, "gold/reward")), spread(win[name]), lead,
                      *(spread(column(runs, row, key), digits) for key, digits in shown)])  # fmt: skip
    return markdown(["method", "true reward", "win rate over SFT", "less SeRA's", "precision", "precision of the "
                     "bootstrapped pairs", "words", "kept pairs: chosen longer by, words"], lines)  # fmt: skip


OVER = {
    "gold/reward": "true reward", "gold/win_rate": "win rate over SFT", "kl": "KL, nats",
    "bootstrap/precision": "precision of the bootstrapped pairs, ties ½", "bootstrap/ties": "tied bootstrapped pairs",
    "gold/broken": "broken answers",
    "bootstrap/reward": "true reward of what bootstrapped pairs choose",
    "bootstrap/margin": "implicit margin of bootstrapped pairs, nats",
}  # fmt: skip


def over_table(runs: Runs, study: str, *keys: str) -> str:
    """By iteration; of OVER's figures these, or all."""
    lines = []
    for key in keys or OVER:
        for name, row in specs(runs, study).items():
            by_t = [column(runs, row, key, t) for t in range(1, LONG + 1)]
            if any(value is not None for values in by_t for value in values):
                lines.append([OVER[key], name, *(spread(values, 1 if "nats" in OVER[key] else 3) for values in by_t)])
    return markdown(["", "method", *(f"t = {t}" for t in range(1, LONG + 1))], lines)


def lead_table(runs: Runs) -> str:
    """By iteration: win rates less plain DPO's, true rewards less SeRA's."""
    rows, times = specs(runs, "over"), range(1, LONG + 1)
    wanted = [("win rate less plain DPO's", "gold/win_rate", name, "plain training") for name in rows]
    wanted += [("true reward less SeRA's", "gold/reward", name, "SeRA") for name in rows if " + " in name]
    lines = []
    for what, key, name, other in wanted[1:]:
        both = [[column(runs, rows[one], key, t) for one in (name, other)] for t in times]
        lines.append([what, name, *(gain(ours, theirs, LONG * (len(wanted) - 1)) for ours, theirs in both)])
    return markdown(["", "method", *(f"t = {t}" for t in times)], lines)


def asked_table(runs: Runs) -> str:
    rows = specs(runs, "asked")
    win = {name: column(runs, row, "gold/win_rate") for name, row in rows.items()}
    first = next(iter(rows))
    return markdown(
        ["after T = 3", "win rate over SFT", "less SeRA's", "precision of the bootstrapped pairs",
         *(f"M tokens {kind}" for kind in KINDS)],
        [[name, spread(win[name]), "–" if name == first else gain(win[name], win[first], len(rows) - 1),
          spread(column(runs, row, "bootstrap/precision")), *cost(runs, row)] for name, row in rows.items()],
    )  # fmt: skip


def losses_table(runs: Runs) -> str:
    """Win rates after T = 3 iterations under the other losses, and their differences from plain training."""
    columns = []
    for rows in (specs(runs, loss) for loss in LOSSES):
        win = {method: column(runs, row, "gold/win_rate") for method, row in rows.items()}
        plain, comparisons = win["plain training"], len(LOSSES) * (len(win) - 1)
        columns.append([spread(plain), *(f"{spread(win[m])}, {gain(win[m], plain, comparisons)}" for m in rows
                                         if m != "plain training")])  # fmt: skip
    headings = [f"{what}: win rate over SFT; less plain training's" for what in LOSSES.values()]
    return markdown(["method", *headings], [list(line) for line in zip(UNDER_LOSSES, *columns)])


TITLES = {
    "short": "DPO, the methods of `main`, each at its best β: 30 % flipped labels, after three iterations",
    "main": "The same, with those of `more`",
    "details": "The same runs: pairs and cost",
    "frontier": "DPO: true reward at equal distance from the reference; validation prompts",
    "tuning": "DPO, by β: validation prompts",
    "noise": "DPO, by the share of flipped labels; and the share of right labels among the K widest pairs",
    "over": "Over-optimisation: six iterations at the best β",
    "lead": "The same runs: differences",
    "near": "The same at the playground's own β and learning rate",
    "length": "Labels of which half favour the longer response, and 15 % are flipped then",
    "asked": "The reviewers' questions, and what each answer costs",
    "losses": "IPO, SLiC-HF and SimPO: win rates",
    **{loss + more: f"{what}, {title}" for loss, what in LOSSES.items() for more, title in (
        ("", "each method at its best β"), (" tuning", "by β: validation prompts"))},
}  # fmt: skip


def tables(runs: Runs) -> dict[str, str]:
    """Of every study all of whose runs have been made."""
    makers = {
        "short": partial(methods_table, runs, "main"), "main": partial(methods_table, runs, "main", "more"),
        "tuning": partial(tuning_table, runs, "dpo"), "details": partial(details_table, runs),
        "frontier": partial(frontier_table, runs), "noise": partial(noise_tables, runs),
        "length": partial(length_table, runs), "asked": partial(asked_table, runs), "lead": partial(lead_table, runs),
        "over": partial(over_table, runs, "over"), "near": partial(over_table, runs, "near"),
        "near, in short": partial(over_table, runs, "near", "gold/reward", "bootstrap/precision"),
        "losses": partial(losses_table, runs),
        **{loss: partial(methods_table, runs, loss) for loss in LOSSES},
        **{f"{loss} tuning": partial(tuning_table, runs, loss) for loss in LOSSES},
    }  # fmt: skip
    shown = made(makers)
    of_dpo = {name for name in shown if loss_of(name.removesuffix(" tuning")) == "dpo" and name != "losses"}
    return shown | {name: shown[name].replace("plain training", "plain DPO") for name in of_dpo}


def made(makers: dict[str, Callable[[], str]]) -> dict[str, str]:
    """What each of them makes, where the runs are there that it needs."""
    shown = {}
    for name, maker in makers.items():
        with contextlib.suppress(Missing):
            shown[name] = maker()
    return shown


def all_tables(runs: Runs) -> str:
    """claims.md"""
    shown = tables(runs)
    return "".join(f"## {title}\n\n{shown[name]}\n\n" for name, title in TITLES.items() if name in shown)


def sentences(runs: Runs) -> dict[str, str]:
    """What claims-in-words.md says. Every number is made of the runs, and so is whether a difference is one."""

    def values(study: str, row: str, key: str, t: int = 3) -> list:
        return column(runs, specs(runs, study)[row], key, t)

    def mean(study: str, row: str, key: str, t: int = 3, digits: int = 3) -> str:
        return f"{statistics.mean(values(study, row, key, t)):.{digits}f}"

    def against_plain(study: str, *rows: str) -> str:
        """Shown to win more often than plain DPO: SeRA (+0.026 [+0.009, +0.044]). Not shown to win …"""
        plain = values(study, "plain training", "gold/win_rate")
        n, comparisons = len(plain), compared(study)
        more, less = "Shown to win more often", "Shown to win less often"
        neither = "Not shown to win more or less often"
        said: dict[str, list[str]] = {more: [], less: [], neither: []}
        for row in rows:
            win = values(study, row, "gold/win_rate")
            low, _, high = interval(win, plain, comparisons)
            verdict = more if low > 0 else less if high < 0 else neither
            said[verdict].append(f"{row} ({gain(win, plain, comparisons)})")
        verdicts = [f"{verdict} than plain DPO: {', '.join(those)}." for verdict, those in said.items() if those]
        return " ".join(verdicts) + (f" These are differences in win rate over SFT, means over {n} seeds, and their "
                                     f"intervals hold for all {comparisons} comparisons at once (95 %).")  # fmt: skip

    def against_random(method: str) -> str:
        win, by_chance = (values("main", row, "gold/win_rate") for row in (method, "random K"))
        return gain(win, by_chance, compared("main"))

    def more_at_kl(kl: float) -> str:
        """plain DPO 0.51; differences from it: SeRA +0.06 [+0.01, +0.11], …"""
        plain = frontier(runs, "plain training")
        others = ("selection only", "SeRA", "SeRA + both remedies")
        found = {method: frontier_at(frontier(runs, method), kl, plain) for method in others}
        more = ", ".join(f"{method} {in_brackets(more, '+')}" for method, more in found.items() if more)
        return f"plain DPO {in_brackets(frontier_at(plain, kl)).split(' ')[0]}; differences from it: {more}"

    headline, right = ("SeRA", "selection only", "SeRA + both remedies"), "bootstrap/precision"
    return made({
        "headline": lambda: (
            "30 % of the labels are flipped, and each method has its own best β. "
            f"{against_plain('main', *headline, 'cDPO, ε = 0.3', 'robust DPO, ε = 0.3')}"),
        "frontier": lambda: (
            f"True reward four nats from the reference: {more_at_kl(4)} (95 % each, seeds resampled)."),
        "direction": lambda: (
            f"True reward by what is kept: the largest margins {mean('main', 'selection only', 'gold/reward')}, the "
            f"middle ones {mean('more', 'the middle margins', 'gold/reward')}, random pairs "
            f"{mean('main', 'random K', 'gold/reward')}, the smallest "
            f"{mean('main', 'the smallest margins', 'gold/reward')}; the share of right labels among them is "
            f"{mean('main', 'selection only', 'select/precision')}, "
            f"{mean('more', 'the middle margins', 'select/precision')}, {mean('main', 'random K', 'select/precision')} "
            f"and {mean('main', 'the smallest margins', 'select/precision')}. Win rates less that of random pairs: "
            f"selection only {against_random('selection only')}, SeRA {against_random('SeRA')} "
            "(95 % for 13 comparisons at once)."),
        "noise40": lambda: f"40 % of the labels are flipped. {against_plain('noise 0.4', *headline)}",
        "clean": lambda: f"No label is flipped. {against_plain('noise 0.0', *headline)}",
        "beta1": lambda: (
            f"With β = 1 for both, SeRA's win rate over SFT on validation prompts is "
            f"{at_beta(runs, 'dpo', 'SeRA', 1.0):.3f}, plain DPO's {at_beta(runs, 'dpo', 'plain training', 1.0):.3f}."),
        "over": lambda: (
            f"SeRA's bootstrapped pairs are right {mean('over', 'SeRA', right, 2)} of the time in the second iteration "
            f"and {mean('over', 'SeRA', right, 6)} in the sixth, with both remedies "
            f"{mean('over', 'SeRA + both', right, 2)} and {mean('over', 'SeRA + both', right, 6)}; after the sixth the "
            f"policy's true reward is {mean('over', 'SeRA', 'gold/reward', 6)}, with both remedies "
            f"{mean('over', 'SeRA + both', 'gold/reward', 6)}, plain DPO's "
            f"{mean('over', 'plain training', 'gold/reward', 6)}."),
        "near": lambda: (
            f"At the β and learning rate of `python train.py`, bootstrapped pairs are right "
            f"{mean('near', 'SeRA', right, 5)} of the time in the fifth iteration, with both remedies "
            f"{mean('near', 'SeRA + both', right, 5)}."),
        "length": lambda: (
            f"In all pairs the chosen response is longer by {mean('length', 'plain training', 'offline/length', 3, 2)} "
            f"words, in those that SeRA keeps by {mean('length', 'SeRA', 'offline/length', 3, 2)}. "
            f"The variant `length_free` makes that {mean('length', 'SeRA + length-free', 'offline/length', 3, 2)}, "
            f"and their precision "
            f"{mean('length', 'SeRA + length-free', 'select/precision')} in the place of "
            f"{mean('length', 'SeRA', 'select/precision')}."),
    })  # fmt: skip


BLOCK = re.compile(r"<!-- claims: (.+?) -->(.*?)<!-- end -->", re.DOTALL)


def filled(text: str, shown: dict[str, str]) -> str:
    """A file with what is shown in its blocks: between `<!-- claims: NAME -->` and `<!-- end -->`.

    NAME: a key of TITLES for a table, `sentence:KEY` for a sentence, which may stand within a line. Raises KeyError
    where a block has another.
    """

    def fill(block: re.Match) -> str:
        around = "\n" if "\n" in block[2] + shown[block[1]] else ""
        return f"<!-- claims: {block[1]} -->{around}{shown[block[1]]}{around}<!-- end -->"

    return BLOCK.sub(fill, text)


def blocks(runs: Runs) -> dict[str, str]:
    """What `filled` takes: every table and sentence by its name."""
    return tables(runs) | {f"sentence:{key}": text for key, text in sentences(runs).items()}


@contextlib.contextmanager
def figure(file: Path, panels: int = 1):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": "small"}
    with plt.rc_context(style):
        drawn, [axes] = plt.subplots(1, panels, figsize=(4.5 + 4 * panels, 4.2), layout="constrained", squeeze=False)
        yield axes
        drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
        drawn.savefig(file, dpi=100)
        plt.close(drawn)


def draw_frontier(runs: Runs, file: Path) -> None:
    """True reward against KL: a line a method, a point a β, means over the seeds and their standard errors.

    Right: the same between 1 and 12 nats, where the best points are.
    """
    points = {method: frontier(runs, method) for method in IN_FIGURE}
    with figure(file, panels=2) as (whole, near):
        for method, of_betas in points.items():
            means = [[statistics.mean(values) for values in zip(*seeds)] for seeds in of_betas]
            errors = [[statistics.stdev(v) / math.sqrt(len(v)) if len(v) > 1 else 0 for v in zip(*seeds)]
                      for seeds in of_betas]  # fmt: skip
            (kl, reward), (kl_error, reward_error) = zip(*means), zip(*errors)
            colour, marker = IN_FIGURE[method]
            for axes in (whole, near):
                axes.errorbar(
                    kl,
                    reward,
                    reward_error,
                    kl_error,
                    color=colour,
                    marker=marker,
                    markersize=5,
                    linewidth=1,
                    elinewidth=0.6,
                    label=method.replace("plain training", "plain DPO"),
                )
        whole.set(xscale="log", xlabel="KL(π_θ ‖ π_ref), nats a response", ylabel="true reward")
        near.set(xlabel="the same from 1 to 12 nats", xlim=(1, 12), ylim=(0.4, 0.9))


def draw_over(runs: Runs, place: Path) -> None:
    """By iteration: the true reward, and the precision of the bootstrapped pairs; means and standard deviations."""
    rows = specs(runs, "over")
    for key, file, label in [
        ("gold/reward", "reward", "true reward"),
        ("bootstrap/precision", "bootstrapped-precision", "precision of the bootstrapped pairs"),
    ]:
        by_t = {row: {t: values for t in range(LONG + 1) if None not in (values := column(runs, rows[row], key, t))}
                for row in rows}  # fmt: skip
        with figure(place / f"{file}.png") as [axes]:
            for row, values in by_t.items():
                mean = [statistics.mean(v) for v in values.values()]
                sd = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values.values()]
                if mean:
                    name = row.replace("plain training", "plain DPO")
                    axes.plot([*values], mean, marker="o", markersize=3, label=name)
                    low, high = ([m + sign * d for m, d in zip(mean, sd)] for sign in (-1, 1))
                    axes.fill_between([*values], low, high, alpha=0.15)
            axes.set(xlabel="iteration", ylabel=label, xticks=range(LONG + 1))


def make_quick() -> None:
    """One seed, two values of β, fewer pairs: every study in minutes, its figures worth nothing."""
    global SEEDS, LONG
    SEEDS, LONG = [0], 3
    TUNING_SEEDS.update({loss: [10] for loss in GRID})
    EVERY.update(max_train_pairs=320, steps_per_iteration=10)
    for loss, (betas, rates) in GRID.items():
        GRID[loss] = (betas[-2:], rates)


def at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} runs: expected at least 1")
    return number


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=STUDIES)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--quick", action="store_true", help="into experiments/results/quick, which git ignores")
    instead.add_argument(
        "--check", type=at_least_one, metavar="N", help="make N of the runs again, write nothing, and exit with 1 "
        "unless they end alike: on a machine that claims.json names in every figure, on another to "
        f"{TOLERANCE} of the win rates of two iterations")  # fmt: skip
    instead.add_argument("--write", action="store_true", help="run nothing, and write all that is made of claims.json")
    options = parser.parse_args(arguments)
    results = RESULTS / "quick" if options.quick else RESULTS
    if options.quick:
        make_quick()
        shutil.rmtree(results, ignore_errors=True)
    file = results / "claims.json"
    runs, machines = read(file)
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        try:
            if options.check:
                return check(runs, machines, options.check, work)
            if not options.write:
                parts = [part for study in options.studies for part in STUDIES[study]]
                wanted = [spec for part in parts for spec in tuning(part)]
                make(wanted, runs, machines, file, work, "tuning")
                wanted = [spec for part in parts for row in specs(runs, part).values() for spec in row]
                make(wanted, runs, machines, file, work, "studies")
        except BrokenProcessPool:
            parser.exit(2, "A worker process was killed (out of memory?). "
                        "Its runs are lost, and nothing is compared: run the same command again.\n")  # fmt: skip
    written = all_tables(runs)
    (results / "claims.md").write_text(written)
    for draw, file in ((draw_frontier, results / "frontier.png"), (draw_over, results)):
        with contextlib.suppress(Missing):
            draw(runs, file)
    print(written)
    if options.quick:
        return
    words = results / "claims-in-words.md"
    try:
        words.write_text(filled(words.read_text(), blocks(runs)))
    except KeyError as error:
        message = f"{words}: of claims.json there is nothing to put into its block {error}"
        if {*options.studies} == {*STUDIES}:
            sys.exit(message)
        print(f"{message}: it is left as it is, as not every study was asked for")


if __name__ == "__main__":
    main()
