"""LoRA against weights that are merged here, by hand, in float64; and against PEFT."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from shared import FAMILIES, tiny_model
from torch import nn

from sera_min.bootstrap import sample_responses
from sera_min.logprobs import plain_logprob, score, sequence_logprobs
from sera_min.lora import LoRA, add_lora, linear_layers, load_lora, lora_state, merge_lora
from sera_min.machinery import device
from sera_min.machinery.models import check_before_training, remove_noise
from sera_min.pairs import Pair

R, ALPHA = 3, 7.0
PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
RESPONSES = [[20, 21, 1], [22, 23, 24, 25, 1], [26, 1]]


def random_state(model, seed=1):
    """Matrices as of a trained policy: no B is zero."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(matrix.shape, generator=generator, dtype=matrix.dtype) for name, matrix in lora_state(model).items()}


def weights_of(model, state):
    """W + (α/r)·B A of the layers that the state has a B and an A of."""
    weights = {}
    for name, b in state.items():
        if name.endswith("lora_B.weight"):
            a = state[name.replace("lora_B", "lora_A")]
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            change = ALPHA / R * b @ a
            if model.config.model_type == "gpt2":
                change = change.T
            weights[f"{layer}.weight"] = model.get_submodule(layer).weight.detach() + change
    return weights


class Merged(nn.Module):
    """A model that is called with other weights than its own, and is otherwise itself."""

    def __init__(self, model, weights):
        super().__init__()
        self.model, self.weights, self.device = model, weights, model.device

    def forward(self, **inputs):
        return torch.func.functional_call(self.model, self.weights, (), inputs)


def with_lora(family="llama", targets=None, dtype=torch.float64, **settings):
    """A model, the same with LoRA, and the matrices that are in it."""
    plain = tiny_model(family, **settings).to(dtype)
    model = copy.deepcopy(plain)
    add_lora(model, R, ALPHA, targets)
    model.to(dtype)
    state = random_state(model)
    load_lora(model, state)
    return plain, model, state


@pytest.mark.parametrize("family", [*FAMILIES, "stablelm", "olmo2", "phi3", "falcon"])
def test_log_probs_and_gradients_are_those_of_merged_weights(family):
    plain, model, state = with_lora(family)
    leaves = {name: matrix.clone().requires_grad_() for name, matrix in state.items()}
    merged = Merged(plain, weights_of(plain, leaves))
    want = torch.stack([plain_logprob(merged, x, y) for x, y in zip(PROMPTS, RESPONSES)])
    got, _ = sequence_logprobs(model, PROMPTS, RESPONSES)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert (got - score(plain, PROMPTS, RESPONSES, max_tokens=100)[0]).abs().min() > 1e-3  # they do something

    factors = torch.tensor([1.0, -2.0, 0.5])
    (want * factors).sum().backward()
    (got * factors).sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(leaves) and all(name.endswith((".A", ".B")) for name in trained)
    for name, leaf in leaves.items():
        layer, _, letter = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        gradient = trained[f"{layer}.{letter}"]
        assert (gradient - leaf.grad).norm() <= 1e-6 * leaf.grad.norm(), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_merged_it_is_an_ordinary_model_that_says_the_same(family, tmp_path):
    plain, model, state = with_lora(family)
    want, _ = score(model, PROMPTS, RESPONSES, max_tokens=100)
    merge_lora(model)
    weights = plain.state_dict() | weights_of(plain, state)
    assert model.state_dict().keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=1e-12, atol=1e-12)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(part, LoRA) for part in model.modules())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(score(again, PROMPTS, RESPONSES, max_tokens=100)[0], want)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_outside_autocast_frozen_weights_of_16_bits_compute_in_float32(family):
    """As in the check before training, which is in float32 on a GPU too."""
    plain = tiny_model(family)
    for p in plain.parameters():
        p.data = p.data.bfloat16().float()  # as it was published
    add_lora(plain, R, ALPHA)
    load_lora(plain, random_state(plain))
    halved = copy.deepcopy(plain)
    for layer in linear_layers(halved).values():
        device.halve(layer)
        assert layer.weight.dtype == torch.bfloat16
    want, _ = sequence_logprobs(plain, PROMPTS, RESPONSES)
    got, _ = sequence_logprobs(halved, PROMPTS, RESPONSES)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    want.sum().backward()
    got.sum().backward()
    for p, q in zip(plain.parameters(), halved.parameters()):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad)
    remove_noise(halved)
    check_before_training(halved, Pair(PROMPTS[0], RESPONSES[0], RESPONSES[1]), [1])


def test_with_b_zero_it_is_the_reference_bit_for_bit():
    plain = tiny_model()
    want, _ = sequence_logprobs(plain, PROMPTS, RESPONSES)
    model = copy.deepcopy(plain)
    add_lora(model, R, ALPHA)
    assert torch.equal(sequence_logprobs(model, PROMPTS, RESPONSES)[0], want)
    load_lora(model, random_state(model))
    assert not torch.equal(sequence_logprobs(model, PROMPTS, RESPONSES)[0], want)
    load_lora(model, None)
    assert torch.equal(sequence_logprobs(model, PROMPTS, RESPONSES)[0], want)


def test_the_sum_is_float32_beside_weights_in_bfloat16():
    """B A x is a thousandth of W x, less than bfloat16 can add to it; and half of it is not lost in the product."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    part = LoRA(layer, 4, 8.0, torch.Generator().manual_seed(0))
    nn.init.normal_(part.B, std=2e-4)
    x = torch.randn(10, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        without, together = layer(x), part(x)
    change = together - without.float()
    want = 2.0 * x.double() @ part.A.double().T @ part.B.double().T
    assert together.dtype == torch.float32 and change.abs().mean() < 2e-3 * without.abs().mean()
    assert (change - want).norm() < 0.01 * want.norm()
    rounded = (together.bfloat16() - without).double()
    assert (rounded - want).norm() > 0.5 * want.norm()


def test_samples_are_those_of_merged_weights():
    plain, model, state = with_lora()
    plain.load_state_dict(weights_of(plain, state), strict=False)
    options = {"max_new_tokens": 40, "temperature": 1.0, "top_p": 1.0, "eos_token_id": 1, "pad_token_id": 0, "seed": 3}
    assert sample_responses(model, PROMPTS, 4, **options) == sample_responses(plain, PROMPTS, 4, **options)


def test_gradient_checkpointing_changes_no_gradient():
    _, model, _ = with_lora()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        sequence_logprobs(model, PROMPTS, RESPONSES)[0].sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_same_seed_gives_the_same_start():
    first, second, other = tiny_model(), tiny_model(), tiny_model()
    add_lora(first, R, ALPHA, seed=5)
    torch.rand(3)
    add_lora(second, R, ALPHA, seed=5)
    add_lora(other, R, ALPHA, seed=6)
    torch.testing.assert_close(lora_state(first), lora_state(second), rtol=0, atol=0)
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    a = lora_state(first)[name]
    assert not torch.equal(a, lora_state(other)[name])
    assert a.abs().max() <= 24**-0.5 < 1.5 * a.abs().max()  # uniform up to 1/√in


def test_which_layers():
    every = {name.rpartition(".")[2] for name in linear_layers(tiny_model())}
    assert every == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    _, _, state = with_lora(targets=["layers.1.mlp.up_proj", "q_proj"])
    of_layers = {name.removeprefix("base_model.model.model.layers.").rpartition(".lora_")[0] for name in state}
    assert of_layers == {"1.mlp.up_proj", "0.self_attn.q_proj", "1.self_attn.q_proj"}


@pytest.mark.parametrize("targets", [["w_proj"], ["q_proj", "lm_head"], ["proj"]])
def test_a_name_of_no_layer_is_refused(targets):
    with pytest.raises(ValueError, match=f"is called '{targets[-1]}'"):
        add_lora(tiny_model(), R, ALPHA, targets)


def test_a_model_without_linear_layers_is_refused():
    model = tiny_model()
    model.model.layers = nn.ModuleList()
    with pytest.raises(ValueError, match="no linear layer but perhaps its head"):
        add_lora(model, R, ALPHA)


def test_a_model_that_has_lora_is_refused():
    _, model, _ = with_lora()
    with pytest.raises(ValueError, match="has LoRA already"):
        add_lora(model, R, ALPHA)


def test_layers_that_share_their_weights_are_refused():
    model = tiny_model()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(ValueError, match=r"layers.1.mlp.gate_proj shares its weights"):
        add_lora(model, R, ALPHA)


def test_matrices_of_another_kind_are_refused():
    _, model, state = with_lora()
    name = next(iter(state))
    for wrong in (state | {name: state[name][:1]}, state | {"more": state[name]}, dict(list(state.items())[1:])):
        with pytest.raises(ValueError, match="not the matrices of this model"):
            load_lora(model, wrong)
    torch.testing.assert_close(lora_state(model), state, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_reads_a_state_to_the_same_log_probs(family, tmp_path):
    peft = pytest.importorskip("peft")
    plain, model, state = with_lora(family, dtype=torch.float32)
    want, _ = score(model, PROMPTS, RESPONSES, max_tokens=100)
    names = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in state})
    settings = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": names, "fan_in_fan_out": family == "gpt2"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file(state, tmp_path / "adapter_model.safetensors")
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).base_model.model
    torch.testing.assert_close(score(theirs, PROMPTS, RESPONSES, max_tokens=100)[0], want, rtol=1e-6, atol=1e-5)


def test_layers_of_one_shape_begin_with_different_matrices():
    model = tiny_model()
    add_lora(model, 3, 7.0)
    every_a = [matrix for name, matrix in lora_state(model).items() if "lora_A" in name]
    assert len(every_a) > 4 and len({str(a.tolist()) for a in every_a}) == len(every_a)


def test_what_is_merged_into_16_bits_is_float32():
    """A small step would be rounded away."""
    model = tiny_model().bfloat16()
    before = model.model.layers[0].self_attn.q_proj.weight.detach().float()
    add_lora(model, 3, 7.0)
    part = model.model.layers[0].self_attn.q_proj
    nn.init.normal_(part.B, std=1e-4)
    expected = before + 7 / 3 * part.B.detach() @ part.A.detach()
    merge_lora(model)
    merged = model.model.layers[0].self_attn.q_proj.weight.detach()
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-9)
