"""SeRA around TRL: two processes do what one does, the review is train.py's, TRL trains on the tokens that it scores."""

import json
import math
import multiprocessing
import os
import re
import shutil
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from shared import CHATML, LLAMA2, bpe_tokenizer, encode_pairs, tiny_model, unigram_tokenizer

trl = pytest.importorskip("trl")

from datasets import load_dataset  # noqa: E402
from tqdm import tqdm  # noqa: E402

import train  # noqa: E402
from sera_min import logprobs, playground, select  # noqa: E402
from sera_min.machinery import data, models  # noqa: E402
from sera_min.machinery.config import Config, Resolved, resolve, seed_of  # noqa: E402
from sera_min.machinery.errors import InputError  # noqa: E402
from sera_min.machinery.policies import REASON  # noqa: E402
from sera_min.pairs import Rows  # noqa: E402

ROOT = Path(__file__).parents[2]
FORK = multiprocessing.get_context("fork")
sys.path.insert(0, str(ROOT / "experiments"))
import with_trl  # noqa: E402

PAIRS, CHUNK = 20, 8  # three chunks, so that two processes have a share each, and not the same
SIZES = {"max_length": 64, "max_prompt_length": 16, "max_new_tokens": 24}  # up to four sentences
LIMITS = ["--max_length", "64", "--max_prompt_length", "16", "--max_new_tokens", "24"]


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module", autouse=True)
def no_gpu_and_small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(with_trl, "CHUNK", CHUNK)
        yield


def one_of_two(rank: int, arguments: list[str], out: Path) -> None:
    """What torchrun starts, but forked: without the seconds of its imports."""
    sys.stdout = sys.stderr = os.fdopen(os.open(out / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), "w")
    tqdm.set_lock(threading.RLock())  # its own is shared with forks
    torch.set_num_threads(1)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()  # of tests that ran before
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1"
    )
    os.environ.update(MASTER_PORT=(out / "port").read_text())
    with_trl.command_line(arguments)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, sft):
    """A run of three iterations by one process, and two of them by two."""
    out = tmp_path_factory.mktemp("trl")
    model, tokenizer = sft
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    write(out / "pairs.jsonl", playground.preferences(PAIRS, "train", label_noise=0.3, seed=0))
    flags = ["--model_name_or_path", str(out / "model"), *LIMITS, "--learning_rate", "1e-3", "--logging_steps", "1"]

    def arguments(name: str, batch: int) -> list[str]:
        where = ["--dataset_name", str(out / "pairs.jsonl"), "--output_dir", str(out / name)]
        return [*flags, *where, "--per_device_train_batch_size", str(batch)]

    with_trl.command_line(arguments("one", 4))  # first: two forks need not import again what it has imported
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (out / "port").write_text(str(free.getsockname()[1]))
    two = [FORK.Process(target=one_of_two, args=(rank, [*arguments("two", 2), "--iterations", "2"], out), daemon=True) for rank in range(2)]
    try:
        for process in two:
            process.start()
        for process in two:
            process.join(timeout=200)
    finally:
        for process in two:
            process.kill()  # should they wait for each other
    log = (out / "log").read_text()
    assert [process.exitcode for process in two] == [0, 0] and "2 processes" in log, log[-3000:]
    assert log.count(" bootstrapped pairs; dropped:") == 1  # once an iteration, not once a process
    return out


def test_two_processes_do_what_one_does(runs):
    for t in (1, 2):
        one, two = (lines(runs / name / f"iteration-{t}/pairs.jsonl") for name in ("one", "two"))
        assert [p.pop("margin") for p in two] == pytest.approx([p.pop("margin") for p in one], abs=1e-3)
        assert one == two and len(one) == PAIRS
        assert [p["source"] for p in one].count("bootstrap") == (0 if t == 1 else 0.3 * PAIRS)
        if t > 1:
            one, two = (lines(runs / name / f"iteration-{t}/samples.jsonl") for name in ("one", "two"))
            assert [(y["prompt"], y["response"]) for y in one] == [(y["prompt"], y["response"]) for y in two] and len(
                one
            ) == 4 * PAIRS
        one, two = (
            [m["loss"] for m in lines(runs / name / "metrics.jsonl") if m["iteration"] == t and "loss" in m]
            for name in ("one", "two")
        )
        assert len(one) == len(two) == PAIRS / 4 and one == pytest.approx(two, abs=1e-4)
        assert t > 1 or one[0] == pytest.approx(math.log(2), abs=1e-6)  # TRL's log π_θ is the log π_ref handed over


def test_the_pairs_of_a_review_are_those_of_the_method(runs):
    """Iteration 3's margins and its K pairs, from the folders it left: r̄ = (1−γ)·r_2 + γ·r_1."""
    pairs = lines(runs / "one/iteration-3/pairs.jsonl")
    _, tokenizer = models.load(runs / "model", "cpu")
    policies = [models.load(f, "cpu")[0] for f in (runs / "model", *(runs / f"one/iteration-{t}/policy" for t in (1, 2)))]

    def margins(rows: list[dict]) -> torch.Tensor:
        x = [tokenizer(row["prompt"]).input_ids for row in rows for _ in "wl"]
        y = [
            [*tokenizer(row[side]).input_ids, tokenizer.eos_token_id] for row in rows for side in ("chosen", "rejected")
        ]
        reference, first, second = (logprobs.score(model, x, y, max_tokens=4096)[0] for model in policies)
        r = 0.5 * (second - reference) + 0.5 * (first - reference)
        return r[::2] - r[1::2]

    assert margins(pairs).tolist() == pytest.approx([row["margin"] for row in pairs], abs=1e-3)
    given = lines(runs / "pairs.jsonl")
    best = [given[i] for i in select.select_top(margins(given), round(0.7 * PAIRS))]
    offline = {(row["prompt"], row["chosen"], row["rejected"]) for row in pairs if row["source"] == "offline"}
    assert offline == {
        (row["prompt"], " " + row["chosen"], " " + row["rejected"]) for row in best
    }  # a prompt's text goes on


def test_samples_of_another_engine_and_an_end_at_the_pairs(runs, tmp_path, capsys):
    """A run goes on after its last policy: with samples that it draws to the same pairs, with a file's to pairs of those."""
    out = tmp_path / "out"
    shutil.copytree(runs / "one/iteration-1", out / "iteration-1")
    given = lines(runs / "one/iteration-1/pairs.jsonl")
    flags = ["--model_name_or_path", str(runs / "model"), "--dataset_name", str(runs / "pairs.jsonl"), *LIMITS]
    flags += ["--iterations", "2", "--output_dir", str(out), "--pairs_only", "--report_to", "none"]
    with_trl.command_line(flags)
    assert lines(out / "iteration-2/pairs.jsonl") == lines(runs / "one/iteration-2/pairs.jsonl")
    assert not (out / "iteration-2/policy").exists()

    capsys.readouterr()
    with_trl.command_line([*flags, "--pause_before_sampling"])
    (asked,) = (out / "state").glob("prompts-1-*.json")
    request = json.loads(asked.read_text())
    printed = capsys.readouterr().out
    assert f"paused: 4 samples of each prompt in {asked}" in printed and "pairs and policies" not in printed
    assert request["policy"] == str(out / "iteration-1/policy") and request["samples_per_prompt"] == 4

    _, tokenizer = models.load(runs / "model", "cpu")
    assert request["prompts"] == [tokenizer(row["prompt"]).input_ids for row in given] and len(given) == PAIRS
    end = tokenizer.eos_token_id
    lovely, ugly, cut = tokenizer(
        ["the fox is lovely .", "the owl seems rude . the barn is ugly .", "the bear"]
    ).input_ids
    answers = {
        "responses": [[*lovely, end], [*ugly, end], cut, cut],
        "finish_reasons": ["stop", "stop", "length", "length"],
    }
    samples = [{"prompt": x, **answers} for x in request["prompts"]]
    file = write(tmp_path / "samples.jsonl", samples)
    with_trl.command_line([*flags, "--samples", str(file)])
    assert len(lines(out / "iteration-2/samples.jsonl")) == 4 * PAIRS
    pairs = [row for row in lines(out / "iteration-2/pairs.jsonl") if row["source"] == "bootstrap"]
    texts = {" the fox is lovely .", " the owl seems rude . the barn is ugly ."}
    assert len(pairs) == 0.3 * PAIRS
    assert all({row["chosen"], row["rejected"]} == texts for row in pairs)  # never the cut-off one

    by_samples = (out / "iteration-2/pairs.jsonl").read_bytes()
    shutil.copy(file, asked.with_name(asked.name.replace("prompts", "samples") + "l"))  # where it is looked for
    with_trl.command_line([*flags, "--pause_before_sampling"])
    assert (out / "iteration-2/pairs.jsonl").read_bytes() == by_samples

    other = [{**samples[0], "prompt": [end]}, *samples[1:]]
    for file, message in [
        (write(tmp_path / "other.jsonl", other), "other.jsonl, line 1: prompt is not the ids of this prompt"),
        (
            write(tmp_path / "broken.jsonl", [*samples[:-1], {"prompt": samples[-1]["prompt"]}]),
            f"line {PAIRS}: expected 4 responses",
        ),
        (write(tmp_path / "empty.jsonl", []), f"empty.jsonl: 0 lines, expected one for each of {PAIRS} prompts"),
    ]:
        with pytest.raises(SystemExit, match=message):
            with_trl.command_line([*flags, "--samples", str(file)])


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--loss_type", "apo_zero"], "--loss_type is apo_zero: expected one of sigmoid, hinge, ipo"),
        (["--loss_type", "simpo"], "--loss_type is simpo: expected one of sigmoid, hinge, ipo"),
        (["--loss_type", "sigmoid", "hinge"], "--loss_type is sigmoid hinge: expected one of sigmoid, hinge, ipo"),
        (["--ld_alpha", "0.5"], "--ld_alpha and --f_divergence_type"),
        (["--max_prompt_length", "64"], "--max_length is not above --max_prompt_length"),
        (["--max_new_tokens", "60"], "--max_new_tokens is 60: a sample must fit"),
        (["--keep", "0", "--bootstrap", "0"], "--keep and --bootstrap"),
        (["--loss_type", "robust"], "--loss_type is robust: expected one of sigmoid, hinge, ipo"),
        (["--samples", "f.jsonl"], "--samples: nothing is reviewed before iteration 2"),
        (["--samples", "f.jsonl", "--iterations", "7"], "--samples: no iteration is left to review, for .*iteration-7/policy"),
        (["--samples", "f.jsonl", "--iterations", "8", "--bootstrap", "0.4"], "--samples: --bootstrap is too low for a single pair"),
        (["--dataset_name", "no.jsonl"], "no.jsonl: no such file"),
        (["--label_smoothing", "0.1"], "--label_smoothing has no effect on TRL's sigmoid"),
        (["--eval_strategy", "epoch"], "--eval_strategy: nothing is held out"),
        (["--resume_from_checkpoint", "OUT"], "--resume_from_checkpoint: to go on, give the same flags as before"),
        (["--loss_weights", "1", "2"], "loss_weights"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(model_dir, tmp_path, monkeypatch, rank, wrong, message):
    """On the first process alone, and on all before anything is exchanged: none waits for another that has failed."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(with_trl, "gather_object", None)
    file = write(tmp_path / "pairs.jsonl", [{"prompt": "ab", "chosen": "cd", "rejected": "ef"}])
    flags = ["--model_name_or_path", str(model_dir), "--dataset_name", str(file), "--output_dir", str(tmp_path / "out")]
    for t in range(1, 8 if "--iterations" in wrong else 1):  # done before
        (tmp_path / f"out/iteration-{t}/policy").mkdir(parents=True)
    with pytest.raises(SystemExit) as error:
        with_trl.command_line([*flags, *LIMITS, *wrong])
    assert error.value.code == 1 if rank == "1" else re.fullmatch(f"error: .*{message}.*", error.value.code)


def test_nothing_is_left_to_do(model_dir, tmp_path, monkeypatch, capsys):
    """For fewer iterations than are there it ends as it does for as many."""
    monkeypatch.setattr(with_trl, "gather_object", None)
    file = write(tmp_path / "pairs.jsonl", [{"prompt": "ab", "chosen": "cd", "rejected": "ef"}])
    for t in (1, 2, 3):
        (tmp_path / f"out/iteration-{t}/policy").mkdir(parents=True)
    flags = ["--model_name_or_path", str(model_dir), "--dataset_name", str(file), "--output_dir", str(tmp_path / "out")]
    for iterations in ("2", "3"):
        with_trl.command_line([*flags, *LIMITS, "--iterations", iterations])
        assert "pairs and policies are in" in capsys.readouterr().out


def make_policies(model=None, **flags) -> with_trl.Policies:
    config = resolve(Config(model_name_or_path="model", dataset_name="pairs", device="cpu", **flags))
    policies = with_trl.Policies(Path("none"), config, bf16=False)
    tokenizer = bpe_tokenizer()
    policies.hold(0, model or tiny_model(), tokenizer)
    policies.hold(1, model or tiny_model(), tokenizer)
    return policies


class Kept:
    """What `train.review` asks for: log-probs by plain models, and samples that were drawn before."""

    def __init__(self, models: list, samples: list) -> None:
        self.models, self.samples = models, samples

    def log_prob(self, i: int, rows: Rows) -> torch.Tensor:
        return logprobs.score(self.models[i], rows.prompts, rows.responses, max_tokens=4096)[0]

    def sample(self, i: int, prompts: list, n: int, seed: int) -> list:
        return self.samples


def test_the_review_is_that_of_train(runs, tmp_path):
    """Its flags reach it: the pairs are those that `train.review` makes of plain log-probs and of the same samples."""
    shutil.copytree(runs / "one/iteration-1", tmp_path / "out/iteration-1")
    flags = [
        "--model_name_or_path",
        str(runs / "model"),
        "--dataset_name",
        str(runs / "pairs.jsonl"),
        *LIMITS,
        "--pairs_only",
    ]
    flags += ["--output_dir", str(tmp_path / "out"), "--loss_type", "ipo", "--keep", "0.5", "--bootstrap", "0.2"]
    with_trl.command_line(flags)
    pairs, samples = (lines(tmp_path / f"out/iteration-2/{name}.jsonl") for name in ("pairs", "samples"))

    (reference, tokenizer), (policy, _) = (
        models.load(f, "cpu") for f in (runs / "model", tmp_path / "out/iteration-1/policy")
    )
    end = tokenizer.eos_token_id
    given, _ = data.encode(
        lines(runs / "pairs.jsonl"), tokenizer, name="rows", eos_ids=[end], max_length=64, max_prompt_length=16
    )
    written = []
    for y in samples:
        ended = y["finish_reason"] == REASON[True]
        written.append((tokenizer(y["response"]).input_ids + [end] * ended, ended))
    four = [written[4 * k : 4 * k + 4] for k in range(PAIRS)]
    config: Resolved = resolve(
        Config(
            model_name_or_path="m", dataset_name="d", device="cpu", loss_type="ipo", keep=0.5, bootstrap=0.2, **SIZES
        )
    )
    offline = with_trl.data.preferences(given)
    result = train.review(2, offline, Kept([reference, policy], four), config, train.SERA).training_set
    assert [row["margin"] for row in pairs] == pytest.approx(result.margins.tolist(), abs=1e-4)
    assert [row["source"] for row in pairs] == result.sources == ["offline"] * 10 + ["bootstrap"] * 4
    for row, pair in zip(pairs, result.pairs):
        assert [*tokenizer(row["chosen"]).input_ids, end] == pair.chosen
        assert [*tokenizer(row["rejected"]).input_ids, end] == pair.rejected


def test_what_fails_on_another_process_is_said_by_the_first(monkeypatch):
    """Each process has its own chunks: the others hear of a failure when the results are exchanged."""
    monkeypatch.setattr(with_trl, "gather_object", lambda mine: [*mine, "process 1: the model fails: on row 7"])
    with pytest.raises(InputError, match="^process 1: the model fails: on row 7$"):
        with_trl.shared_out(3, lambda c, rows: [0.0] * len(rows), "score")

    def fails(c, rows):
        raise FloatingPointError("not finite")

    monkeypatch.setattr(with_trl, "gather_object", list)
    with pytest.raises(InputError, match="^process 0: not finite$"):
        with_trl.shared_out(3, fails, "score")


def test_a_process_needs_memory_for_weights_alone(model_dir, tmp_path, monkeypatch):
    """TRL trains, with the engine that was launched: what that needs is not asked of one GPU."""
    monkeypatch.setattr(with_trl.policies.device, "check_memory", None)
    config = resolve(Config(model_name_or_path=str(model_dir), dataset_name="d.jsonl", device="cpu", output_dir=str(tmp_path)))
    assert with_trl.Policies(tmp_path, config, bf16=False).get(0) is not None


def test_every_chunk_of_samples_has_a_seed(monkeypatch):
    """Not the same for two chunks, nor for two iterations: equal prompts do not get equal samples."""
    monkeypatch.setattr(
        with_trl.Policies, "draw", lambda self, i, prompts, n, seed: [[([seed], True)] for _ in prompts]
    )
    policies = make_policies()
    one, two = (policies.sample(1, [[2]] * with_trl.CHUNK * 3, 1, seed) for seed in (5, 6))
    assert one == [[([seed_of(5, c, "chunk")], True)] for c in range(3)] * with_trl.CHUNK
    assert len({samples[0][0][0] for samples in [*one, *two]}) == 6


def test_out_of_memory_while_scoring_and_log_probs_that_are_no_numbers(monkeypatch):
    """Memory that runs out is tried with fewer tokens, to the same result, kept; a NaN is named by its row."""
    ids, calls = [[2, 5 + r % 40] for r in range(2 * with_trl.CHUNK)], []
    policies = make_policies(tiny_model(), max_tokens=60)
    expected, _ = logprobs.score(policies.get(1), ids, ids, max_tokens=60)

    def score(model, prompts, responses, *, max_tokens):
        calls.append(max_tokens)
        if max_tokens > 30:
            raise torch.OutOfMemoryError
        return logprobs.score(model, prompts, responses, max_tokens=max_tokens)

    monkeypatch.setattr(with_trl, "score", score)
    rows = Rows(ids, ids, list(range(len(ids))))
    for _ in range(2):
        assert torch.allclose(policies.log_prob(1, rows), expected, atol=1e-5)
    assert calls == [60, 30] * 2
    monkeypatch.setattr(
        with_trl, "score", lambda model, x, y, **_: (torch.tensor([torch.nan if b == 7 else -1.0 for _, b in y]), None)
    )
    rows.logps.clear()
    with pytest.raises(FloatingPointError, match=r"of response 2 is nan"):
        policies.log_prob(1, rows)


def texts(n: int) -> list[dict]:
    return [
        {"prompt": f"What is {i} + {i}?", "chosen": f"It's {2 * i}; naturally!", "rejected": f"The fox {i}."}
        for i in range(n)
    ]


def spaced(n: int) -> list[dict]:
    return [{**row, "chosen": " " + row["chosen"], "rejected": " " + row["rejected"]} for row in texts(n)]


def messages(n: int) -> list[dict]:
    say = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    return [{"prompt": say("user", row["prompt"]), "chosen": say("assistant", row["chosen"]),
             "rejected": say("assistant", row["rejected"])} for row in texts(n)]  # fmt: skip


@pytest.mark.parametrize(
    "tokenizer, rows, added",
    [
        (unigram_tokenizer(adds_bos=True), spaced(4), []),
        (bpe_tokenizer(LLAMA2, adds_bos=True), messages(4), []),
        (bpe_tokenizer(CHATML, adds_bos=True), messages(4), [2]),
    ],
    ids=["SentencePiece text", "Llama-2", "ChatML without the tokenizer's BOS"],
)  # fmt: skip
def test_trl_reads_pairs_jsonl_as_it_is(tmp_path, tokenizer, rows, added):
    """TRL's token ids are those that sera_min scores and trains on, and a training step on them is taken.

    train.py and with_trl.py write one and the same file. The last is the limit of a text: TRL puts the tokenizer's BOS before it, where the template writes none.
    """
    model = tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    file, ours, theirs = write(tmp_path / "pairs.jsonl", rows), tmp_path / "ours", tmp_path / "theirs"
    flags = {"model_name_or_path": str(tmp_path / "model"), "dataset_name": str(file), "max_length": 120,
             "max_prompt_length": 100, "iterations": 1}  # fmt: skip
    config = train.Config(**flags, output_dir=str(ours), device="cpu", eval_fraction=0.0)
    train.main(config, replace(train.SERA, report=False))
    flags["output_dir"] = str(theirs)
    with_trl.command_line([*(word for k, v in flags.items() for word in (f"--{k}", str(v))), "--pairs_only"])
    pairs = theirs / "iteration-1/pairs.jsonl"
    assert lines(pairs) == lines(ours / "iteration-1/pairs.jsonl")
    limits = {"eos_ids": [tokenizer.eos_token_id], "max_length": 120, "max_prompt_length": 100}
    encoded, _ = encode_pairs(rows, tokenizer, name="rows", **limits)

    trainer = trl.DPOTrainer(
        str(tmp_path / "model"), processing_class=tokenizer,
        train_dataset=load_dataset("json", data_files=str(pairs), split="train", cache_dir=str(tmp_path)),
        args=trl.DPOConfig(output_dir=str(tmp_path / "trl"), max_steps=1, report_to="none", use_cpu=True, bf16=False, save_strategy="no"),
    )  # fmt: skip
    columns = (trainer.train_dataset[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    assert list(zip(*columns)) == [(added + x, w, l) for x, w, l in encoded]
    assert trainer.train().global_step == 1
    assert not torch.equal(model.get_input_embeddings().weight, trainer.model.get_input_embeddings().weight)
