"""A run that pauses where samples are due, and goes on with those that another program wrote."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import tiny_model, word_tokenizer
from test_oracle import WORDS, some_rows
from transformers import AutoModelForCausalLM, GenerationConfig

import train
from sera_min.forms import InputError, Paused
from sera_min.run import Run

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
import sample_with_vllm

LIMIT = 8  # --max_new_tokens


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


class Engine:
    """In vLLM's place, with the part of its interface that is used: samples by plain transformers."""

    def __init__(self, policy: str, *, dtype: str, generation_config: str, skip_tokenizer_init: bool) -> None:
        assert (dtype, generation_config, skip_tokenizer_init) == ("bfloat16", "vllm", True)
        self.model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)

    def generate(self, prompts: list[dict], settings: list[dict]) -> list[SimpleNamespace]:
        return [SimpleNamespace(outputs=[self.sample(x["prompt_token_ids"], s["seed"] + j, **s) for j in range(s["n"])])
                for x, s in zip(prompts, settings)]  # fmt: skip

    def sample(self, x, own_seed, *, n, temperature, top_p, max_tokens, stop_token_ids, detokenize, seed) -> SimpleNamespace:
        torch.manual_seed(own_seed)
        config = GenerationConfig(do_sample=True, top_k=0, temperature=temperature, top_p=top_p, max_new_tokens=max_tokens,
                                  eos_token_id=stop_token_ids, pad_token_id=0)  # fmt: skip
        y = self.model.generate(torch.tensor([x]), generation_config=config)[0, len(x) :].tolist()
        stopped = y[-1] in stop_token_ids
        drop_end = stopped and own_seed % 2  # some versions do
        return SimpleNamespace(token_ids=tuple(y[: len(y) - drop_end]), finish_reason="stop" if stopped else "length")


@pytest.fixture
def flags(tmp_path, monkeypatch) -> train.Config:
    tokenizer = word_tokenizer(WORDS)
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, some_rows(18, random.Random(3)))))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    sys.modules["vllm"].LLM, sys.modules["vllm"].SamplingParams = Engine, dict
    return train.Config(
        model_name_or_path=str(tmp_path / "model"), dataset_name=str(tmp_path / "d.jsonl"), iterations=3, eval_fraction=0.2,
        max_length=8 + LIMIT, max_prompt_length=8, per_device_train_batch_size=4, learning_rate=1e-3, beta=0.5, device="cpu",
        output_dir=str(tmp_path / "paused"), pause_before_sampling=True,
    )  # fmt: skip


def resumed(flags: train.Config) -> train.Config:
    return replace(flags, resume_from_checkpoint=flags.output_dir)


def paused_once(flags: train.Config) -> Path:
    with pytest.raises(Paused, match=r"iteration 2 needs 4 samples of each prompt in .*/prompts-2.json"):
        train.main(flags)
    return Path(flags.output_dir)


def test_it_ends_as_a_run_that_drew_the_same_samples_itself(flags, tmp_path, monkeypatch, capsys):
    out = paused_once(flags)
    assert [line["phase"] for line in lines(out / "metrics.jsonl")].count("eval") == 2 and (out / "state/policy-1").is_dir()
    with pytest.raises(Paused):  # nobody has written them: it still waits
        train.main(resumed(flags))
    sample_with_vllm.main([str(out)])
    command = [f"--{name}={value}" for name, value in vars(resumed(flags)).items() if value != getattr(train.Config, name)]
    train.command_line(train.main, None, command)
    assert capsys.readouterr().out.endswith(f"to go on: the same command with --resume_from_checkpoint {out}\n")
    sample_with_vllm.main([str(out)])
    final = train.main(resumed(flags))
    assert final["bootstrap/pairs"] > 0

    def draw(run: Run, i: int, prompts: list, n: int, t: int, phase: str, real=Run.draw) -> list:
        if phase != "samples":
            return real(run, i, prompts, n, t, phase)
        request, ends = run.sampling_request(i, prompts), set(run.eos_ids)
        engine = Engine(run.policies.folder(i), dtype="bfloat16", generation_config="vllm", skip_tokenizer_init=True)
        rows = [[engine.sample(x, request["seed"] + k * n + j, n=n, temperature=1.0, top_p=1.0, max_tokens=LIMIT,
                               stop_token_ids=run.eos_ids, detokenize=False, seed=0) for j in range(n)]
                for k, x in enumerate(prompts)]  # fmt: skip
        return [[([*one.token_ids] + run.eos_ids[:1] * (one.finish_reason == "stop" and one.token_ids[-1:] != (run.eos_ids[0],)),
                  one.finish_reason == "stop") for one in row] for row in rows] if ends else []  # fmt: skip

    monkeypatch.setattr(Run, "draw", draw)
    alone = replace(flags, output_dir=str(tmp_path / "alone"), pause_before_sampling=False)
    assert train.main(alone) == final
    for name in ("metrics.jsonl", "policy/model.safetensors", *(f"iteration-{t}/{kind}.jsonl" for t in (2, 3)
                 for kind in ("pairs", "dropped", "samples", "answers"))):  # fmt: skip
        assert (out / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name


def test_what_another_program_wrote_is_checked(flags):
    out = paused_once(flags)
    sample_with_vllm.main([str(out)])
    file = out / "state/samples-2.jsonl"
    right = lines(file)
    asked = json.loads((out / "state/prompts-2.json").read_text())
    end, size = asked["eos_token_ids"][0], asked["vocabulary_size"]
    first = right[0]
    for rows, says in [
        (right[1:], f"{len(right) - 1} lines, expected one for each of the {len(right)} prompts"),
        ([right[1], right[0], *right[2:]], "line 1: prompt is not the ids of this prompt"),
        ([[], *right[1:]], "line 1: prompt is not"),
        ([{**first, "responses": first["responses"][1:]}, *right[1:]], "line 1: expected 4 responses and 4 finish_reasons"),
        ([{**first, "finish_reasons": "stop"}, *right[1:]], "line 1: expected 4 responses"),
        ([{**first, "responses": [[], *first["responses"][1:]]}, *right[1:]], "sample 0: expected a list of token ids, 0 to"),
        ([{**first, "responses": ["a text"] * 4}, *right[1:]], "sample 0: expected a list of token ids"),
        ([{**first, "responses": [[5.0, end]] * 4}, *right[1:]], "expected a list of token ids"),
        ([{**first, "responses": [*first["responses"][:3], [5, size]]}, *right[1:]], f"sample 3: expected .* ids, 0 to {size - 1}"),
        ([{**first, "responses": [[5, -1]] * 4}, *right[1:]], "expected a list of token ids"),
        ([{**first, "responses": [[5] * (LIMIT + 1)] * 4}, *right[1:]], "it has 9 tokens, and --max_new_tokens is 8"),
        ([{**first, "finish_reasons": ["eos"] * 4}, *right[1:]], """its finish_reason is 'eos': expected "stop" or "length\""""),
        ([{**first, "responses": [[5, 6]] * 4, "finish_reasons": ["stop"] * 4}, *right[1:]], '"stop", and its last token is 6: what'),
        ([{**first, "responses": [[5, end]] * 4, "finish_reasons": ["length"] * 4}, *right[1:]], f'"length", and its last token is {end}'),
        ([{**first, "responses": [[end, 5, end]] * 4, "finish_reasons": ["stop"] * 4}, *right[1:]], "it goes on after one of the eos"),
    ]:  # fmt: skip
        file.write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(InputError, match=f"samples-2.jsonl.*{says}"):
            train.main(resumed(flags))
    file.write_text("{}\n{")
    with pytest.raises(InputError, match=r"samples-2.jsonl cannot be read"):
        train.main(resumed(flags))


def test_a_run_that_waits_may_draw_its_samples_after_all(flags, tmp_path):
    paused_once(flags)
    final = train.main(replace(resumed(flags), pause_before_sampling=False))
    assert train.main(replace(flags, output_dir=str(tmp_path / "never"), pause_before_sampling=False)) == final


def test_what_cannot_be_is_refused(flags, monkeypatch):
    for changed in ({"bootstrap": 0.0}, {"iterations": 1}):
        with pytest.raises(InputError, match="--pause_before_sampling: none are drawn"):
            train.main(replace(flags, **changed))
    out = Path(flags.output_dir)
    with pytest.raises(SystemExit, match="no run in .* waits for samples"):
        sample_with_vllm.main([str(out)])
    paused_once(flags)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SystemExit, match="vLLM is not installed: pip install vllm"):
        sample_with_vllm.main([str(out)])
    assert not (out / "state/samples-2.jsonl").exists()
