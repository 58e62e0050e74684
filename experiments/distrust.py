"""How well does the margin find wrong labels? The labels that a model distrusts most, against the truth.

    python experiments/distrust.py            four shares of flipped labels, ten seeds; stopped, it goes on where it was
    python experiments/distrust.py --model DIR --data FILE    a model and pairs of your own: two shares, two seeds
    python experiments/distrust.py --write    run nothing: the tables, anew, from results/distrust.json

The playground, at its own β and learning rate; or a model of your own, on pairs taken to be labelled rightly, of which
160 with different, short prompts are drawn, and 64 more, not flipped, to evaluate on (see MODEL).
A pair's label is distrusted as its margin is small, under
    SeRA             the reward with which it reviews: at t = 2 that is plain DPO after one epoch, at t = 3 its ensemble
    plain DPO        the policy after one and after three epochs; the mean reward of its three policies
    robust DPO       (arXiv:2403.00409) told the true share of flipped labels, after three epochs
    cross-fitted     plain DPO on each half of the pairs, which judges the other half: no pair is judged by a policy
                     that was trained on it
An epoch of D is as many steps for SeRA as for the others; one of each half is as many steps together.

Of the flipped labels: AUC, the area under the ROC curve (the share of pairs of a flipped and a right label of which the
flipped one has the smaller margin; 0.5 by chance), and the share of flipped labels among the 1, 5 and 20 % of the pairs
with the smallest margins.

Of a model of one's own also what wrong labels do to it, where 30 % are flipped, after two iterations of equal steps:
the accuracy of plain DPO, robust DPO, selection only and SeRA on the pairs that are not flipped, and the share of right
labels among the pairs that the last two keep. Writes results/distrust.json, and the tables into results/distrust.md.
"""

import argparse
import json
import math
import os
import random
import re
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
from claims import RESULTS, equal_steps, flags_of, machine, markdown, quiet, sft, variant_of
from tqdm import tqdm

import train
from sera_min import playground
from sera_min.machinery.config import Config
from sera_min.machinery.policies import Policies
from sera_min.machinery.run import open_run
from sera_min.pairs import Preferences
from sera_min.select import ensemble_margin, select_top

NOISE, SEEDS, SHARES = (0.1, 0.2, 0.3, 0.4), range(10), (0.01, 0.05, 0.2)
MODEL = {  # the flags of a run on a model of one's own
    "max_length": 128, "max_new_tokens": 32, "learning_rate": 1e-5, "max_tokens": 2048,
    "per_device_train_batch_size": 8, "device": "cpu",
}  # fmt: skip
PAIRS, CLEAN, MODEL_SEEDS = 160, 64, (0, 1)
PLAIN = {"keep": 1.0, "bootstrap": 0.0}
NAMES = {"plain": "plain DPO", "robust": "robust DPO", "selection": "selection only", "SeRA": "SeRA"}
WAYS = (  # of judging, in the order of the table
    "SeRA, t = 2: plain DPO after one epoch", "SeRA, t = 3", "SeRA, as t = 4 would see", "plain DPO after three epochs",
    "plain DPO, mean of its three policies", "robust DPO after one epoch", "robust DPO after three epochs",
    "cross-fitted, one epoch", "cross-fitted, three epochs",
)  # fmt: skip


def margins_of(policies: Policies, t: int, preferences: Preferences) -> torch.Tensor:
    """m_t of N pairs, in nats: (N,)"""
    r = policies.log_prob(t, preferences.rows) - policies.log_prob(0, preferences.rows)
    return r[0::2] - r[1::2]


def margins_by_iteration(config: Config, variant: train.Variant) -> list[torch.Tensor]:
    """A run without evaluations: the margins of D and then of the evaluation pairs, after each iteration."""
    margins = []
    with open_run(config, variant.name, variant.world, wants_report=False) as run:
        for t in range(1, run.config.iterations + 1):
            reviewed = variant.review(t, run.given, run.policies, run.config, variant)
            train.train(t, reviewed.training_set, run, run.config, variant)
            of_both = [margins_of(run.policies, t, pairs) for pairs in (run.given, run.held_out)]
            margins.append(torch.cat(of_both))
    return margins


def run_of(seed: int, noise: float, work: Path, preferences: Callable | None = None, **flags) -> list[torch.Tensor]:
    """Three iterations of train.py in the playground: the margins of each."""
    variant = variant_of(flags, work)
    if preferences:
        variant.world.preferences = preferences
    with tempfile.TemporaryDirectory() as place:
        config = Config(device="cpu", seed=seed, label_noise=noise, output_dir=f"{place}/run", **flags_of(flags))
        return margins_by_iteration(config, variant)


def one_half(half: int, noise: float, n: int, part: str, *, seed: int, **_) -> list[dict]:
    """In the place of `preferences`: one half of D to train on, and the other to evaluate on."""
    rows = playground.preferences(2000, "train", seed=seed, label_noise=noise)
    return rows[half if part == "train" else 1 - half :: 2]


def figures_of(margins: torch.Tensor, flipped: torch.Tensor) -> dict[str, float]:
    """Of N pairs; flipped is (N,) bool."""
    order = margins.argsort()
    wrong, right = margins[flipped], margins[~flipped]
    below = (wrong[:, None] < right).float() + 0.5 * (wrong[:, None] == right)
    found = {f"{share:.0%}": flipped[order[: round(share * len(order))]].float().mean().item() for share in SHARES}
    return {"auc": below.mean().item(), **found}


def measure(work: Path, seed: int, noise: float) -> dict[str, dict[str, float]]:
    """Way of judging -> its figures, for one world and one share of flipped labels."""
    return quiet(_measure, work, seed, noise)


def _measure(work: Path, seed: int, noise: float) -> dict[str, dict[str, float]]:
    rows = playground.preferences(2000, "train", seed=seed, label_noise=noise)
    flipped, n = torch.tensor([playground.is_flipped(row) for row in rows]), len(rows)
    sera, plain, robust = (
        [margins[:n] for margins in run_of(seed, noise, work, **flags)]
        for flags in ({}, PLAIN, {**PLAIN, "loss_type": "robust", "label_smoothing": noise})
    )
    halves = [run_of(seed, noise, work, partial(one_half, half, noise), **PLAIN) for half in (0, 1)]
    return figures_of_all(sera, plain, robust, crossed(halves, n), flipped)


def crossed(halves: list[list[torch.Tensor]], n: int) -> list[torch.Tensor]:
    """The margins of all n pairs, each by the policy that was trained on the other half of them, by iteration."""
    margins = [torch.empty(n) for _ in halves[0]]
    for half, of_half in enumerate(halves):
        for all_pairs, of_run in zip(margins, of_half):
            all_pairs[1 - half :: 2] = of_run[len(of_run) - len(all_pairs[1 - half :: 2]) :]  # of the evaluation pairs
    return margins


def figures_of_all(sera, plain, robust, crossed, flipped: torch.Tensor) -> dict[str, dict[str, float]]:
    """Way of judging -> its figures; each argument: the margins of D after iterations 1, 2 and 3."""
    margins = (
        plain[0], (sera[0] + sera[1]) / 2, (sera[1] + sera[2]) / 2, plain[2], sum(plain) / 3, robust[0], robust[2],
        crossed[0], crossed[2],
    )  # fmt: skip
    return {way: figures_of(m, flipped) for way, m in zip(WAYS, margins, strict=True)}


def rows_for_model(data: str, seed: int, noise: float) -> tuple[list[dict], list[dict], torch.Tensor]:
    """PAIRS rows of D, CLEAN rows to evaluate on, none of whose prompts D has, and which of D are flipped."""
    fields = ("instruction", "input", "chosen", "rejected")
    read = json.loads(Path(data).read_text(encoding="utf-8"))
    rows = {(row["instruction"], row["input"]): {name: row[name] for name in fields} for row in read}
    usable = [row for row in rows.values() if row["chosen"] != row["rejected"] and sum(map(len, row.values())) < 600]
    generator = random.Random(seed)
    drawn = generator.sample(usable, PAIRS + CLEAN)
    wrong = {*generator.sample(range(PAIRS), round(noise * PAIRS))}
    offline = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if i in wrong else row
        for i, row in enumerate(drawn[:PAIRS])
    ]
    return offline, drawn[PAIRS:], torch.tensor([i in wrong for i in range(PAIRS)])


def runs_for_model(noise: float) -> dict[str, tuple[dict, int | None]]:
    """Name of a run -> its flags, and which half of D it is trained on; None: all of it."""
    robust = {**PLAIN, "loss_type": "robust", "label_smoothing": noise}
    whole = {"SeRA": ({}, None), "plain": (PLAIN, None), "robust": (robust, None)}
    if noise == 0.2:  # how well wrong labels are found
        return {**whole, "half 0": (PLAIN, 0), "half 1": (PLAIN, 1)}
    whole["selection"] = ({"bootstrap": 0.0}, None)  # what they do
    return {run: ({**flags, "iterations": 2}, half) for run, (flags, half) in whole.items()}


def measure_model(model: str, data: str, seed: int, noise: float, run: str) -> dict:
    """Of each iteration the margins of D and then of the evaluation pairs, and the share of the latter above 0."""
    offline, test, _ = rows_for_model(data, seed, noise)
    flags, half = runs_for_model(noise)[run]
    if half is not None:
        offline, test = offline[half::2], offline[1 - half :: 2]
    steps = math.ceil(len(offline) / MODEL["per_device_train_batch_size"])
    variant = replace(variant_of(flags, Path()), batches_of=partial(equal_steps, steps))
    with tempfile.TemporaryDirectory() as place:
        for name, rows in {"train": offline, "test": test}.items():
            Path(place, f"{name}.json").write_text(json.dumps(rows))
        config = Config(
            **MODEL, **flags_of(flags), seed=seed, model_name_or_path=model, dataset_name=f"{place}/train.json",
            eval_dataset_name=f"{place}/test.json", eval_split="train", output_dir=f"{place}/run",
        )  # fmt: skip
        margins = quiet(margins_by_iteration, config, variant)
    assert all(len(some) == len(offline) + len(test) for some in margins), "a pair was dropped"
    return {"margins": [[round(m, 4) for m in some.tolist()] for some in margins],
            "accuracy": [(some[len(offline) :] > 0).float().mean().item() for some in margins]}  # fmt: skip


def figures_of_model(of_model: dict[str, dict], data_flipped: dict[str, list[bool]], seed: int, noise: float) -> dict:
    margins = {run: [torch.tensor(some) for some in of_model[f"{noise} {seed} {run}"]["margins"]]
               for run in runs_for_model(noise)}  # fmt: skip
    of_d = {run: [some[:PAIRS] for some in margins[run]] for run in ("SeRA", "plain", "robust")}
    flipped = torch.tensor(data_flipped[f"{noise} {seed}"])
    return figures_of_all(*of_d.values(), crossed([margins["half 0"], margins["half 1"]], PAIRS), flipped)


def table(done: dict[str, dict], noises=NOISE, seeds=SEEDS) -> str:
    """Means over the seeds, and the standard deviation of the AUC."""
    rows, names = [], [f"{share:.0%}" for share in SHARES]
    for way in WAYS:
        cells = [way]
        for noise in noises:
            of_seeds = [done[f"{noise} {seed}"][way] for seed in seeds]
            auc = [one["auc"] for one in of_seeds]
            found = " / ".join(f"{statistics.mean(one[name] for one in of_seeds):.2f}" for name in names)
            cells.append(f"{statistics.mean(auc):.3f} ± {statistics.stdev(auc):.3f}; {found}")
        rows.append(cells)
    return markdown(["AUC; flipped among the 1 / 5 / 20 % of the smallest margins",
                     *(f"{noise:.0%} flipped" for noise in noises)], rows)  # fmt: skip


def accuracy_table(of_model: dict[str, dict], noise: float) -> str:
    """Accuracy on the evaluation pairs, whose labels are right, after each iteration: one number a seed."""
    runs = {run: name for run, name in NAMES.items() if run in runs_for_model(noise)}
    every = {run: [of_model[f"{noise} {seed} {run}"]["accuracy"] for seed in MODEL_SEEDS] for run in runs}
    rows = [[name, *(one_a_seed(of_t) for of_t in zip(*every[run]))] for run, name in runs.items()]
    times = range(1, len(rows[0]))
    return markdown([f"accuracy, {noise:.0%} flipped in training", *(f"iteration {t}" for t in times)], rows)


def kept_table(of_model: dict[str, dict], flipped: dict[str, list[bool]], noise: float) -> str:
    """Of the pairs that a review after each iteration keeps, the share of right labels: one number a seed."""
    headings = [f"right labels among the kept pairs, {noise:.0%} flipped", "for iteration 2", "for iteration 3"]
    rows = [["plain DPO, robust DPO (all pairs)", *[one_a_seed(1 - noise for _ in MODEL_SEEDS)] * 2]]
    for run in ("selection", "SeRA"):
        shares = []
        for name in (f"{noise} {seed}" for seed in MODEL_SEEDS):
            margins = [torch.tensor(of_d[:PAIRS]) for of_d in of_model[f"{name} {run}"]["margins"]]
            shares.append(right_among_kept(margins, torch.tensor(flipped[name])))
        rows.append([NAMES[run], *map(one_a_seed, zip(*shares))])
    return markdown(headings, rows)


def right_among_kept(margins: list[torch.Tensor], flipped: torch.Tensor) -> list[float]:
    """margins: m_1 and m_2 of D. The review for iteration 2 sees m_1, that for iteration 3 the ensemble of both."""
    first, second = margins
    k = round(Config.keep * len(flipped))
    seen = first, ensemble_margin(second, first, Config.ensemble_gamma)
    return [(~flipped[select_top(m, k)]).float().mean().item() for m in seen]


def one_a_seed(values) -> str:
    return " / ".join(f"{value:.3f}" for value in values)


def tables(saved: dict) -> dict[str, str]:
    """By the names of distrust.md's blocks, of what has been run."""
    shown = {"distrust": table(saved["runs"])}
    done = saved.get("model", {})
    whole = {noise for noise in (0.2, 0.3) if all(f"{noise} {seed} {run}" in done for seed in MODEL_SEEDS
                                                  for run in runs_for_model(noise))}  # fmt: skip
    if 0.2 in whole:
        figures = {f"0.2 {seed}": figures_of_model(done, saved["flipped"], seed, 0.2) for seed in MODEL_SEEDS}
        shown["distrust: model"] = table(figures, (0.2,), MODEL_SEEDS)
        shown["distrust: accuracy"] = accuracy_table(done, 0.2)
    if 0.3 in whole:
        shown["distrust: accuracy, 30 %"] = accuracy_table(done, 0.3)
        shown["distrust: kept"] = kept_table(done, saved["flipped"], 0.3)
    return shown


def filled(text: str, shown: dict[str, str]) -> str:
    for name, block in shown.items():
        parts = rf"(<!-- {name} -->\n).*?\n?(<!-- end -->)"
        text = re.sub(parts, lambda m, block=block: m[1] + block + "\n" + m[2], text, flags=re.DOTALL)
    return text


def all_of(jobs: dict, pool: ProcessPoolExecutor, into: dict, save: Callable[[], None], desc: str) -> None:
    """jobs: name -> what to submit. What one returns is kept under its name, and saved."""
    running = {pool.submit(*job): name for name, job in jobs.items()}
    for job in tqdm(as_completed(running), desc, len(running)):
        into[running[job]] = job.result()
        save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--data")
    options, file = parser.parse_args(), RESULTS / "distrust.json"
    saved = json.loads(file.read_text()) if file.exists() else {"machines": [], "runs": {}}

    def save() -> None:
        saved["machines"] = sorted({*saved["machines"], machine()})
        file.with_suffix(".tmp").write_text(json.dumps(saved, sort_keys=True, indent=1) + "\n")
        file.with_suffix(".tmp").replace(file)

    with tempfile.TemporaryDirectory() as place, ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        if options.model:
            of_model = saved.setdefault("model", {})
            worlds = [(seed, noise) for noise in (0.2, 0.3) for seed in MODEL_SEEDS]
            saved["flipped"] = {f"{noise} {seed}": rows_for_model(options.data, seed, noise)[2].tolist()
                                for seed, noise in worlds}  # fmt: skip
            jobs = {f"{noise} {seed} {run}": (measure_model, options.model, options.data, seed, noise, run)
                    for seed, noise in worlds for run in runs_for_model(noise)}  # fmt: skip
            all_of({name: job for name, job in jobs.items() if name not in of_model}, pool, of_model, save, "runs")
        elif not options.write:
            work, lacking = Path(place), [(s, n) for s in SEEDS for n in NOISE if f"{n} {s}" not in saved["runs"]]
            seeds = sorted({seed for seed, _ in lacking})
            list(pool.map(sft, [work / f"sft-{seed}" for seed in seeds], seeds))
            jobs = {f"{noise} {seed}": (measure, work, seed, noise) for seed, noise in lacking}
            all_of(jobs, pool, saved["runs"], save, "worlds")
    shown = tables(saved)
    page = RESULTS / "distrust.md"
    page.write_text(filled(page.read_text(), shown))
    print("\n\n".join(shown.values()))


if __name__ == "__main__":
    main()
