"""What is not the paper's: each variant of experiments/variants.py, against the naive run and on numbers of a hand."""

import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared import read, words_world

import train
from sera_min.machinery.config import Config, command_line
from sera_min.machinery.errors import InputError

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS / "method"), str(TESTS.parent / "experiments")]
import variants  # noqa: E402
from naive_sera import NaiveSera  # noqa: E402

FLAGS = {
    "loss_type": "dpo", "beta": 0.5, "label_smoothing": 0.0, "iterations": 2, "keep": 0.7, "bootstrap": 0.3,
    "samples_per_prompt": 4, "ensemble_gamma": 0.3, "learning_rate": 1e-3, "epochs_per_iteration": 1,
    "per_device_train_batch_size": 5,
}  # fmt: skip
NOT_NAIVE = {"max_length": 24, "max_prompt_length": 8, "max_new_tokens": 12, "device": "cpu", "max_tokens": 60}
SCENARIOS = {  # variant -> its flags, and what the naive run calls it
    "robust": ({"label_smoothing": 0.2, "keep": 1.0, "bootstrap": 0.0}, {"loss_type": "robust"}),
    "length_free": ({"samples_per_prompt": 6, "beta": 0.1, "keep": 0.5}, {"length_free": True}),
    "token_floor": ({"loss_type": "slic"}, {"token_floor": 0.6}),
    "both_remedies": ({"loss_type": "simpo", "beta": 3.0, "iterations": 3}, {"token_floor": 0.6, "length_free": True}),
    "random_pairs": ({"iterations": 3}, {"select": "random"}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return words_world(tmp_path_factory.mktemp("world"))


def flags_of(world, out, **flags):
    here, _ = world
    return Config(model_name_or_path=str(here / "model"), dataset_name=str(here / "D.jsonl"), output_dir=str(out),
                  eval_dataset_name=str(here / "held_out.jsonl"), **{**NOT_NAIVE, **FLAGS, **flags})  # fmt: skip


def quickly(name):
    return replace(variants.make_variant(name), report=False)


def watch(monkeypatch, name):
    """A list of what torch's `name` returns from now on."""
    drawn, function = [], getattr(torch, name)

    def watched(*args, **kwargs):
        drawn.append(function(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(torch, name, watched)
    return drawn


def drawn_by(out, settings, permutations, numbers):
    """What the naive run is given: the order of pairs, the random control's numbers, samples and answers."""
    n, times = settings["samples_per_prompt"], range(2, settings["iterations"] + 1)
    samples = {}
    for t in times if settings["bootstrap"] else ():
        ended = [
            (line["response"], line["finish_reason"] == "stop") for line in read(out / f"iteration-{t}/samples.jsonl")
        ]
        samples[t] = [ended[first : first + n] for first in range(0, len(ended), n)]
    answers = {}
    for t in range(settings["iterations"] + 1):
        lines = read(out / f"iteration-{t}/answers.jsonl")
        answers[t] = [(line["prompt"], line["answer"], line["finish_reason"] == "stop") for line in lines]
    return {"permutations": [p.tolist() for p in permutations], "samples": samples, "answers": answers,
            "numbers": [n.tolist() for n in numbers if n.ndim == 1]}  # fmt: skip


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_run_is_the_naive_run(name, world, tmp_path, monkeypatch):
    """The same pairs in the same order, margins, rewards, steps and weights."""
    changed, known_as = SCENARIOS[name]
    monkeypatch.setattr(variants, "TOKEN_FLOOR", 0.6)
    permutations, numbers = watch(monkeypatch, "randperm"), watch(monkeypatch, "rand")
    out, (here, rows) = tmp_path / "run", world
    train.main(flags_of(world, out, **changed), quickly(name))
    assert json.loads((out / "config.json").read_text())["variant"] == name
    chosen_by = [tuple(n.tolist()) for n in numbers if n.ndim == 1]  # of the random control
    assert len({*chosen_by}) == len(chosen_by)  # no choice takes the numbers of another

    settings = {**FLAGS, "select": "margin", "length_free": False, "token_floor": 0.0, **changed, **known_as}
    drawn = drawn_by(out, settings, permutations, numbers)
    naive = NaiveSera(here / "model", rows["D"], rows["held_out"], settings, drawn)
    assert not drawn["permutations"] and not drawn["numbers"]
    close = lambda value: pytest.approx(value, abs=1e-4, rel=1e-4)  # noqa: E731
    for t, rewards in naive.sample_rewards.items():
        lines, expected = read(out / f"iteration-{t}/samples.jsonl"), list(itertools.chain(*rewards))
        assert [line["reward"] is None for line in lines] == [r is None for r in expected]
        assert [line["reward"] for line in lines if line["usable"]] == close([r for r in expected if r is not None])
        cut_off = sum(line["finish_reason"] == "length" for line in lines)
        assert ("floor" in name or name == "both_remedies") == (sum(r is None for r in expected) > cut_off)
    for t in range(1, settings["iterations"] + 1):
        expected = naive.trained_on[t] + naive.dropped.get(t, [])
        written = read(out / f"iteration-{t}/pairs.jsonl")
        if t > 1:
            written += read(out / f"iteration-{t}/dropped.jsonl")
        assert [line["margin"] for line in written] == close([pair[3] for pair in expected])
        tokens = naive.tokenizer.convert_ids_to_tokens
        texts = [[line[key].split() for key in ("prompt", "chosen", "rejected")] for line in written]
        assert texts == [[tokens(x), tokens(w[:-1]), tokens(l[:-1])] for x, w, l, _, _ in expected]
    steps = [line for line in read(out / "metrics.jsonl") if line["phase"] == "train"]
    assert len(steps) == len(naive.steps)
    for step, expected in zip(steps, naive.steps):
        if (step["iteration"], step["step"]) == (1, 1):
            expected.pop("rewards/accuracies")  # π_θ is π_ref, and how sums are rounded decides
        assert {key: step[key] for key in expected} == close(expected)
    for key, value in load_file(out / "policy" / "model.safetensors").items():
        assert (value.double() - dict(naive.policies[-1].named_parameters())[key]).abs().max() < 1e-4, key


def test_the_robust_loss_is_unbiased():
    """With a share ε of labels flipped its expectation is DPO's loss on the right ones, whatever the margin."""
    margin = torch.tensor([-3.0, 0.0, 0.2, 5.0], dtype=torch.float64)
    for eps in (0.0, 0.1, 0.4):
        expected = (1 - eps) * variants.robust_loss(margin, 0.5, eps) + eps * variants.robust_loss(-margin, 0.5, eps)
        torch.testing.assert_close(expected, train.dpo_loss(margin, 0.5))
    by_hand = (0.8 * 0.4741 - 0.2 * 0.9741) / 0.6  # βm = 0.5: −log σ(0.5) and −log σ(−0.5)
    assert variants.robust_loss(torch.tensor([1.0]), 0.5, 0.2).item() == pytest.approx(by_hand, abs=1e-4)


def test_length_is_taken_out_within_prompts():
    nan = float("nan")
    rewards = torch.tensor([1.0, 3.0, 10.0, 14.0, nan, 7.0])  # 2 nats for 2 tokens, 4 for 2: b = (2 + 4) / (2 + 2)
    lengths = torch.tensor([2, 4, 30, 32, 90, 5])
    left = variants.without_length(rewards, lengths, [0, 0, 2, 2, 2, 3])
    assert left[[0, 1, 2, 3, 5]].tolist() == pytest.approx([-2.0, -3.0, -35.0, -34.0, -0.5]) and left[4].isnan()
    same = torch.tensor([3, 3])
    assert variants.without_length(rewards[:2], same, [0, 0]).tolist() == [1.0, 3.0]  # nothing to explain
    assert len(variants.without_length(rewards[:0], lengths[:0], [])) == 0


def test_the_smallest_and_the_middle_margins():
    margins = torch.tensor([3.0, -1.0, 2.0, 0.0, 5.0])
    assert variants.select_smallest(margins, 2).tolist() == [1, 3]
    assert variants.select_middle(margins, 3).tolist() == [0, 2, 3]
    assert variants.make_variant("smallest_margins").select_top is variants.select_smallest
    assert variants.make_variant("middle_margins").select_top is variants.select_middle


def test_resume_knows_the_variant(world, tmp_path):
    """A run stopped before iteration 2 goes on as its own variant, and as no other."""

    class Stop(Exception):
        pass

    def stops(t, *others):
        if t == 2:
            raise Stop
        return train.review(t, *others)

    out = tmp_path / "run"
    begun = replace(quickly("length_free"), review=stops)
    with pytest.raises(Stop):
        train.main(flags_of(world, out, iterations=2), begun)
    resumed = Config(resume_from_checkpoint=str(out))
    how = f"python experiments/variants.py length_free --resume_from_checkpoint {out}"
    for wrong in (train.SERA, variants.make_variant("random_pairs")):
        with pytest.raises(InputError, match=re.escape(how)):
            train.main(resumed, wrong)
    train.main(resumed, quickly("length_free"))
    train.main(flags_of(world, tmp_path / "whole", iterations=2), quickly("length_free"))
    for file in ("iteration-2/pairs.jsonl", "policy/model.safetensors"):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("arguments, message", [
    (["robus"], "error: 'robus' is no variant: expected one of robust, length_free, token_floor, "),
    (["robust", "--loss_type", "ipo"], "error: robust is a variant of DPO's loss, and --loss_type is ipo"),
    (["both_remedies", "--bootstrap", "0"], "error: both_remedies is for bootstrapped pairs, and --bootstrap is 0"),
    (["robust", "--token_floor", "1"], "error: "),
])  # fmt: skip
def test_what_is_wrong_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        variants.main(arguments)
    assert str(stopped.value.code).startswith(message)


def test_the_command_line_runs_a_variant_with_train_py_s_flags(monkeypatch, capsys):
    made = []
    monkeypatch.setattr(train, "main", lambda flags, variant: made.append((flags, variant.name)))
    for name in variants.VARIANTS:
        variants.main([name, "--keep", "0.5", "--seed", "7"])
        flags, of_variant = made[-1]
        assert (flags.keep, flags.seed, of_variant) == (0.5, 7, name)
    variants.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"    {name} " in shown for name in variants.VARIANTS)
    command_line(lambda flags: None, None, [])
