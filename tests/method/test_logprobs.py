"""log π(y|x) against a float64 loop, one token at a time, no batching, on the logits of the model as its authors wrote it."""

import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from shared import FAMILIES, tiny_model

from sera_min import bootstrap, logprobs
from sera_min.logprobs import (
    implicit_reward,
    plain_logprob,
    score,
    sequence_logprobs,
    token_batches,
    token_logprobs,
)  # fmt: skip


def ragged(n=5, vocab=61, seed=0):
    rng = random.Random(seed)
    rows = [([rng.randrange(3, vocab) for _ in range(rng.randint(1, 9))],
             [rng.randrange(3, vocab) for _ in range(rng.randint(1, 7))] + [1]) for _ in range(n)]  # fmt: skip
    return [x for x, _ in rows], [y for _, y in rows]


def brute_force(model, prompts, responses):
    """Σ log softmax(logits(x, y_<i))[y_i], every term a forward pass of its own, in float64."""
    sums = []
    for x, y in zip(prompts, responses):
        terms = [
            model(input_ids=torch.tensor([x + y[:i]])).logits[0, -1].log_softmax(-1)[token] for i, token in enumerate(y)
        ]
        sums.append(torch.stack(terms).sum())
    return torch.stack(sums)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_gradients_are_the_float64_loop_s(family):
    prompts, responses = ragged()
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])  # every row its own upstream gradient
    model, exact = tiny_model(family), tiny_model(family).double()
    sums, counts = sequence_logprobs(model, prompts, responses)
    want = brute_force(exact, prompts, responses)
    assert sums.dtype == torch.float32 and counts.tolist() == [len(y) for y in responses]
    torch.testing.assert_close(sums.double(), want, rtol=1e-5, atol=1e-5)
    (sums * weights).sum().backward()
    (want * weights).sum().backward()
    whole = torch.stack([q.grad.norm() for q in exact.parameters() if q.grad is not None]).norm()
    for (name, p), q in zip(model.named_parameters(), exact.parameters()):
        if q.grad is None:
            assert p.grad is None or not p.grad.any(), name
            continue
        # opt's k_proj.bias shifts every attention score of a row alike: its gradient is 0, but for float32's rounding
        error, allowed = (
            (p.grad.double() - q.grad).norm(),
            1e-5 * q.grad.norm() + torch.finfo(torch.float32).eps * whole,
        )
        assert error < allowed, f"{name}: {error} > {allowed}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_form_is_the_float64_loop_s_sum(family):
    """plain_logprob, with which logprobs.py begins, is an oracle: float64 where the model is (gemma2's softmax is not)."""
    exact = tiny_model(family).double()
    for x, y in zip(*ragged()):
        torch.testing.assert_close(plain_logprob(exact, x, y), brute_force(exact, [x], [y])[0], rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    "tied, frozen", [(False, None), (False, "body"), (False, "head"), (True, None), (True, "head")]
)
@pytest.mark.parametrize("by_grad", [False, True])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-7), (torch.float32, 1e-5)])
def test_gradients_are_the_plain_form_s_whoever_asks_for_them(monkeypatch, tied, frozen, by_grad, dtype, bound):
    """By backward and by autograd.grad, to a tied head, above a frozen body, below a frozen head; chunks of two rows.

    Within a float64 llama the norms are float32: 1e-7.
    """
    monkeypatch.setattr(logprobs, "HEAD_LOGITS", {"cpu": 2 * 61})
    prompts, responses = ragged()
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])

    def gradients_of(model, logps):
        if frozen:
            (model.model if frozen == "body" else model.lm_head).requires_grad_(False)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        loss = (logps(model) * weights).sum()
        if by_grad:
            got = torch.autograd.grad(loss, list(named.values()))
            assert all(p.grad is None for p in model.parameters())
            return dict(zip(named, got))
        loss.backward()
        return {name: p.grad for name, p in named.items()}

    def plain(model):
        return torch.stack([plain_logprob(model, x, y) for x, y in zip(prompts, responses)])

    settings = {"tie_word_embeddings": tied}
    got = gradients_of(tiny_model(**settings).to(dtype), lambda model: sequence_logprobs(model, prompts, responses)[0])
    want = gradients_of(tiny_model(**settings).double(), plain)
    assert got.keys() == want.keys() and ("lm_head.weight" in want) == (not tied and frozen != "head")
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() < bound * gradient.norm(), name


def test_gradients_of_several_passes_add_up_and_a_graph_may_be_kept():
    model, (prompts, responses) = tiny_model(), ragged()
    loss = sequence_logprobs(model, prompts, responses)[0].sum()
    loss.backward(retain_graph=True)
    once = model.lm_head.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(model.lm_head.weight.grad, 2 * once)


class Logps(torch.nn.Module):
    """What a user wraps for distributed training: DDP knows only `forward`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, prompts, responses):
        return sequence_logprobs(self.model, prompts, responses)[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_plain_ddp_sees_every_gradient_once(monkeypatch, tmp_path, reentrant):
    """One process of DDP, its bookkeeping as ever; the number of chunks changes between steps, as lengths do.

    A reentrant checkpoint fails here: each chunk's backward pass reports the head's gradient as ready once more.
    """
    monkeypatch.setattr(logprobs, "HEAD_LOGITS", {"cpu": 2 * 61})
    if reentrant:
        real = logprobs.checkpoint
        monkeypatch.setattr(logprobs, "checkpoint", lambda *args, **_: real(*args, use_reentrant=True))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, exact = tiny_model(), tiny_model().double()
        wrapped = torch.nn.parallel.DistributedDataParallel(Logps(model))
        with pytest.raises(RuntimeError, match="ready") if reentrant else nullcontext():
            for step, n in enumerate((3, 7, 1)):
                prompts, responses = ragged(n, seed=step)
                for one in (model, exact):
                    one.zero_grad()
                wrapped(prompts, responses).sum().backward()
                sum(plain_logprob(exact, x, y) for x, y in zip(prompts, responses)).backward()
                for p, q in zip(model.parameters(), exact.parameters()):
                    assert (p.grad - q.grad).norm() < 1e-5 * q.grad.norm()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_the_naive_head_is_wrong_where_the_model_has_its_own(family):
    """What we must not do: hidden states times the head's weights."""
    model, (prompts, responses) = tiny_model(family), ragged(1)
    ids = torch.tensor([prompts[0] + responses[0]])
    with torch.no_grad():
        naive = model.get_output_embeddings()(model.base_model(input_ids=ids).last_hidden_state).log_softmax(-1)
        rows = torch.arange(len(prompts[0]) - 1, ids.shape[1] - 1)
        naive = naive[0, rows, torch.tensor(responses[0])].sum()
        assert (naive - sequence_logprobs(model, prompts, responses)[0][0]).abs() > 0.1


def test_chunks_change_nothing_and_full_logits_never_exist(monkeypatch):
    model, (prompts, responses) = tiny_model(), ragged()
    model.zero_grad()
    whole = sequence_logprobs(model, prompts, responses)[0]
    whole.sum().backward()
    gradient = model.lm_head.weight.grad.clone()
    largest = []
    model.lm_head.register_forward_hook(lambda module, args, out: largest.append(out[..., 0].numel()))

    tokens = sum(map(len, responses))
    monkeypatch.setattr(logprobs, "HEAD_LOGITS", {"cpu": 2 * 61})  # two rows of a vocabulary of 61
    model.zero_grad()
    chunked = sequence_logprobs(model, prompts, responses)[0]
    chunked.sum().backward()
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.lm_head.weight.grad, gradient, rtol=1e-4, atol=1e-5)
    assert max(largest) == 2 and sum(largest) == 2 * tokens  # each row once forward, once again in backward


def test_the_model_is_left_as_it_was():
    model, (prompts, responses) = tiny_model(), ragged()
    before = model(input_ids=torch.tensor([prompts[0]])).logits
    hook = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # while the body's forward is replaced
        sequence_logprobs(model, prompts, responses)
    hook.remove()
    sequence_logprobs(model, prompts, responses)
    assert "forward" not in vars(model.base_model)
    assert torch.equal(before, model(input_ids=torch.tensor([prompts[0]])).logits)


def test_padding_order_and_batching_change_nothing():
    model, (prompts, responses) = tiny_model("gpt2"), ragged(9)
    want, counts = score(model, prompts, responses, max_tokens=10**6)
    for max_tokens in (1, 20, 40):
        got, _ = score(model, prompts, responses, max_tokens=max_tokens)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
    order = [4, 2, 8, 0, 1, 3, 7, 6, 5]
    got, mixed = score(model, [prompts[i] for i in order], [responses[i] for i in order], max_tokens=30)
    torch.testing.assert_close(got, want[order], rtol=1e-6, atol=1e-5)
    assert mixed.tolist() == counts[order].tolist()


def test_score_is_without_dropout_and_gives_the_mode_back():
    model, (prompts, responses) = tiny_model("gpt2", resid_pdrop=0.5), ragged()
    model.train()
    first, second = (score(model, prompts, responses, max_tokens=64)[0] for _ in range(2))
    assert torch.equal(first, second) and model.training and not first.requires_grad


def test_score_of_nothing():
    sums, counts = score(tiny_model(), [], [], max_tokens=8)
    assert sums.shape == counts.shape == (0,)


@pytest.mark.parametrize("x, y, what", [([], [3], "prompt"), ([3], [], "response")])
def test_empty_rows_are_named(x, y, what):
    with pytest.raises(ValueError, match=f"row 1: an empty {what}"):
        sequence_logprobs(tiny_model(), [[3], x], [[4], y])


def test_bfloat16_logits_are_summed_in_float32():
    """A bfloat16 sum of thousands is off by whole nats; ours is the sum of its own tokens, in float32."""
    model, y = tiny_model().to(torch.bfloat16), [7] * 100
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, *y]])).logits[0, :-1]  # (100, V)
        want = logits.double().log_softmax(-1)[:, 7].sum()
        naive = logits.log_softmax(-1)[:, 7].sum(dtype=torch.bfloat16)
    got = score(model, [[5]], [y], max_tokens=512)[0][0]
    assert got.dtype == torch.float32 and (got - want).abs() < 1e-3 * want.abs() < (naive - want).abs()


def test_token_batches_hold_every_row_once_within_the_budget():
    lengths = [random.Random(i).randint(1, 40) for i in range(50)]
    batches = token_batches(lengths, 64)
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 64 for b in batches)
    assert [lengths[i] for b in batches for i in b] == sorted(lengths, reverse=True)
    assert token_batches([100, 3], 8) == [[0], [1]]


def test_implicit_reward_is_a_difference_and_per_token_on_request():
    policy, reference = torch.tensor([-10.0, -4.0]), torch.tensor([-12.0, -3.0])
    assert implicit_reward(policy, reference).tolist() == [2.0, -1.0]
    assert implicit_reward(policy, reference, torch.tensor([4, 2])).tolist() == [0.5, -0.5]


def test_each_token_has_its_log_probability():
    model, (prompts, responses) = tiny_model(), ragged(9)
    with torch.no_grad():
        for got, x, y in zip(token_logprobs(model, prompts, responses), prompts, responses):
            logps = tiny_model().double()(input_ids=torch.tensor([x + y])).logits[0, len(x) - 1 : -1].log_softmax(-1)
            torch.testing.assert_close(got.double(), logps[range(len(y)), y], rtol=1e-5, atol=1e-4)


def test_what_is_no_list_of_token_ids_is_refused():
    model = tiny_model()
    with pytest.raises(TypeError, match="row 1: the response is a Tensor, expected a list of token ids"):
        sequence_logprobs(model, [[3], [4]], [[5], torch.tensor([6])])
    with pytest.raises(ValueError, match="shorter"):
        sequence_logprobs(model, [[3], [4]], [[5]])


@pytest.mark.parametrize("wrong", [61, 10**6, -1, -100])
@pytest.mark.parametrize("name", ["prompt", "response"])
def test_ids_that_the_model_does_not_have_are_named(name, wrong):
    """−100 would be no error in cross_entropy: it would be counted, and contribute nothing."""
    ids = {"prompt": [3, 4], "response": [5, 6], name: [7, wrong]}
    with pytest.raises(ValueError, match=f"row 1: the {name} has ids .*{wrong}.*, not 0 to 60"):
        sequence_logprobs(tiny_model(), [[3], ids["prompt"]], [[4], ids["response"]])


def test_log_probs_of_two_shapes_are_no_reward():
    column, row = torch.zeros(3, 1), torch.zeros(3)
    assert (column - row).shape == (3, 3)  # what would happen
    with pytest.raises(ValueError, match=r"\(3, 1\) and \(3,\)"):
        implicit_reward(column, row)
    with pytest.raises(ValueError, match=r"\(3,\) and \(3, 1\)"):
        implicit_reward(row, row, column)


def test_token_batches_are_filled_to_the_brim():
    assert token_batches([5, 5, 5, 5], 15) == [[0, 1, 2], [3]]
    assert token_batches([5, 5, 5], 14) == [[0, 1], [2]]


def test_score_leaves_the_model_in_its_mode_even_where_it_fails():
    model = tiny_model().train()
    with pytest.raises(ValueError, match="empty response"):
        score(model, [[3]], [[]], max_tokens=9)
    assert model.training


def test_the_head_runs_in_the_type_of_its_own_weights():
    """A float32 head above a bfloat16 body; under autocast hidden states are bfloat16 too."""
    model, y = tiny_model().to(torch.bfloat16), [7, 9, 1]
    model.lm_head.float()
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([[5, *y]])).last_hidden_state[0, :-1]
        want = (hidden.float() @ model.lm_head.weight.T).log_softmax(-1)[range(3), y].sum()
    torch.testing.assert_close(sequence_logprobs(model, [[5]], [y])[0][0].detach(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "family", ["llama", "bloom"]
)  # a body of bloom's returns a tuple where it is not asked for more
def test_a_config_that_asks_for_tuples_changes_nothing(family, monkeypatch):
    monkeypatch.setitem(FAMILIES, "bloom", {})
    prompts, responses = ragged()
    want, _ = sequence_logprobs(tiny_model(family), prompts, responses)
    assert torch.equal(sequence_logprobs(tiny_model(family, return_dict=False), prompts, responses)[0], want)


def test_all_that_is_made_is_on_the_model_s_device(monkeypatch):
    """The meta device, where nothing is computed, stands for a GPU. Only embeddings take what is on another device."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # meta has none
    model, inputs = tiny_model("opt", attn_implementation="eager").to("meta"), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: inputs.append(args[0].device))
    sums, counts = sequence_logprobs(model, *ragged())
    sums.sum().backward()
    assert {sums.device, counts.device, *inputs} == {torch.device("meta")}


@pytest.mark.parametrize("what", ["score", "sample"])
def test_a_part_that_is_frozen_in_eval_mode_stays_so(what):
    model = tiny_model().train()
    model.model.layers[0].eval()
    before = [part.training for part in model.modules()]
    if what == "score":
        score(model, [[5]], [[6, 7]], max_tokens=64)
    else:
        options = {
            "max_new_tokens": 2,
            "temperature": 1.0,
            "top_p": 1.0,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "seed": 0,
        }
        bootstrap.sample_responses(model, [[5, 6]], 2, **options)
    assert [part.training for part in model.modules()] == before and True in before and False in before


def test_what_cannot_be_read_is_said_before_anything_is_computed():
    """By the caller's own row, not the batch's; and models that would give another number than theirs, or none."""
    model = tiny_model()
    for both in (score, sequence_logprobs):
        options = {"max_tokens": 4} if both is score else {}
        with pytest.raises(ValueError, match="row 2: the response has ids 99 to 99, not 0 to 60"):
            both(model, [[5], [6], [7]], [[8, 9, 9], [9], [99]], **options)
        with pytest.raises(TypeError, match="row 0: the prompt has ids that are no integers"):
            both(model, [[5.0]], [[8]], **options)
    with pytest.raises(ValueError, match="an empty batch has no log-probabilities"):
        sequence_logprobs(model, [], [])
    model.active_peft_config = SimpleNamespace(is_prompt_learning=True)
    with pytest.raises(ValueError, match="prompt or prefix tuning: what was learnt would be left out"):
        score(model, [[5]], [[6]], max_tokens=4)
    del model.active_peft_config
    with pytest.raises(ValueError, match="LlamaModel has no head over the vocabulary"):
        sequence_logprobs(model.model, [[5]], [[6]])
    with pytest.raises(TypeError, match="DataParallel is no model of transformers: see token_logprobs on wrapped ones"):
        score(torch.nn.DataParallel(model), [[5]], [[6]], max_tokens=4)
    model.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="LlamaForCausalLM has an encoder"):
        sequence_logprobs(model, [[5]], [[6]])


def test_the_head_is_float32_under_autocast_and_in_the_backward_pass_too():
    model, types = tiny_model(), []
    model.lm_head.register_forward_hook(lambda module, args, output: types.append((args[0].dtype, output.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums, _counts = sequence_logprobs(model, [[5, 6]], [[7, 8, 1]])
    sums.sum().backward()  # the head is computed once more, for its gradient
    assert types == [(torch.float32, torch.float32)] * 2
