"""What SeRA does in the playground, and where it fails: the studies that docs/results.md is about.

    python experiments/claims.py                        all, hours of all cores; stopped, it resumes where it left off
    python experiments/claims.py --studies verdict keep some of them
    python experiments/claims.py --quick                every study, small: does it all still run?
    python experiments/claims.py --check 12             repeat 12 runs, drawn at random: the same figures?
    python experiments/claims.py --write                run nothing: tables and figures anew from claims.json
    python experiments/claims.py --write --file earlier the same of earlier.json, the runs of commit 8edd6ba

β is chosen on validation prompts with seeds of their own, by the mean win rate; results are on test prompts. The plan
of verdict, keep and ensemble was written before their runs: results/plan.md. Writes claims.json, claims.md and figures.
"""

import argparse
import itertools
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT)]

import neighbours
import numpy as np
import pandas as pd
import study
import torch
import variants
from study import in_brackets, interval, markdown, spread

import train

T, LONG = 3, 6  # iterations
REWARD, WIN, KL, RIGHT, OWN = "gold/reward", "gold/win_rate", "kl", "offline/right", "bootstrap/right"
PLAIN: dict[str, Any] = {"keep": 1.0, "bootstrap": 0.0}
SELECTION: dict[str, Any] = {"bootstrap": 0.0}

# --------------------------------------------------------------------------------- the methods


def every_pair(prompt_of: list[int], responses: list[list[int]], rewards: torch.Tensor) -> tuple:
    """In place of `best_worst_pairs`: all pairs of a prompt's different samples, of which the K̃ widest are kept."""
    rows_of: dict[int, dict[tuple, int]] = {}  # prompt -> response -> its row
    for row, (prompt, response) in enumerate(zip(prompt_of, responses)):
        rows_of.setdefault(prompt, {})[tuple(response)] = row
    best, worst = [], []
    for rows in rows_of.values():
        for a in rows.values():
            for b in rows.values():
                if rewards[a] > rewards[b]:
                    best.append(a)
                    worst.append(b)
    return torch.tensor(best, dtype=torch.int64), torch.tensor(worst, dtype=torch.int64), Counter()


def select_positive(margins: torch.Tensor, k: int) -> torch.Tensor:
    """In place of `select_top`: every pair with a margin above 0, the widest first, however many there are."""
    return train.select_top(margins, int((margins > 0).sum()))


METHODS: dict[str, tuple[Callable[[], train.Variant], dict[str, Any]]] = {  # its functions, its flags
    "plain DPO": (train.Variant, PLAIN),
    "selection only": (train.Variant, SELECTION),
    "SeRA": (train.Variant, {}),
    "SeRA + floor": (variants.token_floor, {}),
    "SeRA + length-free": (variants.length_free, {}),
    "SeRA + both": (variants.both_remedies, {}),
    "random K": (variants.random_pairs, SELECTION),
    "the smallest margins": (variants.smallest_margins, SELECTION),
    "the middle margins": (variants.middle_margins, SELECTION),
    "margins above 0": (lambda: train.Variant("positive", select_top=select_positive), SELECTION),
    "cDPO, ε = 0.3": (train.Variant, {**PLAIN, "label_smoothing": 0.3}),
    "robust DPO, ε = 0.3": (variants.robust, {**PLAIN, "label_smoothing": 0.3}),
    "every pair of the samples": (lambda: train.Variant("every pair", best_worst_pairs=every_pair), {}),
    **neighbours.METHODS,
}


def run_method(method: str, flags: dict[str, Any]) -> dict[str, Any]:
    make_variant, own = METHODS[method]
    return study.play(make_variant(), **{**own, **flags})


# --------------------------------------------------------------------------------- the studies

Rows = dict[str, tuple[str, dict[str, Any]]]  # a row of the table: its method, and what it changes


def plainly(*methods: str) -> Rows:
    """A row for each method, in which nothing is changed."""
    return {method: (method, {}) for method in methods}


THREE = plainly("plain DPO", "selection only", "SeRA")
OTHERS = plainly("random K", "the smallest margins", "the middle margins", "cDPO, ε = 0.3", "robust DPO, ε = 0.3",
                 "SeRA + floor", "SeRA + both")  # fmt: skip
LONGER = plainly("plain DPO", "SeRA", "SeRA + floor", "SeRA + both")
BIASED = plainly(*THREE, "SeRA + length-free", "SeRA + both")
KEEP, NOISE, GAMMA = (0.5, 0.6, 0.7, 0.8, 0.9), (0.0, 0.15, 0.3, 0.4), (0.0, 0.3, 0.5, 0.7)
ABOVE_0 = "margins above 0"


def of_keep(k: float | str, noise: float) -> str:
    return f"{k}, {noise:.0%} flipped"


GAMMAS: Rows = {f"γ = {gamma}": ("SeRA", {"ensemble_gamma": gamma}) for gamma in GAMMA}
KS: Rows = {}
for noise in NOISE:
    for k in KEEP:
        KS[of_keep(k, noise)] = ("selection only", {"keep": k, "label_noise": noise})
    KS[of_keep(ABOVE_0, noise)] = (ABOVE_0, {"label_noise": noise})
ASKED: Rows = {
    "every pair of the samples": ("every pair of the samples", {}),
    "bootstrapped pairs alone (K = 0, K̃ = all)": ("SeRA", {"keep": 0.0, "bootstrap": 1.0}),
    "nothing removed (K = all)": ("SeRA", {"keep": 1.0}),
    "N = 2": ("SeRA", {"samples_per_prompt": 2}),
    "N = 8": ("SeRA", {"samples_per_prompt": 8}),
}


@dataclass
class Study:
    title: str
    rows: Rows
    seeds: list[int]
    tuning_seeds: list[int] = field(default_factory=list)  # none: β is that of `verdict`
    betas: list[float] = field(default_factory=lambda: [0.01, 0.03, 0.1, 0.3, 1.0, 3.0])
    flags: dict[str, Any] = field(default_factory=dict)  # of all runs
    baseline: str = "plain DPO"  # what the table compares with; "": nothing
    beside: tuple[str, ...] = ()  # rows of `verdict` that the table shows too


STUDIES = {
    "verdict": Study("Three methods, each at its best β", THREE, [*range(60)], [*range(60, 80)], baseline=""),
    "keep": Study("Selection only, by K and the share of flipped labels", KS, [*range(20)]),
    "ensemble": Study("SeRA, by γ", GAMMAS, [*range(40)], baseline="", flags={"iterations": LONG}),
    "others": Study("Other answers to wrong labels, and other margins to keep", OTHERS, [*range(20)],
                    [*range(60, 65)], beside=("plain DPO", "selection only", "SeRA")),
    "clean": Study("No flipped label, and β as it was", THREE, [*range(10)], flags={"label_noise": 0.0}),
    "long": Study("Six iterations", LONGER, [*range(10)], flags={"iterations": LONG}),
    "length": Study("Half of the labels favour the longer response, and 15 % are flipped then", BIASED, [*range(10)],
                    flags={"length_bias": 0.5, "label_noise": 0.15}, baseline="SeRA"),
    "asked": Study("What the paper's reviewers asked", ASKED, [*range(10)], baseline="SeRA", beside=("SeRA",)),
    "ipo": Study("IPO", THREE, [*range(10)], [60, 61, 62], [0.03, 0.1, 0.3, 1.0], {"loss_type": "ipo"}),
    "slic": Study("SLiC-HF", THREE, [*range(10)], [60, 61, 62], [0.03, 0.1, 0.3, 1.0], {"loss_type": "slic"}),
    "simpo": Study("SimPO", THREE, [*range(10)], [60, 61, 62], [0.25, 0.5, 1.0, 2.0], {"loss_type": "simpo"}),
    "neighbours": Study("Related methods", plainly(*neighbours.METHODS), [*range(10)], [60, 61, 62],
                        beside=("plain DPO", "selection only", "SeRA")),
}  # fmt: skip


def jobs_of(part: str, results: dict[str, Any]) -> dict[str, tuple]:
    """The runs of a study, each method at its best β; or of "STUDY, tuning", which choose it on validation prompts."""
    name = part.removesuffix(", tuning")
    asked = STUDIES[name]
    seeds, flags = asked.seeds, asked.flags
    if part != name:
        seeds, flags = asked.tuning_seeds, {**asked.flags, "eval_split": "validation"}
    betas_of = dict.fromkeys(asked.rows, asked.betas)
    if part == name:
        for row, (method, _changed) in asked.rows.items():
            betas_of[row] = [best_beta(results, tuned_by(name), method)]
    jobs: dict[str, tuple] = {}
    for seed in seeds:
        for row, (method, changed) in asked.rows.items():
            for beta in betas_of[row]:
                job = (run_method, method, {"beta": beta, "seed": seed, **flags, **changed})
                jobs[f"{part} | {row} | β = {beta:g} | seed {seed}"] = job
    return jobs


def tuned_by(name: str) -> str:
    if STUDIES[name].tuning_seeds:
        return name
    return "verdict"


def best_beta(results: dict[str, Any], name: str, method: str) -> float:
    """That of the largest mean win rate. A variant that was not tuned takes the β of SeRA, or of selection only."""
    runs = frame_of(results, f"{name}, tuning")
    if method == ABOVE_0:
        method = "selection only"
    elif method not in set(runs.row):
        method = "SeRA"
    return float(runs[(runs.row == method) & (runs.t == T)].groupby("beta")[WIN].mean().idxmax())


def frame_of(results: dict[str, Any], part: str) -> pd.DataFrame:
    """A line for every run and iteration of a study or its tuning: row, beta, seed, t, and what was measured."""
    lines = []
    for run, result in results.items():
        of_part, row, beta, seed = run.split(" | ")
        if of_part == part:
            known = {"row": row, "beta": float(beta.removeprefix("β = ")), "seed": int(seed.removeprefix("seed "))}
            for t, measured in result.items():
                if t.isdigit():
                    lines.append({**known, "t": int(t), "seconds": result["seconds"], **measured})
    rows = list(STUDIES[part.removesuffix(", tuning")].rows)
    return pd.DataFrame(sorted(lines, key=lambda line: (rows.index(line["row"]), line["seed"])))


# ---------------------------------------------------------------------------------- the tables


def by_seed(runs: pd.DataFrame, key: str, t: int = T) -> pd.DataFrame:
    """A figure after iteration t: a line a seed, a column a row of the table. Seeds that a row lacks are left out."""
    return runs[runs.t == t].pivot(index="seed", columns="row", values=key).dropna()


def difference(ours: pd.Series, theirs: pd.Series | float, comparisons: int) -> str:
    return in_brackets(*interval(list(ours - theirs), comparisons))


SHOWN = {  # title -> what is measured, and its digits
    "true reward": (REWARD, 3), "win rate": (WIN, 3), "KL, nats": (KL, 1), "right labels": (RIGHT, 3),
    "longer by, words": ("offline/longer", 2), "bootstrapped pairs right": (OWN, 3), "seconds": ("seconds", 0),
}  # fmt: skip


def with_beside(results: dict[str, Any], name: str) -> pd.DataFrame:
    runs, beside = frame_of(results, name), STUDIES[name].beside
    if beside:
        verdict = frame_of(results, "verdict")
        runs = pd.concat([verdict[verdict.row.isin(beside)], runs])
    return runs


def results_table(results: dict[str, Any], name: str) -> str:
    """For each row its β, figures, mean ± spread over the seeds, and its win rate less the baseline's."""
    baseline, runs = STUDIES[name].baseline, with_beside(results, name)
    win = by_seed(runs, WIN)
    lines = []
    for row in runs.row.unique():
        of_row = runs[(runs.row == row) & (runs.t == T) & runs.seed.isin(win.index)]
        line = {f"{len(win)} seeds": row, "β": f"{of_row.beta.iloc[0]:g}"}
        for title, (key, digits) in SHOWN.items():
            line[title] = spread(of_row[key], digits)
        if baseline and row != baseline:
            others = win.shape[1] - 1
            line[f"win rate less that of {baseline}"] = difference(win[row], win[baseline], others)
        lines.append(line)
    return markdown(pd.DataFrame(lines).fillna("–"))


def differences_table(runs: pd.DataFrame, compared: list[tuple[str, str]], comparisons: int, t: int = T) -> str:
    reward, win = by_seed(runs, REWARD, t), by_seed(runs, WIN, t)
    lines = []
    for ours, theirs in compared:
        line = {f"t = {t}, {len(win)} seeds, 95 % for {comparisons} comparisons": f"{ours} less {theirs}"}
        line["true reward"] = difference(reward[ours], reward[theirs], comparisons)
        line["win rate"] = difference(win[ours], win[theirs], comparisons)
        lines.append(line)
    return markdown(pd.DataFrame(lines))


COMPARED = [("SeRA", "plain DPO"), ("selection only", "plain DPO"), ("SeRA", "selection only")]


def verdict_table(results: dict[str, Any]) -> str:
    tables = [results_table(results, "verdict"), differences_table(frame_of(results, "verdict"), COMPARED, 3)]
    return "\n\n".join([*tables, equal_kl_table(results)])


def points_of(results: dict[str, Any], method: str) -> np.ndarray:
    """Where a method ends on validation prompts: KL and true reward, (betas, seeds, 2)."""
    runs = frame_of(results, "verdict, tuning")
    of_method = runs[(runs.row == method) & (runs.t == T)]
    both = [of_method.pivot(index="beta", columns="seed", values=key).to_numpy() for key in (KL, REWARD)]
    return np.stack(both, axis=-1)


def reward_at(kl: float, means: np.ndarray) -> float:
    """The largest true reward at this KL on straight lines between neighbouring β, (betas, 2); NaN where none is."""
    crossed = []
    for (a, low), (b, high) in itertools.pairwise(means):
        if a != b and min(a, b) <= kl <= max(a, b):
            crossed.append(low + (high - low) * (kl - a) / (b - a))
    return max(crossed, default=np.nan)


def equal_kl_table(results: dict[str, Any]) -> str:
    """True reward at equal distance from π_ref; the intervals draw the seeds anew, for three comparisons at once."""
    points = {method: points_of(results, method) for method in THREE}
    n = points["SeRA"].shape[1]
    draws = np.random.default_rng(0).integers(n, size=(2000, n))
    lines = []
    for kl in (2, 4, 8):
        line = {f"true reward, {n} seeds, at a KL of": f"{kl} nats"}
        at, again = {}, {}
        for method, of_method in points.items():
            at[method] = reward_at(kl, of_method.mean(1))
            again[method] = np.array([reward_at(kl, of_method[:, seeds].mean(1)) for seeds in draws])
            line[method] = f"{at[method]:.3f}".replace("nan", "–")
        for ours, theirs in COMPARED:
            gains = again[ours] - again[theirs]
            reached = ~np.isnan(gains)
            line[f"{ours} less {theirs}"] = "–"  # a line does not reach so far
            if reached.mean() > 0.9:
                low, high = np.quantile(gains[reached], [0.05 / 6, 1 - 0.05 / 6])
                line[f"{ours} less {theirs}"] = in_brackets(at[ours] - at[theirs], low, high)
        lines.append(line)
    return markdown(pd.DataFrame(lines))


def tuning_table(results: dict[str, Any], name: str) -> str:
    runs = frame_of(results, f"{name}, tuning")
    means = runs[runs.t == T].groupby(["row", "beta"], sort=False)[WIN].mean().unstack().sort_index(axis=1)
    table = means.map(lambda rate: f"{rate:.3f}").rename(columns=lambda beta: f"β = {beta:g}")
    return markdown(table.reset_index(names=f"win rate, validation, {runs.seed.nunique()} seeds"))


def keep_table(results: dict[str, Any]) -> str:
    """Each K at each share of flipped labels, and less K = 0.7."""
    runs = frame_of(results, "keep")
    win, reward = by_seed(runs, WIN), by_seed(runs, REWARD)
    lines = []
    for noise in NOISE:
        for k in (*KEEP, ABOVE_0):
            row = of_keep(k, noise)
            of_row = runs[runs.row == row]
            first, end = of_row[of_row.t == 2], of_row[of_row.t == T]
            line = {f"K / D, {len(win)} seeds": row, "win rate": spread(win[row])}
            line["smallest"] = f"{win[row].min():.3f}"
            line["KL, nats"] = spread(end[KL], 1)
            line["pairs kept"] = spread(end["select/pairs"], 0)
            line["right labels"] = spread(end[RIGHT])
            line["AUC, first review"] = spread(first.auc)
            if k != 0.7:
                for title, of in (("win rate", win), ("true reward", reward)):
                    line[f"{title}, less K = 0.7"] = difference(of[row], of[of_keep(0.7, noise)], 20)
            lines.append(line)
    return markdown(pd.DataFrame(lines).fillna("–"))


def iterations_table(runs: pd.DataFrame) -> str:
    """By iteration: true reward, win rate, KL, and the shares of right labels."""
    lines = []
    for title in ("true reward", "win rate", "KL, nats", "right labels", "bootstrapped pairs right"):
        key, digits = SHOWN[title]
        for row in runs.row.unique():
            line = {"": title, f"{runs.seed.nunique()} seeds": row}
            for t, of_t in runs[runs.row == row].groupby("t"):
                line[f"t = {t}"] = spread(of_t[key], digits)
            lines.append(line)
    return markdown(pd.DataFrame(lines))


def ensemble_table(results: dict[str, Any]) -> str:
    """By iteration; and each γ less none, after three iterations and at the end."""
    runs = frame_of(results, "ensemble")
    compared = [(row, "γ = 0.0") for row in runs.row.unique() if row != "γ = 0.0"]
    tables = [iterations_table(runs)]
    for t in sorted({T, LONG} & {*runs.t}):
        tables.append(differences_table(runs, compared, 6, t))
    return "\n\n".join(tables)


def others_table(results: dict[str, Any]) -> str:
    """With more comparisons, for which the intervals count those of the first table too."""
    compared = [("selection only", "random K"), ("SeRA", "random K"), ("SeRA + both", "SeRA")]
    runs = with_beside(results, "others")
    more = differences_table(runs, compared, runs.row.nunique() - 1 + len(compared))
    return results_table(results, "others") + "\n\n" + more


def long_table(results: dict[str, Any]) -> str:
    """By iteration; and less SeRA at the end."""
    runs = frame_of(results, "long")
    compared = [(row, "SeRA") for row in runs.row.unique() if row != "SeRA"]
    return iterations_table(runs) + "\n\n" + differences_table(runs, compared, len(compared), LONG)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {  # of studies that have more to show than `results_table`
    "verdict": verdict_table,
    "keep": keep_table,
    "ensemble": ensemble_table,
    "others": others_table,
    "long": long_table,
}


def tables_of(results: dict[str, Any]) -> Iterator[str]:
    """Those of the studies that have been run."""
    run = parts_in(results)
    for name, asked in STUDIES.items():
        if name in run:
            make = TABLES.get(name, partial(results_table, name=name))
            yield f"## {asked.title}\n\n{make(results)}\n"
        if f"{name}, tuning" in run:
            yield f"## {asked.title}: by β\n\n{tuning_table(results, name)}\n"


def parts_in(results: dict[str, Any]) -> set[str]:
    return {name.split(" | ")[0] for name in results}


def draw_frontier(results: dict[str, Any], axes: Any) -> None:
    """A line a method, a point a β; means and their standard errors."""
    for method in THREE:
        points = points_of(results, method)
        kl, reward = points.mean(1).T
        kl_error, reward_error = points.std(1, ddof=1).T / points.shape[1] ** 0.5
        axes.errorbar(kl, reward, reward_error, kl_error, marker="o", markersize=4, linewidth=1, label=method)
    axes.set_xscale("log")


def draw_keep(results: dict[str, Any], axes: Any) -> None:
    """Selection only, a line a share of flipped labels; means and their standard errors."""
    win = by_seed(frame_of(results, "keep"), WIN)
    for noise in NOISE:
        of_noise = win[[of_keep(k, noise) for k in KEEP]]
        axes.errorbar(KEEP, of_noise.mean(), of_noise.sem(), marker="o", markersize=4, label=f"{noise:.0%} flipped")


def draw_iterations(results: dict[str, Any], axes: Any, name: str, key: str) -> None:
    """A line a row of the table; means and their standard errors."""
    runs = frame_of(results, name)
    for row in runs.row.unique():
        by_t = runs[runs.row == row].groupby("t")[key].agg(["mean", "sem"]).dropna()
        axes.errorbar(by_t.index, by_t["mean"], by_t["sem"], marker="o", markersize=3, label=row)


FIGURES: dict[str, tuple[str, Callable[..., None], str, str]] = {  # name -> part of the results, who draws it, x and y
    "frontier": ("verdict, tuning", draw_frontier, "KL(π_θ ‖ π_ref), nats a response", "true reward"),
    "keep": ("keep", draw_keep, "K / |D|", "win rate"),
    "ensemble": ("ensemble", partial(draw_iterations, name="ensemble", key=REWARD), "iteration", "true reward"),
    "reward": ("long", partial(draw_iterations, name="long", key=REWARD), "iteration", "true reward"),
    "bootstrapped": ("long", partial(draw_iterations, name="long", key=OWN), "iteration", "bootstrapped pairs right"),
}


def check(results: dict[str, Any], count: int, file: Path) -> None:
    """Repeat `count` of the runs. Exits with 1 unless every figure is the same, where the machine is the same.

    On another sums round otherwise, and runs part: the differences are printed, and nothing more.
    """
    names = random.sample(sorted(results), min(count, len(results)))
    jobs = {}
    for name in names:
        part, row = name.split(" | ")[:2]
        method = STUDIES[part.removesuffix(", tuning")].rows[row][0]
        jobs[name] = (run_method, method, results[name]["flags"])
    again = study.run_all(jobs, file)
    others = 0
    for name in names:
        now, then = again[name], results[name]
        known = [t for t in then if t.isdigit()]
        if all(now[t].get(key) == value for t in known for key, value in then[t].items()):
            print(f"{name}: alike")
            continue
        print(f"{name}: win rate {then[str(T)][WIN]:.3f} then, {now[str(T)][WIN]:.3f} now")
        if now["machine"] == then["machine"]:
            others += 1
    if others:
        sys.exit(f"{others} of {len(names)} runs end otherwise on the machine that they were made on")


def make_quick() -> None:
    """Two seeds, one β, few pairs and prompts: every study in minutes, its figures worth nothing."""
    for asked in STUDIES.values():
        asked.seeds = [0, 1]
        asked.betas = asked.betas[-1:]
        if asked.tuning_seeds:
            asked.tuning_seeds = [0, 1]  # both SFT policies are made at once
        asked.flags |= {"max_train_pairs": 32, "max_new_tokens": 12, "prompts": 8}


def run(names: list[str], file: Path) -> None:
    """The runs of these studies: first those that choose their β. A table may show rows of `verdict` too."""
    if any(STUDIES[name].beside for name in names):
        names = ["verdict", *names]
    tuning: dict[str, tuple] = {}
    for name in names:
        tuning |= jobs_of(f"{tuned_by(name)}, tuning", {})
    results = study.run_all(tuning, file)
    jobs: dict[str, tuple] = {}
    for name in names:
        jobs |= jobs_of(name, results)
    study.run_all(jobs, file)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.epilog = "\n".join(f"{name}: {asked.title}" for name, asked in STUDIES.items())
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=STUDIES)
    parser.add_argument("--file", default="claims", help="the name of the results")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--quick", action="store_true", help="into experiments/results/quick, which git ignores")
    instead.add_argument("--check", type=int, metavar="N", help="repeat N of the runs, and write nothing")
    instead.add_argument("--write", action="store_true", help="run nothing, and write all that the results make")
    options = parser.parse_args(arguments)
    file = study.RESULTS / f"{options.file}.json"
    if options.quick:
        make_quick()
        file = study.RESULTS / "quick" / file.name
        file.unlink(missing_ok=True)
    if options.check is not None:
        with tempfile.TemporaryDirectory() as beside:
            check(study.read(file), options.check, Path(beside) / "again.json")
        return
    if not options.write:
        run(options.studies, file)
    results = study.read(file)
    written = "\n".join(tables_of(results))
    file.with_suffix(".md").write_text(f"# The studies of the playground\n\n{written}")
    print(written)
    for name, (part, draw, x, y) in FIGURES.items():
        if part in parts_in(results):
            with study.figure(file.with_name(f"{file.stem}-{name}.png"), x, y) as axes:
                draw(results, axes)


if __name__ == "__main__":
    main()
