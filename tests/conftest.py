"""The fixtures that tests share. Heavy imports are inside: pytest-xdist loads this file once more before its workers start."""

import gc
import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what a GPU does is checked by experiments/gpu_check.py

import pytest
from hypothesis import settings

settings.register_profile("ours", deadline=None)  # on a busy machine any example may take long
settings.load_profile("ours")
gc.disable()  # while everything is imported, where a collection of garbage finds next to nothing, and takes seconds in all
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores


LONGEST = """test_run test_with_trl test_neighbours test_oracle test_variants test_claims test_reported test_drawn
    test_pause test_families test_bootstrap test_bench test_logprobs test_data test_kills""".split()


def pytest_collection_modifyitems(items):
    """On several cores the files that take longest begin first, and the short ones fill up the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish():
    """What is imported by now stays: a collection of garbage need not look at it, which takes half a second each time."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A saved llama and tokenizer, as a user would have one."""
    from shared import bpe_tokenizer, tiny_model

    folder = tmp_path_factory.mktemp("model")
    tokenizer = bpe_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sft():
    """The playground's SFT policy after two seconds of training, and its tokenizer. Runs take a copy."""
    from sera_min import playground

    return playground.make_sft_policy(0, "cpu", steps=100, batch=16)


@pytest.fixture
def small_world(tmp_path, monkeypatch, sft):
    """The playground of experiments/study.py in seconds: few prompts and pairs, short answers, and this SFT policy."""
    import study

    from sera_min import playground

    every, rows = playground.prompts, playground.preferences
    monkeypatch.setattr(playground, "prompts", lambda part: every(part)[:6])
    monkeypatch.setattr(playground, "preferences", lambda n, part, **others: rows(min(n, 16), part, **others))
    monkeypatch.setattr(playground, "make_sft_policy", lambda *_: sft)
    monkeypatch.setitem(playground.DEFAULTS, "max_new_tokens", 12)  # up to two sentences
    monkeypatch.setitem(playground.DEFAULTS, "max_train_pairs", 16)
    monkeypatch.setattr(study, "SFT", tmp_path / "sft")
    study.make_sft(0)
