"""Sampling from the model's own distribution, with our settings alone; pairing; another engine's samples."""

import json
from contextlib import nullcontext

import pytest
import torch
from conftest import FAMILIES, tiny_model
from transformers import TopPLogitsWarper

from sera_min import bootstrap
from sera_min.bootstrap import best_worst_pairs, read_responses, sample_responses


def sample(model, prompts, n=2, **changed):
    settings = {"max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0, "eos_token_id": 1, "pad_token_id": 0, "seed": 0}
    return sample_responses(model, prompts, n, **{**settings, **changed})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_frequencies_are_the_model_s_whatever_its_generation_config_says(family):
    """Left padding, top_k = 50 by default, a repetition penalty: none of them may show in the samples."""
    model = tiny_model(family)
    model.generation_config.update(top_k=1, repetition_penalty=5.0, min_new_tokens=3, temperature=0.1, max_length=3)
    before = model.generation_config.to_dict()
    prompts = [[5, 6, 7, 8], [9]]
    got = sample(model, prompts, n=4000, max_new_tokens=1, temperature=2.0)
    assert model.generation_config.to_dict() == before
    for x, row in zip(prompts, got):
        with torch.no_grad():
            want = (model(input_ids=torch.tensor([x])).logits[0, -1] / 2.0).softmax(-1)
        share = torch.bincount(torch.tensor([y[0] for y, _ in row]), minlength=61) / 4000
        assert (share - want).abs().max() < 0.04


@pytest.mark.parametrize("family", FAMILIES)
def test_at_no_temperature_samples_are_the_model_s_own_greedy_answers(family, monkeypatch):
    """Read once for all samples, ended ones taken out, the rest gone on with: as if each prompt were alone."""
    monkeypatch.setattr(bootstrap, "STRIDE", 4)
    model, ends = tiny_model(family), list(range(1, 61, 4))
    prompts = [list(range(i, i + 1 + i % 5)) for i in range(2, 50, 3)]
    got = sample(model, prompts, n=3, max_new_tokens=22, temperature=1e-6, eos_token_id=ends)
    lengths = set()
    for x, row in zip(prompts, got):
        want = model.generate(input_ids=torch.tensor([x]), do_sample=False, max_new_tokens=22, eos_token_id=ends, pad_token_id=0)
        want = want[0, len(x) :].tolist()
        assert row == [(want, want[-1] in ends)] * 3
        lengths.add(len(want))
    assert len(lengths) > 1


def test_the_nucleus_is_transformers_own():
    model, x = tiny_model(), [5, 6]
    got = sample(model, [x], n=4000, max_new_tokens=1, top_p=0.7, temperature=1.5)[0]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([x])).logits[:, -1] / 1.5
    want = TopPLogitsWarper(0.7)(None, logits).softmax(-1)[0]
    share = torch.bincount(torch.tensor([y[0] for y, _ in got]), minlength=61) / 4000
    assert 1 < (want > 0).sum() < 61 and not share[want == 0].any() and (share - want).abs().max() < 0.04


def model_of(logits):
    """Whatever it reads, the next word's logits are these, and -inf of the words that are not named."""
    model, row = tiny_model(), torch.full((61,), -torch.inf)
    row[list(logits)] = torch.tensor(list(logits.values()))
    model.lm_head.register_forward_hook(lambda module, args, out: row.expand_as(out))
    return model


def test_the_nucleus_is_the_fewest_words_that_reach_top_p():
    """Of four words of probability 1/4 two make a half, not three."""
    got = sample(model_of({3: 0.0, 4: 0.0, 5: 0.0, 6: 0.0}), [[8]], n=200, max_new_tokens=1, top_p=0.5)[0]
    assert len({y[0] for y, _ in got}) == 2


def test_no_word_is_cut_off_where_top_p_is_1(monkeypatch):
    """One of probability 1e-9 is drawn by the number that is its own, though 1 + 1e-9 is 1 in float32."""
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.zeros(size, dtype=torch.float64))
    assert sample(model_of({3: 0.0, 60: -20.7}), [[8]], n=1, max_new_tokens=1) == [[([60], False)]]


def test_a_sample_ends_at_its_first_end_or_not_at_all():
    model, ends = tiny_model(), [1, 7, 9]
    rows = sample(model, [[5, 6], [8]], n=64, eos_token_id=ends, temperature=5.0)
    for y, ended in (s for row in rows for s in row):
        assert ended == (y[-1] in ends) and not set(y[:-1]) & set(ends)
        assert len(y) <= 6 and (ended or len(y) == 6)
    assert {ended for row in rows for _, ended in row} == {True, False}


def test_a_draw_is_as_likely_as_it_says_and_only_of_numbers():
    """Words of probability 0 never, at either end of the row; and no NaN becomes a word."""
    torch.manual_seed(0)
    p = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    share = torch.bincount(bootstrap.draw_tokens(p.expand(20_000, 6))[:, 0], minlength=6) / 20_000
    assert not share[p == 0].any() and (share - p).abs().max() < 0.02
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match="probabilities are not finite"):
        sample(model, [[5, 6]])
    with torch.no_grad():  # one prompt of two, in the batch of the other: its second token has no numbers
        model = tiny_model()
        model.get_input_embeddings().weight[6] = float("inf")
    with pytest.raises(FloatingPointError, match="probabilities are not finite"):
        sample(model, [[5, 6], [5, 7]])
    p = torch.tensor([[float("nan")] * 3, [0.0, 1.0, 0.0]])
    assert 0 <= bootstrap.draw_tokens(p)[0] < 3 and bootstrap.draw_tokens(p)[1] == 1  # and no other row is touched


def test_the_check_of_the_draws_is_made_once_a_batch(monkeypatch):
    """At every token a GPU would have to wait for it."""
    asked = []
    monkeypatch.setattr(torch, "stack", lambda parts, *a, real=torch.stack: (asked.append(len(parts)), real(parts, *a))[1])
    sample(tiny_model(), [[5, 6], [7], [8, 9]], max_new_tokens=6, max_tokens=16, eos_token_id=99)  # a batch each
    assert asked == [6, 6, 6]


def test_keys_are_cached_in_the_type_of_the_values_and_no_draw_changes(monkeypatch):
    model, kinds = tiny_model(), []

    def draw() -> list:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return sample(model, [[5, 6, 7], [8, 9]], n=3, max_new_tokens=40, eos_token_id=99)

    def watched(output, real=bootstrap.cache_of):
        cache = real(output)
        kinds.extend((layer.keys.dtype, layer.values.dtype) for one in cache.values() for layer in one.layers)
        return cache

    monkeypatch.setattr(bootstrap, "cache_of", watched)
    with_cast = draw()
    of_prompts, *others = kinds[:: model.config.num_hidden_layers]
    assert of_prompts == (torch.float32, torch.bfloat16) and {*others} == {(torch.bfloat16, torch.bfloat16)}
    monkeypatch.setattr(bootstrap, "keys_like_values", lambda cache: nullcontext())
    assert draw() == with_cast and kinds[-1] == (torch.float32, torch.bfloat16)


def test_a_draw_is_made_where_the_probabilities_are():
    """Whatever the default device is: on meta, which stands for another one, there are no numbers."""
    with torch.device("meta"):
        assert bootstrap.draw_tokens(torch.eye(3, device="cpu")).tolist() == [[0], [1], [2]]


def test_pad_may_be_the_end():
    rows = sample(tiny_model(), [[5, 6], [8]], n=32, pad_token_id=1, temperature=5.0)
    assert all(y.count(1) == ended for row in rows for y, ended in row)


def test_the_seed_decides_and_nothing_else_does():
    model, prompts = tiny_model(), [[5, 6, 7], [8], [9, 10]]
    torch.manual_seed(1)
    first, state = sample(model, prompts), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert sample(model, prompts) == first != sample(model, prompts, seed=1)
    assert [len(row) for row in sample(model, prompts, max_tokens=1)] == [2, 2, 2]
    assert sample(model, []) == []


@pytest.mark.parametrize("max_tokens, sizes", [(31, [1] * 5), (32, [2, 2, 1]), (48, [3, 2]), (1, [1] * 5)])
def test_a_batch_is_within_max_tokens_or_one_prompt(monkeypatch, max_tokens, sizes):
    """Two samples of a prompt of two tokens, and up to six more: 16 tokens of cache a prompt."""
    batches, continue_all = [], bootstrap.continue_all
    monkeypatch.setattr(bootstrap, "continue_all", lambda model, x, *rest: (batches.append(len(x)), continue_all(model, x, *rest))[1])
    sample(tiny_model(), [[5, 6]] * 5, max_tokens=max_tokens)
    assert batches == sizes


def test_a_gpu_s_generator_is_left_as_it_was_too(monkeypatch):
    """The GPU is played by the name of its device: nothing is sampled."""
    model, kept = tiny_model(), []
    monkeypatch.setattr(type(model), "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: (kept.extend(devices), nullcontext())[1])
    assert sample(model, []) == [] and kept == [torch.device("cuda", 0)]


def test_a_device_of_another_kind_has_room_too(monkeypatch):
    monkeypatch.setattr(bootstrap, "CACHE_TOKENS", {"cuda": 2**17})  # as if the CPU were none of those named
    assert [len(row) for row in sample(tiny_model(), [[5, 6], [7]])] == [2, 2]


def test_pairs_are_best_against_worst_and_every_drop_is_counted():
    rewards = [[1.0, 5.0, -2.0, 9.0], [1.0, 1.0, 0.0, 0.0], [3.0, 4.0], [2.0, 2.0], [float("nan"), 1.0, 2.0]]
    ended = [[True, True, True, False], [True] * 4, [True, False], [True, True], [False, True, True]]
    responses = [[[3, 1], [4, 1], [5, 1], [6]], [[3, 1], [3, 1], [4, 1], [4, 1]], [[3, 1], [4]], [[3, 1], [4, 1]], [[9], [3, 1], [4, 1]]]
    pairs, margins, dropped = best_worst_pairs(rewards, ended, responses)
    assert pairs == [(0, 1, 2), (1, 0, 2), (4, 2, 1)]  # prompt 0: the cut-off 9.0 is not the best
    assert margins.tolist() == [7.0, 1.0, 1.0]
    assert dropped == {"cut-off samples": 3, "identical samples": 2, "prompts without a pair": 2}


def test_samples_that_are_not_usable_are_never_paired():
    """Nor may they hide an identical one, or need a reward; and a cut-off one is counted as that alone."""
    rewards = [[9.0, 1.0, 2.0, -9.0], [float("nan"), 1.0, 3.0], [5.0, 1.0], [7.0, 8.0]]
    ended = [[True] * 4, [True] * 3, [True, True], [False, True]]
    responses = [[[3, 1], [4, 1], [5, 1], [6, 1]], [[3, 1], [3, 1], [4, 1]], [[3, 1], [4, 1]], [[3], [4, 1]]]
    usable = [[False, True, True, False], [False, True, True], [False, True], [False, False]]
    pairs, margins, dropped = best_worst_pairs(rewards, ended, responses, usable)
    assert pairs == [(0, 2, 1), (1, 2, 1)] and margins.tolist() == [1.0, 2.0]
    assert dropped == {"samples below --token_floor": 5, "cut-off samples": 1, "prompts without a pair": 2}
    every = [[True] * len(row) for row in ended]
    rewards[1][0] = 1.0
    for some in (None, every):  # without a bar, none is barred
        assert best_worst_pairs(rewards, ended, responses, some)[0] == [(0, 0, 3), (1, 2, 0), (2, 0, 1)]


def test_a_finished_sample_must_have_a_number():
    with pytest.raises(ValueError, match="prompt 0, sample 1: the reward is nan"):
        best_worst_pairs([[1.0, float("nan")]], [[True, True]], [[[3], [4]]])
    pairs, margins, dropped = best_worst_pairs([], [], [])
    assert pairs == [] and margins.shape == (0,) and not dropped


def encode(text):
    return [ord(c) for c in text]


def test_another_engine_s_samples(tmp_path):
    rows = [
        {"prompt": "p", "response": "ab", "finish_reason": "stop"}, {"prompt": "q", "response": "c"},
        {"prompt": "p", "response": "d", "finish_reason": "length"}, {"prompt": "p", "response": "", "finish_reason": None},
    ]  # fmt: skip
    file = tmp_path / "samples.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    prompts, samples = read_responses(file, encode, 1)
    assert prompts == ["p", "q"]
    assert samples == [[([97, 98, 1], True), ([100], False), ([1], True)], [([99, 1], True)]]
    responses, ended = ([[s[k] for s in row] for row in samples] for k in (0, 1))
    pairs, _, _ = best_worst_pairs([[0.0, 9.0, 1.0], [0.0]], ended, responses)
    assert pairs == [(0, 2, 0)]


def test_another_engine_s_samples_are_utf_8_whatever_the_machine_s_encoding(tmp_path, monkeypatch):
    monkeypatch.setattr(bootstrap, "open", lambda file, encoding=None: open(file, encoding=encoding or "ascii"), raising=False)  # noqa: SIM115
    file = tmp_path / "samples.jsonl"
    file.write_text('{"prompt": "naïve", "response": "é"}', encoding="utf-8")
    assert read_responses(file, encode, 1) == (["naïve"], [[([233, 1], True)]])


@pytest.mark.parametrize("line, what", [("{", "not JSON"), ("[]", "'prompt'"), ('{"prompt": "p"}', "'response'"), ('{"prompt": 3, "response": "a"}', "'prompt'")])
def test_another_engine_s_mistakes_are_named(tmp_path, line, what):
    file = tmp_path / "samples.jsonl"
    file.write_text('{"prompt": "p", "response": "a"}\n' + line)
    with pytest.raises(ValueError, match=f"line 2: .*{what}"):
        read_responses(file, encode, 1)
