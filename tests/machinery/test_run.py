"""The loop's contract: files, metrics, resuming, and the ways a run is refused or stopped.

Its numbers are test_oracle.py's, what it draws test_drawn.py's, and what it says of itself test_reported.py's.
"""

import copy
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file, save_file
from shared import CHATML, WORDS, bpe_tokenizer, read, some_rows, tiny_model, word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import train
from sera_min import bootstrap, playground
from sera_min.logprobs import sequence_logprobs
from sera_min.lora import lora_state
from sera_min.machinery import config as configuration
from sera_min.machinery import folder, policies
from sera_min.machinery.config import Config, resolve
from sera_min.machinery.errors import InputError
from sera_min.machinery.policies import LoRAPolicies, Policies
from sera_min.machinery.run import Run
from sera_min.pairs import Pair, Rows, TrainingSet
from train import SERA, main

ROOT = Path(__file__).parents[2]
STEP_KEYS = {
    "phase", "iteration", "step", "loss", "learning_rate", "grad_norm", "rewards/chosen", "rewards/rejected",
    "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
}  # fmt: skip
GOLD = {"gold/reward", "gold/win_rate", "gold/length", "gold/broken", "select/precision", "bootstrap/precision", "data/label_accuracy"}


@pytest.fixture(autouse=True)
def figures():
    """matplotlib, which is slow to import, is not there; call this where it is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        yield patch.undo


@pytest.fixture(scope="module")
def world(sft):
    """The playground with an SFT policy of a few seconds, and fewer prompts and pairs to evaluate on."""
    policy, tokenizer = sft
    functions = {
        "make_sft_policy": lambda seed, device: (copy.deepcopy(policy), tokenizer),
        "prompts": lambda part: playground.prompts(part)[:10],
        "preferences": lambda n, *part, **noise: playground.preferences(min(n, 24), *part, **noise),
    }
    return replace(SERA, world=SimpleNamespace(**{**vars(playground), **functions}))


def small(out, **changed):
    """In the playground, three steps an iteration, samples of up to two sentences."""
    return Config(**{"output_dir": str(out), "max_train_pairs": 24, "per_device_train_batch_size": 8, "max_new_tokens": 12, "device": "cpu", **changed})


def command(flags, variant=SERA):
    """`python train.py` with these flags."""
    given = {f.name: getattr(flags, f.name) for f in fields(Config) if getattr(flags, f.name) != f.default}
    arguments = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    configuration.command_line(lambda flags: main(flags, variant), train.__doc__, arguments)


def resumed(out):
    return Config(resume_from_checkpoint=str(out))


def newest(out):
    """The number of the newest policy that a run of the playground has saved."""
    return Policies(out, resolve(small(out))).newest()


def write_preferences(file):
    rows = [{"instruction": f"Say {i}", "chosen": f"The fox is {i}" * (1 + i % 3), "rejected": f"{i} no"} for i in range(20)]
    file.write_text("\n".join(map(json.dumps, [*rows, {**rows[0], "rejected": rows[0]["chosen"]}])))
    return file


@pytest.fixture
def preferences(tmp_path):
    return write_preferences(tmp_path / "d.jsonl")


def real(model_dir, file, out, **changed):
    return Config(**{
        "model_name_or_path": str(model_dir), "dataset_name": str(file), "output_dir": str(out), "max_length": 60,
        "max_prompt_length": 40, "max_new_tokens": 8, "eval_fraction": 0.2, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "beta": 0.5,
        "device": "cpu", **changed,
    })  # fmt: skip


class Killed(BaseException):
    pass


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def interrupted_in(step):
    """A train_step that is interrupted instead of being the step-th of all."""
    counter, real_step = iter(range(1, 1000)), train.train_step
    return lambda *args: interrupted() if next(counter) == step else real_step(*args)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of two iterations, and the same run interrupted in step 3 of iteration 2, with a checkpoint at every step.

    The model knows few words, so that many of its samples end, and some are paired.
    """
    here = tmp_path_factory.mktemp("stopped")
    tokenizer = word_tokenizer(WORDS)
    tokenizer.save_pretrained(here / "model")
    tiny_model(vocab_size=len(tokenizer), num_hidden_layers=1).save_pretrained(here / "model")
    (here / "d.jsonl").write_text("\n".join(map(json.dumps, some_rows(18, random.Random(3)))))
    flags = real(here / "model", here / "d.jsonl", here / "whole", iterations=2, save_steps=1, max_length=24, max_prompt_length=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        final = main(flags)
        patch.setattr(train, "train_step", interrupted_in(4 + 3))
        with pytest.raises(KeyboardInterrupt):
            main(replace(flags, output_dir=str(here / "stopped")))
    phases = ["eval", *["train"] * 4, "eval", *["train"] * 4, "final"]
    assert [line["phase"] for line in lines(here / "whole")] == phases and len(lines(here / "stopped")) == 1 + 4 + 1 + 2
    assert (here / "stopped/state/checkpoint-2.pt").exists() and final["bootstrap/pairs"] > 0
    return flags, here


def copy_of(stopped, out):
    """The interrupted run in a folder of its own, and the flags that resume it."""
    shutil.copytree(stopped[1] / "stopped", out)
    return resumed(out)


def lines(out):
    return read(out / "metrics.jsonl")


def assert_same_end(out, undisturbed):
    """Every file byte by byte, but those that hold the folder's name, or how a tokenizer was loaded."""
    but = ["config.json"]
    if json.loads((out / "config.json").read_text())["model_name_or_path"] is None:
        but += ["policy/tokenizer_config.json"]  # transformers notes in it that it was loaded, and not made
    ends = [{name: file.read_bytes() for file in sorted(end.rglob("*")) if (name := str(file.relative_to(end))) not in but and file.is_file()}
            for end in (out, undisturbed)]  # fmt: skip
    assert ends[0].keys() == ends[1].keys() and "policy/model.safetensors" in ends[0]
    assert [name for name in ends[0] if ends[0][name] != ends[1][name]] == []


def test_the_contract_in_the_playground(world, tmp_path):
    out = tmp_path / "run"
    final = main(small(out, learning_rate=1e-3), world)
    metrics = lines(out)
    assert metrics[-1] == final and final["phase"] == "final" and GOLD <= final.keys()
    steps = [m for m in metrics if m["phase"] == "train"]
    assert all(m.keys() == STEP_KEYS for m in steps) and [m["iteration"] for m in steps] == [1] * 3 + [2] * 3 + [3] * 3
    assert [m["step"] for m in steps] == [1, 2, 3] * 3
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5) and abs(steps[0]["rewards/margins"]) < 1e-4
    assert [m["iteration"] for m in metrics if m["phase"] == "eval"] == [0, 1, 2]
    for t, sources in [(1, {"offline"}), (2, {"offline", "bootstrap"}), (3, {"offline", "bootstrap"})]:
        pairs = load_dataset("json", data_files=str(out / f"iteration-{t}/pairs.jsonl"), split="train", cache_dir=tmp_path / "c")
        assert pairs.column_names == ["prompt", "chosen", "rejected", "margin", "source", "row"] and {*pairs["source"]} == sources
        for source in sources - {"offline"} if t > 1 else []:
            margins = [row["margin"] for row in pairs if row["source"] == source]
            assert margins == sorted(margins, reverse=True) and min(margins) > 0
    assert pairs["source"].count("offline") == 17 and pairs["source"].count("bootstrap") == 7
    assert (final["select/pairs"], final["bootstrap/pairs"]) == (17, 7)
    samples = read(out / "iteration-2/samples.jsonl")
    assert len(samples) == 24 * 4 and samples[0].keys() == {"prompt", "response", "finish_reason", "usable", "reward"}
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(out / "policy"), AutoTokenizer.from_pretrained(out / "policy")
    assert policy.dtype == torch.float32 and tokenizer.eos_token == "<eos>"
    written = json.loads((out / "config.json").read_text())
    assert written.pop("variant") == "SeRA" and written["beta"] == 1
    assert written == asdict(resolve(small(out, learning_rate=1e-3)))
    assert "| iteration |" in (out / "report.md").read_text()
    assert {p.name for p in out.iterdir()} == {
        "config.json", "metrics.jsonl", "policy", "report.md", *(f"iteration-{t}" for t in (0, 1, 2, 3)),
    }  # fmt: skip


def test_lora_in_the_playground(world, sft, tmp_path):
    """policy/ has the SFT policy's weights, but for those of the linear layers."""
    out = tmp_path / "run"
    main(small(out, use_peft=True, iterations=1), world)
    weights, before = load_file(out / "policy/model.safetensors"), sft[0].state_dict()
    assert weights.keys() == before.keys() and resolve(small(out, use_peft=True)).learning_rate == 1e-3
    changed = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert changed == {name for name in weights if "_proj" in name}
    assert (out / "adapter/adapter_model.safetensors").exists()


def test_every_loss_has_its_beta():
    """The larger one suits the playground's small model; given, it is what was given."""
    for name in ("dpo", "ipo", "slic", "simpo"):
        assert resolve(Config(loss_type=name)).beta == (2.0 if name == "simpo" else 1.0)
        of_user = Config(loss_type=name, model_name_or_path="m", dataset_name="d")
        assert resolve(of_user).beta == (2.0 if name == "simpo" else 0.1)
        assert resolve(Config(loss_type=name, beta=0.3)).beta == 0.3


def test_what_is_left_open_is_resolved():
    """Half of the length is the prompt's, and what it leaves the samples'; the playground has lengths of its own."""
    def lengths(**given):
        c = resolve(Config(model_name_or_path="m", dataset_name="d", **given))
        return c.max_length, c.max_prompt_length, c.max_new_tokens

    assert lengths() == (1024, 512, 512)
    assert lengths(max_length=384) == (384, 192, 192)
    assert lengths(max_length=385) == (385, 192, 193)
    assert lengths(max_prompt_length=100) == (1024, 100, 924)
    assert lengths(max_length=384, max_prompt_length=300, max_new_tokens=7) == (384, 300, 7)
    c = resolve(Config())
    assert (c.max_length, c.max_prompt_length, c.max_new_tokens, c.max_train_pairs) == (64, 16, 32, 2000)
    assert c.eval_split == "test" and c.device in ("cpu", "cuda") and c.learning_rate == playground.LEARNING_RATE
    assert resolve(Config(model_name_or_path="m", dataset_name="d")).learning_rate == 1e-6


def test_a_pair_names_the_row_that_it_is_from(model_dir, tmp_path):
    """Rows that were dropped, or held out, are counted too; a bootstrapped pair has the row of its prompt."""
    rows = [{"prompt": f"Say {i}", "chosen": f"The fox is {i}" * (1 + i % 3), "rejected": f"{i} no"} for i in range(20)]
    for i in (0, 7):
        rows[i]["rejected"] = rows[i]["chosen"]  # will be dropped
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    main(real(model_dir, tmp_path / "d.jsonl", tmp_path / "out", iterations=2))
    whole, kept, left_out = (read(tmp_path / "out" / name) for name in
                             ("iteration-1/pairs.jsonl", "iteration-2/pairs.jsonl", "iteration-2/dropped.jsonl"))  # fmt: skip
    assert all(line["prompt"] in rows[line["row"]]["prompt"] for line in whole + kept + left_out) and len(whole) == 14
    assert sorted(line["row"] for line in kept + left_out if line["source"] == "offline") == [line["row"] for line in whole]
    report = (tmp_path / "out/report.md").read_text()
    assert f"margin: {left_out[0]['margin']:.2f}, row {left_out[0]['row']}" in report and "10 of 14 given pairs kept" in report


def test_a_model_and_data_of_one_s_own(model_dir, preferences, tmp_path, capsys):
    out = tmp_path / "run"
    final = main(real(model_dir, preferences, out, iterations=2))
    printed = capsys.readouterr().out
    assert "21 read, 20 kept" in printed and "1 dropped: chosen equals rejected" in printed
    assert final["eval_rewards/accuracies"] > 0.5 and not any(key.startswith("gold") for key in final)
    assert lines(out)[0] == {"phase": "eval", "iteration": 0, "eval_loss": pytest.approx(0.693147, abs=1e-4),
                             "eval_rewards/accuracies": 0.5, "eval_rewards/margins": 0.0, "kl": 0.0}  # fmt: skip
    assert (out / "policy/model.safetensors").exists() and "after: " in (out / "report.md").read_text()


def test_a_review_that_leaves_no_pair_is_one_line(model_dir, preferences, tmp_path, capsys):
    """None of the given ones is kept, and no sample can end: two that end in one token are alike."""
    with pytest.raises(InputError, match="iteration 2: no pair is left to train on"):
        main(real(model_dir, preferences, tmp_path / "run", keep=0.0, max_new_tokens=1))
    assert "most samples reach --max_new_tokens 1 without an end" in capsys.readouterr().out


def test_evaluation_data_of_one_s_own(model_dir, preferences, tmp_path, capsys):
    """What is evaluated on is never trained on; the part of it that D holds too is dropped and counted."""
    rows, file = read(preferences), tmp_path / "held.json"
    file.write_text(json.dumps([*rows[:3], {"instruction": "New?", "chosen": "yes", "rejected": "no"}]))
    out = tmp_path / "run"
    final = main(real(model_dir, preferences, out, iterations=1, eval_dataset_name=str(file), eval_fraction=Config.eval_fraction))
    printed = capsys.readouterr().out
    assert "21 read, 17 kept" in printed and "3 dropped: the prompt is in the evaluation data" in printed
    assert "evaluation data: 4 read, 4 kept" in printed
    trained = {row["prompt"] for row in read(out / "iteration-1/pairs.jsonl")}
    assert len(trained) == 17 and not any("Say 0" in x or "Say 2\n" in x for x in trained)
    assert {"eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"} <= final.keys()


def test_a_split_of_the_same_data_set_to_evaluate_on(model_dir, preferences, tmp_path, capsys):
    rows, data_set = read(preferences), tmp_path / "set"
    data_set.mkdir()
    for split, some in {"train": rows[:12], "test": rows[12:20]}.items():
        (data_set / f"{split}.jsonl").write_text("\n".join(map(json.dumps, some)))
    main(real(model_dir, data_set, tmp_path / "run", iterations=1, eval_split="test", eval_fraction=Config.eval_fraction))
    printed = capsys.readouterr().out
    assert "data: 12 read, 12 kept" in printed and "evaluation data: 8 read, 8 kept" in printed


def test_figures_are_not_needed(stopped, tmp_path, figures):
    flags, here = stopped
    figures()
    out = tmp_path / "with"
    main(replace(flags, output_dir=str(out)))
    assert "![review.png](review.png)" in (out / "report.md").read_text()
    names, without = ({path.name for path in folder.iterdir()} for folder in (out, here / "whole"))
    assert names - without == {"curves.png", "review.png"} and without < names
    assert lines(out) == lines(here / "whole")


def test_gradient_checkpointing_changes_nothing(model_dir, preferences, tmp_path, monkeypatch):
    """And is on: transformers switches it off in eval mode."""
    ends, modes, real_pass = [], [], train.sequence_logprobs

    def watched(model, x, y):
        modes.append(any(part.training for part in model.modules()))
        return real_pass(model, x, y)

    monkeypatch.setattr(train, "sequence_logprobs", watched)
    for name in (False, True):
        main(real(model_dir, preferences, tmp_path / str(name), iterations=1, learning_rate=1e-4, gradient_checkpointing=name))
        ends.append(([m["loss"] for m in lines(tmp_path / str(name)) if m["phase"] == "train"],
                     load_file(tmp_path / str(name) / "policy/model.safetensors")))  # fmt: skip
    (losses, weights), (checkpointed, others) = ends
    assert checkpointed == pytest.approx(losses, abs=1e-5) and len(losses) == 4
    for key, value in weights.items():
        torch.testing.assert_close(value, others[key], rtol=0, atol=2e-5)
    assert len(modes) == 8 and all(modes[4:])


def test_two_policies_are_in_memory_one_while_it_is_trained_and_nothing_is_scored_twice(stopped, tmp_path, monkeypatch):
    """In a run, and in one that goes on within an iteration."""
    flags, _ = stopped
    held, scored = [], []

    def watched(function, most):
        def count(*args, **kwargs):
            assert sum(policy() is not None for policy in held) <= most
            return function(*args, **kwargs)

        return count

    def loads(*args, real=policies.load):
        policy, tokenizer = real(*args)
        held.append(weakref.ref(policy))
        return policy, tokenizer

    def scores(self, i, rows, real=Policies.score):
        scored.append((i, str(rows.responses)))
        return real(self, i, rows)

    monkeypatch.setattr(policies, "load", loads)
    for module, name, most in [(train, "train_step", 1), (bootstrap, "sample_responses", 2), (policies, "score", 2)]:
        monkeypatch.setattr(module, name, watched(getattr(module, name), most))
    monkeypatch.setattr(Policies, "score", scores)
    main(replace(flags, output_dir=str(tmp_path / "run"), iterations=3))
    # Iteration 1 reads π_ref and, to go on from it, again; the later ones what is not in memory, at most three.
    assert 3 < len(held) <= 2 + 3 * 2 and len(scored) == len({*scored})
    held.clear()
    main(copy_of(stopped, tmp_path / "resumed"))
    assert held


# A training by itself


def a_run(out, flags, i, policy):
    """A Run that has begun, without data, and with π_θi in memory."""
    run = Run.__new__(Run)
    run.config, run.out, run.state = flags, out, out / "state"
    run.policies = Policies(out, flags)
    run.policies.hold(i, policy, bpe_tokenizer())
    run.state.mkdir(parents=True)
    return run


def trained(out, model, pairs, reference, t=1, **changed):
    """The lines that training π_θt from the model on these pairs logs."""
    flags = resolve(real("m", "d", out, **changed))
    run = a_run(out, flags, t - 1, model)
    train.train(t, training_set_of(pairs, reference), run, flags, SERA)
    return lines(out)


def training_set_of(pairs, reference):
    return TrainingSet(pairs, reference, torch.zeros(len(pairs)), ["offline"] * len(pairs), list(range(len(pairs))))


def some_pairs(n):
    """Of lengths from 2 to 8."""
    generator = torch.Generator().manual_seed(0)
    some = lambda: torch.randint(3, 61, (int(torch.randint(2, 9, (), generator=generator)),), generator=generator).tolist()  # noqa: E731
    return [Pair(some(), some(), some()) for _ in range(n)]


def test_one_pair_is_overfitted(tmp_path):
    model, pair = tiny_model(), Pair([3, 4], [5, 6, 1], [7, 8, 1])
    reference = sequence_logprobs(model, [pair.prompt] * 2, [pair.chosen, pair.rejected])[0].detach()[None]
    seen = trained(tmp_path / "run", model, [pair], reference, epochs_per_iteration=40, learning_rate=1e-2)
    assert seen[0]["loss"] == pytest.approx(0.6931, abs=1e-3) and seen[-1]["loss"] < 0.01 and seen[-1]["rewards/margins"] > 4


def test_a_pair_that_is_nan_is_named(tmp_path):
    """By its line of pairs.jsonl, whatever micro-batch it is in."""
    pairs = [Pair([3] * (1 + i % 5), [5] * (1 + i % 7), [6, 7, 8]) for i in range(12)]
    reference = torch.zeros(12, 2)
    reference[4, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"iteration 2, step \d, pairs.jsonl lines \[5\]: the loss is nan"):
        trained(tmp_path / "run", tiny_model(), pairs, reference, t=2, max_tokens=40)


def test_a_gradient_that_is_not_finite_names_all_pairs_of_its_step(tmp_path, monkeypatch):
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: clip(*args) * float("inf"))
    pairs = some_pairs(3)
    with pytest.raises(FloatingPointError, match=r"step 1, pairs.jsonl lines \[1, 2, 3\]: .*, its gradient inf"):
        trained(tmp_path / "run", tiny_model(), pairs, torch.zeros(3, 2))


def test_no_pass_has_more_tokens_than_are_allowed(tmp_path, monkeypatch):
    passes, real_pass = [], train.sequence_logprobs

    def watched(model, x, y):
        passes.append(len(x) * max(len(a) + len(b) for a, b in zip(x, y)))
        return real_pass(model, x, y)

    monkeypatch.setattr(train, "sequence_logprobs", watched)
    config, model = resolve(real("m", "d", tmp_path, max_tokens=64)), tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    train.train_step(model, optimizer, some_pairs(16), torch.zeros(16, 2), config, SERA)
    assert max(passes) <= 64 and len(passes) > 1


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing(tmp_path, monkeypatch, capsys):
    """The GPU is played by a model that holds 60 tokens at a time; the steps are those of one that holds any."""
    real_pass, pairs, steps, held = train.sequence_logprobs, some_pairs(16), {}, [0]

    def limited(model, x, y):
        held[0] += sum(map(len, [*x, *y]))
        if held[0] > 60:
            held[0] = 0
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real_pass(model, x, y)

    def backward(loss, *args, real=torch.Tensor.backward, **kwargs):
        held[0] = 0
        return real(loss, *args, **kwargs)

    for name in ("any", "sixty"):
        if name == "sixty":
            monkeypatch.setattr(train, "sequence_logprobs", limited)
            monkeypatch.setattr(torch.Tensor, "backward", backward)
        steps[name] = trained(tmp_path / name, tiny_model(), pairs, torch.zeros(16, 2), per_device_train_batch_size=8)
    said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert 1 <= len(said) <= 10 and said[-1].endswith(("with 64 tokens at a time", "with 32 tokens at a time"))
    for a, b in zip(steps["any"], steps["sixty"], strict=True):
        assert b.pop("phase") == a.pop("phase") and b == pytest.approx(a, rel=1e-4, abs=1e-5)
    monkeypatch.setattr(train, "sequence_logprobs", lambda model, x, y: limited(model, x * 99, y))
    with pytest.raises(torch.OutOfMemoryError):  # not for ever
        trained(tmp_path / "none", tiny_model(), pairs, torch.zeros(16, 2), per_device_train_batch_size=8)


def test_out_of_memory_after_a_backward_pass_starts_the_step_anew(tmp_path, monkeypatch):
    """What the first micro-batch has added to the gradients is not added twice."""
    real_pass, steps, failed = train.sequence_logprobs, [], []
    flags, pairs = resolve(real("m", "d", tmp_path, max_tokens=100)), some_pairs(8)
    for fails in (False, True):
        model = tiny_model()

        def limited(model, x, y, fails=fails):
            if fails and not failed and any(p.grad is not None for p in model.parameters()):
                failed.append(True)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real_pass(model, x, y)

        monkeypatch.setattr(train, "sequence_logprobs", limited)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        steps.append(train.train_step(model, optimizer, pairs, torch.zeros(8, 2), flags, SERA))
    assert steps[1].pop("losses") == pytest.approx(steps[0].pop("losses"), rel=1e-4)
    assert failed and steps[1] == pytest.approx(steps[0], rel=1e-4)


def test_out_of_memory_in_sampling_halves_the_batch(tmp_path, monkeypatch, capsys):
    """And one that does not fit by itself is not tried for ever."""
    flags = resolve(real("m", "d", tmp_path, max_new_tokens=4))
    real_sampling, tried, room = bootstrap.sample_responses, [], [9000]

    def limited(*args, max_tokens, **settings):
        tried.append(max_tokens)
        if max_tokens > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real_sampling(*args, max_tokens=max_tokens, **settings)

    def sample():
        held = Policies(tmp_path, flags)
        held.hold(0, tiny_model(), bpe_tokenizer())
        return held.draw(0, [[5, 6], [7]], 2, seed=0)

    monkeypatch.setattr(bootstrap, "sample_responses", limited)
    got = sample()
    assert tried == [32768, 16384, 8192] and [len(row) for row in got] == [2, 2]
    assert "again, with 8192 tokens at a time" in capsys.readouterr().out
    room[0] = 0
    with pytest.raises(torch.OutOfMemoryError):
        sample()


def test_out_of_memory_in_scoring_halves_the_batch_and_changes_nothing(tmp_path, monkeypatch, capsys):
    """The GPU is played by a model that holds 90 tokens, padding included; the log-probs are those of one that holds any."""
    flags, pairs, model, room = resolve(real("m", "d", tmp_path)), some_pairs(30), tiny_model().train(), [90]
    rows = Rows([pair.prompt for pair in pairs], [pair.chosen for pair in pairs], [*range(30)])
    held = Policies(tmp_path, flags)
    held.hold(0, model, bpe_tokenizer())
    want = held.score(0, rows)

    def limited(module, args, kwargs):
        if kwargs["input_ids"].numel() > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.register_forward_pre_hook(limited, with_kwargs=True)
    got = held.score(0, rows)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert got.shape == (30,) and model.training
    assert re.search(r"again, with (64|128) tokens at a time\n$", capsys.readouterr().out)
    room[0] = 0
    with pytest.raises(torch.OutOfMemoryError):  # not for ever
        held.score(0, rows)


def test_gradient_checkpointing_where_the_model_has_none(tmp_path):
    held, model = Policies(tmp_path, resolve(small(tmp_path, gradient_checkpointing=True))), tiny_model()
    model.supports_gradient_checkpointing = False
    with pytest.raises(InputError, match="^--gradient_checkpointing: LlamaForCausalLM does not support"):
        held.hold(0, model, bpe_tokenizer())


def test_what_a_model_or_a_tokenizer_raises_is_one_line(tmp_path):
    """In scoring and in sampling; a tokenizer's are in test_forms.py, those of the first check in test_models.py."""
    def fail(*_, **__):
        raise ZeroDivisionError("division\nby zero")

    held, model = Policies(tmp_path, resolve(real("m", "d", tmp_path))), tiny_model()
    held.hold(0, model, bpe_tokenizer())
    model.forward = fail
    with pytest.raises(InputError, match=r"^score 1 responses under policy 0: the model fails: division by zero$"):
        held.score(0, Rows([[5]], [[6, 7]], [0]))
    with pytest.raises(InputError, match=r"^sample from policy 0: the model fails: division by zero$"):
        held.draw(0, [[5]], 2, seed=0)


def test_a_mistake_in_ones_own_loss_is_not_said_to_be_the_model_s(world, tmp_path):
    """Someone who changes the code sees where it fails."""
    def pair_losses(*_):
        raise NameError("my_typo")

    with pytest.raises(NameError, match="my_typo"):
        main(small(tmp_path / "out"), replace(world, pair_losses=pair_losses))


def test_what_is_evaluated_are_the_answers_of_the_policy_itself():
    policies = SimpleNamespace(
        sample=lambda i, prompts, n, seed: [[([7 + i, 1], True)] for _ in prompts],
        log_prob=lambda i, rows: torch.tensor([float(10 * i + y[0]) for y in rows.responses]),
    )
    run = SimpleNamespace(
        policies=policies, held_out=SimpleNamespace(pairs=[]), prompts=[[5], [6]],
        write_answers=lambda t, answers: {"t": t, "answers": answers},
    )  # fmt: skip
    metrics = train.evaluate(2, run, resolve(Config(device="cpu")))
    assert metrics == {"kl": 20.0, "t": 2, "answers": [[9, 1], [9, 1]]}


# A run that is stopped, and goes on


REVIEWED = {"loss_type": "ipo", "learning_rate": 1e-3}


def test_a_killed_run_goes_on_to_the_same_end(world, tmp_path, monkeypatch):
    """Within iteration 2, where it goes on from a step's checkpoint."""
    undisturbed, out, log = tmp_path / "whole", tmp_path / "out", Run.log
    more = {"save_steps": 2, "iterations": 2, **REVIEWED}
    main(small(undisturbed, **more), world)

    def dies(run, line):
        if len(lines(out)) == 7:
            raise Killed
        return log(run, line)

    monkeypatch.setattr(Run, "log", dies)
    with pytest.raises(Killed):
        main(small(out, **more), world)
    assert torch.load(out / "state/checkpoint-2.pt", weights_only=True)["step"] == 2
    monkeypatch.setattr(Run, "log", log)
    with pytest.raises(InputError, match="begun with beta = 1.0, not 0.5"):
        main(replace(resumed(out), beta=0.5), world)
    main(resumed(out), world)
    assert_same_end(out, undisturbed)
    with pytest.raises(InputError, match="already holds a run that has ended"):
        main(resumed(out), world)


def test_killed_at_every_file_it_goes_on_to_the_same_end(stopped, tmp_path, monkeypatch):
    """Whatever a run writes is the last thing that a process does: not yet renamed; a folder also when it is."""
    out, real_writing, deaths = tmp_path / "out", folder.writing, Counter()
    flags = replace(stopped[0], output_dir=str(tmp_path / "whole"), iterations=3, per_device_train_batch_size=8)
    main(flags)

    @contextmanager
    def writing(path):
        with real_writing(path) as beside:
            yield beside
            deaths[path] += 1
            if deaths[path] == 1:
                raise Killed
        if deaths[path] == 2 and path.is_dir():
            raise Killed

    for module in (folder, policies):
        monkeypatch.setattr(module, "writing", writing)
    monkeypatch.setattr("sera_min.machinery.run.check_before_training", lambda *_, **__: None)  # it takes long, and was passed above
    while not (out / "policy").exists():
        again = replace(flags, output_dir=str(out))
        if (out / "config.json").exists():
            again = resumed(out)
        try:
            main(again)
        except Killed:
            assert len(deaths) < 60
    assert_same_end(out, tmp_path / "whole")
    assert min(deaths.values()) >= 2 and len(deaths) > 30


def test_killed_between_its_last_two_acts_it_has_ended(stopped, tmp_path):
    """Its policy has its place, and state/ is still there, or a part of it: a resume takes it away, and says so."""
    _, here = stopped
    out = tmp_path / "out"
    shutil.copytree(here / "whole", out)
    (out / "state/policy-1").mkdir(parents=True)
    with folder.locked(out), pytest.raises(InputError, match="another process is running in it"):  # it is not killed
        main(resumed(out))
    assert (out / "state").exists()
    with pytest.raises(InputError, match="a run that has ended; its policy is in"):
        main(resumed(out))
    assert not (out / "state").exists()
    assert_same_end(out, here / "whole")


def test_killed_before_it_has_begun_it_can_be_begun(model_dir, preferences, tmp_path, monkeypatch):
    """Where config.json, which says that there is a run to resume, is not written, or cannot be."""
    flags = real(model_dir, preferences, tmp_path / "run", iterations=1)
    for error in (Killed, OSError):
        with monkeypatch.context() as patch:
            def dies(*args, error=error):
                raise error

            patch.setattr(folder, "write", dies)
            with pytest.raises(error):
                main(flags)
    main(flags)
    assert (tmp_path / "run/policy").exists()


def test_a_resume_asks_for_the_same_data_and_flags_but_those_of_memory(model_dir, preferences, tmp_path, monkeypatch):
    """Both are in the folder: the user's file is not read again, and a flag that contradicts is refused."""
    out, flags = tmp_path / "out", real(model_dir, preferences, tmp_path / "whole", iterations=1)
    main(flags)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(replace(flags, output_dir=f"{out}/"))
    preferences.unlink()
    again = Config(resume_from_checkpoint=f"{out}/")
    for name, value in {"seed": 1, "dataset_name": "other.jsonl", "max_new_tokens": 7, "beta": 0.1, "keep": 0.5}.items():
        with pytest.raises(InputError, match=f"out was begun with {name} = .*, not {value!r}: --resume_from_checkpoint alone"):
            main(replace(again, **{name: value}))
    with pytest.raises(SystemExit, match="out was begun with iterations = 1, not 3"):  # given, though it is the default
        configuration.command_line(main, None, ["--resume_from_checkpoint", str(out), "--iterations", "3"])
    with pytest.raises(SystemExit, match="out was begun with iterations = 1, not 3"):  # whatever is given beside it
        configuration.command_line(main, None, ["--resume_from_checkpoint", str(out), "--iterations", "3", "--seed", "0"])
    with pytest.raises(InputError, match="--save_steps is 0: expected at least 1"):  # what may change is checked too
        main(replace(again, save_steps=0))
    begun = (out / "config.json").read_text()
    (out / "config.json").write_text(begun.replace('"device": "cpu"', '"device": "cuda:99"'))  # on another machine
    with pytest.raises(InputError, match="--device is 'cuda:99': expected one of cpu"):
        main(again)
    (out / "config.json").write_text(begun)
    main(replace(again, max_tokens=512, gradient_checkpointing=True, save_steps=1, beta=0.5))
    for name in ("iteration-1/pairs.jsonl", "iteration-0/answers.jsonl"):
        assert (out / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert (out / "policy").exists()


def test_a_resume_trains_on_what_the_run_read_whatever_the_template_writes_today(model_dir, preferences, tmp_path, monkeypatch, capsys):
    """As a template that writes the date does, after midnight."""
    model = shutil.copytree(model_dir, tmp_path / "model")
    template = "Today is {}. {% for m in messages %}{{ m.content }}{% endfor %}"

    def write_date(day):
        (model / "chat_template.jinja").write_text(template.replace("{}", day, 1))

    write_date("Monday")
    flags = real(model, preferences, tmp_path / "whole", iterations=1)
    main(flags)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(replace(flags, output_dir=str(tmp_path / "out")))
    write_date("Tuesday")
    main(resumed(tmp_path / "out"))
    assert "data: as read when the run began, 16 pairs to train on" in capsys.readouterr().out
    for name in ("iteration-1/pairs.jsonl", "iteration-1/answers.jsonl", "metrics.jsonl"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert "Today is Monday." in (tmp_path / "out/iteration-1/pairs.jsonl").read_text()


@pytest.mark.parametrize("name, content, message", [
    ("config.json", b'{"half', "config.json cannot be read: ."), ("config.json", b"3", "config.json cannot be read: ."),
    ("state/data.json", b'{"half', "data.json cannot be read: ."),
    ("state/logps-0-*.json", b"[1", r"logps-0-.*json cannot be read: ."),
    ("state/samples-1-*.jsonl", b'{"half', r"samples-1-.*jsonl cannot be read: ."),
    ("state/policy-1/model.safetensors", b"half", "policy-1: ."),
    ("state/checkpoint-2.pt", b"half", "checkpoint-2.pt cannot be read: ."),
], ids=str)  # fmt: skip
def test_what_a_resume_cannot_read_is_one_line(stopped, tmp_path, name, content, message):
    out = tmp_path / "out"
    again, files = copy_of(stopped, out), [*(tmp_path / "out").glob(name)]
    assert files
    for file in files:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        main(again)
    assert "\n" not in str(error.value)


class RunsCode:
    """Unpickled, it creates a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (self.file, "w")


def test_a_checkpoint_that_wants_to_run_code_is_refused(stopped, tmp_path):
    out = tmp_path / "out"
    again = copy_of(stopped, out)
    torch.save({"step": 2, "policy": RunsCode(str(tmp_path / "it-has-run"))}, out / "state/checkpoint-2.pt")
    with pytest.raises(InputError, match="checkpoint-2.pt cannot be read: ."):
        main(again)
    assert not (tmp_path / "it-has-run").exists()


@pytest.mark.parametrize("metrics", ["missing", "shorter", "half a line", "longer"])
def test_metrics_are_those_of_the_uninterrupted_run_whatever_was_left_of_them(stopped, tmp_path, metrics):
    out = tmp_path / "out"
    again, file = copy_of(stopped, out), out / "metrics.jsonl"
    text = file.read_text()
    left = {"shorter": "".join(text.splitlines(True)[:-3]), "half a line": text[:-40], "longer": text + '{"phase": "train", "ite'}
    if metrics == "missing":
        file.unlink()
    else:
        file.write_text(left[metrics])
    main(again)
    assert_same_end(out, stopped[1] / "whole")


def test_what_another_run_began_meanwhile_is_not_taken_over(stopped, tmp_path, monkeypatch):
    """While this one was reading its data, before it had the lock."""
    out, check = tmp_path / "out", Run.check_disk

    def slow(run):
        check(run)
        copy_of(stopped, out)
        before.update((path, path.stat().st_mtime_ns) for path in out.rglob("*"))

    before: dict = {}
    monkeypatch.setattr(Run, "check_disk", slow)
    with pytest.raises(InputError, match="already holds a run"):
        main(replace(stopped[0], output_dir=str(out)))
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_two_processes_do_not_run_in_one_folder(stopped, tmp_path, monkeypatch):
    """A second one is refused and has changed nothing; the lock is held until the end, and then free."""
    out = tmp_path / "out"
    again, step, steps = copy_of(stopped, out), train.train_step, []

    def files():
        return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in out.rglob("*")}

    before, refused = files(), f"^{out}: another process is running in it$"
    with folder.locked(out), pytest.raises(InputError, match=refused):
        main(again)
    assert files() == before

    def watched(*args):
        with pytest.raises(InputError, match=refused), folder.locked(out):
            pass
        steps.append(step(*args))
        return steps[-1]

    monkeypatch.setattr(train, "train_step", watched)
    main(again)
    assert steps
    assert_same_end(out, stopped[1] / "whole")
    with folder.locked(out):
        pass
    (tmp_path / "new").mkdir()
    with folder.locked(tmp_path / "new"), pytest.raises(InputError, match="another process is running in it"):
        main(replace(stopped[0], output_dir=str(tmp_path / "new")))  # nor do two begin at once
    assert not list((tmp_path / "new").iterdir())


def test_what_others_leave_in_the_folder_harms_nothing(stopped, tmp_path, monkeypatch):
    """A file as macOS leaves in every folder, and folders, in a run and in one that is resumed."""
    log = Run.log

    def leave(out):
        for place in (out, out / "state", *(out / "state").glob("policy-[0-9]*")):
            if place.is_dir():
                (place / ".DS_Store").write_bytes(b"\0Bud1")
                (place / "notes").mkdir(exist_ok=True)
                (place / "notes/a.txt").write_text("mine")
        (out / "state/policy-notes").mkdir(parents=True, exist_ok=True)

    def leaves(run, line):
        log(run, line)
        leave(run.out)

    out = tmp_path / "resumed"
    again = copy_of(stopped, out)
    leave(out)
    main(again)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.DS_Store").touch()
    monkeypatch.setattr(Run, "log", leaves)
    main(replace(stopped[0], output_dir=str(tmp_path / "run")))
    for end in (out, tmp_path / "run"):
        assert (end / ".DS_Store").exists() and (end / "notes/a.txt").read_text() == "mine" and not (end / "state").exists()
        for left in [*end.rglob(".DS_Store"), *end.rglob("notes/a.txt")]:  # in policy/ too, which was policy-2
            left.unlink()
        assert_same_end(end, stopped[1] / "whole")


@pytest.mark.parametrize("number, step", [(signal.SIGINT, 2), (signal.SIGTERM, 4)], ids=str)
def test_a_signal_ends_the_step_and_saves_it(stopped, tmp_path, monkeypatch, capsys, number, step):
    """In step 2 of iteration 2, and in its last: exit status 130, how to go on, and the end of a run left alone."""
    (flags, here), out, real_step, steps = stopped, tmp_path / "out", train.train_step, []

    def signalled(*args):
        steps.append(None)
        if len(steps) == 4 + step:
            os.kill(os.getpid(), number)
        return real_step(*args)

    monkeypatch.setattr(train, "train_step", signalled)
    with pytest.raises(SystemExit) as stop:
        command(replace(flags, output_dir=str(out), save_steps=500))
    assert stop.value.code == 130 and f"--resume_from_checkpoint {out}" in capsys.readouterr().err
    assert torch.load(out / "state/checkpoint-2.pt", weights_only=True)["step"] == step and lines(out)[-1]["step"] == step
    command(resumed(out))
    assert len(steps) == 4 + 4  # none was taken twice
    assert_same_end(out, here / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_signal_while_sampling_stops_at_once(stopped, tmp_path, monkeypatch, number):
    unhandled = []
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: unhandled.append(1))  # pytest would end
    monkeypatch.setattr(bootstrap, "sample_responses", lambda *_, **__: os.kill(os.getpid(), number))
    try:
        with pytest.raises(SystemExit) as stop:
            command(replace(stopped[0], output_dir=str(tmp_path / "out")))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 130 and not unhandled


def test_weights_that_are_nan_replace_no_checkpoint(stopped, tmp_path, monkeypatch):
    out, real_step, steps = tmp_path / "out", train.train_step, []

    def breaks(policy, *args):
        metrics = real_step(policy, *args)
        steps.append(1)
        if len(steps) == 2:
            next(policy.parameters()).data[0] = float("nan")
        return metrics

    monkeypatch.setattr(train, "train_step", breaks)
    with pytest.raises(FloatingPointError, match="iteration 1, step 2: its weights are not finite"):
        main(replace(stopped[0], output_dir=str(out)))
    assert torch.load(out / "state/checkpoint-1.pt", weights_only=True)["step"] == 1


def test_plain_training_draws_answers_alone(stopped, tmp_path, monkeypatch):
    asked, real_sample = [], Policies.sample

    def sample(policies, i, prompts, n, seed):
        asked.append(n)
        return real_sample(policies, i, prompts, n, seed)

    monkeypatch.setattr(Policies, "sample", sample)
    main(replace(stopped[0], output_dir=str(tmp_path / "out"), keep=1.0, bootstrap=0.0))
    assert set(asked) == {1} and not [*(tmp_path / "out").rglob("samples.jsonl")]


def test_what_is_printed_is_what_was_written(stopped, tmp_path, capsys):
    main(replace(stopped[0], output_dir=str(tmp_path / "out"), max_new_tokens=3))
    printed = capsys.readouterr().out
    assert "iteration 1 should begin at a loss of 0.6931: all margins are 0" in printed
    reasons = [line["finish_reason"] for line in read(tmp_path / "out/iteration-2/samples.jsonl")]
    assert 0 < reasons.count("length") < len(reasons)
    assert f"dropped: {reasons.count('length')} cut-off samples" in printed


def test_a_second_signal_stops_at_once(stopped, tmp_path, monkeypatch):
    def signalled(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it goes on")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train, "train_step", signalled)
    with pytest.raises(SystemExit) as stop:
        command(replace(stopped[0], output_dir=str(tmp_path / "out")))
    assert stop.value.code == 130 and not list((tmp_path / "out/state").glob("checkpoint*"))
    assert signal.getsignal(signal.SIGINT) == before


def test_a_disk_that_is_full(stopped, tmp_path, monkeypatch):
    """Too small from the start: nothing is written. Full on the way: what is saved is whole, and the run goes on."""
    flags, here = stopped
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**4))
        with pytest.raises(InputError, match=r"0.0 GB free, and checkpoints take"):
            main(replace(flags, output_dir=str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()
    full, save_policy = tmp_path / "full", PreTrainedModel.save_pretrained

    def full_of_policies(policy, path, **settings):
        save_policy(policy, path, **settings)
        if Path(path).name == ".policy-1":
            (path / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")

    def full_of_log_probs(file, *args, real=Path.write_text, **settings):
        if file.name.startswith(".logps-1-"):
            file.write_bytes(b"[1")
            raise OSError(28, "No space left on device")
        return real(file, *args, **settings)

    def full_of_checkpoints(state, path, real=torch.save):
        if state["step"] == 1:
            return real(state, path)
        path.write_bytes(b"PK half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: No space left on device\nand more")

    for again, where, name, fails, message, saved in [
        (replace(flags, output_dir=str(full)), torch, "save", full_of_checkpoints, "checkpoint-1.pt", -1),
        (replace(resumed(full), save_steps=500), PreTrainedModel, "save_pretrained", full_of_policies, "policy-1", -1),
        (resumed(full), Path, "write_text", full_of_log_probs, r"logps-1-\w+.json", 1),
    ]:
        message = f"{message} cannot be written: .*No space left on device"
        with monkeypatch.context() as patch, pytest.raises(OSError, match=message):
            patch.setattr(where, name, fails)
            main(again)
        assert newest(full) == saved
        assert not list((full / "state").glob(".*"))  # what is half written would keep the disk full
        if where is torch:  # the last checkpoint is complete
            assert torch.load(full / "state/checkpoint-1.pt", weights_only=True)["step"] == 1
    main(resumed(full))
    assert_same_end(full, here / "whole")


def test_a_loss_that_is_nan_stops_with_its_step_and_what_was_saved_stays(world, tmp_path, monkeypatch):
    out, calls = tmp_path / "run", iter(range(100))

    def losses(*args):
        losses, logps = train.pair_losses(*args)
        return losses * (float("nan") if next(calls) == 4 else 1), logps  # three steps an iteration, one micro-batch each

    every = r"lines \[\d+(, \d+){7}\]"
    with pytest.raises(FloatingPointError, match=rf"iteration 2, step 2, pairs.jsonl {every}: the loss is nan"):
        main(small(out), replace(world, pair_losses=losses))
    assert newest(out) == 1
    policy, _ = policies.load(out / "state/policy-1", "cpu")
    assert all(value.isfinite().all() for value in policy.parameters())


def test_weights_that_are_nan_after_the_last_step_are_not_saved(world, tmp_path, monkeypatch):
    """What only the next evaluation would show must not have replaced what was good."""
    out, step = tmp_path / "run", train.train_step

    def breaks(policy, *args):
        metrics = step(policy, *args)
        next(policy.parameters()).data[0] = float("nan")
        return metrics

    monkeypatch.setattr(train, "train_step", breaks)
    with pytest.raises(FloatingPointError, match="policy-1: its weights are not finite numbers"):
        main(small(out, per_device_train_batch_size=48), world)
    assert newest(out) == 0 and not list((out / "state").glob("checkpoint*"))


# Input that is wrong, and the command line


SHORT = ["--max_length", "99", "--max_prompt_length", "50"]
WRONG = [
    (["--loss_type", "foo"], "--loss_type is 'foo': expected one of dpo, ipo, slic, simpo"),
    (["--keep", "1.5"], "--keep is 1.5: expected between 0 and 1"),
    (["--bootstrap", "-0.1"], "--bootstrap is -0.1: expected between 0 and 1"),
    (["--ensemble_gamma", "nan"], "--ensemble_gamma is nan: expected between 0 and 1"),
    (["--keep", "0", "--bootstrap", "0"], "no pair would be left"),
    (["--iterations", "0"], "--iterations is 0: expected at least 1"),
    (["--model_name_or_path", "", "--dataset_name", "DATA"], "error: "),
    (["--output_dir", "HOLDS-POLICY"], "already holds a policy, of no run"),
    (["--model_name_or_path", "TRUNCATED", "--dataset_name", "DATA"], "TRUNCATED: "),
    (["--model_name_or_path", "MISMATCHED", "--dataset_name", "DATA"], "MISMATCHED: "),
    (["--model_name_or_path", "HEADLESS", "--dataset_name", "DATA"], "HEADLESS: its files lack lm_head.weight"),
    (["--beta", "many"], "invalid float value: 'many'"),
    (["--spelled_wrong", "1"], "unrecognized arguments: --spelled_wrong"),
    (["--loss_type", "ipo", "--label_smoothing", "0.1"], "--label_smoothing has no effect on ipo"),
    (["--dataset_name", "d.jsonl"], "--dataset_name has no effect in the playground: --model_name_or_path is missing"),
    (["--model_name_or_path", "MODEL"], "--model_name_or_path needs --dataset_name"),
    (["--max_length", "16"], "--max_length is not above --max_prompt_length"),
    (["--model_name_or_path", "MODEL", "--dataset_name", "DATA"], "is 1024: the model has 128 positions"),
    (["--eval_split", "dev"], "--eval_split is 'dev': expected one of test, validation"),
    (["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--label_noise", "0"], "--label_noise has no effect on data of your own"),
    (["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--eval_dataset_name", "ALIKE", *SHORT], "no pair is left to evaluate on"),
    (["--eval_fraction", "0.5"], "--eval_fraction has no effect in the playground"),
    (["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--eval_dataset_name", "DATA", "--eval_fraction", "0.5"], "--eval_fraction has no effect"),
    (["--dataset_train_split", "x"], "--dataset_train_split has no effect in the playground"),
    (["--samples_per_prompt", "1"], "--samples_per_prompt is 1: the best of them is paired with the worst"),
    (["--label_smoothing", "0.5"], "--label_smoothing is 0.5: expected from 0 to below 0.5"),
    (["--output_dir", "ENDED"], "already holds a run that has ended"),
    (["--token_floor", "0.1"], "unrecognized arguments: --token_floor 0.1"),
    (["--resume_from_checkpoint", "TAKEN", "--output_dir", "other"], "TAKEN was begun with output_dir"),
    (["--resume_from_checkpoint", "ENDED"], "ENDED already holds a run that has ended"),
    (["--temperature", "0"], "--temperature is 0.0: expected above 0"),
    (["--model_name_or_path", "MODEL", "--dataset_name", "gone.jsonl", *SHORT], "gone.jsonl: no such file"),
    (["--model_name_or_path", "no/such-model", "--dataset_name", "DATA"], "no/such-model: "),
    (["--model_name_or_path", "no-folder/", "--dataset_name", "DATA"], "no-folder/: no such folder"),
    (["--model_name_or_path", "MODEL", "--dataset_name", "no-folder/", *SHORT], "no-folder/: no such file"),
    (["--model_name_or_path", "MODEL", "--dataset_name", "no/such-data", *SHORT], "no/such-data, split 'train' cannot be read"),
    (["--model_name_or_path", "NO-EOS", "--dataset_name", "DATA"], "its tokenizer has no EOS token"),
    (["--model_name_or_path", "NARROW", "--dataset_name", "DATA"], "its tokenizer has 379 ids, the model embeds 300"),
    (["--model_name_or_path", "PICKLED", "--dataset_name", "DATA"], "PICKLED: "),
    (["--model_name_or_path", "REMOTE", "--dataset_name", "DATA", *SHORT], "REMOTE: "),
    (["--model_name_or_path", "HALF-REMOTE", "--dataset_name", "DATA", *SHORT], "HALF-REMOTE: "),
    (["--model_name_or_path", "MODEL", "--dataset_name", "ALIKE", *SHORT], "no pair is left to train on"),
    (["--model_name_or_path", "MODEL", "--dataset_name", "BAD", *SHORT], "row 1: 'rejected': missing or null"),
    (["--output_dir", "TAKEN"], "already holds a run"),
    (["--output_dir", "DATA.jsonl/out"], "--output_dir DATA.jsonl/out: cannot write to "),
    (["--resume_from_checkpoint", "nowhere"], "nowhere: no run has begun there"),
]


@pytest.fixture(scope="module")
def wrong_things(model_dir, tmp_path_factory):
    """A folder of everything that WRONG names, to be the working directory."""
    here = tmp_path_factory.mktemp("wrong")
    names = "MODEL NO-EOS NARROW PICKLED REMOTE HALF-REMOTE TRUNCATED MISMATCHED HEADLESS".split()
    for name, vocab in {**dict.fromkeys(names, 400), "NARROW": 300}.items():
        tokenizer = bpe_tokenizer()
        tokenizer.save_pretrained(here / name)
        tiny_model(vocab_size=vocab).save_pretrained(here / name)
    settings = here / "NO-EOS/tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token": None}))
    torch.save(load_file(here / "PICKLED/model.safetensors"), here / "PICKLED/pytorch_model.bin")
    (here / "PICKLED/model.safetensors").unlink()
    for name, kind in {"REMOTE": "strange", "HALF-REMOTE": "llama4_vision_model"}.items():  # known, but no language model
        remote = {"model_type": kind, "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
        (here / name / "config.json").write_text(json.dumps(remote))
        (here / name / "code.py").write_text("open('it-has-run', 'w')\nclass C: pass\nclass M: pass\n")
    weights = (here / "TRUNCATED/model.safetensors").read_bytes()
    (here / "TRUNCATED/model.safetensors").write_bytes(weights[: len(weights) // 2])
    settings = here / "MISMATCHED/config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "vocab_size": 500}))
    headless = {k: v for k, v in load_file(here / "HEADLESS/model.safetensors").items() if k != "lm_head.weight"}
    save_file(headless, here / "HEADLESS/model.safetensors", {"format": "pt"})
    (here / "HOLDS-POLICY/policy").mkdir(parents=True)
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for name, rows in {"DATA": [row], "ALIKE": [{**row, "rejected": "b"}], "BAD": [row, {"prompt": "a", "chosen": "b"}]}.items():
        (here / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("TAKEN", "ENDED"):
        (here / name).mkdir()
        (here / name / "config.json").write_text(json.dumps(asdict(resolve(Config()))))
    (here / "ENDED/policy").mkdir()
    return here


@pytest.mark.parametrize("flags, message", WRONG, ids=[" ".join(flags) for flags, _ in WRONG])
def test_bad_input_is_one_line_and_nothing_is_written(wrong_things, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(wrong_things)
    before = sorted(Path().rglob("*"))
    flags = [f + ".jsonl" if f in ("DATA", "ALIKE", "BAD") else f for f in flags]
    with pytest.raises(SystemExit) as stop:
        configuration.command_line(main, train.__doc__, flags)
    assert isinstance(stop.value.code, str) and stop.value.code.startswith("error: ") and message in stop.value.code
    assert "\n" not in stop.value.code and sorted(Path().rglob("*")) == before


def test_a_whole_number_is_a_share_too():
    """From Python, where nothing makes 0 a 0.0."""
    assert resolve(Config(model_name_or_path="m", dataset_name="d", eval_fraction=0, keep=1)).eval_fraction == 0
    with pytest.raises(InputError, match="--save_steps is 0: expected at least 1"):
        resolve(Config(save_steps=0))


def test_help_names_every_flag_and_the_five_that_matter_first(capsys):
    with pytest.raises(SystemExit) as stop:
        configuration.command_line(main, train.__doc__, ["--help"])
    shown = capsys.readouterr().out
    flags = re.findall(r"^  --(\w+)", shown, re.MULTILINE)
    assert stop.value.code == 0 and "arXiv:2410.09362" in shown and sorted(flags) == sorted(f.name for f in fields(Config))
    assert flags[:5] == ["keep", "bootstrap", "loss_type", "beta", "learning_rate"]
    places = [shown.index(f"\n{group}:\n") for group in configuration.GROUPS.values()]
    assert places == sorted(places)
    assert all(f.metadata["help"] for f in fields(Config)) and max(map(len, shown.splitlines())) <= 120


def test_a_file_that_grows_too_large_is_one_line(world, tmp_path):
    """The kernel refuses, not a mock: what may be written ends at 100 kB, half a policy."""
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            command(small(out, iterations=1), world)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.match(r"error: .*state/policy-0 cannot be written: .*File too large", stop.value.code)
    assert "\n" not in stop.value.code and newest(out) == -1
    command(resumed(out), world)
    assert (out / "policy/model.safetensors").exists()


def test_every_field_is_read():
    source = "".join(path.read_text() for path in [ROOT / "train.py", *(ROOT / "sera_min").rglob("*.py")])
    for f in fields(Config):
        assert re.search(rf"\b(config|c|flags)\.{f.name}\b", source), f"nothing reads {f.name}"


def test_a_share_that_is_less_than_one_pair_is_told(world, tmp_path, capsys):
    main(small(tmp_path / "out", max_train_pairs=1, iterations=2), world)
    assert "--bootstrap is 0.3: of 1 pairs that is less than one, so none" in capsys.readouterr().out


ALONE = {
    "logprobs": "m.implicit_reward(torch.ones(2), torch.zeros(2)).sum() == 2 and m.token_batches([1], 1) == [[0]]",
    "losses": "m.dpo_loss(torch.zeros(1)).item() > 0.69",
    "select": "m.select_top(m.ensemble_margin(torch.tensor([1., 2.])), 1).item() == 1",
    "lora": "m.LoRA(torch.nn.Linear(3, 2), 1, 1.0, torch.Generator()).B.shape == (2, 1)",
    "bootstrap": "m.best_worst_pairs([0, 0], [[1], [2]], torch.tensor([0., 1.]))[0].tolist() == [1]",
}


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """A Python of its own, which takes seconds to import torch: the concept files alone, and then train.py as a command."""
    here = tmp_path_factory.mktemp("process")
    code = "import gc, runpy, sys\ngc.disable()\nimport torch\n"  # imports are faster without a search for garbage
    for name, use in ALONE.items():
        (here / f"their_{name}").mkdir()
        shutil.copy(ROOT / f"sera_min/{name}.py", here / f"their_{name}")
        code += f"import their_{name}.{name} as m\nassert {use}\n"
    code += "assert not {'sera_min', 'transformers', 'datasets'} & sys.modules.keys()\nprint('alone')\n"
    code += f"sys.path[0], sys.argv = {str(ROOT)!r}, ['train.py', '--keep', '7']\n"  # as `python train.py` has them
    code += f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\nprint('it went on')\n"
    return subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True)


def test_a_concept_file_works_alone(process):
    """Each in a folder of its own."""
    assert process.stdout.startswith("alone\n"), process.stderr


def test_as_a_command(process):
    """Exit status 1 and one line on stderr."""
    said = process.returncode, process.stdout, process.stderr
    assert said == (1, "alone\n", "error: --keep is 7.0: expected between 0 and 1\n")


def test_every_test_that_the_docs_promise_is_there():
    promised = {*re.findall(r"`(test_\w+)`", (ROOT / "docs/running.md").read_text())}
    defined = {name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}
    assert len(promised) > 20 and promised <= defined, sorted(promised - defined)


# What the terminal, the shell and the starter of a run do to it


SHOWN = {"cp1252": "?_?, K?, ½, –, ??", "gbk": "π_θ, K?, ?, –, 日本", "ascii": "?_?, K?, ?, ?, ??"}


@pytest.mark.parametrize("encoding", SHOWN)
def test_a_terminal_that_has_no_such_letter_does_not_end_a_run(encoding, monkeypatch, tmp_path):
    """In --help, on the command line, and where a run is begun from Python."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
    with pytest.raises(SystemExit) as end:
        configuration.command_line(main, train.__doc__, ["--help"])
    assert end.value.code == 0
    configuration.command_line(lambda flags: print("π_θ, K̃, ½, –, 日本"), None, [])
    sys.stdout.flush()
    assert shown.getvalue().decode(encoding).splitlines()[-1] == SHOWN[encoding]
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(InputError, match="already holds a run"):
        (tmp_path / "config.json").write_text("{}")
        main(small(tmp_path))
    print("π_θ")


def test_a_signal_that_the_starter_ignores_stays_ignored():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, signal.SIG_IGN)
    try:
        configuration.command_line(lambda flags: os.kill(os.getpid(), signal.SIGTERM), None, [])
        with folder.signals_noted() as noted:
            os.kill(os.getpid(), signal.SIGINT)
        assert not noted and signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_run_is_resumed_from_any_folder(stopped, tmp_path, monkeypatch):
    """The model is named from the folder that the run was begun in: another one has another model of that name."""
    flags, here = stopped
    monkeypatch.chdir(here)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", interrupted_in(3))
        with pytest.raises(KeyboardInterrupt):
            main(replace(flags, model_name_or_path="model", output_dir=str(tmp_path / "out")))
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"was begun with model_name_or_path = '.*stopped.*/model', not '.*/model'"):
        main(replace(resumed("out"), model_name_or_path="model"))
    monkeypatch.chdir(here)
    main(replace(resumed(tmp_path / "out"), model_name_or_path="model"))  # the same
    assert_same_end(tmp_path / "out", here / "whole")


def test_a_tilde_is_the_home(tmp_path, monkeypatch):
    """Which a shell leaves as it is in --output_dir=~/run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = Config(model_name_or_path="~/m", dataset_name="~/d.json", eval_dataset_name="some/data", output_dir="~/run", device="cpu")
    config = resolve(flags)
    assert (config.model_name_or_path, config.dataset_name) == (f"{tmp_path}/m", f"{tmp_path}/d.json")
    assert config.eval_dataset_name == "some/data" and config.output_dir == f"{tmp_path}/run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(configuration.config_json(config, "SeRA"))
    assert configuration.resumed(Config(resume_from_checkpoint="~/run"), "SeRA") == config


def test_log_probs_that_are_no_numbers_name_their_row(tmp_path):
    held, model = Policies(tmp_path, resolve(real("m", "d", tmp_path))), tiny_model()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    held.hold(0, model, bpe_tokenizer())
    with pytest.raises(FloatingPointError, match="log π.* of response 0 is nan"):
        held.score(0, Rows([[5]], [[6, 1]], [0]))


def test_lora_begins_with_other_matrices_under_another_seed(stopped, tmp_path):
    first = []
    for seed in (0, 1):
        config = resolve(replace(stopped[0], use_peft=True, learning_rate=1e-3, seed=seed))
        policy = LoRAPolicies(tmp_path / str(seed), config).get(0)
        first.append(next(iter(lora_state(policy).values())))
    assert not torch.equal(*first)


def test_a_key_is_that_of_one_list_of_rows():
    assert policies.key_of([1, 2], [3]) != policies.key_of([1], [2, 3])


def test_a_prompt_without_the_bos_that_trl_puts_before_it_has_its_ids_in_the_line():
    run = Run.__new__(Run)
    run.tokenizer, run.offline_rows = bpe_tokenizer(CHATML, adds_bos=True), [0]

    def ids(text):
        return run.tokenizer(text, add_special_tokens=False).input_ids

    pair = Pair(ids("<|im_start|>user\nfox<|im_end|>\n"), ids("yes<|im_end|>"), ids("no<|im_end|>"))
    [line] = run.pair_lines(training_set_of([pair], torch.zeros(1, 2)))
    assert line["token_ids"] == pair._asdict()


def test_a_pair_that_trl_would_read_to_other_ids_has_them_in_its_line(tmp_path):
    """A sample is seldom spelled as the tokenizer spells its text, and its bytes need not be characters."""
    run = a_run(tmp_path / "run", small(tmp_path / "run"), 0, tiny_model())
    tokenizer, rng = run.policies.tokenizer, random.Random(0)
    samples = [[rng.randrange(3, len(tokenizer)) for _ in range(9)] + [1] for _ in range(20)]
    texts = [[*tokenizer(text, add_special_tokens=False).input_ids, 1] for text in (" the fox", " is lovely")]
    pairs = [Pair(tokenizer("Tell me:").input_ids, w, l) for w, l in [*zip(samples[::2], samples[1::2]), texts]]
    run.tokenizer, run.offline_rows = run.policies.tokenizer, list(range(len(pairs)))
    marked = 0
    for pair, line in zip(pairs, run.pair_lines(training_set_of(pairs, torch.zeros(len(pairs), 2)))):
        read = [[*tokenizer(line["prompt"] + line[name]).input_ids[len(pair.prompt) :], 1] for name in ("chosen", "rejected")]
        assert line.get("token_ids", pair._asdict()) == pair._asdict() and ("token_ids" in line) == (read != list(pair[1:]))
        marked += "token_ids" in line
    assert 5 < marked <= 10 and "token_ids" not in line
