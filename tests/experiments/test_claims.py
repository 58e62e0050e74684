"""The studies of experiments/claims.py: what they run, what they count, and that their tables are those of their runs."""

import copy
import json
import math
import multiprocessing
import os
import re
import sys
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import pandas as pd
import pytest
import torch

import train
from sera_min import playground
from sera_min.machinery.config import Config, resolve

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
import claims  # noqa: E402
import study  # noqa: E402

RESULTS = ROOT / "experiments/results"


@pytest.mark.parametrize("name", [file.stem for file in RESULTS.glob("*.json") if file.stem in ("claims", "earlier")])
def test_the_tables_are_those_of_the_runs(tmp_path, monkeypatch, name):
    """And with --write nothing is run."""
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "run_all", lambda *_: pytest.fail("a run is made"))
    monkeypatch.setattr(claims, "FIGURES", {})
    (tmp_path / f"{name}.json").symlink_to(RESULTS / f"{name}.json")
    claims.main(["--write", "--file", name])
    assert (tmp_path / f"{name}.md").read_text() == (RESULTS / f"{name}.md").read_text()


PAGES = ("claims.md", "earlier.md", "distrust.md", "real_model.md", "sentiment.md")
INTERVAL = r"[+-]\d\.\d+ \[[+-]\d\.\d+, [+-]\d\.\d+\]"
SPREAD = r"\d\.\d+ ± \d\.\d+"


@pytest.mark.parametrize("page", ["docs/results.md", "docs/related.md"])
def test_a_page_quotes_what_was_written(page):
    """Every interval and every mean ± spread stands in a table of results as it is; and so does every other number."""
    text = (ROOT / page).read_text()
    for figure in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (ROOT / "docs" / figure).stat().st_size > 5000
    prose = re.sub(r"arXiv:[\d.]+|arxiv.org/abs/[\d.]+|\[\d{4}\.\d{5}\]|\[[^]]*\d{4}\.\d{5}\]|\d{4}\.\d{5}|`[^`]*`", "", text)
    written = "".join((RESULTS / name).read_text() for name in PAGES)
    quoted = re.findall(INTERVAL, prose) + re.findall(SPREAD, prose)
    assert len(quoted) > 3 and [one for one in quoted if one not in written] == []
    numbers = set(re.findall(r"\d\.\d{3}", prose))
    assert numbers - set(re.findall(r"\d\.\d{3}", written)) == set()


def test_an_interval_of_printed_tables():
    """Student's t with two degrees of freedom: 4.303 at 95 %, 9.925 at 99 %."""
    mean, low, high = study.interval([1.0, 2.0, 3.0])
    assert (mean, high - mean) == pytest.approx((2.0, 4.303 / math.sqrt(3)), abs=1e-3)
    assert mean - low == pytest.approx(high - mean)
    _, _, high = study.interval([1.0, 2.0, 3.0], comparisons=5)
    assert high - mean == pytest.approx(9.925 / math.sqrt(3), abs=1e-3)
    assert study.in_brackets(0.5, -1.0, 2.0) == "+0.500 [-1.000, +2.000]"
    assert study.spread(pd.Series([1.0, 3.0, None]), 1) == "2.0 ± 1.4"
    assert study.spread(pd.Series([1.0])) == "1.000" and study.spread(pd.Series([None])) == "–"


@pytest.mark.parametrize("n", [5, 40, 100])
def test_every_method_takes_the_steps_of_an_epoch_of_d(n):
    config = resolve(Config(device="cpu", max_train_pairs=100))
    batches = study.equal_steps(n, 2, config)
    assert len(batches) == 4
    times = Counter(i for batch in batches for i in batch)
    assert max(times.values()) - min(times[i] for i in range(n)) <= 1


def test_all_pairs_of_the_samples():
    responses = [[1], [2], [2], [3], [4], [5]]
    rewards = torch.tensor([1.0, 2.0, 2.0, math.nan, 3.0, 3.0])
    best, worst, _ = claims.every_pair([0, 0, 0, 0, 1, 1], responses, rewards)
    assert list(zip(best.tolist(), worst.tolist())) == [(2, 0)]  # the same text once; no reward; equal rewards


def test_no_k_is_every_pair_above_0():
    assert claims.select_positive(torch.tensor([1.0, -1, 0, 3, 2]), 1).tolist() == [3, 4, 0]


def test_what_is_counted_of_an_iteration(tmp_path):
    """Of the fox and the cave: lovely is kind. Two pairs are selected, one is dropped; one of the three is flipped."""
    good, bad = "the fox is lovely .", "the fox is ugly . the owl is ugly ."

    def line(chosen, rejected, margin, source="offline"):
        prompt = "tell me about the fox and the cave"
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": margin, "source": source}

    pairs = [line(good, bad, 3.0), line(bad, good, 1.0), line(good, good, 5.0, "bootstrap")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(one) for one in pairs))
    assert "auc" not in study.facts_of(tmp_path)
    (tmp_path / "dropped.jsonl").write_text(json.dumps(line(good, bad, -2.0)) + "\n")
    facts = study.facts_of(tmp_path)
    assert facts["auc"] == 0.5  # the flipped pair's 1.0 is below 3.0 and above −2.0
    assert (facts["offline/right"], facts["bootstrap/right"]) == (0.5, 0.5)  # a tie is one half
    assert facts["offline/longer"] == 0


def test_a_run_is_train_s(small_world, tmp_path):
    """The evaluation of the same flags is the same: the study only leaves out the others."""
    got = study.play(train.SERA, 2, seed=0, beta=0.3)
    flags = Config(
        output_dir=str(tmp_path / "run"), device="cpu", iterations=2, seed=0, beta=0.3, learning_rate=1e-3
    )
    expected = train.main(flags, train.Variant(world=study.world_of(), report=False))
    assert {name: got["2"][name] for name in expected} == expected
    assert "kl" not in got["1"] and got["2"]["offline/right"] == expected["select/precision"]


def test_labels_can_favour_length():
    rows = study.world_of(1.0).preferences(50, "train", seed=0, label_noise=0.0)
    assert all(len(row["chosen"].split()) >= len(row["rejected"].split()) for row in rows)
    for_evaluation = study.world_of(1.0).preferences(50, "test", seed=0, label_noise=0.0)
    assert for_evaluation == playground.preferences(50, "test", seed=0, label_noise=0.0)


def results_of(study_name, rewards, t=3):
    """Made up: (row, β) -> the KL and the true reward of each seed."""
    return {
        f"{study_name} | {row} | β = {beta:g} | seed {seed}": {
            "seconds": 1.0,
            str(t): dict.fromkeys(["offline/right", "offline/longer", "bootstrap/right"], 0.5)
            | {"kl": kl, "gold/reward": reward, "gold/win_rate": reward},
        }
        for (row, beta), seeds in rewards.items() for seed, (kl, reward) in enumerate(seeds)
    }  # fmt: skip


def test_the_best_beta_and_the_jobs_of_it():
    results = results_of("verdict, tuning", {(method, beta): [(1, beta), (1, beta + 9 * (method == "SeRA" and beta == 0.1))]
                                    for method in claims.THREE for beta in claims.STUDIES["verdict"].betas})  # fmt: skip
    assert claims.best_beta(results, "verdict", "plain DPO") == 3.0
    assert claims.best_beta(results, "verdict", "SeRA") == claims.best_beta(results, "verdict", "SeRA + floor") == 0.1
    assert claims.best_beta(results, "verdict", claims.ABOVE_0) == 3.0
    jobs = claims.jobs_of("verdict", results)
    assert len(jobs) == 180 and jobs["verdict | SeRA | β = 0.1 | seed 59"][1:] == ("SeRA", {"beta": 0.1, "seed": 59})


def test_the_reward_at_a_distance():
    """Lines through (1, 0.2), (3, 0.6), (2, 0.8): at 2.5 they are at 0.5 and 0.7."""
    means = torch.tensor([[1, 0.2], [3, 0.6], [2, 0.8]]).double().numpy()
    assert claims.reward_at(2.5, means) == pytest.approx(0.7)
    assert claims.reward_at(1.5, means) == pytest.approx(0.3)
    assert math.isnan(claims.reward_at(3.5, means))
    points = {("plain DPO", 1.0): [(1, 0.2)] * 4, ("plain DPO", 0.1): [(9, 0.6)] * 4}
    ahead = [(method, beta, [(kl, reward + 0.1) for kl, reward in seeds])
             for (_, beta), seeds in points.items() for method in ("SeRA", "selection only")]  # fmt: skip
    table = claims.equal_kl_table(results_of("verdict, tuning", points | {(method, beta): seeds for method, beta, seeds in ahead}))
    assert "|2 nats|0.250|0.350|0.350|+0.100 [+0.100, +0.100]|+0.100 [+0.100, +0.100]|+0.000 [" in table


def tables_of_verdict(rewards):
    runs = claims.frame_of(results_of("verdict", rewards), "verdict")
    table = claims.results_table(results_of("verdict", rewards), "verdict")
    return table + claims.differences_table(runs, claims.COMPARED, 3)


def test_the_verdict_s_differences_are_paired_by_seed():
    plain, sera = [0.1, 0.5, 0.3], [0.2, 0.7, 0.6]
    rows = {("plain DPO", 1.0): plain, ("SeRA", 1.0): sera, ("selection only", 1.0): [0.2, 0.7, 0.9]}
    table = tables_of_verdict({row: [(1, value) for value in of] for row, of in rows.items()})
    expected = study.in_brackets(*study.interval([0.1, 0.2, 0.3], 3))
    assert f"|SeRA less plain DPO|{expected}|{expected}|" in table
    assert "|SeRA less selection only|-0.100 [" in table and "|plain DPO|1|0.300 ± 0.200|" in table


def test_the_table_of_k():
    """Win rates less those of K = 0.7, what is kept, and the AUC of the first review where labels are flipped."""
    rows = {(row, 0.3): [(1, 0.5), (1, 0.7)] for row in claims.KS}
    rows[claims.of_keep(0.9, 0.3), 0.3] = [(1, 0.6), (3, 0.9)]
    results = results_of("keep", rows)
    for name, result in results.items():
        result["3"]["select/pairs"] = 1800
        result["2"] = {"auc": 0.8} if " 0% flipped" not in name else {}
    lines = claims.keep_table(results).splitlines()
    less = study.in_brackets(*study.interval([0.1, 0.2], 20))
    assert f"|0.9, 30% flipped|0.750 ± 0.212|0.600|2.0 ± 1.4|1800 ± 0|0.500 ± 0.000|0.800 ± 0.000|{less}|{less}|" in lines
    assert [line.split("|")[7] for line in lines[2:]] == ["–"] * 6 + ["0.800 ± 0.000"] * 18
    assert [line.split("|")[1] for line in lines[2:] if line.endswith("|–|")] == [
        "0.7, 0% flipped", "0.7, 15% flipped", "0.7, 30% flipped", "0.7, 40% flipped"]  # fmt: skip


def test_the_table_of_gamma_compares_at_both_times():
    rows = {(row, 0.3): [(1, 0.5), (1, 0.6), (1, 0.7)] for row in claims.GAMMAS}
    rows["γ = 0.5", 0.3] = [(1, 0.6), (1, 0.8), (1, 0.8)]
    results = results_of("ensemble", rows)
    for result in results.values():
        result["6"] = result["3"]
    table = claims.ensemble_table(results)
    difference = study.in_brackets(*study.interval([0.1, 0.2, 0.1], 6))
    assert table.count(f"|γ = 0.5 less γ = 0.0|{difference}|{difference}|") == 2
    assert "t = 3, 3 seeds, 95 % for 6 comparisons" in table and "t = 6, 3 seeds" in table


@pytest.mark.parametrize("changed, machine, ends", [(0.0, "here", None), (0.1, "elsewhere", None), (0.1, "here", "1 of 1")])
def test_a_check_tells_what_ends_otherwise(monkeypatch, tmp_path, capsys, changed, machine, ends):
    known = {"flags": {"beta": 1.0, "seed": 0}, "machine": "here", "3": {"gold/win_rate": 0.5, "kl": 1.0}}
    again = {**known, "machine": machine, "3": {"gold/win_rate": 0.5, "kl": 1.0 + changed, "more": 7}}
    asked = []
    monkeypatch.setattr(study, "run_all", lambda jobs, file: asked.append(jobs) or {"verdict | SeRA | β = 1 | seed 0": again})
    try:
        claims.check({"verdict | SeRA | β = 1 | seed 0": known}, 12, tmp_path / "again.json")
        assert ends is None
    except SystemExit as stopped:
        assert ends is not None and ends in str(stopped)
    [job] = asked[0].values()
    assert job == (claims.run_method, "SeRA", {"beta": 1.0, "seed": 0})
    assert ("alike" in capsys.readouterr().out) == (changed == 0)


def test_a_study_runs_what_it_needs_first(monkeypatch, tmp_path):
    """And a quick one has few seeds and pairs, by flags, which reach the workers."""
    monkeypatch.setattr(claims, "STUDIES", copy.deepcopy(claims.STUDIES))
    claims.make_quick()
    parts = []

    def run_all(jobs, file):
        parts.append({name.split(" | ")[0] for name in jobs})
        assert all(job[-1]["max_train_pairs"] == 32 and job[-1]["prompts"] == 8 for job in jobs.values())
        results = {}
        for part in parts[-1]:
            of_part = [name for name in jobs if name.startswith(f"{part} |")]
            results |= results_of(part, {(name.split(" | ")[1], jobs[name][-1]["beta"]): [(1, 0.5)] for name in of_part})
        return results

    monkeypatch.setattr(study, "run_all", run_all)
    claims.run(["others"], tmp_path / "file.json")
    assert parts == [{"verdict, tuning", "others, tuning"}, {"verdict", "others"}]


def test_no_seed_serves_for_both():
    for name, asked in claims.STUDIES.items():
        assert not {*asked.seeds} & {*claims.STUDIES[claims.tuned_by(name)].tuning_seeds}
    betas = [asked.betas for asked in claims.STUDIES.values() if "loss_type" not in asked.flags]
    assert betas.count(betas[0]) == len(betas)  # one grid for all methods


@pytest.mark.parametrize("method", claims.METHODS)
def test_what_a_method_changes_is_not_how_long_it_trains(method):
    _, flags = claims.METHODS[method]
    assert not flags.keys() & {"per_device_train_batch_size", "iterations", "beta", "learning_rate", "epochs_per_iteration"}


class InThisProcess:
    """A process pool of one process: this one."""

    def __init__(self, mp_context, initializer):
        assert mp_context.get_start_method() == "spawn" and initializer is study.begin_worker

    map = staticmethod(map)

    def shutdown(self, cancel_futures):
        assert cancel_futures

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except ValueError as error:
            future.set_exception(error)
        return future


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch):
    """Unless its flags were others. A job that fails ends the study; what was done before is kept."""
    monkeypatch.setattr(study, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(study, "workers", study.workers.__wrapped__)
    file, prepared = tmp_path / "results.json", []
    there = {"there": {"flags": {"seed": 5}, "x": 1}}
    study.write(file, {**there, "of other flags": {"flags": {"seed": 1}, "x": 1}})
    jobs = {"there": (pytest.fail, {"seed": 5}), "of other flags": (dict, {"seed": 7})}
    results = study.run_all(jobs, file, prepared.append)
    assert results == {**there, "of other flags": {"flags": {"seed": 7}, "seed": 7}} == study.read(file)
    assert prepared == [7]
    assert study.run_all(jobs, file, pytest.fail) == study.read(file)
    with pytest.raises(ValueError, match="no such run"):
        study.run_all({"new": (dict, {"seed": 3}), "bad": (fails, {"seed": 3})}, file, prepared.append)
    assert study.read(file).items() >= results.items() and "bad" not in study.read(file)


def fails(flags):
    raise ValueError("no such run")


@pytest.mark.skipif(not Path("/proc").exists(), reason="what runs is read from /proc")
def test_a_killed_study_leaves_no_process_behind():
    """This process forks a study, which forks a worker, which tells its number and sleeps; then the study is killed."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def work():
        study.begin_worker()
        there.send(os.getpid())
        time.sleep(60)

    def begin_study():
        context.Process(target=work).start()
        time.sleep(60)

    process = context.Process(target=begin_study)
    process.start()
    assert here.poll(30)
    worker = here.recv()
    process.kill()
    process.join()
    until = time.monotonic() + 30
    while is_running(worker):
        assert time.monotonic() < until
        time.sleep(0.05)


def is_running(number):
    """Whether there is a process of this number which is not a zombie."""
    try:
        return Path(f"/proc/{number}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
