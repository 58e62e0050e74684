"""Sampling from the model's own distribution, with our settings alone; what ended; pairing."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared import FAMILIES, tiny_model
from transformers import TopPLogitsWarper

from sera_min import bootstrap
from sera_min.bootstrap import best_worst_pairs, ended_responses, plain_sample, sample_responses


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
        assert (share - want).abs().max() < 0.02


def test_the_plain_sampler_draws_from_the_same_distribution():
    """Greedily the same tokens and ends; at temperature 2 each first token as often as the model says."""
    model = tiny_model(num_hidden_layers=1)
    prompts = [[5, 6, 7, 8], [9], [17, 3], [40]]
    cold = {"max_new_tokens": 12, "temperature": 1e-6}
    ends = [1, *{y for [(ys, _)] in sample(model, prompts, n=1, **cold) for y in ys[3:5]}]
    for end in ends:
        fast = sample(model, prompts, n=1, eos_token_id=end, **cold)
        assert fast == [[plain_sample(model, x, 12, 1e-6, end)] for x in prompts]
    assert len(ends) > 2
    with torch.no_grad():
        answer = model(input_ids=torch.tensor([[9]]))
        want = (answer.logits[0, -1] / 2.0).softmax(-1)
    torch.manual_seed(0)
    model.forward = lambda input_ids: answer  # the same every time, and at once
    drawn = [plain_sample(model, [9], 1, 2.0, 1)[0][0] for _ in range(1500)]
    share = torch.bincount(torch.tensor(drawn), minlength=61) / 1500
    assert (share - want).abs().max() < 0.025  # the uniform distribution is twice as far away


@pytest.mark.parametrize("family", FAMILIES)
def test_at_no_temperature_samples_are_the_model_s_own_greedy_answers(family, monkeypatch):
    """Read once for all samples, ended ones taken out, the rest gone on with: as if each prompt were alone."""
    monkeypatch.setattr(bootstrap, "STRIDE", 4)
    model, ends = tiny_model(family), list(range(1, 61, 4))
    prompts = [list(range(i, i + 1 + i % 5)) for i in range(2, 50, 6)]
    got = sample(model, prompts, n=3, max_new_tokens=22, temperature=1e-6, eos_token_id=ends)
    lengths = set()
    for x, row in zip(prompts, got):
        want = model.generate(
            input_ids=torch.tensor([x]), do_sample=False, max_new_tokens=22, eos_token_id=ends, pad_token_id=0
        )
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
    monkeypatch.setattr(
        torch, "stack", lambda parts, *a, real=torch.stack: (asked.append(len(parts)), real(parts, *a))[1]
    )
    sample(tiny_model(), [[5, 6], [7], [8, 9]], max_new_tokens=6, max_tokens=16, eos_token_id=99)  # a batch each
    assert asked == [6, 6, 6]


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
    monkeypatch.setattr(
        bootstrap, "continue_all", lambda model, x, *rest: (batches.append(len(x)), continue_all(model, x, *rest))[1]
    )
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


def test_what_ended_is_flattened_and_what_was_cut_off_is_counted():
    samples = [[([3, 1], True), ([4, 5], False)], [([6, 7], False)], [], [([8, 1], True), ([1], True)]]
    assert ended_responses(samples) == ([0, 3, 3], [[3, 1], [8, 1], [1]], 2)
    assert ended_responses([]) == ([], [], 0)


@pytest.mark.parametrize("ended", ["length", "stop", None, 1])
def test_whether_a_sample_ended_is_a_bool(ended):
    """An engine's "length" is true as `if` sees it: cut-off samples would be paired in silence."""
    with pytest.raises(TypeError, match=f"prompt 1, sample 1: ended is {ended!r}"):
        ended_responses([[], [([3, 1], True), ([4], ended)]])


def pairs_of(prompt_of, responses, rewards):
    best, worst, dropped = best_worst_pairs(prompt_of, responses, torch.tensor(rewards))
    assert best.dtype == worst.dtype == torch.int64 and best.shape == worst.shape == (len(best),)
    return best.tolist(), worst.tolist(), dropped


def test_pairs_are_best_against_worst_and_every_drop_is_counted():
    prompt_of = [0, 0, 0, 1, 1, 1, 1, 2, 3, 3, 5, 5]
    responses = [[3, 1], [4, 1], [5, 1], [3, 1], [3, 1], [4, 1], [4, 1], [3, 1], [3, 1], [4, 1], [3, 1], [4, 1]]
    rewards = [1.0, 5.0, -2.0, 1.0, 1.0, 0.0, 0.0, 3.0, 2.0, 2.0, 1.0, 2.0]
    best, worst, dropped = pairs_of(prompt_of, responses, rewards)
    assert (best, worst) == ([1, 3, 11], [2, 5, 10])
    assert dropped == {"identical samples": 2, "prompts without a pair": 2}  # a single one; a tie


def test_of_equal_rewards_the_first_row_is_taken():
    assert pairs_of([0] * 4, [[3], [4], [5], [6]], [1.0, 2.0, 2.0, 1.0])[:2] == ([1], [0])


def test_a_prompt_s_rows_need_not_stand_together():
    assert pairs_of([7, 2, 7, 2], [[3], [3], [4], [4]], [0.0, 1.0, 2.0, -1.0])[:2] == ([2, 1], [0, 3])


def test_a_row_without_a_reward_is_never_paired():
    """Nor does it hide an identical one."""
    nan = float("nan")
    prompt_of = [0, 0, 0, 0, 1, 1, 1, 2, 2]
    responses = [[3, 1], [4, 1], [5, 1], [6, 1], [3, 1], [3, 1], [4, 1], [3, 1], [4, 1]]
    best, worst, dropped = pairs_of(prompt_of, responses, [nan, 1.0, 2.0, nan, nan, 1.0, 3.0, 1.0, nan])
    assert (best, worst) == ([2, 6], [1, 5])
    assert dropped == {"samples without a reward": 4, "prompts without a pair": 1}
    naive = torch.tensor([nan, 1.0, 2.0]).argmax()
    assert naive == 0  # what would happen: the row without a reward is the best of all


def test_no_rows_give_no_pairs():
    assert pairs_of([], [], []) == ([], [], {})
    best, worst, _ = best_worst_pairs([], [], torch.empty(0))
    assert torch.empty(0)[best].shape == torch.empty(0)[worst].shape == (0,)


def test_a_reward_is_a_number():
    for infinite in (float("inf"), -float("inf")):
        with pytest.raises(ValueError, match=f"row 1: the reward is {infinite}"):
            best_worst_pairs([0, 0, 0], [[3], [4], [5]], torch.tensor([1.0, infinite, 2.0]))


def test_rows_of_different_lengths_or_types_are_refused():
    three = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(AttributeError, match="'list' object has no attribute"):
        best_worst_pairs([0, 0], [[3], [4]], [1.0, 2.0])
    with pytest.raises(ValueError, match="argument 3 is longer"):
        best_worst_pairs([0, 0], [[3], [4]], three)
    with pytest.raises(ValueError, match="argument 3 is shorter"):
        best_worst_pairs([0, 0, 0], [[3], [4], [5]], three[:2])
    with pytest.raises(TypeError, match="must be real number, not list"):
        best_worst_pairs([0, 0, 0], [[3], [4], [5]], three[:, None])
    with pytest.raises(ValueError, match="argument 2 is longer"):
        best_worst_pairs([0, 0], [[3], [4], [5]], three)
    same = torch.tensor([3, 1])
    assert len({tuple(same), tuple(same.clone())}) == 2  # what would happen: the two are taken for different ones
    with pytest.raises(TypeError, match="row 0: the response is a Tensor, expected a list of token ids"):
        best_worst_pairs([0, 0], [same, same], three[:2])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.sampled_from([0.0, 1.0, 2.0, float("nan")]))))
def test_pairs_against_a_search_of_all_two_rows(rows):
    """The widest margin of two rows of a prompt, if it is above 0; earlier rows where there are several such."""
    prompt_of, responses, rewards = [i for i, _, _ in rows], [[3 + y, 1] for _, y, _ in rows], [r for _, _, r in rows]
    best, worst, dropped = best_worst_pairs(prompt_of, responses, torch.tensor(rewards))
    expected, identical, seen = {}, 0, set()
    usable = []
    for k, row in enumerate(rows):
        if row[2] == row[2]:
            identical += row[:2] in seen
            usable += [k] if row[:2] not in seen else []
            seen.add(row[:2])
    for i in dict.fromkeys(prompt_of):
        found = [(rewards[w] - rewards[l], -w, -l) for w in usable for l in usable if prompt_of[w] == prompt_of[l] == i]
        margin, w, l = max(found, default=(0.0, 0, 0))
        if margin > 0:
            expected[i] = (-w, -l)
    assert list(zip(best.tolist(), worst.tolist())) == list(expected.values())
    assert dropped["identical samples"] == identical
    assert dropped["samples without a reward"] == sum(r != r for r in rewards)
    assert dropped["prompts without a pair"] == len({*prompt_of}) - len(expected)


def test_from_prompts_to_pairs():
    """The three functions hand on to each other what they return."""
    model = tiny_model()
    samples = sample(model, [[5, 6], [7]], n=32, temperature=5.0, eos_token_id=[1, 7, 9])
    prompt_of, responses, cut_off = ended_responses(samples)
    assert cut_off + len(responses) == 64 and 0 < cut_off < 64
    rewards = torch.tensor([float(len(y)) for y in responses])
    best, worst, _ = best_worst_pairs(prompt_of, responses, rewards)
    assert len(best) == 2 and (rewards[best] > rewards[worst]).all()
    assert [prompt_of[i] for i in best.tolist()] == [prompt_of[i] for i in worst.tolist()] == [0, 1]


@pytest.mark.parametrize(("changed", "says"), [
    ({"temperature": 0.0}, "temperature 0.0, .* expected numbers above 0"), ({"temperature": -1.0}, "above 0"),
    ({"top_p": 0.0}, "top_p at most 1"), ({"top_p": 50.0}, "top_p at most 1"), ({"max_new_tokens": 0}, "above 0"),
    ({"eos_token_id": []}, "eos_token_id is missing"), ({"eos_token_id": None}, "eos_token_id is missing"),
    ({"pad_token_id": None}, "pad_token_id is missing: any token will do"),
])  # fmt: skip
def test_numbers_that_make_no_sense_are_an_error(changed, says):
    options = {"max_new_tokens": 3, "temperature": 1.0, "top_p": 1.0, "eos_token_id": 1, "pad_token_id": 0, "seed": 0}
    with pytest.raises(ValueError, match=says):
        sample_responses(tiny_model(), [[5, 6]], 2, **options | changed)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sample_responses(tiny_model(), [[5, 6], []], 2, **options)


def test_a_row_that_is_left_is_read_without_padding(monkeypatch):
    """Where the cache does not serve, and the model looks at padding if a batch is one row, as Mamba-2 before 5.16 does."""

    def of_one_row(hidden, mask):
        if mask is not None and mask.shape[0] > 1 and mask.shape[1] > 1:
            return hidden * mask[:, :, None]
        return hidden

    monkeypatch.setattr("transformers.models.mamba2.modeling_mamba2.apply_mask_to_padding_states", of_one_row)
    monkeypatch.setattr(bootstrap, "STRIDE", 4)
    monkeypatch.setitem(
        FAMILIES, "mamba2", {"num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 8}
    )
    model, long, short = tiny_model("mamba2", hidden_size=16), list(range(30, 45)), [7, 8]
    greedily = {"n": 1, "temperature": 1e-6, "pad_token_id": 50}
    alone = sample(model, [short], max_new_tokens=16, eos_token_id=99, **greedily)[0]  # it never ends
    first = sample(model, [long], max_new_tokens=4, eos_token_id=99, **greedily)[0][0][0]
    ends = [token for token in first if token not in alone[0][0]]
    together = sample(model, [long, short], max_new_tokens=16, eos_token_id=ends, **greedily)
    assert ends and together[0][0][1] and together[1] == alone


def test_every_part_of_a_model_has_its_settings_back():
    """A model of PEFT hands what it is given on to its base, which a merge takes out."""

    class Wrapped(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.device, self.generation_config = base, base.device, base.generation_config

        def generate(self, **inputs):
            self.base.generation_config = self.generation_config
            return self.base.generate(**inputs)

    model = tiny_model()
    settings = model.generation_config
    sample(Wrapped(model), [[5, 6], [7]])
    assert model.generation_config is settings


def test_a_model_in_training_mode_is_sampled_without_dropout():
    """Nearly at temperature 0: all samples are the greedy one."""
    model = tiny_model("gpt2", resid_pdrop=0.5).train()
    [samples] = sample(model, [[5, 6]], n=8, max_new_tokens=12, temperature=1e-6, eos_token_id=60)
    assert samples == [samples[0]] * 8


def test_after_an_error_the_model_has_its_own_settings_again():
    """Where memory has run out sampling is tried again."""
    model = tiny_model("gpt2").train()
    settings = model.generation_config
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(FloatingPointError):
        sample(model, [[5, 6]])
    assert model.generation_config is settings and model.training
