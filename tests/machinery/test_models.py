"""What a folder holds is what is loaded, or it is refused in one line; and what a model does wrongly is seen at once."""

import json
import os
import shutil
import weakref
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import CHATML, FAMILIES, bpe_tokenizer, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.cache_utils import DynamicLayer

from sera_min.logprobs import score, sequence_logprobs
from sera_min.machinery.errors import InputError
from sera_min.machinery.models import (
    check_before_training,
    check_positions,
    eos_ids_of,
    load,
    pad_id_of,
    save_model,
)
from sera_min.machinery.rows import is_lfs_pointer
from sera_min.pairs import Pair

PAIR = Pair([5, 6, 7, 8], [9, 10, 11, 1], [12, 1])
FEW = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def save(folder, family="llama", template=None, **settings):
    tokenizer = bpe_tokenizer(template)
    tokenizer.save_pretrained(folder)
    tiny_model(family, vocab_size=len(tokenizer), **settings).save_pretrained(folder)
    return folder


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder):
    with pytest.raises(InputError) as error:
        load(folder, "cpu")
    assert "\n" not in str(error.value) and str(error.value).startswith(str(folder))
    return str(error.value)


def test_fp8_weights_are_refused_with_their_scales(tmp_path):
    """Read as they are they would be some 1,000 times too large."""

    def to_fp8(weights):
        for name in [name for name in weights if "proj" in name]:
            scale = weights[name].abs().max() / 448
            weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
            weights[f"{name}_scale"] = scale.reshape(1)

    change_weights(save(tmp_path), to_fp8)
    assert "tensors that the model has no place for: model.layers.0" in refused(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_is_read(tmp_path, dtype):
    model = AutoModelForCausalLM.from_pretrained(save(tmp_path))
    model.to(dtype).save_pretrained(tmp_path)
    policy, _ = load(tmp_path, "cpu")
    assert all(torch.equal(p, q.float()) for p, q in zip(policy.parameters(), model.parameters()))


def test_old_constants_are_no_weights(tmp_path):
    """Causal masks, rotary frequencies, a version: what folders of older versions hold."""
    change_weights(save(tmp_path), lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load(tmp_path, "cpu")
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64), "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    change_weights(save(tmp_path, "gpt2"), lambda weights: weights.update(masks))
    load(tmp_path, "cpu")
    older = {"model.decoder.version": torch.ones(1), "model.decoder.layers.0.self_attn.attention.bias": torch.ones(1, 1, 9, 9)}
    change_weights(save(tmp_path, "opt"), lambda weights: weights.update(older))
    load(tmp_path, "cpu")


def test_a_head_that_the_model_has_no_place_for(tmp_path):
    change_weights(save(tmp_path), lambda weights: weights.update({"v_head.summary.weight": torch.ones(1, 16)}))
    assert refused(tmp_path).endswith("tensors that the model has no place for: v_head.summary.weight")


def test_an_adapter_without_its_matrices_is_one_line(tmp_path):
    save(tmp_path / "base")
    save(tmp_path / "adapter")
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base"), "r": 2, "lora_alpha": 4}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))
    assert "adapter_model.safetensors" in refused(tmp_path / "adapter")


@pytest.mark.parametrize("method", ["fp8", "gptq", "bitsandbytes", "of_next_year"])
def test_a_quantised_folder(tmp_path, method):
    config = json.loads((save(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method, "bits": 4}}))
    assert "its weights are quantised" in refused(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_is_not_the_file(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 4999999\n"
    (save(tmp_path) / name).write_text(pointer)
    assert is_lfs_pointer(tmp_path / name)
    assert refused(tmp_path) == f"{tmp_path / name} is a Git LFS pointer, not the file itself: run `git lfs pull` there"


def test_named_templates(tmp_path):
    """Of several the one named default is used, and all are saved again."""
    save(tmp_path, template=CHATML)
    tokenizer = bpe_tokenizer(CHATML)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ messages }}"}
    tokenizer.save_pretrained(tmp_path)
    _, tokenizer = load(tmp_path, "cpu")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "fox"}], tokenize=False)
    assert text == "<|im_start|>user\nfox<|im_end|>\n" and set(tokenizer.chat_template) == {"default", "tool_use"}


@pytest.mark.parametrize("settings", [{"temperature": 0.6, "top_p": 0.9}, {"pad_token_id": -1}, {"length_penalty": 2.0}, {"output_scores": True}], ids=str)
def test_what_is_loaded_can_be_saved(tmp_path, settings):
    """Versions of transformers read settings of generate that they will not write: said now, not after the training."""
    file = save(tmp_path / "model") / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    try:
        policy, tokenizer = load(tmp_path / "model", "cpu")
    except InputError as error:
        assert next(iter(settings)) in str(error)
        return
    save_model(tmp_path / "policy", policy, tokenizer)
    load(tmp_path / "policy", "cpu")


def test_what_cannot_be_saved_is_refused_with_all_that_is_said(tmp_path, monkeypatch):
    reason = "GenerationConfig is invalid:\n" + "- `a`: b\n" * 40 + "- `length_penalty` is set"
    save(tmp_path)
    monkeypatch.setattr(GenerationConfig, "save_pretrained", Mock(side_effect=ValueError(reason)))
    assert refused(tmp_path).endswith("- `length_penalty` is set")


def test_settings_that_are_saved_with_do_sample(tmp_path, monkeypatch):
    """Llama 2's, which older versions of transformers will not write as they are."""
    save_settings = GenerationConfig.save_pretrained

    def as_in_4(settings, *args, **kwargs):
        settings.validate(strict=True)
        save_settings(settings, *args, **kwargs)

    monkeypatch.setattr(GenerationConfig, "save_pretrained", as_in_4)
    file = save(tmp_path / "model") / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "temperature": 0.6}))
    save_model(tmp_path / "policy", *load(tmp_path / "model", "cpu"))
    assert json.loads((tmp_path / "policy/generation_config.json").read_text())["do_sample"] is True


BESIDE = ("preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json", "tokenizer.model", "tekken.json.tiktoken")
NOT_KEPT = ("pytorch_model.bin", "model.safetensors.index.json", "optimizer.pt", "trainer_state.json", "training_args.bin", "README.md")


def test_what_lies_beside_the_weights_is_in_policy_too(tmp_path):
    """From iteration to iteration, though the folder that a policy was loaded from is gone; and all can read it."""
    save(tmp_path / "model")
    for name in (*BESIDE, *NOT_KEPT[2:]):
        (tmp_path / "model" / name).write_text(f'{{"is": "{name}"}}')
        (tmp_path / "model" / name).chmod(0o600)
    source = tmp_path / "model"
    for i in (1, 2):
        policy, tokenizer = load(source, "cpu")
        shutil.rmtree(source)
        source = tmp_path / f"policy-{i}"
        save_model(source, policy, tokenizer)
    names = {file.name for file in source.iterdir()}
    assert names >= {*BESIDE, "config.json", "model.safetensors", "tokenizer.json"} and not names & {*NOT_KEPT}
    assert (source / "tokenizer.model").read_text() == '{"is": "tokenizer.model"}'
    hidden = os.umask(0)
    os.umask(hidden)
    assert {file.stat().st_mode & 0o777 for file in source.iterdir()} == {0o666 & ~hidden}


def test_a_config_that_asks_for_more_outputs_is_that_of_the_model_without(tmp_path, monkeypatch):
    """Router logits of batches, attentions, hidden states: nobody here reads them, and some cannot be sampled or saved with."""
    monkeypatch.setitem(FAMILIES, "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2})
    save(tmp_path, "mixtral")
    want = score(load(tmp_path, "cpu")[0], [PAIR.prompt], [PAIR.chosen], max_tokens=99)[0]
    file = tmp_path / "config.json"
    more = dict.fromkeys(("output_router_logits", "output_attentions", "output_hidden_states"), True)
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
    policy, tokenizer = load(tmp_path, "cpu")
    check_before_training(policy, PAIR, [1])
    assert torch.equal(score(policy, [PAIR.prompt], [PAIR.chosen], max_tokens=99)[0], want)
    save_model(tmp_path / "policy", policy, tokenizer)


def test_a_model_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "a [model]")
    load("~/a [model]", "cpu")


@pytest.mark.parametrize("named, ends", [(None, [1]), (0, [1, 0]), (1, [1]), ([7, 1], [1, 7])])
def test_a_response_ends_with_the_tokenizer_s_token_or_one_that_the_model_names(named, ends):
    model, tokenizer = tiny_model(), bpe_tokenizer()
    model.generation_config.eos_token_id = named
    assert eos_ids_of(model, tokenizer) == ends and pad_id_of(tokenizer) == 0
    tokenizer.pad_token = None
    assert pad_id_of(tokenizer) == 1


def noisy(family, tmp_path, **settings):
    """A loaded model of the family, in training mode as far as it goes, and its log-probs as it is scored."""
    tokenizer = bpe_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FEW, "vocab_size": len(tokenizer), **settings})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    policy, _ = load(tmp_path, "cpu")
    return policy, score(policy, [PAIR.prompt], [PAIR.chosen], max_tokens=99)[0]


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1, "initializer_range": 0.5}


@pytest.mark.parametrize("family, settings", [
    ("mixtral", {**EXPERTS, "router_jitter_noise": 0.5}), ("phimoe", {**EXPERTS, "router_jitter_noise": 0.3}),
    ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "attn_pdrop": 0.5, "embd_pdrop": 0.5}),
])  # fmt: skip
def test_noise_is_off_whatever_its_name(family, settings, tmp_path):
    """Router jitter, experts drawn at random, dropout; and the model is still the one that its authors wrote."""
    policy, scored = noisy(family, tmp_path, **settings)
    exact = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(score(exact, [PAIR.prompt], [PAIR.chosen], max_tokens=99)[0], scored)
    policy.train()
    trained = sequence_logprobs(policy, [PAIR.prompt], [PAIR.chosen])[0]
    torch.testing.assert_close(trained.detach(), scored)


def test_layers_are_computed_again_under_gradient_checkpointing_and_without_dropout(tmp_path):
    policy, scored = noisy("opt", tmp_path, ffn_dim=24, word_embed_proj_dim=16, dropout=0.5, attention_dropout=0.5, initializer_range=0.5)
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    policy.train()
    passes = []
    policy.get_decoder().layers[0].fc1.register_forward_hook(lambda *_: passes.append(1))
    trained = sequence_logprobs(policy, [PAIR.prompt], [PAIR.chosen])[0]
    trained.sum().backward()
    assert len(passes) == 2
    torch.testing.assert_close(trained.detach(), scored)


def test_a_loaded_model_is_freed_at_once(tmp_path):
    policy, _ = load(save(tmp_path), "cpu")
    policy.train()
    gone = weakref.ref(policy.lm_head)
    del policy
    assert gone() is None


def test_the_check_accepts_a_model_and_says_so(capsys):
    model = tiny_model().train()
    check_before_training(model, PAIR, [1])
    assert "check passed: in training and in sampling log π(y|x) is that of a row alone, to 0.0001 nats a token" in capsys.readouterr().out


def test_the_check_accepts_a_model_whose_samples_end_at_once():
    """Sampling stops where all have ended: the last passes are the samples'."""
    check_before_training(tiny_model(), PAIR, list(range(61)))


def test_the_check_sees_a_wrong_cache(monkeypatch):
    """Rows of the cache in another order than the samples."""

    def in_another_order(self, repeats):
        self.keys, self.values = (x.repeat(repeats, 1, 1, 1) for x in (self.keys, self.values))

    monkeypatch.setattr(DynamicLayer, "batch_repeat_interleave", in_another_order)
    with pytest.raises(InputError, match="as it is sampled differs from its logits', by .* LlamaForCausalLM cannot be trained"):
        check_before_training(tiny_model(), PAIR, [1])


def test_the_check_sees_noise():
    with pytest.raises(InputError, match=r"log π\(y\|x\) differs from its logits', by"):
        check_before_training(tiny_model("gpt2", resid_pdrop=0.5), PAIR, [1])


def test_what_the_model_s_own_code_raises_is_one_line():
    model = tiny_model()
    model.model.layers[0].mlp.forward = lambda h: h[:, :, :3].view(-1, 7)
    with pytest.raises(InputError, match="LlamaForCausalLM cannot be trained here: ") as error:
        check_before_training(model, PAIR, [1])
    assert "\n" not in str(error.value)


def long_rope():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    config = AutoConfig.for_model("phi3", **{
        **FEW, "max_position_embeddings": 128, "original_max_position_embeddings": 32, "pad_token_id": 0,
        "num_key_value_heads": 2, "initializer_range": 0.5, "rope_parameters": {**rope, "original_max_position_embeddings": 32},
    })  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def dynamic_rope():
    return tiny_model(max_position_embeddings=32, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})


def test_lengths_at_which_rope_depends_on_the_batch_are_refused():
    check_positions(long_rope(), 32, "--max_length")
    with pytest.raises(InputError, match="--max_length is 33: beyond 32 tokens this model's log-probs depend on the batch"):
        check_positions(long_rope(), 33, "--max_length")
    with pytest.raises(InputError, match="--max_length is 33: the model has 32 positions"):
        check_positions(dynamic_rope(), 33, "--max_length")


@pytest.mark.parametrize("written", ["rope_parameters", "rope_scaling", "config"])
def test_the_rope_limit_is_found_where_each_version_of_transformers_writes_it(written):
    config = SimpleNamespace(max_position_embeddings=128, rope_parameters=None)
    config.get_text_config = lambda: config
    limit = {"original_max_position_embeddings": 32}
    if written == "config":
        config.rope_scaling = {"rope_type": "longrope"}
        config.original_max_position_embeddings = 32
    else:
        setattr(config, written, {"rope_type": "longrope", **limit})
    policy = SimpleNamespace(config=config)
    check_positions(policy, 32, "--max_length")
    with pytest.raises(InputError, match="beyond 32 tokens"):
        check_positions(policy, 33, "--max_length")
