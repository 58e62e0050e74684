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


def close(value):
    """The run computes in float32, the naive run in float64."""
    return pytest.approx(value, abs=1e-4, rel=1e-4)


def assert_the_same(out, world, settings, permutations, policies=None):
    """Everything that the run in `out` wrote is what the naive run comes to."""
    here, rows = world
    drawn = {"permutations": [p.tolist() for p in permutations], "numbers": [],
             "samples": samples_of(out, settings), "answers": answers_of(out, settings)}  # fmt: skip
    naive = NaiveSera(here / "model", rows["D"], rows["held_out"], {**NAIVE, **settings}, drawn)
    assert not drawn["permutations"]

    metrics = read(out / "metrics.jsonl")
    assert_same_steps([m for m in metrics if m["phase"] == "train"], naive.steps)
    assert_same_evaluations([m for m in metrics if m["phase"] != "train"], naive.evaluations)
    for t, expected in naive.trained_on.items():
        assert_same_pairs(read(out / f"iteration-{t}/pairs.jsonl"), expected, rows["D"], naive.tokenizer)
    assert list(naive.dropped) == list(range(2, settings["iterations"] + 1))
    assert not (out / "iteration-1/dropped.jsonl").exists()
    for t, expected in naive.dropped.items():
        assert_same_pairs(read(out / f"iteration-{t}/dropped.jsonl"), expected, rows["D"], naive.tokenizer)
    for t, expected in naive.sample_rewards.items():
        assert_same_rewards(read(out / f"iteration-{t}/samples.jsonl"), expected)

    expected = [dict(policy.named_parameters()) for policy in naive.policies[1:]]
    assert_same_weights(load_file(out / "policy" / "model.safetensors"), expected[-1])
    if policies:
        saved = [policy for before, policy in pairwise([None, *policies]) if not alike(before, policy)]
        for policy, naive_policy in zip(saved[-len(expected) :], expected, strict=True):
            assert_same_weights(policy, naive_policy)


def assert_same_steps(steps, expected):
    steps = [{name: value for name, value in step.items() if name != "phase"} for step in steps]
    for step in (steps[0], expected[0]):  # π_θ is π_ref: how sums are rounded decides which of its margins are above 0
        assert 0 <= step.pop("rewards/accuracies") <= 1
    rates = [pytest.approx(step["learning_rate"], rel=1e-6) for step in expected]
    assert [step["learning_rate"] for step in steps] == rates
    assert steps == [close(step) for step in expected]


def assert_same_evaluations(evaluations, expected):
    names = expected[0]
    assert [{name: found[name] for name in names} for found in evaluations] == [close(one) for one in expected]


def assert_same_pairs(lines, expected, given, tokenizer):
    """Lines of pairs.jsonl or dropped.jsonl; expected: (prompt, chosen, rejected, margin, source)."""
    assert [line["margin"] for line in lines] == close([margin for *_, margin, _source in expected])
    for line, (x, w, l, _margin, source) in zip(lines, expected, strict=True):
        prompt, chosen, rejected = (line[name].split() for name in ("prompt", "chosen", "rejected"))
        assert prompt == tokenizer.convert_ids_to_tokens(x)
        assert chosen == tokenizer.convert_ids_to_tokens(w[:-1])  # a text does not tell its end of sequence
        assert rejected == tokenizer.convert_ids_to_tokens(l[:-1])
        assert line["source"] == source
        row = given[line["row"]]
        assert row["prompt"].split() == prompt
        if source == "offline":
            assert (row["chosen"].split(), row["rejected"].split()) == (chosen, rejected)


def assert_same_rewards(lines, expected):
    """Lines of samples.jsonl; expected: of each prompt the rewards of its samples, None where one is not usable."""
    rewards = [reward for of_prompt in expected for reward in of_prompt]
    assert [line["usable"] for line in lines] == [reward is not None for reward in rewards]
    usable = [reward for reward in rewards if reward is not None]
    assert [line["reward"] for line in lines if line["usable"]] == close(usable) and len(usable) > 10


def assert_same_weights(policy, expected):
    for name, value in policy.items():
        assert (value.double() - expected[name]).abs().max() < 1e-4, name


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
