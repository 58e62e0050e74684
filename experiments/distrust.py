"""How well does the margin find wrong labels? The labels that a model distrusts most, against the truth.

    python experiments/distrust.py            four shares of flipped labels, ten seeds; stopped, it goes on where it was
    python experiments/distrust.py --write    run nothing: the table, anew, from results/distrust.json

The playground, at its own β and learning rate. A pair's label is distrusted as its margin is small, under
    SeRA             the reward with which it reviews: at t = 2 that is plain DPO after one epoch, at t = 3 its ensemble
    plain DPO        the policy after one and after three epochs; the mean reward of its three policies
    robust DPO       (arXiv:2403.00409) told the true share of flipped labels, after three epochs
    cross-fitted     plain DPO on each half of the pairs, which judges the other half: no pair is judged by a policy
                     that was trained on it
An epoch of D is 63 steps of 32 pairs, for SeRA as for the others; one of each half is as many steps together.

Of the flipped labels: AUC, the area under the ROC curve (the share of pairs of a flipped and a right label of which the
flipped one has the smaller margin; 0.5 by chance), and the share of flipped labels among the 1, 5 and 20 % of the pairs
with the smallest margins. Writes results/distrust.json, and the table into README.md beside this file.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
from claims import RESULTS, machine, markdown, quiet, sft
from tqdm import tqdm

import train
from sera_min import folder, playground, report
from sera_min.pairs import Pair, rows_of

NOISE, SEEDS, SHARES = (0.1, 0.2, 0.3, 0.4), range(10), (0.01, 0.05, 0.2)
README = Path(__file__).parent / "README.md"


def margins_of(run: train.Run, t: int, pairs: list[Pair], what: str) -> torch.Tensor:
    """m_t of N pairs, in nats: (N,)"""
    logps, reference = (run.log_prob(i, *rows_of(pairs), what)[:, 0] for i in (t, 0))
    r = (logps - reference).view(-1, 2)
    return r[:, 0] - r[:, 1]


def run_of(seed: int, noise: float, work: Path, preferences=playground.preferences, **flags) -> list[torch.Tensor]:
    """Three iterations of train.py; after each, the margins of D and then those of the evaluation pairs."""
    margins: list[torch.Tensor] = []

    def evaluate(run: train.Run, t: int, plain=train.evaluate) -> dict:
        if t > 0:
            of_both = ((run.offline, "pairs"), (run.held_out, "evaluation pairs"))
            margins.append(torch.cat([margins_of(run, t, *some) for some in of_both]))
        return plain(run, t)

    with (
        tempfile.TemporaryDirectory() as place, mock.patch.object(train, "evaluate", evaluate),
        mock.patch.multiple(report, draw_figures=lambda *_: [], events=lambda *_: None),
        mock.patch.multiple(playground, preferences=preferences, prompts=partial(few_to_answer, playground.prompts),
                            make_sft_policy=lambda seed, on: folder.load(work / f"sft-{seed}", on)),
    ):  # fmt: skip
        train.main(train.Config(device="cpu", seed=seed, label_noise=noise, output_dir=f"{place}/run", **flags))
    return margins


def few_to_answer(plain, part: str) -> list[str]:
    """Answers are not looked at here."""
    return plain(part)[:16] if part == "test" else plain(part)


def one_half(half: int, noise: float, n: int, part: str, *, seed: int, plain=playground.preferences, **_) -> list[dict]:
    """In the place of `preferences`: one half of D to train on, and the other to evaluate on."""
    rows = plain(2000, "train", seed=seed, label_noise=noise, length_bias=0)
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
    rows = playground.preferences(2000, "train", seed=seed, label_noise=noise, length_bias=0)
    flipped, n = torch.tensor([playground.is_flipped(row) for row in rows]), len(rows)
    alone = {"keep": 1.0, "bootstrap": 0.0}
    sera, plain, robust = (
        [margins[:n] for margins in run_of(seed, noise, work, **flags)]
        for flags in ({}, alone, {**alone, "loss_type": "robust", "label_smoothing": noise})
    )
    crossed = [torch.empty(n) for _ in plain]
    for half in (0, 1):
        for margins, of_run in zip(crossed, run_of(seed, noise, work, partial(one_half, half, noise), **alone)):
            margins[1 - half :: 2] = of_run[n // 2 :]  # of the evaluation pairs, which are the other half
    ways = {
        "SeRA, t = 2: plain DPO after one epoch": plain[0], "SeRA, t = 3": (sera[0] + sera[1]) / 2,
        "SeRA, as t = 4 would see": (sera[1] + sera[2]) / 2,
        "plain DPO after three epochs": plain[2], "plain DPO, mean of its three policies": sum(plain) / 3,
        "robust DPO after one epoch": robust[0], "robust DPO after three epochs": robust[2],
        "cross-fitted, one epoch": crossed[0], "cross-fitted, three epochs": crossed[2],
    }  # fmt: skip
    return {way: figures_of(margins, flipped) for way, margins in ways.items()}


def table(done: dict[str, dict]) -> str:
    """Means over the seeds, and the standard deviation of the AUC."""
    rows, names = [], [f"{share:.0%}" for share in SHARES]
    for way in next(iter(done.values())):
        cells = [way]
        for noise in NOISE:
            of_seeds = [done[f"{noise} {seed}"][way] for seed in SEEDS]
            auc = [one["auc"] for one in of_seeds]
            found = " / ".join(f"{statistics.mean(one[name] for one in of_seeds):.2f}" for name in names)
            cells.append(f"{statistics.mean(auc):.3f} ± {statistics.stdev(auc):.3f}; {found}")
        rows.append(cells)
    return markdown(["AUC; flipped among the 1 / 5 / 20 % of the smallest margins",
                     *(f"{noise:.0%} flipped" for noise in NOISE)], rows)  # fmt: skip


def filled(text: str, shown: str) -> str:
    return re.sub(r"(<!-- distrust -->\n).*?(\n<!-- end -->)", lambda m: m[1] + shown + m[2], text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    options, file = parser.parse_args(), RESULTS / "distrust.json"
    saved = json.loads(file.read_text()) if file.exists() else {"machines": [], "runs": {}}
    lacking = [(seed, noise) for seed in SEEDS for noise in NOISE if f"{noise} {seed}" not in saved["runs"]]
    if lacking and not options.write:
        saved["machines"] = sorted({*saved["machines"], machine()})
        with tempfile.TemporaryDirectory() as place, ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
            work, seeds = Path(place), sorted({seed for seed, _ in lacking})
            list(pool.map(sft, [work / f"sft-{seed}" for seed in seeds], seeds))
            jobs = {pool.submit(measure, work, seed, noise): f"{noise} {seed}" for seed, noise in lacking}
            for job in tqdm(as_completed(jobs), "worlds", len(jobs)):
                saved["runs"][jobs[job]] = job.result()
                file.with_suffix(".tmp").write_text(json.dumps(saved, indent=1, sort_keys=True) + "\n")
                file.with_suffix(".tmp").replace(file)
    README.write_text(filled(README.read_text(), table(saved["runs"])))
    print(table(saved["runs"]))


if __name__ == "__main__":
    main()
