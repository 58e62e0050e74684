"""What depends on the device. GPUs are played by what torch says of them: nothing runs on one."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from shared import tiny_model, word_tokenizer

from sera_min import bootstrap
from sera_min.machinery import policies
from sera_min.machinery.config import Config, resolve
from sera_min.machinery.device import autocast, check_memory, has_bfloat16, prepare
from sera_min.machinery.errors import InputError


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
    says = r"needs 0 GB .* two moments(, bfloat16 copy)?\) and room for activations; the GPU has 0 GB. Take a smaller model"
    with pytest.raises(InputError, match=says) as refusal:
        check_memory(model, "cuda:1")
    assert ("bfloat16 copy" in str(refusal.value)) == bfloat16


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


def test_a_second_gpu_samples_as_much_at_a_time_as_the_first(tmp_path, monkeypatch):
    """No samples are drawn: what counts is the room that they are asked for."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(policies, "autocast", lambda device: nullcontext())
    monkeypatch.setattr(bootstrap, "sample_responses", lambda *_, max_tokens, **__: max_tokens)
    for device in ("cuda", "cuda:1"):
        held = policies.Policies(tmp_path, resolve(Config(device=device)))
        held.hold(0, tiny_model(), word_tokenizer([]))
        assert held.draw(0, [[5]], 2, seed=0) == bootstrap.CACHE_TOKENS["cuda"]
