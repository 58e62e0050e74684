"""The related methods of experiments/neighbours.py: their equations on numbers worked by hand, and a small run of each."""

import inspect
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from shared import tiny_model

from sera_min import playground
from sera_min.logprobs import token_logprobs
from sera_min.machinery.config import Config, resolve
from sera_min.pairs import Pair, Preferences

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent.parent / "experiments")]
import neighbours  # noqa: E402
import study  # noqa: E402
from neighbours import ids, text  # noqa: E402

X = ids("tell me about the fox and the cave")[:-1]
GOOD, FAIR, BAD = "the fox is lovely .", "the owl is lovely .", "the owl is ugly ."  # true reward 1, 0, −1


def pairs_of(changes, t, offline, *, sampled=(), logps=0.0, policies=None, **flags):
    """A method's review of iteration t. sampled: of each prompt the samples, all ended; logps: log π_θi(y|x) by i, y."""
    score = logps if callable(logps) else lambda i, y: logps
    samples = [[(ids(y), True) for y in row] for row in sampled]
    asked = SimpleNamespace(
        log_prob=lambda i, rows: torch.tensor([float(score(i, text(y))) for y in rows.responses]),
        sample=lambda i, prompts, n, seed: samples[: len(prompts)],
        eos_ids=[neighbours.TOKENIZER.eos_token_id],
    )
    config = resolve(Config(device="cpu", beta=1.0, **flags))
    given = Preferences(offline)
    return changes.review(t, given, policies or asked, config, None)


def pair(chosen, rejected):
    return Pair(X, ids(chosen), ids(rejected))


def texts(review):
    return [(text(x), text(w), text(l)) for x, w, l in review.training_set.pairs]


def test_rad_trains_on_both_responses_each_under_its_own_score():
    of_d = [pair(GOOD, BAD), pair(BAD, GOOD), pair(FAIR, GOOD), pair(GOOD, GOOD)]  # the label does not matter
    made = pairs_of(neighbours.rad(True), 1, of_d).training_set.pairs
    assert [(text(x), text(w), text(l)) for x, w, l in made[:4]] == [
        (text(X), GOOD, BAD), ("and and and and fox and the cave", BAD, GOOD),
        ("and and and and fox and the cave", BAD, GOOD), (text(X), GOOD, BAD),
    ]  # fmt: skip
    assert len(made) == 6  # the last pair has one score
    of_two = pairs_of(neighbours.rad(True), 2, [pair(GOOD, BAD)], logps=lambda i, y: -float(i) - 5 * (y == BAD))
    [reference, _] = of_two.training_set.reference.tolist()
    assert reference == [0.0, -5.0]  # log π_θ0 of the chosen and of the rejected
    prefers_bad = lambda i, y: float(i) if y == BAD else 0.0  # noqa: E731  # as π_θ1 has come to do
    first, second, *_ = pairs_of(neighbours.rad(False), 2, [pair(GOOD, BAD)] * 2, logps=prefers_bad).training_set.pairs
    assert (text(first.prompt)[:8], text(first.chosen)) == ("the the ", GOOD)
    assert (text(second.prompt), text(second.chosen)) == (text(X), BAD)


def test_bmc_mends_the_worst_sentence_and_weighs_where_the_two_differ():
    mended = neighbours.mend(text(X), f"{BAD} {GOOD}", f"{FAIR} {BAD} {FAIR}")
    assert mended == f"{FAIR} {GOOD} {FAIR}"
    # π_θ = 0.8, π_ref = 0.4, δ = 2: w = 1 + 1/0.8, m = 2.25 ln 2
    logps = torch.tensor([0.8, 0.8, 0.1]).log()
    w = neighbours.confidence(logps, [5, 6, 7], [5, 9], 2.0)
    assert w.tolist() == pytest.approx([1.0, 2.25, 3.0])  # the same token; another; none, and 1/0.1 is cut at δ
    assert (w[1] * (logps[1] - math.log(0.4))).item() == pytest.approx(1.5596, abs=1e-4)
    changes = neighbours.bmc()
    policy, reference = (playground.make_sft_policy(seed, "cpu", steps=2)[0] for seed in (0, 1))
    inspect.getclosurevars(changes.pair_losses).nonlocals["reference"].append(reference)
    pairs = [pair(GOOD, BAD)]
    losses, logps = changes.pair_losses(policy, pairs, None, resolve(Config(device="cpu", beta=1.0)))
    [w, l], [w_ref, l_ref] = (
        [one.detach() for one in token_logprobs(m, [X, X], [ids(GOOD), ids(BAD)])] for m in (policy, reference)
    )
    by_hand = []
    for ours, theirs in ((w, w_ref), (l, l_ref)):  # words 2 and 4 differ
        weight = torch.ones(6)
        weight[[1, 3]] += (1 / ours[[1, 3]].exp()).clamp(max=2)
        by_hand.append((weight * (ours - theirs)).sum().item())
    m = by_hand[0] - by_hand[1]
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-m))], rel=1e-4)
    assert logps[0].tolist() == pytest.approx([w.sum().item(), l.sum().item()], rel=1e-4)


def test_sapo_splices_and_averages():
    y, ends = [10, 11, 12, 13, 1], [1]
    assert neighbours.spliced(y, 1, 2, [20, 21, 22], ends) == [10, 20, 21, 13, 1]
    assert neighbours.spliced(y, 1, 2, [20, 1], ends) == [10, 20, 1]  # it ended there
    assert neighbours.spliced(y, 1, 2, [1], ends) == [10, 1]
    policies = [tiny_model() for _ in range(3)]
    for i, policy in enumerate(policies):  # E_0 = θ_0 = 0, then θ = 1 twice: 0.75
        for p in policy.parameters():
            p.data.fill_(float(i > 0))
    mean = neighbours.moving_average(SimpleNamespace(get=policies.__getitem__), 3, 0.5)
    assert {p.unique().item() for p in mean.parameters()} == {0.75}
    assert {p.unique().item() for p in policies[0].parameters()} == {0.0}  # the reference is as it was


def test_dice_s_price_of_length():
    rewards, lengths = torch.tensor([2.0, 3, 1]), torch.tensor([10, 40, 12])
    # best 10, worst 12; below it best is 40
    assert neighbours.length_price(rewards, lengths, [5, 5, 5]) == pytest.approx(0.034)
    uneven = neighbours.length_price(rewards[[0, 1, 2, 0]], lengths[[0, 1, 2, 0]], [5, 5, 5, 6])
    assert uneven == pytest.approx(0.034)  # a prompt with one sample has no difference
    made = pairs_of(neighbours.dice(), 2, [pair(GOOD, BAD)] * 4, sampled=[[GOOD, f"{BAD} {BAD}"]] * 4,
                    logps=lambda i, y: i * len(y) / 100)  # fmt: skip
    assert len(made.training_set.pairs) == 4 and texts(made)[2:] == [(text(X), GOOD, BAD)] * 2  # half are D's
    r, long = {GOOD: 2.0, f"{BAD} {BAD}": 3.0, FAIR: 1.0}, f"{BAD} {BAD}"  # the long one is best by r, not by q
    for t in (2, 3):
        made = pairs_of(neighbours.dice(), t, [pair(GOOD, BAD)] * 4, sampled=[[GOOD, long, FAIR]] * 4,
                        logps=lambda i, y: i * r.get(y, 7.0))  # fmt: skip
        assert texts(made)[:2] == [(text(X), GOOD, FAIR)] * 2  # 6 tokens each
        assert made.training_set.reference[0].tolist() == [2.0 * (t - 1), 1.0 * (t - 1)]  # π_θ(t−1)'s
    asked = []
    pairs_of(neighbours.dice(), 3, [pair(GOOD, BAD)] * 4, sampled=[[GOOD, long, FAIR]] * 4,
             logps=lambda i, y: asked.append(i) or 0.0)  # fmt: skip
    assert list(dict.fromkeys(asked)) == [2, 1]  # the reward is of two policies; π_θ2 is the reference too


def test_spin_sets_the_chosen_against_samples_of_two_rounds():
    of_d = [pair(GOOD, BAD), pair(FAIR, BAD)]
    first, second = (
        pairs_of(neighbours.spin(), t, of_d, sampled=[[FAIR], [FAIR]], logps=lambda i, y: -float(i)) for t in (1, 2)
    )
    assert [pair[1:] for pair in texts(first)] == [(GOOD, FAIR)]  # of the second the sample is the chosen one
    assert len(second.training_set.pairs) == 2 and second.training_set.reference.unique().item() == -1.0  # π_θ1's
    drawn_from = []
    policies = SimpleNamespace(
        log_prob=lambda i, rows: torch.zeros(len(rows.responses)),
        sample=lambda i, prompts, n, seed: drawn_from.append(i) or [[(ids(GOOD), True)]] * 2,
    )
    for t in (1, 2, 3):
        pairs_of(neighbours.spin(), t, of_d, policies=policies)
    assert drawn_from == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("method", neighbours.METHODS)
def test_a_small_run(method, small_world):
    make_variant, flags = neighbours.METHODS[method]
    variant, sources = make_variant(), {}

    def review(t, *others):
        reviewed = variant.review(t, *others)
        sources[t] = {*reviewed.training_set.sources}
        return reviewed

    result = study.play(replace(variant, review=review), 3, [3], seed=0, beta=0.3, **flags)
    assert math.isfinite(result["3"]["kl"]) and result["3"]["kl"] != 0
    begins_with_d = method in {"DICE", "RAD, own scores"}
    assert sources == {1: {"offline" if begins_with_d else "own"}, 2: {"own"}, 3: {"own"}}


def test_a_method_is_a_function_of_at_most_30_lines():
    for name in ("rad", "bmc", "sapo", "dice", "spin"):
        method = getattr(neighbours, name)
        assert len(inspect.getsource(method).splitlines()) <= 30, name
        assert "arXiv:" in method.__doc__
