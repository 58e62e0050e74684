"""Runs with --use_peft: what they write, how they go on, and adapters of PEFT as π_ref."""

import json
import random
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from shared import WORDS, read, some_rows, tiny_model, word_tokenizer
from transformers import AutoModelForCausalLM

import train
from sera_min.logprobs import plain_logprob, score
from sera_min.lora import add_lora, load_lora, lora_state
from sera_min.machinery import policies
from sera_min.machinery.adapters import write_adapter
from sera_min.machinery.config import Config, resolve
from sera_min.machinery.errors import InputError
from sera_min.machinery.models import load
from sera_min.machinery.policies import LoRAPolicies
from sera_min.pairs import Rows
from train import main

PROMPTS, RESPONSES = [[5, 6, 7], [8, 9]], [[10, 11, 1], [12, 1]]
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


def saved_model(folder, family="llama"):
    """A model of one layer that knows few words, so that many of its samples end."""
    tokenizer = word_tokenizer(WORDS)
    tokenizer.save_pretrained(folder)
    tiny_model(family, vocab_size=len(tokenizer), num_hidden_layers=1).save_pretrained(folder)


def trained(model, seed=2):
    """With matrices that are not those of the start."""
    generator = torch.Generator().manual_seed(seed)
    load_lora(model, {name: 0.3 * torch.randn(matrix.shape, generator=generator) for name, matrix in lora_state(model).items()})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Flags of a run of two iterations with a checkpoint at every step; and where it has ended."""
    here = tmp_path_factory.mktemp("lora")
    saved_model(here / "model")
    (here / "d.jsonl").write_text("\n".join(map(json.dumps, some_rows(18, random.Random(3)))))
    flags = Config(
        model_name_or_path=str(here / "model"), dataset_name=str(here / "d.jsonl"), output_dir=str(here / "whole"),
        use_peft=True, lora_r=2, lora_alpha=4, learning_rate=1e-2, beta=0.5, iterations=2, save_steps=1,
        max_length=24, max_prompt_length=8, per_device_train_batch_size=4, eval_fraction=0.2, device="cpu",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        final = main(flags)
    assert final["bootstrap/pairs"] > 0 and final["eval_rewards/margins"] != 0
    return flags, here


def test_policy_is_an_ordinary_folder_and_adapter_is_peft_s(finished):
    peft = pytest.importorskip("peft")
    _, here = finished
    assert {file.name for file in (here / "whole/adapter").iterdir()} == ADAPTER and not (here / "whole/state").exists()
    policy = AutoModelForCausalLM.from_pretrained(here / "whole/policy")
    base = AutoModelForCausalLM.from_pretrained(here / "model")
    reference, _ = score(base, PROMPTS, RESPONSES, max_tokens=100)
    want, _ = score(policy, PROMPTS, RESPONSES, max_tokens=100)
    theirs = peft.PeftModel.from_pretrained(base, here / "whole/adapter").base_model.model
    torch.testing.assert_close(score(theirs, PROMPTS, RESPONSES, max_tokens=100)[0], want, rtol=1e-5, atol=1e-5)
    assert (want - reference).abs().min() > 1e-3 and policy.dtype == torch.float32


class Killed(BaseException):
    pass


def killed_at_last(policy):
    raise Killed


def test_a_killed_run_goes_on_to_the_same_end(finished, tmp_path, monkeypatch):
    """In step 2 of iteration 2, of which matrices are left, and their moments; and when only policy/ is not written."""
    flags, here = finished
    out, real, steps = tmp_path / "run", train.train_step, []

    def killed(*args):
        steps.append(1)
        if len(steps) == 4 + 2:
            raise Killed
        return real(*args)

    monkeypatch.setattr(train, "train_step", killed)
    with pytest.raises(Killed):
        main(replace(flags, output_dir=str(out)))
    monkeypatch.setattr(train, "train_step", real)
    state = out / "state"
    assert {file.name for file in (state / "policy-1").iterdir()} == ADAPTER and not (state / "policy-0").exists()
    checkpoint = torch.load(state / "checkpoint-2.pt", weights_only=True)
    assert checkpoint["step"] == 1 and all(name.endswith((".A", ".B")) for name in checkpoint["policy"])
    assert len(checkpoint["optimizer"]["state"]) == len(checkpoint["policy"]) == 2 * 7
    for left in (state / ".policy-2", out / ".adapter", out / ".policy"):  # by a kill in the midst of writing
        left.mkdir()
        (left / "adapter_config.json").write_text("{")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(policies, "merge_lora", killed_at_last)
        main(Config(resume_from_checkpoint=str(out)))
    assert (out / "adapter").exists() and not (out / "policy").exists()
    main(Config(resume_from_checkpoint=str(out)))
    for name in ("policy/model.safetensors", "adapter/adapter_model.safetensors", "metrics.jsonl", "iteration-2/pairs.jsonl"):
        assert (out / name).read_bytes() == (here / "whole" / name).read_bytes(), name


def test_rewards_of_two_adapters_are_those_of_merged_weights(finished, tmp_path):
    """mean_reward at t = 3, from three policies in one model, against three models in float64."""
    flags, here = finished
    config = resolve(replace(flags, iterations=3))
    policies = LoRAPolicies(tmp_path, config)
    exact = [AutoModelForCausalLM.from_pretrained(here / "model", dtype=torch.float64)]
    for i in (1, 2):
        policy = policies.get(0)
        trained(policy, seed=i)
        policies.forget()
        policies.save(i, policy)
        exact.append(load(tmp_path / f"state/policy-{i}", "cpu")[0].double())
        weights = load_file(tmp_path / f"state/policy-{i}/adapter_model.safetensors")
        name = "model.layers.0.mlp.up_proj"
        b, a = (weights[f"base_model.model.{name}.lora_{letter}.weight"].double() for letter in "BA")
        merged = exact[0].get_submodule(name).weight + 2.0 * b @ a
        torch.testing.assert_close(exact[i].get_submodule(name).weight, merged, rtol=1e-6, atol=1e-6)
    got = train.mean_reward(3, Rows(PROMPTS, RESPONSES, [0, 1]), policies, config)
    with torch.no_grad():
        logps = [torch.stack([plain_logprob(model, x, y) for x, y in zip(PROMPTS, RESPONSES)]) for model in exact]
    want = 0.5 * (logps[2] - logps[0]) + 0.5 * (logps[1] - logps[0])
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.fixture
def adapter(finished, tmp_path):
    """An adapter that PEFT has written, and the model that PEFT makes of it."""
    peft = pytest.importorskip("peft")
    _, here = finished
    base = AutoModelForCausalLM.from_pretrained(here / "model")
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", theirs.merge_and_unload()


def test_an_adapter_is_merged_into_its_base(adapter, finished, tmp_path, capsys):
    folder, theirs = adapter
    policy, tokenizer = load(folder, "cpu")
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(policy.state_dict()[name], weight)
    assert len(tokenizer) == len(word_tokenizer(WORDS)) and all(p.requires_grad for p in policy.parameters())
    flags, _ = finished
    out = tmp_path / "out"
    main(replace(flags, model_name_or_path=str(folder), output_dir=str(out), iterations=1))
    assert "no adapter/ is written" in capsys.readouterr().out and not (out / "adapter").exists()
    assert (out / "policy/model.safetensors").exists()


@pytest.mark.parametrize("setting, value", [
    ("use_dora", True), ("use_rslora", True), ("bias", "all"), ("peft_type", "IA3"), ("init_lora_weights", "pissa"),
    ("alpha_pattern", {"q_proj": 3}), ("modules_to_save", ["lm_head"]), ("a_setting_of_tomorrow", 3),
])  # fmt: skip
def test_what_is_no_plain_lora_is_refused(adapter, setting, value):
    folder, _ = adapter
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: value}))
    with pytest.raises(InputError, match=f"{folder}: an adapter, but no plain LoRA \\({setting}\\)"):
        load(folder, "cpu")


def test_an_adapter_that_does_not_fit_its_base_is_refused(finished, tmp_path):
    _, here = finished
    other = tiny_model("gpt2")
    add_lora(other, 2, 4)
    write_adapter(tmp_path / "other", other, here / "model", 4)
    with pytest.raises(InputError, match="no layer is called 'transformer.h.0"):
        load(tmp_path / "other", "cpu")
    shutil.rmtree(tmp_path / "other")
    write_adapter(tmp_path / "other", other, "not/there/model", 4)
    with pytest.raises(InputError, match="not/there/model"):
        load(tmp_path / "other", "cpu")


def test_names_of_no_layer_are_refused_before_anything_is_written(finished, tmp_path):
    flags, _ = finished
    with pytest.raises(InputError, match="--use_peft: no layer is called 'w_proj'; there are down_proj, gate_proj, k_proj"):
        main(replace(flags, lora_target_modules=["q_proj", "w_proj"], output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_flags_of_lora_without_it_are_refused():
    with pytest.raises(InputError, match="--lora_r has no effect without --use_peft"):
        resolve(Config(lora_r=8))
    mine = {"model_name_or_path": "m", "dataset_name": "d", "use_peft": True}
    assert resolve(Config(**mine)).learning_rate == pytest.approx(1e-5)
    assert resolve(Config(**mine, learning_rate=3e-4)).learning_rate == 3e-4


def test_names_of_layers_on_the_command_line():
    from sera_min.machinery.config import parse

    flags = parse(["--use_peft", "--lora_target_modules", "q_proj", "v_proj"], None)
    assert flags.use_peft and flags.lora_target_modules == ["q_proj", "v_proj"]


def test_metrics_name_what_was_trained(finished):
    _, here = finished
    steps = [line for line in read(here / "whole/metrics.jsonl") if line["phase"] == "train"]
    assert len(steps) == 8 and steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_a_model_that_reads_weights_without_calling_their_layer_is_refused(finished, tmp_path):
    """As Mamba's mixers do: LoRA would change nothing there."""
    flags, here = finished
    shutil.copytree(here / "model", tmp_path / "model")
    tiny_model("mamba", vocab_size=len(word_tokenizer(WORDS)), state_size=4).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="MambaForCausalLM cannot be trained here: 'LoRA' object has no attribute 'weight'"):
        main(replace(flags, model_name_or_path=str(tmp_path / "model"), output_dir=str(tmp_path / "out")))
