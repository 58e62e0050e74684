"""Whole runs against naive_sera.py: the same rewards, pairs, losses and weights, whatever the flags.

The naive run is given what was drawn (the order of pairs, the samples): the rule by which these are drawn is tested in
test_drawn.py. Variants have their runs in tests/experiments/test_variants.py, one of them with SLiC's loss.
"""

import os
import signal
from itertools import pairwise

import pytest
import torch
from naive_sera import NaiveSera
from safetensors.torch import load_file
from shared import Drawn, read, words_world

import train
from sera_min.machinery.config import Config

PLAIN = {  # every flag that the method depends on, as the README has them
    "loss_type": "dpo", "beta": 0.5, "label_smoothing": 0.0, "iterations": 3, "keep": 0.7, "bootstrap": 0.3,
    "samples_per_prompt": 4, "ensemble_gamma": 0.3,
    "learning_rate": 1e-3, "epochs_per_iteration": 1, "per_device_train_batch_size": 5,
}  # fmt: skip
NAIVE = {"select": "margin", "length_free": False, "token_floor": 0.0}  # what makes a variant of the naive run
REST = {"max_length": 24, "max_prompt_length": 8, "max_new_tokens": 12, "device": "cpu"}  # of no influence here
SCENARIOS = {  # name: what it changes of PLAIN, and of what must change nothing
    "dpo": ({"iterations": 4}, {}),
    "dpo, label smoothing, four epochs of three steps": (
        {"label_smoothing": 0.1, "epochs_per_iteration": 4, "iterations": 2}, {}),
    "ipo, unequal micro-batches": ({"loss_type": "ipo", "beta": 0.2}, {"max_tokens": 40}),
    "simpo, many samples": ({"loss_type": "simpo", "beta": 3.0, "samples_per_prompt": 6, "keep": 0.5}, {"max_tokens": 60}),
    "plain dpo": ({"keep": 1.0, "bootstrap": 0.0}, {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return words_world(tmp_path_factory.mktemp("world"))


def config_of(world, out, settings, rest):
    here, _ = world
    return Config(model_name_or_path=str(here / "model"), dataset_name=str(here / "D.jsonl"),
                  eval_dataset_name=str(here / "held_out.jsonl"), output_dir=str(out), **{**REST, **settings, **rest})  # fmt: skip


def samples_of(out, settings):
    """iteration -> prompt's number in D -> [(text, whether it ended)], as the run wrote them."""
    n, found = settings["samples_per_prompt"], {}
    for t in range(2, settings["iterations"] + 1) if settings["bootstrap"] else ():
        lines = read(out / f"iteration-{t}" / "samples.jsonl")
        every = [(line["response"], line["finish_reason"] == "stop") for line in lines]
        found[t] = [every[start : start + n] for start in range(0, len(every), n)]
    return found


def answers_of(out, settings):
    """iteration -> [(prompt, text, whether it ended)], as the run wrote them: one to every prompt of the held-out pairs."""
    found = {t: read(out / f"iteration-{t}" / "answers.jsonl") for t in range(settings["iterations"] + 1)}
    return {t: [(a["prompt"], a["answer"], a["finish_reason"] == "stop") for a in rows] for t, rows in found.items()}


def alike(one, other):
    return one is not None and all(torch.equal(one[name], other[name]) for name in other)


def assert_the_same(out, world, settings, permutations, policies=None):
    """Everything that the run in `out` wrote is what the naive run comes to."""
    here, rows = world
    drawn = {"permutations": [p.tolist() for p in permutations], "numbers": [],
             "samples": samples_of(out, settings), "answers": answers_of(out, settings)}  # fmt: skip
    naive = NaiveSera(here / "model", rows["D"], rows["held_out"], {**NAIVE, **settings}, drawn)
    assert not drawn["permutations"]
    close = lambda value: pytest.approx(value, abs=1e-4, rel=1e-4)  # noqa: E731

    metrics = read(out / "metrics.jsonl")
    steps = [{name: value for name, value in m.items() if name != "phase"} for m in metrics if m["phase"] == "train"]
    for step in (steps[0], naive.steps[0]):  # π_θ is π_ref: how sums are rounded decides which of its margins are above 0
        assert 0 <= step.pop("rewards/accuracies") <= 1
    rates = [pytest.approx(step["learning_rate"], rel=1e-6) for step in naive.steps]
    assert [step["learning_rate"] for step in steps] == rates and steps == [close(step) for step in naive.steps]
    evaluations = [m for m in metrics if m["phase"] != "train"]
    assert [{k: m[k] for k in naive.evaluations[0]} for m in evaluations] == [close(e) for e in naive.evaluations]

    pairs = {f"iteration-{t}/pairs.jsonl": expected for t, expected in naive.trained_on.items()}
    dropped = {f"iteration-{t}/dropped.jsonl": expected for t, expected in naive.dropped.items()}
    assert not (out / "iteration-1/dropped.jsonl").exists() and len(dropped) == settings["iterations"] - 1
    for name, expected in {**pairs, **dropped}.items():
        written = read(out / name)
        assert [line["source"] for line in written] == [pair[4] for pair in expected]
        assert [line["margin"] for line in written] == close([pair[3] for pair in expected])
        texts = [[line[name].split() for name in ("prompt", "chosen", "rejected")] for line in written]
        ids = [(x, w[:-1], l[:-1]) for x, w, l, _, _ in expected]  # a text does not tell its end of sequence
        assert texts == [[naive.tokenizer.convert_ids_to_tokens(part) for part in pair] for pair in ids]
        given = [rows["D"][line["row"]] for line in written]
        assert [row["prompt"].split() for row in given] == [x for x, _, _ in texts]
        assert all(line["source"] == "bootstrap" or [row["chosen"].split(), row["rejected"].split()] == both
                   for line, row, (_, *both) in zip(written, given, texts))  # fmt: skip
    for t, rewards in naive.sample_rewards.items():
        lines = read(out / f"iteration-{t}" / "samples.jsonl")
        assert [line["usable"] for line in lines] == [r is not None for group in rewards for r in group]
        pairs = [(line["reward"], r) for line, r in zip(lines, (r for group in rewards for r in group)) if r is not None]
        assert [a for a, _ in pairs] == close([b for _, b in pairs]) and len(pairs) > 10

    saved = [policy for before, policy in pairwise([None, *(policies or [])]) if not alike(before, policy)]
    final = load_file(out / "policy" / "model.safetensors")
    expected = [dict(policy.named_parameters()) for policy in naive.policies[1:]]
    for run_s, naive_s in [*zip(saved[-len(expected) :], expected, strict=True)] if policies else [(final, expected[-1])]:
        for name, value in run_s.items():
            assert (value.double() - naive_s[name]).abs().max() < 1e-4, name


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_run_is_the_naive_run(world, tmp_path, monkeypatch, name):
    changed, rest = SCENARIOS[name]
    settings, drawn = {**PLAIN, **changed}, Drawn(monkeypatch)
    train.main(config_of(world, tmp_path / "run", settings, rest))
    assert_the_same(tmp_path / "run", world, settings, drawn.permutations, drawn.policies)


def test_a_run_that_is_interrupted_and_resumed_is_the_naive_run(world, tmp_path, monkeypatch):
    """Stopped in its first training step of iteration 2, and again while it samples in iteration 3."""
    drawn = Drawn(monkeypatch)
    out, step, rand = tmp_path / "run", torch.optim.AdamW.step, torch.rand
    steps, draws = [], []

    def stops_at_the_fourth(*args, **kwargs):
        steps.append(None)
        if len(steps) == 4:  # iteration 1 has three
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args, **kwargs)

    def stops_in_iteration_3(*size, **kwargs):
        draws.append(None)
        if len(draws) == 3:
            raise KeyboardInterrupt
        return rand(*size, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", stops_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        train.main(config_of(world, out, PLAIN, {}))
    assert len(steps) == 4
    resumed = Config(resume_from_checkpoint=str(out))
    monkeypatch.setattr(torch, "rand", stops_in_iteration_3)
    with pytest.raises(KeyboardInterrupt):
        train.main(resumed)
    assert len(steps) == 6  # no step of iteration 2 was done twice
    monkeypatch.setattr(torch, "rand", rand)
    train.main(resumed)
    orders = {str(order): order for order in drawn.permutations}  # that of iteration 2 was drawn once more: the same
    assert len(orders) == 3 < len(drawn.permutations)
    assert_the_same(out, world, PLAIN, orders.values())
