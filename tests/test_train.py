"""The loop's contract: files, metrics, resuming, and the ways a run is refused or stopped."""

import copy
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import bpe_tokenizer, tiny_model
from datasets import load_dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from sera_min import bootstrap, playground, run
from sera_min.data import InputError
from sera_min.logprobs import sequence_logprobs
from sera_min.losses import LOSSES
from train import Config, main

ROOT = Path(__file__).parent.parent
STEP_KEYS = {
    "phase", "iteration", "step", "loss", "learning_rate", "grad_norm", "rewards/chosen", "rewards/rejected",
    "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
}  # fmt: skip
GOLD = {"gold/reward", "gold/win_rate", "gold/length", "gold/broken", "select/precision", "bootstrap/precision", "data/label_accuracy"}


@pytest.fixture(scope="session")
def sft():
    return playground.make_sft_policy(0, "cpu", steps=60)


@pytest.fixture
def world(sft, monkeypatch):
    """The playground with an SFT policy of a few seconds, and fewer questions."""
    monkeypatch.setattr(playground, "make_sft_policy", lambda seed, device: (copy.deepcopy(sft[0]), sft[1]))
    every = playground.prompts
    monkeypatch.setattr(playground, "prompts", lambda part: every(part)[:40])


def small(out, **changed):
    return Config(**{"output_dir": str(out), "max_train_pairs": 48, "per_device_train_batch_size": 16, "device": "cpu", **changed})


@pytest.fixture
def preferences(tmp_path):
    file = tmp_path / "d.jsonl"
    rows = [{"instruction": f"Say {i}", "chosen": f"The fox is {i}" * (1 + i % 3), "rejected": f"{i} no"} for i in range(20)]
    file.write_text("\n".join(map(json.dumps, [*rows, {**rows[0], "rejected": rows[0]["chosen"]}])))
    return file


def real(model_dir, file, out, **changed):
    return Config(**{
        "model_name_or_path": str(model_dir), "dataset_name": str(file), "output_dir": str(out), "max_length": 60,
        "max_prompt_length": 40, "eval_fraction": 0.2, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "beta": 0.5,
        "device": "cpu", **changed,
    })  # fmt: skip


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def lines(out):
    return read(out / "metrics.jsonl")


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_contract_in_the_playground(world, tmp_path, loss_type):
    out = tmp_path / "run"
    final = main(small(out, loss_type=loss_type, learning_rate=1e-3))
    metrics = lines(out)
    assert metrics[-1] == final and final["phase"] == "final" and GOLD <= final.keys()
    steps = [m for m in metrics if m["phase"] == "train"]
    assert all(m.keys() == STEP_KEYS for m in steps) and [m["iteration"] for m in steps] == [1] * 3 + [2] * 3 + [3] * 3
    if loss_type == "dpo":
        assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5) and abs(steps[0]["rewards/margins"]) < 1e-4
    assert [m["iteration"] for m in metrics if m["phase"] == "eval"] == [0, 1, 2]
    for t, sources in [(1, {"offline"}), (2, {"offline", "bootstrap"}), (3, {"offline", "bootstrap"})]:
        pairs = load_dataset("json", data_files=str(out / f"iteration-{t}/pairs.jsonl"), split="train", cache_dir=tmp_path / "c")
        assert pairs.column_names == ["prompt", "chosen", "rejected", "margin", "source"] and {*pairs["source"]} == sources
        for source in sources - {"offline"} if t > 1 else []:
            margins = [row["margin"] for row in pairs if row["source"] == source]
            assert margins == sorted(margins, reverse=True) and min(margins) > 0
    assert pairs["source"].count("offline") == 34 and pairs["source"].count("bootstrap") == 14
    samples = [json.loads(line) for line in (out / "iteration-2/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 48 * 4 and samples[0].keys() == {"prompt", "response", "finish_reason", "usable", "reward"}
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(out / "policy"), AutoTokenizer.from_pretrained(out / "policy")
    assert policy.dtype == torch.float32 and tokenizer.eos_token == "<eos>"
    assert json.loads((out / "config.json").read_text())["beta"] == playground.BETA[loss_type]
    assert "| iteration |" in (out / "report.md").read_text()
    assert {p.name for p in out.iterdir()} == {
        "config.json", "metrics.jsonl", "policy", "report.md", "tensorboard", "curves.png", "margins.png",
        *(f"iteration-{t}" for t in (1, 2, 3)),
    }  # fmt: skip


def test_selection_keeps_the_largest_margins_of_the_previous_policies(world, tmp_path, monkeypatch):
    """The margins in pairs.jsonl are (1−γ) m_{t−1} + γ m_{t−2}, by an independent pass over the saved policies."""
    out, saved = tmp_path / "run", tmp_path / "saved"
    keep = run.save_checkpoint

    def also(out, t, policy, *rest, **more):
        policy.save_pretrained(saved / str(t))
        keep(out, t, policy, *rest, **more)

    monkeypatch.setattr(run, "save_checkpoint", also)
    main(small(out, ensemble_gamma=0.25, learning_rate=1e-3))
    policies = [AutoModelForCausalLM.from_pretrained(saved / str(t)).eval() for t in (0, 1, 2)]
    tokenizer = playground.make_tokenizer()

    def reward(policy, x, y):
        x, y = tokenizer(x).input_ids, [*tokenizer(y).input_ids, tokenizer.eos_token_id]
        ids = torch.tensor([x + y])
        with torch.no_grad():
            both = [p(ids).logits[0, len(x) - 1 : -1].double().log_softmax(-1).gather(1, torch.tensor(y)[:, None]).sum()
                    for p in (policy, policies[0])]  # fmt: skip
        return (both[0] - both[1]).item()

    def margin(row, t):
        return reward(policies[t], row["prompt"], row["chosen"]) - reward(policies[t], row["prompt"], row["rejected"])

    first, third = ([json.loads(line) for line in (out / f"iteration-{t}/pairs.jsonl").read_text().splitlines()] for t in (1, 3))
    for row in third[::7]:
        assert row["margin"] == pytest.approx(0.75 * margin(row, 2) + 0.25 * margin(row, 1), abs=1e-4)
    want = sorted((0.75 * margin(row, 2) + 0.25 * margin(row, 1) for row in first), reverse=True)[:34]
    assert [row["margin"] for row in third if row["source"] == "offline"] == pytest.approx(want, abs=1e-4)


def test_dpo_alone_and_the_random_control(world, tmp_path):
    final = main(small(tmp_path / "dpo", keep=1.0, bootstrap=0.0, iterations=2))
    assert final["bootstrap/precision"] is None and final["select/precision"] == final["data/label_accuracy"]
    texts = {}
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        main(small(tmp_path / name, select="random", seed=seed, iterations=2, bootstrap=0.0))
        texts[name] = (tmp_path / name / "iteration-2/pairs.jsonl").read_text()
    assert texts["a"] == texts["b"] != texts["c"]
    margins = [json.loads(line)["margin"] for line in texts["a"].splitlines()]
    assert len(margins) == 34 and margins != sorted(margins, reverse=True)


def test_a_model_and_data_of_one_s_own(model_dir, preferences, tmp_path, capsys):
    out = tmp_path / "run"
    final = main(real(model_dir, preferences, out))
    assert "21 read, 20 kept" in (printed := capsys.readouterr().out) and "1 dropped: chosen equals rejected" in printed
    assert final["eval_rewards/accuracies"] > 0.5 and not any(key.startswith("gold") for key in final)
    assert lines(out)[0] == {"phase": "eval", "iteration": 0, "eval_loss": pytest.approx(0.693147, abs=1e-4),
                             "eval_rewards/accuracies": 0.5, "eval_rewards/margins": 0.0}  # fmt: skip
    assert (out / "policy/model.safetensors").exists() and "now: " in (out / "report.md").read_text()


def test_an_iteration_takes_the_steps_asked_for(world, tmp_path, monkeypatch):
    """7 where a pass over 48 pairs has 3, or over 24 has 2; no pair a third time before every pair came twice."""
    seen, step = [], train.train_step

    def watched(policy, optimizer, pairs, *rest):
        seen.append([str(pair) for pair in pairs])
        return step(policy, optimizer, pairs, *rest)

    monkeypatch.setattr(train, "train_step", watched)
    main(small(tmp_path / "a", steps_per_iteration=7, iterations=2, keep=0.5, bootstrap=0.0))
    for part, n in ((seen[:7], 48), (seen[7:], 24)):
        counts = Counter(pair for batch in part for pair in batch)
        assert len(counts) == n and max(counts.values()) - min(counts.values()) <= 1
    steps = [line for line in lines(tmp_path / "a") if line["phase"] == "train"]
    assert [line["iteration"] for line in steps] == [1] * 7 + [2] * 7
    with pytest.raises(InputError, match="steps_per_iteration is 0"):
        main(small(tmp_path / "b", steps_per_iteration=0))


def test_no_sample_below_the_floor_is_paired(world, tmp_path, capsys):
    """By an independent pass: every token of an own pair is as likely under the reference as the quantile asks."""
    out = tmp_path / "run"
    main(small(out, token_floor=0.25, iterations=2, learning_rate=1e-3))
    below = int(re.search("([1-9][0-9]*) samples below --token_floor", capsys.readouterr().out)[1])
    policy, tokenizer = playground.make_sft_policy(0, "cpu")

    def least(x, y):
        x, y = tokenizer(x).input_ids, [*tokenizer(y).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logps = policy(torch.tensor([x + y])).logits[0, len(x) - 1 : -1].double().log_softmax(-1)
        return logps.gather(1, torch.tensor(y)[:, None]).min().item()

    of = {source: [least(row["prompt"], row[y]) for t in (1, 2) for row in read(out / f"iteration-{t}/pairs.jsonl")
                   if row["source"] == source and (t == 1 or source == "bootstrap") for y in ("chosen", "rejected")]
          for source in ("offline", "bootstrap")}  # fmt: skip
    floor = sorted(of["offline"])[len(of["offline"]) // 4]
    assert len(of["offline"]) == 96 and of["bootstrap"] and min(of["bootstrap"]) >= floor - 1e-4
    samples = read(out / "iteration-2/samples.jsonl")
    barred = [row for row in samples if row["finish_reason"] == "stop" and not row["usable"]]
    assert len(barred) == below and all(least(row["prompt"], row["response"]) < floor + 1e-4 for row in barred)
    assert not any(row["usable"] for row in samples if row["finish_reason"] == "length")


def test_length_free_margins_are_not_explained_by_length(world, tmp_path):
    out = tmp_path / "run"
    main(small(out, length_free=True, keep=1.0, iterations=2, learning_rate=1e-3))
    rows = [row for row in read(out / "iteration-2/pairs.jsonl") if row["source"] == "offline"]
    longer = torch.tensor([float(len(r["chosen"].split()) - len(r["rejected"].split())) for r in rows])
    margins = torch.tensor([r["margin"] for r in rows])
    assert len(rows) == 48 and (longer * margins).sum().abs() < 1e-2 * longer.norm() * margins.norm()
    # The samples' rewards too, within a prompt, and they are what ranks: a pair's margin is their difference.
    samples = [row for row in read(out / "iteration-2/samples.jsonl") if row["finish_reason"] == "stop"]
    by_prompt = {}
    for i, row in enumerate(read(out / "iteration-2/samples.jsonl")):
        if row["finish_reason"] == "stop":
            by_prompt.setdefault(i // 4, []).append([row["reward"], float(len(row["response"].split()))])
    apart = torch.cat([torch.tensor(some) - torch.tensor(some).mean(0) for some in by_prompt.values()])  # (W, 2)
    assert (apart[:, 0] * apart[:, 1]).sum().abs() < 1e-2 * apart[:, 0].norm() * apart[:, 1].norm()
    known = {(row["prompt"], row["response"]): row["reward"] for row in samples}
    own = [row for row in read(out / "iteration-2/pairs.jsonl") if row["source"] == "bootstrap"]
    assert own and all(row["margin"] == pytest.approx(
        known[row["prompt"], row["chosen"]] - known[row["prompt"], row["rejected"]], abs=1e-4) for row in own)  # fmt: skip


def test_evaluation_data_of_one_s_own(model_dir, preferences, tmp_path, capsys):
    """What is evaluated on is never trained on; the part of it that D holds too is dropped and counted."""
    rows, file = read(preferences), tmp_path / "held.json"
    file.write_text(json.dumps([*rows[:3], {"instruction": "New?", "chosen": "yes", "rejected": "no"}]))
    out = tmp_path / "run"
    final = main(real(model_dir, preferences, out, eval_dataset_name=str(file), eval_fraction=Config.eval_fraction))
    printed = capsys.readouterr().out
    assert "21 read, 17 kept" in printed and "3 dropped: the prompt is in the evaluation data" in printed
    assert "evaluation data: 4 read, 4 kept" in printed
    trained = {row["prompt"] for row in read(out / "iteration-1/pairs.jsonl")}
    assert len(trained) == 17 and not any("Say 0" in x or "Say 2\n" in x for x in trained)
    assert {"eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"} <= final.keys()


def test_a_split_of_the_same_data_set_to_evaluate_on(model_dir, preferences, tmp_path, capsys):
    rows, folder = read(preferences), tmp_path / "set"
    folder.mkdir()
    for split, some in {"train": rows[:12], "test": rows[12:20]}.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, some)))
    main(real(model_dir, folder, tmp_path / "run", iterations=1, eval_split="test", eval_fraction=Config.eval_fraction))
    printed = capsys.readouterr().out
    assert "data: 12 read, 12 kept" in printed and "evaluation data: 8 read, 8 kept" in printed


def test_answers_for_an_outside_judge(model_dir, preferences, tmp_path):
    """In each row the question that the model was asked, whole."""
    file, out = tmp_path / "ask.json", tmp_path / "run"
    asked = [{"instruction": "Say 3", "dataset": "x"}, {"instruction": "What is", "input": "2 + 2?"}, {"prompt": "Say"},
             {"prompt": [{"role": "system", "content": "Be"}, {"role": "user", "content": "kind"}]}]  # fmt: skip
    file.write_text(json.dumps(asked))
    main(real(model_dir, preferences, out, iterations=1, prompt_file=str(file)))
    answers = json.loads((out / "samples.json").read_text())
    assert [row["instruction"] for row in answers] == ["Say 3", "What is\n\n2 + 2?", "Say", "Be\n\nkind"]
    assert all(row.keys() == {"instruction", "output", "generator"} and row["generator"] == str(out) for row in answers)


def test_tensorboard_shows_the_metrics_and_is_not_needed(model_dir, preferences, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "with"
    main(real(model_dir, preferences, out, iterations=2))
    for t in (1, 2):
        events = EventAccumulator(str(out / f"tensorboard/iteration-{t}")).Reload()
        want = [line["loss"] for line in lines(out) if line["phase"] == "train" and line["iteration"] == t]
        assert [event.value for event in events.Scalars("loss")] == pytest.approx(want, rel=1e-5)
    events = EventAccumulator(str(out / "tensorboard/evaluation")).Reload().Scalars("eval_rewards/margins")
    assert [event.step for event in events] == [0, 1, 2]
    assert "![margins.png](margins.png)" in (out / "report.md").read_text()

    out = tmp_path / "without"
    for name in ("torch.utils.tensorboard", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    main(real(model_dir, preferences, out, iterations=2))
    assert not {"tensorboard", "curves.png", "margins.png"} & {path.name for path in out.iterdir()}
    assert lines(out) == lines(tmp_path / "with")


def test_micro_batches_and_checkpointing_change_nothing(model_dir, preferences, tmp_path):
    """Lengths 1 to 3 apart, a last partial batch: the mean is over the step's pairs however they are split."""
    ends = []
    for name, changed in {"whole": {}, "split": {"max_tokens": 64}, "checkpointed": {"gradient_checkpointing": True}}.items():
        main(real(model_dir, preferences, tmp_path / name, iterations=1, learning_rate=1e-4, per_device_train_batch_size=6, **changed))
        ends.append(([m["loss"] for m in lines(tmp_path / name) if m["phase"] == "train"],
                     load_file(tmp_path / name / "policy/model.safetensors")))  # fmt: skip
    for losses, weights in ends[1:]:
        assert losses == pytest.approx(ends[0][0], abs=1e-5) and len(losses) == 3
        for key, value in weights.items():
            torch.testing.assert_close(value, ends[0][1][key], rtol=0, atol=2e-5)


def test_fifty_steps_are_the_naive_trainer_s(tmp_path):
    """Every trick on and off: against a padding mask, (B, T, V) logits, one batch in the order of the pairs."""
    rng = random.Random(0)
    pairs = [tuple([rng.randrange(3, 61) for _ in range(rng.randint(1, 30))] for _ in "xwl") for _ in range(24)]
    config = train.resolve(real("m", "d", tmp_path, max_tokens=128))  # several micro-batches, and passes in each

    def naive(model, x, y):
        rows = [a + b for a, b in zip(x, y)]
        ids = torch.tensor([row + [0] * (60 - len(row)) for row in rows])
        column, ends = torch.arange(60), torch.tensor([[len(row)] for row in rows])
        logps = model(input_ids=ids, attention_mask=(column < ends).long()).logits[:, :-1].log_softmax(-1)
        logps = logps.gather(2, ids[:, 1:, None])[:, :, 0]
        mask = (column >= torch.tensor([[len(a)] for a in x])) & (column < ends)
        return logps.masked_fill(~mask[:, 1:], 0).sum(1)

    ours, theirs = tiny_model(), tiny_model()
    reference = train.pair_logps(ours, pairs, config, None)
    ours.train(), theirs.train()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.0) for m in (ours, theirs)]
    losses = []
    for step in range(50):
        batch = [(8 * step + i) % 24 for i in range(8)]
        x, w, l = zip(*(pairs[i] for i in batch))
        got = train.train_step(ours, optimizers[0], [pairs[i] for i in batch], reference[batch], config)
        r = naive(theirs, x + x, w + l).view(2, -1).T - reference[batch]
        loss = -torch.nn.functional.logsigmoid(config.beta * (r[:, 0] - r[:, 1])).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizers[1].step(), optimizers[1].zero_grad()
        assert got["loss"] == pytest.approx(loss.item(), abs=1e-4) and got["grad_norm"] == pytest.approx(norm.item(), rel=1e-2)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(0.6931, abs=1e-4) and max(losses[-3:]) < 0.5


def test_one_pair_is_overfitted(tmp_path):
    model, pairs = tiny_model(), [([3, 4], [5, 6, 1], [7, 8, 1])]
    reference = torch.stack([sequence_logprobs(model, [x, x], ys)[0].detach() for x, *ys in pairs])
    config = train.resolve(real("m", "d", tmp_path, epochs_per_iteration=40, learning_rate=1e-2))
    seen = []
    resume = {"optimizer": None, "step": None}
    train.train_on(model, pairs, reference, 1, resume, config, lambda **line: seen.append(line), None)
    assert seen[0]["loss"] == pytest.approx(0.6931, abs=1e-3) and seen[-1]["loss"] < 0.01 and seen[-1]["rewards/margins"] > 4


class Killed(BaseException):
    pass


REVIEWED = {"loss_type": "ipo", "token_floor": 0.05, "length_free": True, "learning_rate": 1e-3}


@pytest.mark.parametrize("moment, more", [(0, {}), (8, {}), (11, REVIEWED)])  # the line of metrics.jsonl at which it dies
def test_a_killed_run_goes_on_to_the_same_end(world, tmp_path, monkeypatch, moment, more):
    """At its first line, after iteration 2, and within iteration 3, where it goes on from a step's checkpoint."""
    whole, out, log = tmp_path / "whole", tmp_path / "out", run.log
    more = {"save_steps": 2, **more}
    main(small(whole, **more))

    def dies(*args, **metrics):
        if moment == len(lines(out) if (out / "metrics.jsonl").exists() else []):
            raise Killed
        return log(*args, **metrics)

    monkeypatch.setattr(run, "log", dies)
    with pytest.raises(Killed):
        main(small(out, **more))
    assert moment < 11 or run.latest_checkpoint(out)[1]["step"] == 2
    monkeypatch.setattr(run, "log", log)
    with pytest.raises(InputError, match="begun with beta = 1.0, not 0.5"):
        main(small(out, **more, resume_from_checkpoint=str(out), beta=0.5))
    main(small(out, **more, resume_from_checkpoint=str(out)))
    assert (out / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert (out / "policy/model.safetensors").read_bytes() == (whole / "policy/model.safetensors").read_bytes()
    assert (out / "iteration-3/pairs.jsonl").read_text() == (whole / "iteration-3/pairs.jsonl").read_text()
    with pytest.raises(InputError, match="this run has ended"):
        main(small(out, **more, resume_from_checkpoint=str(out)))


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_resume_asks_for_the_same_data_and_flags_but_those_of_memory(model_dir, preferences, tmp_path, monkeypatch):
    out, rows, asked = tmp_path / "out", preferences.read_text(), tmp_path / "ask.json"
    asked.write_text('[{"instruction": "Say 3"}]')
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_on", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(real(model_dir, preferences, f"{out}/", prompt_file=str(asked)))
    again = {"resume_from_checkpoint": f"{out}/", "prompt_file": str(asked)}
    preferences.write_text(rows.replace("The fox is 7", "The fox is 8"))
    with pytest.raises(InputError, match="out was begun with other data: .* CRC"):
        main(real(model_dir, preferences, out, **again))
    preferences.write_text(rows)
    asked.write_text('[{"instruction": "Say 4"}]')
    with pytest.raises(InputError, match="out was begun with other data: .* CRC"):
        main(real(model_dir, preferences, out, **again))
    asked.write_text('[{"instruction": "Say 3"}]')
    with pytest.raises(InputError, match="out was begun with seed = 0, not 1"):
        main(real(model_dir, preferences, out, seed=1, **again))
    main(real(model_dir, preferences, f"{out}/", max_tokens=512, gradient_checkpointing=True, save_steps=1, **again))
    assert (out / "policy").exists()


@pytest.mark.parametrize("name, content", [("config.json", b'{"half'), ("config.json", b"3"), ("state/000-pairs.pt", b"PK"),
                                           ("state/000-done/state.pt", pickle.dumps(Path("a pickle")))])  # fmt: skip
def test_what_a_resume_cannot_read_is_one_line(model_dir, preferences, tmp_path, monkeypatch, name, content):
    """Broken, or a pickle that wants to run code."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(*((run, "save_checkpoint") if name.endswith("pairs.pt") else (train, "train_on")), interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(real(model_dir, preferences, out, max_train_pairs=8))
    (out / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} cannot be read: .") as error:
        main(real(model_dir, preferences, out, max_train_pairs=8, resume_from_checkpoint=str(out)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves_it(world, tmp_path, monkeypatch, capsys, number):
    """In step 2 of iteration 2: exit status 130, how to go on, and then the end of a run that was left alone."""
    whole, out, step = tmp_path / "whole", tmp_path / "out", train.train_step
    main(small(whole))
    count = iter(range(1, 100))

    def signalled(*args):
        if next(count) == 5:
            os.kill(os.getpid(), number)
        return step(*args)

    monkeypatch.setattr(train, "train_step", signalled)
    flags = ["--max_train_pairs", "48", "--per_device_train_batch_size", "16", "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        train.command_line([*flags, "--output_dir", str(out)])
    assert stop.value.code == 130 and f"--resume_from_checkpoint {out}" in capsys.readouterr().err
    assert (out / "state/002-00000002/state.pt").exists() and lines(out)[-1]["step"] == 2
    train.command_line([*flags, "--resume_from_checkpoint", str(out)])
    assert (out / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert (out / "policy/model.safetensors").read_bytes() == (whole / "policy/model.safetensors").read_bytes()


def test_a_disk_that_is_full(world, tmp_path, monkeypatch):
    """Too small from the start: nothing is written. Full on the way: the last checkpoint is whole, and the run goes on."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
        with pytest.raises(InputError, match=r"0.0 GB free, and checkpoints take"):
            main(small(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    with monkeypatch.context() as patch:
        save = torch.save

        def full(what, path):
            if path.name == "state.pt" and "002-done" in str(path):
                path.write_bytes(b"PK half")
                raise RuntimeError("PytorchStreamWriter failed writing file data/3: No space left on device\nand more")
            save(what, path)

        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"002-done cannot be written: .*No space left on device$"):
            main(small(tmp_path / "full"))
    assert run.latest_checkpoint(tmp_path / "full")[1]["iteration"] == 1
    assert not list((tmp_path / "full/state").glob(".*"))  # what is half written would keep the disk full
    main(small(tmp_path / "full", resume_from_checkpoint=str(tmp_path / "full")))
    assert (tmp_path / "full/policy/model.safetensors").exists()


def test_a_loss_that_is_nan_stops_with_its_step_and_what_was_saved_stays(world, tmp_path, monkeypatch):
    out, losses = tmp_path / "run", train.pair_losses
    calls = iter(range(100))
    monkeypatch.setattr(train, "pair_losses", lambda r, c: losses(r, c) * (float("nan") if next(calls) == 8 else 1))
    every = r"lines \[\d+(, \d+){15}\]"  # before: 2 losses of preflight, 2 of evaluations, 4 steps; 16 pairs a step
    with pytest.raises(FloatingPointError, match=rf"iteration 2, step 2, pairs.jsonl {every}: the loss is nan"):
        main(small(out))
    folder, state = run.latest_checkpoint(out)
    weights = load_file(folder / "model.safetensors")
    assert state["iteration"] == 1 and all(value.isfinite().all() for value in weights.values())


def test_weights_that_are_nan_after_the_last_step_are_not_saved(world, tmp_path, monkeypatch):
    """What only the next evaluation would show must not have replaced what was good."""
    out, step = tmp_path / "run", train.train_step

    def breaks(policy, *args):
        metrics = step(policy, *args)
        next(policy.parameters()).data[0] = float("nan")
        return metrics

    monkeypatch.setattr(train, "train_step", breaks)
    with pytest.raises(FloatingPointError, match="iteration 1: weights of the policy are no numbers"):
        main(small(out, per_device_train_batch_size=48))
    assert run.latest_checkpoint(out)[1]["iteration"] == 0


def test_a_pair_that_is_nan_is_named(tmp_path):
    """By its line of pairs.jsonl, whatever micro-batch it is in."""
    model, pairs = tiny_model(), [([3] * (1 + i % 5), [5] * (1 + i % 7), [6, 7, 8]) for i in range(12)]
    reference = torch.zeros(12, 2)
    reference[4, 0] = float("nan")
    config = train.resolve(real("m", "d", tmp_path, per_device_train_batch_size=12, max_tokens=40))
    resume = {"optimizer": None, "step": None}
    with pytest.raises(FloatingPointError, match=r"iteration 2, step 1, pairs.jsonl lines \[5\]: the loss is nan"):
        train.train_on(model, pairs, reference, 2, resume, config, None, None)


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing(tmp_path, monkeypatch, capsys):
    """The GPU is played by a model that holds 60 tokens at a time; the steps are those of one that holds any."""
    rng, real_pass = random.Random(0), train.sequence_logprobs
    pairs = [tuple([rng.randrange(3, 61) for _ in range(rng.randint(2, 8))] for _ in "xwl") for _ in range(16)]
    config = train.resolve(real("m", "d", tmp_path, per_device_train_batch_size=8))
    reference, steps, held = torch.zeros(16, 2), {}, [0]

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
        steps[name] = []
        resume = {"optimizer": None, "step": None}
        log = steps[name].append
        train.train_on(tiny_model(), pairs, reference, 1, resume, config, lambda log=log, **line: log(line), None)
    said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert 1 <= len(said) <= 10 and said[-1].endswith(("with 64 tokens at a time", "with 32 tokens at a time"))
    for a, b in zip(steps["any"], steps["sixty"], strict=True):
        assert b.pop("phase") == a.pop("phase") and b == pytest.approx(a, rel=1e-4, abs=1e-5)
    monkeypatch.setattr(train, "sequence_logprobs", lambda model, x, y: limited(model, x * 99, y))
    with pytest.raises(torch.OutOfMemoryError):  # not for ever
        train.train_on(tiny_model(), pairs, reference, 1, {"optimizer": None, "step": None}, config, None, None)


def test_out_of_memory_after_a_backward_pass_starts_the_step_anew(tmp_path, monkeypatch, capsys):
    """What the first micro-batch has added to the gradients is not added twice."""
    rng, real_pass, steps = random.Random(0), train.sequence_logprobs, []
    pairs = [tuple([rng.randrange(3, 61) for _ in range(rng.randint(2, 8))] for _ in "xwl") for _ in range(8)]
    config, failed = train.resolve(real("m", "d", tmp_path, max_tokens=100)), []
    for fails in (False, True):
        model = tiny_model()

        def limited(model, x, y, fails=fails):
            if fails and not failed and any(p.grad is not None for p in model.parameters()):
                failed.append(True)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real_pass(model, x, y)

        monkeypatch.setattr(train, "sequence_logprobs", limited)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(max_tokens, model=model, optimizer=optimizer):
            return train.train_step(model, optimizer, pairs, torch.zeros(8, 2), replace(config, max_tokens=max_tokens))

        steps.append(run.halving(step, 100, 20))
    assert failed and steps[1][1] == 50 and steps[1][0] == pytest.approx(steps[0][0], rel=1e-4)


def test_out_of_memory_in_sampling_halves_the_batch(tmp_path, monkeypatch, capsys):
    """And one that does not fit by itself is not tried for ever."""
    config = train.resolve(real("m", "d", tmp_path, max_new_tokens=4))
    real_sampling, tried, room = bootstrap.sample_responses, [], [9000]

    def limited(*args, max_tokens, **settings):
        tried.append(max_tokens)
        if max_tokens > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real_sampling(*args, max_tokens=max_tokens, **settings)

    monkeypatch.setattr(bootstrap, "sample_responses", limited)
    args = tiny_model(), bpe_tokenizer(), [[5, 6], [7]], 2, [1], 0, config, None
    got = train.sample(*args)
    assert tried == [32768, 16384, 8192] and [len(row) for row in got] == [2, 2]
    assert "again, with 8192 tokens at a time" in capsys.readouterr().out
    room[0] = 0
    with pytest.raises(torch.OutOfMemoryError):
        train.sample(*args)


SHORT = ["--max_length", "99", "--max_prompt_length", "50"]
WRONG = [
    (["--loss_type", "foo"], "--loss_type is 'foo': expected one of dpo, ipo, slic, simpo"),
    (["--keep", "1.5"], "--keep is 1.5: expected between 0 and 1"),
    (["--bootstrap", "-0.1"], "--bootstrap is -0.1: expected between 0 and 1"),
    (["--ensemble_gamma", "nan"], "--ensemble_gamma is nan: expected between 0 and 1"),
    (["--keep", "0", "--bootstrap", "0"], "nothing would be left to train on"),
    (["--iterations", "0"], "--iterations is 0: expected at least 1"),
    (["--seed", "99999999999999999999"], "--seed is 99999999999999999999: expected at least 0 and below"),
    (["--model_name_or_path", "", "--dataset_name", "DATA"], "error: "),
    (["--output_dir", "HOLDS-POLICY"], "already holds a policy"),
    (["--model_name_or_path", "TRUNCATED", "--dataset_name", "DATA"], "TRUNCATED: "),
    (["--model_name_or_path", "MISMATCHED", "--dataset_name", "DATA"], "MISMATCHED: "),
    (["--model_name_or_path", "HEADLESS", "--dataset_name", "DATA"], "HEADLESS: its weights lack lm_head.weight"),
    (["--beta", "many"], "invalid float value: 'many'"),
    (["--spelled_wrong", "1"], "unrecognized arguments: --spelled_wrong"),
    (["--loss_type", "ipo", "--label_smoothing", "0.1"], "--label_smoothing is dpo's"),
    (["--dataset_name", "d.jsonl"], "--model_name_or_path and --dataset_name go together"),
    (["--max_length", "16"], "--max_length is not above --max_prompt_length"),
    (["--model_name_or_path", "MODEL", "--dataset_name", "DATA"], "is 1024: the model has 128 positions"),
    (["--eval_split", "dev"], "--eval_split is 'dev': the playground has test and validation prompts"),
    (["--prompt_file", "DATA"], "--prompt_file are for a model of your own"),
    (["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--eval_split", "test"], "DATA.jsonl is a file, which has no splits"),
    (["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--dataset_train_split", "x"], "DATA.jsonl is a file, which has no splits"),
    (["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--label_noise", "0"], "--label_noise and --length_bias are the playground's"),
    (["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--eval_dataset_name", "ALIKE", *SHORT], "no pair is left to evaluate on"),
    (["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--prompt_file", "SPELLS", *SHORT], "SPELLS.jsonl, row 0 is no prompt to answer: a text spells"),
    (["--steps_per_iteration", "3", "--epochs_per_iteration", "2"], "give one of them"),
    (["--eval_fraction", "0.5"], "--eval_fraction holds out pairs of your own data"),
    (["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--eval_dataset_name", "DATA", "--eval_fraction", "0.5"], "--eval_fraction holds out"),
    (["--dataset_train_split", "x"], "--dataset_train_split is of --dataset_name"),
    (["--output_dir", "ENDED"], "already holds a run, which has ended"),
    (["--token_floor", "0.1", "--bootstrap", "0"], "--token_floor is for own pairs, and --bootstrap is 0"),
    (["--resume_from_checkpoint", "TAKEN", "--output_dir", "other"], "a run that is resumed stays where it is"),
    (["--temperature", "0"], "--temperature is 0.0: expected above 0"),
    (["--model_name_or_path", "MODEL", "--dataset_name", "gone.jsonl", *SHORT], "gone.jsonl: no such file"),
    (["--model_name_or_path", "no/such-model", "--dataset_name", "DATA"], "no/such-model: "),
    (["--model_name_or_path", "MODEL", "--dataset_name", "no/such-data", *SHORT], "no/such-data, split 'train': cannot be read"),
    (["--model_name_or_path", "NO-EOS", "--dataset_name", "DATA"], "its tokenizer has no EOS token"),
    (["--model_name_or_path", "NARROW", "--dataset_name", "DATA"], "its tokenizer has 379 ids, the model embeds 300"),
    (["--model_name_or_path", "PICKLED", "--dataset_name", "DATA"], "PICKLED: "),
    (["--model_name_or_path", "REMOTE", "--dataset_name", "DATA", *SHORT], "REMOTE: "),
    (["--model_name_or_path", "HALF-REMOTE", "--dataset_name", "DATA", *SHORT], "HALF-REMOTE: "),
    (["--model_name_or_path", "MODEL", "--dataset_name", "ALIKE", *SHORT], "no pair is left to train on"),
    (["--model_name_or_path", "MODEL", "--dataset_name", "BAD", *SHORT], "row 1: 'rejected' is missing"),
    (["--output_dir", "TAKEN"], "already holds a run"),
    (["--output_dir", "DATA.jsonl/out"], "DATA.jsonl is no folder that can be written to"),
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
    for name, rows in {"DATA": [row], "ALIKE": [{**row, "rejected": "b"}], "BAD": [row, {"prompt": "a", "chosen": "b"}],
                       "SPELLS": [{"instruction": "a </s> b"}]}.items():  # fmt: skip
        (here / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("TAKEN", "ENDED"):
        (here / name).mkdir()
        (here / name / "config.json").write_text("{}")
    (here / "ENDED/policy").mkdir()
    return here


@pytest.mark.parametrize("flags, message", WRONG, ids=[" ".join(flags) for flags, _ in WRONG])
def test_bad_input_is_one_line_and_nothing_is_written(wrong_things, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(wrong_things)
    before = sorted(Path().rglob("*"))
    flags = [f + ".jsonl" if f in ("DATA", "ALIKE", "BAD", "SPELLS") else f for f in flags]
    with pytest.raises(SystemExit) as stop:
        train.command_line(flags)
    assert isinstance(stop.value.code, str) and stop.value.code.startswith("error: ") and message in stop.value.code
    assert "\n" not in stop.value.code and sorted(Path().rglob("*")) == before


def test_as_a_command():
    """Exit status 1 and one line on stderr; --help names every flag."""
    def command(*flags):
        return subprocess.run([sys.executable, ROOT / "train.py", *flags], capture_output=True, text=True)

    wrong = command("--keep", "7")
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (1, "", "error: --keep is 7.0: expected between 0 and 1\n")
    shown = command("--help").stdout
    assert all(f"--{f.name}" in shown for f in fields(Config)) and "arXiv:2410.09362" in shown


def test_killed_at_random_moments_it_ends_alike():
    """experiments/kills.py in short: SIGKILL, resume, and the same bytes; the whole script takes 50 runs."""
    done = subprocess.run([sys.executable, ROOT / "experiments/kills.py", "--runs", "3"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and re.match(r"3 runs, \d+ kills, 3 identical ends", done.stdout), done.stderr[-3000:]


def test_a_file_that_grows_too_large_is_one_line(world, tmp_path):
    """The kernel refuses, not a mock: what may be written ends at 100 kB, half a checkpoint."""
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            train.command_line(["--max_train_pairs", "48", "--device", "cpu", "--output_dir", str(out)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.match(r"error: .*state/000-done cannot be written: .*File too large", stop.value.code)
    assert "\n" not in stop.value.code and run.latest_checkpoint(out) is None
    train.command_line(["--max_train_pairs", "48", "--device", "cpu", "--resume_from_checkpoint", str(out)])
    assert (out / "policy/model.safetensors").exists()


def test_every_field_is_read():
    source = "".join(path.read_text() for path in [ROOT / "train.py", *(ROOT / "sera_min").glob("*.py")])
    for f in fields(Config):
        assert re.search(rf"\b(config|c)\.{f.name}\b", source), f"nothing reads {f.name}"


@pytest.mark.parametrize("names, use", [
    (["logprobs"], "m.implicit_reward(torch.ones(2), torch.zeros(2)).sum() == 2 and m.token_batches([1], 1) == [[0]]"),
    (["losses"], "m.dpo_loss(torch.zeros(1)).item() > 0.69"),
    (["select"], "m.select_top(m.ensemble_margin(torch.tensor([1., 2.])), 1).item() == 1"),
    (["bootstrap"], "m.best_worst_pairs([[0., 1.]], [[True, True]], [[[1], [2]]])[0] == [(0, 1, 0)]"),
])  # fmt: skip
def test_a_concept_file_works_alone(tmp_path, names, use):
    (tmp_path / "theirs").mkdir()
    for name in names:
        shutil.copy(ROOT / f"sera_min/{name}.py", tmp_path / "theirs")
    code = f"import torch, sys; import theirs.{names[0]} as m; assert {use}; assert 'sera_min' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
