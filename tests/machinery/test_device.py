"""What depends on the device. GPUs are played by what torch says of them: nothing runs on one."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from shared import tiny_model, word_tokenizer

from sera_min import bootstrap
from sera_min.logprobs import sequence_logprobs
from sera_min.machinery import device, policies
from sera_min.machinery.config import Config, command_line, resolve
from sera_min.machinery.device import autocast, check_memory, has_bfloat16, prepare, uncompiled
from sera_min.machinery.errors import InputError
from sera_min.machinery.run import Run
from sera_min.pairs import Pair, Preferences


@pytest.fixture(params=[True, False], ids=["with bfloat16", "without"])
def bfloat16(request, monkeypatch) -> bool:
    """Two GPUs: one as it is asked for, another of the other kind."""
    current = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(current.append(str(device))))
    supported = lambda including_emulation: request.param == (current[-1] == "cuda:1") and not including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    return request.param


def test_products_are_bfloat16_where_that_gpu_has_it(bfloat16, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: (kind, dtype, enabled))
    assert autocast("cuda:1") == ("cuda", torch.bfloat16, bfloat16)
    assert autocast("cuda") == ("cuda", torch.bfloat16, not bfloat16)
    assert autocast("cpu") == ("cpu", torch.bfloat16, False) and not has_bfloat16("cpu")


def test_a_gpu_without_bfloat16_is_said_at_the_start(bfloat16, monkeypatch, capsys):
    matmul = SimpleNamespace(allow_tf32=False)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device}")
    prepare("cpu")
    assert not matmul.allow_tf32
    prepare("cuda:1")
    says = "" if bfloat16 else "Card cuda:1 has no bfloat16: all products are float32, which is slow\n"
    assert matmul.allow_tf32 and capsys.readouterr().out == says


def test_what_does_not_fit_the_gpu_is_refused_at_the_start(bfloat16, monkeypatch):
    model = tiny_model()
    needed = (18 if bfloat16 else 16) * sum(p.numel() for p in model.parameters())
    for there, fits in ((needed, True), (needed - 1, False)):
        of_gpu = SimpleNamespace(total_memory=there)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, of_gpu=of_gpu: of_gpu)
        check_memory(model, "cpu")
        if fits:
            check_memory(model, "cuda:1")
    each = 18 if bfloat16 else 16
    says = f"needs 0 GB, {each} bytes for each parameter that is trained, and room for activations; the GPU has 0 GB"
    with pytest.raises(InputError, match=says):
        check_memory(model, "cuda:1")


def test_what_does_not_fit_never_reaches_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda name: SimpleNamespace(total_memory=1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(device, "has_bfloat16", lambda name: True)
    for kind, flags in ((policies.Policies, {}), (policies.LoRAPolicies, {"use_peft": True})):
        model = tiny_model()
        monkeypatch.setattr(model, "to", lambda *_: pytest.fail("it is moved"))
        with pytest.raises(InputError, match="the model needs 0 GB"):
            kind(tmp_path, resolve(Config(device="cuda", **flags))).hold(0, model, word_tokenizer([]))


def test_without_memory_the_advice_can_be_followed(tmp_path, monkeypatch):
    def main(flags):
        raise torch.OutOfMemoryError

    for remedy in ("begin with --gradient_checkpointing or --use_peft", "resume with --gradient_checkpointing"):
        with pytest.raises(SystemExit, match=f"out of GPU memory: {remedy}, or begin with a smaller --max_length"):
            command_line(main, "", ["--output_dir", str(tmp_path)])
        (tmp_path / "config.json").touch()


def test_what_is_frozen_needs_its_own_bytes_alone(monkeypatch):
    model = tiny_model()
    model.requires_grad_(False)
    model.lm_head.to(torch.bfloat16).requires_grad_(True)
    monkeypatch.setattr(device, "has_bfloat16", lambda device: True)
    needed = sum(p.nbytes for p in model.model.parameters()) + 18 * model.lm_head.weight.numel()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=needed))
    check_memory(model, "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=needed - 1))
    with pytest.raises(InputError, match="needs 0 GB"):
        check_memory(model, "cuda")


def test_a_device_is_a_gpu_that_is_there_or_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [resolve(Config(device=name)).device for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    for name, says in [
        ("cuda:2", "--device is 'cuda:2': expected one of cpu, cuda:0, cuda:1, cuda$"),
        ("mps", "--device is 'mps': expected one of cpu"), ("cuda:", "expected one of cpu"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=says):
            resolve(Config(device=name))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="--device is 'cuda': expected one of cpu$"):
        resolve(Config(device="cuda"))


def test_sampling_takes_what_the_memory_has_room_for(tmp_path, monkeypatch):
    """No samples are drawn: what counts is the room that they are asked for."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(policies, "autocast", lambda device: nullcontext())
    monkeypatch.setattr(bootstrap, "sample_responses", lambda *_, max_tokens, **__: max_tokens)
    model, free = tiny_model(), 0
    monkeypatch.setattr(device, "free_memory", lambda name: free)
    config = resolve(Config(device="cuda:1"))
    held = policies.Policies(tmp_path, resolve(Config(device="cpu")))
    held.hold(0, model, word_tokenizer([]))
    held.config = config
    of_cache = 2 * 4 * 2 * 1 * 8  # keys and values in float32, 2 layers, 1 head of 8
    of_row = 40 * 61 / (config.max_prompt_length + config.max_new_tokens)
    for free in (10**6, 10**12):
        tokens = held.draw(0, [[5]], 2, seed=0)
        assert tokens == min(int(0.5 * free / (of_cache + of_row)), 2**20)


def test_a_training_pass_takes_what_the_memory_has_room_for(monkeypatch):
    """Of a GPU whose passes take 1 MB, and 1 kB a token."""
    model, tokens = tiny_model(), []
    weights = sum(p.numel() for p in model.parameters())
    real = device.sequence_logprobs

    def watched(policy, prompts, responses):
        assert policy.training
        tokens.append(sum(map(len, prompts + responses)))
        return real(policy, prompts, responses)

    monkeypatch.setattr(device, "sequence_logprobs", watched)
    monkeypatch.setattr(device, "has_bfloat16", lambda name: False)
    monkeypatch.setattr(device, "autocast", lambda name: nullcontext())
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda name: 10**9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda name: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda name: 10**9 + 10**6 + 1000 * tokens[-1])
    monkeypatch.setattr(device, "free_memory", lambda name: 10**8)
    found = device.training_tokens(model, 31, "cuda")
    assert found == pytest.approx((0.9 * 10**8 - 12 * weights - 10**6) / 1000, abs=2)
    assert not model.training and all(p.grad is None for p in model.parameters())

    def too_large(policy, prompts, responses):
        if len(prompts) == 8:
            raise torch.OutOfMemoryError
        return real(policy, prompts, responses)

    monkeypatch.setattr(device, "sequence_logprobs", too_large)
    assert device.training_tokens(model, 31, "cuda") == 0
    assert not model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("first", "then", "expected"), [
    (10**6, None, (32768, False)), (9000, None, (9000, False)), (3000, 20000, (20000, True)), (-5, 10, (128, True)),
    (0, 128, (128, True)), (0, 127, (128, True)),
])  # fmt: skip
def test_where_few_tokens_fit_gradients_are_checkpointed(first, then, expected, tmp_path, monkeypatch, capsys):
    found = [first, then]
    monkeypatch.setattr(device, "training_tokens", lambda policy, length, name: found.pop(0))
    run = Run.__new__(Run)
    run.config = resolve(Config(device="cpu", max_length=64))
    run.policies = policies.Policies(tmp_path, run.config)
    run.policies.hold(0, tiny_model(), word_tokenizer([]))
    run.find_max_tokens()
    tokens, checkpointing = expected
    assert (run.config.max_tokens, run.config.gradient_checkpointing) == expected and run.policies.config == run.config
    assert run.policies.get(0).is_gradient_checkpointing == checkpointing
    fits = ", one pair: even that may be too much for" if then in (10, 127) else " fit into"
    ends = ", with gradient checkpointing" if checkpointing else ""
    assert capsys.readouterr().out == f"--max_tokens {tokens}{fits} the GPU's memory{ends}\n"


def test_log_probs_are_checked_again_as_a_run_in_bfloat16_computes_them(tmp_path, monkeypatch):
    checks = []
    monkeypatch.setattr("sera_min.machinery.run.check_before_training", lambda *_, allowed=None: checks.append(allowed))
    run = Run.__new__(Run)
    run.config = resolve(Config(device="cpu"))
    run.policies = policies.Policies(tmp_path, run.config)
    run.policies.hold(0, tiny_model(), word_tokenizer([]))
    run.given = Preferences([Pair([5], [6], [7])])
    run.check_model()
    assert checks == [None]
    monkeypatch.setattr("sera_min.machinery.run.has_bfloat16", lambda name: True)
    run.check_model()
    assert checks == [None, None, 0.2]


def test_compiled_layers_compute_the_same_and_sampling_leaves_them_alone(monkeypatch):
    model, calls = tiny_model(), []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    rows = [[5, 6, 7], [8, 9]], [[4, 1], [3, 3, 1]]
    plain, _ = sequence_logprobs(model, *rows)
    device.compile_layers(model, backend)
    with uncompiled():
        sequence_logprobs(model, *rows)
    assert not calls
    torch.testing.assert_close(sequence_logprobs(model, *rows)[0], plain)
    assert calls


def test_without_a_compiler_layers_are_not_compiled(capsys, monkeypatch):
    assert not device.can_compile("cpu")
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: 1 / 0)
    monkeypatch.setattr(torch, "ones", lambda n, device: n)
    assert not device.can_compile("cuda")
    assert capsys.readouterr().out == "layers are not compiled, and a step takes longer: division by zero\n"
