"""The fixtures that tests share. Heavy imports are inside: pytest-xdist loads this file once more before its workers start."""

import gc
import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what a GPU does is checked by experiments/gpu_check.py

import pytest

gc.disable()  # while everything is imported, where a collection of garbage finds next to nothing, and takes seconds in all
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores


APART = {"test_bench", "test_drawn", "test_families", "test_oracle", "test_pause", "test_variants"}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """A file is on one core, where what its tests share is made once. The tests of APART share next to nothing: they come
    last, each on the core that is free."""
    for item in items:
        if item.path.stem not in APART:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


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
