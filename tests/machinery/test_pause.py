"""A run that pauses where samples are due, and goes on with those that another program wrote."""

import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from shared import WORDS, read, some_rows, tiny_model, word_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig

import train
from sera_min.machinery.config import Config, command_line
from sera_min.machinery.errors import InputError, Paused
from sera_min.machinery.policies import Policies

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import sample_with_vllm

LIMIT = 8  # --max_new_tokens


class Engine:
    """In vLLM's place, with the part of its interface that is used: samples by plain transformers."""

    def __init__(self, policy: str, *, dtype: str, generation_config: str, skip_tokenizer_init: bool, tensor_parallel_size: int,
                 max_model_len: int) -> None:
        assert (dtype, generation_config, skip_tokenizer_init, tensor_parallel_size) == ("bfloat16", "vllm", True, 1)
        assert LIMIT < max_model_len <= 8 + LIMIT
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
        says_so = stopped and (drop_end or len(y) < max_tokens)  # of an end at the last token some versions say "length"
        return SimpleNamespace(token_ids=tuple(y[: len(y) - drop_end]), finish_reason="stop" if says_so else "length")


@pytest.fixture
def flags(tmp_path, monkeypatch) -> Config:
    tokenizer = word_tokenizer(WORDS)
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model(vocab_size=len(tokenizer), num_hidden_layers=1).save_pretrained(tmp_path / "model")
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, some_rows(6, random.Random(3)))))
    monkeypatch.chdir(tmp_path)  # where output_dir is a relative path
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    sys.modules["vllm"].LLM, sys.modules["vllm"].SamplingParams = Engine, dict
    return Config(
        model_name_or_path=str(tmp_path / "model"), dataset_name=str(tmp_path / "d.jsonl"), iterations=3, eval_fraction=0.2,
        max_length=8 + LIMIT, max_prompt_length=8, per_device_train_batch_size=4, learning_rate=1e-3, beta=0.5, device="cpu",
        output_dir="paused", pause_before_sampling=True,
    )  # fmt: skip


def resumed(flags: Config) -> Config:
    return Config(resume_from_checkpoint=flags.output_dir)


def paused_once(flags: Config) -> Path:
    with pytest.raises(Paused, match=r"paused: 4 samples of each prompt in .*/prompts-1-\w+.json are needed, in .*/samples-1-\w+.jsonl"):
        train.main(flags)
    return Path(flags.output_dir)


def test_it_ends_as_a_run_that_drew_the_same_samples_itself(flags, tmp_path, monkeypatch, capsys):
    out = paused_once(flags)
    assert [line["phase"] for line in read(out / "metrics.jsonl")].count("eval") == 2 and (out / "state/policy-1").is_dir()
    with pytest.raises(Paused):  # nobody has written them: it still waits
        train.main(resumed(flags))
    sample_with_vllm.main([str(out)])
    command_line(train.main, None, ["--resume_from_checkpoint", str(out)])
    assert capsys.readouterr().out.endswith(f"to go on: the same program with --resume_from_checkpoint {out}\n")
    sample_with_vllm.main([str(out)])
    final = train.main(resumed(flags))
    assert final["bootstrap/pairs"] > 0

    def draw(self: Policies, i: int, prompts: list, n: int, seed: int, real=Policies.draw) -> list:
        if n == 1:  # an answer, which a run draws itself
            return real(self, i, prompts, n, seed)
        engine = Engine(self.folder(i), dtype="bfloat16", generation_config="vllm", skip_tokenizer_init=True,
                        tensor_parallel_size=1, max_model_len=8 + LIMIT)  # fmt: skip
        ends, samples = self.eos_ids, []
        for k, x in enumerate(prompts):
            drawn = [engine.sample(x, seed + k * n + j, n=n, temperature=1.0, top_p=1.0, max_tokens=LIMIT,
                                   stop_token_ids=ends, detokenize=False, seed=0) for j in range(n)]  # fmt: skip
            samples.append([])
            for one in drawn:
                left_out = one.finish_reason == "stop" and one.token_ids[-1:] != (ends[0],)
                y = [*one.token_ids] + ends[:1] * left_out
                samples[-1].append((y, y[-1] in ends))
        return samples

    monkeypatch.setattr(Policies, "draw", draw)
    alone = replace(flags, output_dir=str(tmp_path / "alone"), pause_before_sampling=False)
    assert train.main(alone) == final
    for name in ("metrics.jsonl", "policy/model.safetensors", *(f"iteration-{t}/{kind}.jsonl" for t in (2, 3)
                 for kind in ("pairs", "dropped", "samples", "answers"))):  # fmt: skip
        assert (out / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name


def test_what_another_program_wrote_is_checked(flags):
    out = paused_once(flags)
    sample_with_vllm.main([str(out)])
    (file,) = [file for file in (out / "state").glob("samples-1-*.jsonl") if len(read(file)[0]["responses"]) == 4]
    right = read(file)
    asked = json.loads(next((out / "state").glob("prompts-1-*.json")).read_text())
    end, size = asked["eos_token_ids"][0], asked["vocabulary_size"]
    first = right[0]
    for rows, says in [
        (right[1:], f"{len(right) - 1} lines, expected one for each of {len(right)} prompts"),
        ([right[1], right[0], *right[2:]], "line 1: prompt is not the ids of this prompt"),
        ([[], *right[1:]], "line 1: prompt is not"),
        ([{**first, "responses": first["responses"][1:]}, *right[1:]], "line 1: expected 4 responses and 4 finish_reasons"),
        ([{**first, "finish_reasons": "stop"}, *right[1:]], "line 1: expected 4 responses"),
        ([{**first, "responses": [[], *first["responses"][1:]]}, *right[1:]], "sample 0: expected a list of token ids"),
        ([{**first, "responses": ["a text"] * 4}, *right[1:]], "sample 0: expected a list of token ids"),
        ([{**first, "responses": [[5.0, end]] * 4}, *right[1:]], f"5.0 is no token id: expected 0 to {size - 1}"),
        ([{**first, "responses": [*first["responses"][:3], [5, size]]}, *right[1:]], f"sample 3: {size} is no token id: expected 0 to {size - 1}"),
        ([{**first, "responses": [[5, -1]] * 4}, *right[1:]], "-1 is no token id"),
        ([{**first, "responses": [[5] * (LIMIT + 1)] * 4}, *right[1:]], "it has 9 tokens, and --max_new_tokens is 8"),
        ([{**first, "finish_reasons": ["eos"] * 4}, *right[1:]], "its finish_reason is 'eos': expected '"),
        ([{**first, "responses": [[5, 6]] * 4, "finish_reasons": ["stop"] * 4}, *right[1:]], "'stop': expected 'length', as its last token is 6"),
        ([{**first, "responses": [[5, end]] * 4, "finish_reasons": ["length"] * 4}, *right[1:]], f"'length': expected 'stop', as its last token is {end}"),
        ([{**first, "responses": [[end, 5, end]] * 4, "finish_reasons": ["stop"] * 4}, *right[1:]], "it goes on after one of the eos"),
    ]:  # fmt: skip
        file.write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(InputError, match=rf"samples-1-\w+.jsonl.*{says}"):
            train.main(resumed(flags))
    file.write_text("{}\n{")
    with pytest.raises(InputError, match=r"samples-1-\w+.jsonl cannot be read"):
        train.main(resumed(flags))


def test_a_run_that_waits_may_draw_its_samples_after_all(flags, tmp_path):
    flags = replace(flags, iterations=2)
    paused_once(flags)
    command_line(train.main, None, ["--resume_from_checkpoint", flags.output_dir, "--pause_before_sampling", "false"])
    final = read(Path(flags.output_dir) / "metrics.jsonl")[-1]
    assert train.main(replace(flags, output_dir=str(tmp_path / "never"), pause_before_sampling=False)) == final


def test_what_cannot_be_is_refused(flags, monkeypatch):
    out = Path(flags.output_dir)
    with pytest.raises(SystemExit, match="no run in .* waits for samples"):
        sample_with_vllm.main([str(out)])
    paused_once(flags)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SystemExit, match="vLLM is not installed: pip install vllm"):
        sample_with_vllm.main([str(out)])
    asked, answer = sample_with_vllm.waiting_request(out)
    assert asked.exists() and not answer.exists()
    older = asked.with_name("prompts-0-of-other-flags.json")
    older.touch()
    os.utime(older, (0, 0))
    assert sample_with_vllm.waiting_request(out) == (asked, answer)
