"""What is said of results is what experiments/claims.py wrote, and what it writes is what its runs did."""

import json
import re
import statistics
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

import train
from sera_min import playground
from sera_min.machinery.config import Config

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
import claims  # noqa: E402

RESULTS = ROOT / "experiments/results"
RUNS, _ = claims.read(RESULTS / "claims.json")
WORDS = RESULTS / "claims-in-words.md"
WRITTEN = (RESULTS / "claims.md").read_text()


@pytest.fixture(scope="module")
def shown():
    """Every table and sentence by its name; made here, as it takes seconds and every worker collects this file."""
    return claims.blocks(RUNS)


def test_every_block_is_what_the_runs_say(shown):
    """Sentences with numbers stand in blocks of claims-in-words.md; the tables of claims.md are compared in the test below."""
    assert {*claims.TITLES, "sentence:noise40", "sentence:clean"} < shown.keys()  # every study has been run
    assert WRITTEN.count("## ") == len(claims.TITLES)
    text = WORDS.read_text()
    assert claims.filled(text, shown) == text
    assert len(claims.BLOCK.findall(text)) == text.count("<!-- claims:")  # each has its end
    names = re.findall("<!-- claims: (.+?) -->", text)
    assert {*names} == {name for name in shown if name.startswith("sentence:")}
    with pytest.raises(KeyError, match="unheard of"):
        claims.filled("<!-- claims: unheard of --> <!-- end -->", shown)
    for name in ("sentence:headline", "sentence:frontier"):  # what is copied wrongly is seen, and mended
        begins = re.compile(rf"(<!-- claims: {name} -->.*?\d\.\d)(\d)", re.DOTALL)
        changed = begins.sub(lambda match: match[1] + str(9 - int(match[2])), text)
        assert changed != text and claims.filled(changed, shown) == text
    within = "- <!-- claims: sentence:clean -->0.5<!-- end --> So much for that."
    assert claims.filled(within, shown) == within.replace("0.5", shown["sentence:clean"])
    assert (
        claims.filled("<!-- claims: main --><!-- end -->", shown)
        == f"<!-- claims: main -->\n{shown['main']}\n<!-- end -->"
    )


def test_write_makes_the_tables_fills_the_blocks_and_runs_nothing(shown, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    monkeypatch.setattr(claims, "make", lambda *_: pytest.fail("a run is made"))
    monkeypatch.setattr(claims, "draw_frontier", lambda *_: None)
    monkeypatch.setattr(claims, "draw_over", lambda *_: None)
    monkeypatch.setattr(claims, "blocks", lambda _: shown)  # of the same runs: they take seconds
    (tmp_path / "claims.json").write_text((RESULTS / "claims.json").read_text())
    words = tmp_path / "claims-in-words.md"
    words.write_text("# A\n<!-- claims: near -->\nold\n<!-- end -->\nB\n")
    claims.main(["--write"])
    assert (tmp_path / "claims.md").read_text() == WRITTEN
    assert words.read_text() == f"# A\n<!-- claims: near -->\n{shown['near']}\n<!-- end -->\nB\n"
    monkeypatch.setattr(claims, "all_tables", lambda _: WRITTEN)  # as was seen
    words.write_text("<!-- claims: far -->\nold\n<!-- end -->")
    with pytest.raises(SystemExit, match="nothing to put into its block 'far'"):
        claims.main(["--write"])
    monkeypatch.setattr(claims, "make", lambda *_: None)
    claims.main(["--studies", "near"])
    assert "'far': it is left as it is" in capsys.readouterr().out and "old" in words.read_text()


def numbers_of(text):
    return {number.lstrip("+-−") for number in re.findall(r"[+\-−]?\d+\.\d{2,}", text)}


def test_the_page_of_results_quotes_what_was_written():
    """Every number of two decimals and more in docs/results.md is in a file of results, but for settings and sources."""
    page = (ROOT / "docs/results.md").read_text()
    prose = re.sub(r"arXiv:[\d.]+|arxiv.org/abs/[\d.]+|`[^`]*`", "", page)
    written = set().union(*(numbers_of(file.read_text()) for file in RESULTS.glob("*.md")))
    settings = {"0.03", "0.01"}
    assert numbers_of(prose) - written <= settings, numbers_of(prose) - written - settings
    for figure in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (ROOT / "docs" / figure).stat().st_size > 5000


def test_what_the_runs_start_from():
    """SFT learns most of its data's true reward (0.25); at a β as large as 1 SeRA is ahead by far."""
    rows = claims.specs(RUNS, "main")
    assert len(rows["SeRA"]) == 10
    sft = claims.column(RUNS, rows["SeRA"], "gold/reward", 0)
    assert 0.6 * 0.25 < statistics.mean(sft) < 0.25
    ours, plain = (claims.at_beta(RUNS, "dpo", method, 1.0) for method in ("SeRA", "plain training"))
    assert ours - plain > 0.1


def test_a_sentence_says_a_difference_where_the_interval_of_all_comparisons_has_no_zero():
    def said(*differences):
        rows, runs = claims.specs(RUNS, "main"), claims.Measured(RUNS)
        for ours, plain, difference in zip(rows["SeRA"], rows["plain training"], 2 * differences):
            ours, plain = claims.name_of(ours), claims.name_of(plain)
            both = zip(RUNS[ours]["iterations"], RUNS[plain]["iterations"])
            runs[ours] = {
                "iterations": [row | {"gold/win_rate": other["gold/win_rate"] + difference} for row, other in both]
            }
        return claims.sentences(runs)["headline"]

    assert "Shown to win more often than plain DPO: SeRA (+0.120 [" in said(0.1, 0.12, 0.11, 0.13, 0.14)
    assert "Shown to win less often than plain DPO: SeRA (-0.120 [" in said(-0.1, -0.12, -0.11, -0.13, -0.14)
    assert "Not shown to win more or less often than plain DPO: SeRA (-0.020 [" in said(-0.2, 0.1, 0.1, -0.2, 0.1)
    # standard deviation 0.0422, t 2.262: ±0.0302 without the correction, which would have no zero
    assert "Not shown to win more or less often than plain DPO: SeRA (+0.040 [" in said(0.0, 0.0, 0.04, 0.08, 0.08)


def test_every_method_takes_as_many_steps_at_a_point_of_one_grid():
    assert {claims.name_of(spec) for study in ("main", "more") for spec in claims.tuning(study)} <= RUNS.keys()
    for method in claims.METHODS | claims.BASELINES:
        assert claims.best(RUNS, "dpo", method) in claims.grid("dpo")
    assert not {*claims.SEEDS} & {seed for seeds in claims.TUNING_SEEDS.values() for seed in seeds}
    changed = {name for row in (claims.METHODS | claims.BASELINES).values() for name in row}
    assert not changed & {"steps_per_iteration", "per_device_train_batch_size", "iterations", "beta", "learning_rate"}


@pytest.mark.parametrize("probability, freedom, quantile", [
    (0.95, 4, 2.776), (0.95, 9, 2.262), (0.99, 9, 3.250), (0.998, 9, 4.297), (0.95, 1, 12.706),  # of a printed table
])  # fmt: skip
def test_student_s_quantile(probability, freedom, quantile):
    assert claims.student_t(probability, freedom) == pytest.approx(quantile, abs=1e-3)


def test_interval_is_student_s():
    differences = [
        0.1,
        0.3,
        0.2,
        0.25,
        0.15,
    ]  # mean 0.2, standard deviation 0.0791: half-width 2.776 * 0.0791 / sqrt(5)
    low, mean, high = claims.interval(differences, [0.0] * 5)
    assert (low, mean, high) == pytest.approx((0.2 - 0.09816, 0.2, 0.2 + 0.09816), abs=1e-4)
    low, mean, high = claims.interval(differences, [0.0] * 5, comparisons=5)  # 4.604, of 99 %
    assert (low, mean, high) == pytest.approx((0.2 - 0.16279, 0.2, 0.2 + 0.16279), abs=1e-4)


def test_the_frontier_is_read_on_straight_lines():
    points = [[(3.0, 0.5), (5.0, 0.7)], [(2.0, 0.9), (2.0, 0.7)], [(1.0, 0.4), (1.0, 0.4)]]  # smallest β first
    at = lambda kl, seeds=(0, 1): claims.reward_at(points, kl, seeds)  # noqa: E731
    assert at(1.5) == pytest.approx(0.6) and at(3.0) == pytest.approx(0.7)
    assert at(4.0) == pytest.approx(0.6) and at(4.1) is None and at(3.5, [0]) is None and at(0.5) is None
    assert claims.reward_at([[(1.0, 0.3)], [(2.0, 0.8)]], 1.0, [0]) == pytest.approx(0.3)
    there_and_back = [[(1.0, 0.6)], [(3.0, 0.8)], [(0.0, 0.2)]]
    assert claims.reward_at(there_and_back, 1.5, [0]) == pytest.approx(0.65)  # the way back, which is higher
    assert claims.frontier_at(points, 2.0) == pytest.approx((0.7, 0.8, 0.9))
    assert (
        claims.frontier_at(points, 9.0) is None and claims.frontier_at(points, 4.0) is None
    )  # a quarter goes less far
    lower = [[(kl, reward - d) for (kl, reward), d in zip(of_beta, (0.1, 0.3))] for of_beta in points]
    assert claims.frontier_at(points, 2.0, lower) == pytest.approx(
        (0.1, 0.2, 0.3)
    )  # with the same seeds drawn for both
    assert claims.frontier_at(points, 2.0, [[(9.0, 0.1)] * 2] * 3) is None
    assert claims.in_brackets((-0.1, 0.0, 0.25), "+") == "+0.00 [-0.10, +0.25]" and claims.in_brackets(None) == "–"


def test_every_pair_of_a_prompt_s_different_samples():
    responses, prompt_of = [[1], [2], [3], [1], [1], [9], [2]], [0, 0, 0, 0, 2, 2, 2]
    rewards = torch.tensor([3.0, 1.0, 2.0, 3.0, 7.0, 5.0, torch.nan])
    best, worst, _ = claims.every_pair(prompt_of, responses, rewards)
    assert sorted(zip(best.tolist(), worst.tolist())) == [(2, 1), (3, 1), (3, 2), (4, 5)]
    best, worst, _ = claims.every_pair([0, 1], [[1], [2]], torch.tensor([1.0, 2.0]))
    assert best.shape == worst.shape == (0,) and best.dtype == torch.int64


def test_names_of_saved_runs_are_read_as_flags_and_variants(tmp_path):
    """Every run of claims.json is of flags that train.py has, and of one variant."""
    names = set()
    for name in RUNS:
        spec = json.loads(name)
        Config(**claims.flags_of(spec))
        names.add(claims.variant_of(spec, tmp_path).name)
    assert names == {"SeRA", "every pair", *claims.variants.VARIANTS}
    variant = claims.variant_of({"loss_type": "robust", "steps_per_iteration": 5}, tmp_path)
    assert variant.name == "robust" and claims.flags_of({"loss_type": "robust"}) == {"loss_type": "dpo"}
    assert claims.variant_of({"token_floor": 0.01, "length_free": True}, tmp_path).name == "both_remedies"
    biased = claims.variant_of({"length_bias": 0.5}, tmp_path).world
    for part, bias in (("train", 0.5), ("test", 0.0)):
        rows = playground.preferences(50, part, label_noise=0.1, seed=3, length_bias=bias)
        assert biased.preferences(50, part, label_noise=0.1, seed=3) == rows


def test_equal_steps_are_epochs_cut_short():
    config = Config(seed=3, per_device_train_batch_size=4)
    batches = claims.equal_steps(5, 10, 2, config)
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4]
    assert sorted(i for batch in batches[:3] for i in batch) == list(range(10)) and batches[3] != batches[0]
    assert claims.equal_steps(3, 10, 2, config) == batches[:3] == train.batches_of(10, 2, config)


class InThisProcess:
    """In the place of a pool of processes, which would not have what is changed here."""

    def __init__(self, *_):
        self.map = map

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        done = Future()
        done.set_result(function(*args))
        return done


def put_back_what_a_quick_run_changes(monkeypatch):
    for name in ("GRID", "EVERY", "TUNING_SEEDS"):
        monkeypatch.setattr(claims, name, getattr(claims, name).copy())
    for name in ("SEEDS", "LONG", "METHODS", "BASELINES", "IN_FIGURE"):
        monkeypatch.setattr(claims, name, getattr(claims, name))


def test_quick_and_smaller(sft, tmp_path, monkeypatch, capsys):
    """Two studies from end to end: shared runs go on from one iteration 1, and end as runs of their own would."""
    every, pairs = playground.prompts, playground.preferences
    monkeypatch.setattr(playground, "prompts", lambda part: every(part)[:6])
    monkeypatch.setattr(
        playground, "preferences", lambda n, part, **of: pairs(min(n, 16 if part == "train" else 8), part, **of)
    )
    monkeypatch.setattr(playground, "make_sft_policy", lambda *_: sft)
    monkeypatch.setitem(playground.DEFAULTS, "max_new_tokens", 12)  # up to two sentences
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    monkeypatch.setattr(claims, "ProcessPoolExecutor", InThisProcess)
    put_back_what_a_quick_run_changes(monkeypatch)
    few, make_quick = ("plain training", "SeRA"), claims.make_quick
    methods = {name: claims.METHODS[name] for name in few}
    no_remedy = {name: {} for name in claims.REMEDIES}  # their rows are SeRA's: two runs fewer
    changed = {"SEEDS": [0], "LONG": 3, "IN_FIGURE": {"SeRA": ("black", "o")}, "REMEDIES": no_remedy}
    for name, value in {**changed, "methods_of": lambda part: methods if part == "main" else {}}.items():
        monkeypatch.setattr(claims, name, value)

    def smaller():
        make_quick()
        monkeypatch.setattr(claims, "LONG", 2)
        claims.EVERY.update(max_train_pairs=16, steps_per_iteration=1)
        claims.GRID["dpo"] = ([1.0], [1e-3])

    monkeypatch.setattr(claims, "make_quick", smaller)
    claims.main(["--quick", "--studies", "main", "over"])
    folder = tmp_path / "quick"
    runs = json.loads((folder / "claims.json").read_text())["runs"]
    assert {path.name for path in folder.glob("*.png")} == {"frontier.png", "reward.png", "bootstrapped-precision.png"}
    assert (folder / "claims.md").read_text().count("|SeRA|") == 5 + (
        8 + 1
    )  # short, main, details, frontier, tuning; over, lead
    [spec] = claims.specs(runs, "main")["SeRA"]
    others = json.loads(json.dumps({name: run for name, run in runs.items() if name == claims.name_of(spec)}))
    here = {f"2 CPU cores, {claims.machine()}"}
    claims.check(others, here, 2, tmp_path)  # this one makes the run again; the others read what it made
    monkeypatch.setattr(claims, "make", lambda *_: None)
    others[claims.name_of(spec)]["iterations"][3]["gold/win_rate"] += 1e-9
    with pytest.raises(SystemExit, match="1 of 1 runs end otherwise"):  # on the same machine: exactly
        claims.check(others, here, 2, tmp_path)
    claims.check(others, {"another machine"}, 2, tmp_path)  # on another: about
    others[claims.name_of(spec)]["iterations"][2]["gold/win_rate"] += 2 * claims.TOLERANCE
    with pytest.raises(SystemExit, match="1 of 1 runs end otherwise"):
        claims.check(others, {"another machine"}, 2, tmp_path)
    said = re.findall(r"(\d) of 1 runs end as in claims.json", capsys.readouterr().out)
    assert said == ["1", "0", "1", "0"]
    shared = runs[claims.name_of(spec)]["iterations"]
    out = tmp_path / "own"
    spec = spec | claims.EVERY
    claims.sft(tmp_path / "sft-0", 0)
    train.main(Config(**claims.flags_of(spec), output_dir=str(out)), claims.variant_of(spec, tmp_path))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for ours, own in zip(shared, [line for line in lines if line["phase"] != "train"], strict=True):
        assert {key: ours[key] for key in own.keys() - {"select/pairs", "bootstrap/pairs"}}.items() <= own.items()
    for t in (1, 2, 3):
        trained = sum(2 + len(f"{p['prompt']} {p['chosen']} {p['prompt']} {p['rejected']}".split())
                      for p in map(json.loads, (out / f"iteration-{t}/pairs.jsonl").read_text().splitlines()))  # fmt: skip
        assert t > 1 or shared[t]["tokens/trained"] == trained  # 16 pairs, a step of up to 32: all of them once
    of_d = shared[1]["tokens/trained"]  # all of D is scored by the newest policy alone, beside the samples
    samples = (out / "iteration-2/samples.jsonl").read_text().splitlines()
    ended = [one for one in map(json.loads, samples) if one["finish_reason"] == "stop"]
    words = sum(len(f"{one['prompt']} {one['response']}".split()) + 1 for one in ended)
    assert [shared[t]["tokens/scored"] for t in (1, 2)] == [0, of_d + 2 * words]
    written = sum(len(one["response"].split()) for one in map(json.loads, samples)) + len(ended)
    assert [shared[t]["tokens/sampled"] for t in (1, 2)] == [0, written]


def test_a_dead_worker_is_no_difference(monkeypatch, capsys):
    def killed(*_):
        raise claims.BrokenProcessPool

    monkeypatch.setattr(claims, "make", killed)
    with pytest.raises(SystemExit) as stopped:
        claims.main(["--check", "2"])
    assert stopped.value.code == 2 and "A worker process was killed" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-1", "some"])
def test_a_check_of_no_run_is_refused(count, capsys):
    with pytest.raises(SystemExit) as stopped:
        claims.main(["--check", count])
    assert stopped.value.code == 2 and "argument --check: " in capsys.readouterr().err


def test_a_check_draws_of_all_runs(tmp_path, monkeypatch, capsys):
    def same(wanted, runs, machines, file, *_):
        made = {claims.name_of(spec): RUNS[claims.name_of(spec)] for spec in wanted}
        file.write_text(json.dumps({"runs": made}))

    monkeypatch.setattr(claims, "make", same)
    for count in (5, 10 * len(RUNS)):
        claims.check(RUNS, {claims.machine()}, count, tmp_path)
        drawn = json.loads((tmp_path / "again.json").read_text())["runs"]
        assert len(drawn) == min(count, len(RUNS)) and drawn.keys() <= RUNS.keys()
    monkeypatch.setattr(claims, "RESULTS", tmp_path / "empty")
    with pytest.raises(SystemExit, match="holds no run"):
        claims.main(["--check", "3"])


def test_the_pages_of_experiments_name_only_what_is_there():
    for page in (ROOT / "experiments/README.md", RESULTS / "README.md", WORDS):
        for path in re.findall(r"\]\(([\w/.-]+)\)", page.read_text()):
            assert (page.parent / path).exists(), (page, path)
        for path in re.findall(r"python ((?:experiments/)?\w+\.py)", page.read_text()):
            assert (ROOT / path).exists(), (page, path)
