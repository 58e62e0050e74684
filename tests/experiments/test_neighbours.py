"""The related methods of experiments/neighbours.py: their equations on numbers worked by hand, and a small run of each."""

import inspect
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sera_min import playground
from sera_min.machinery.config import Config, resolve
from sera_min.pairs import Pair, Preferences

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent.parent / "experiments")]
import neighbours  # noqa: E402
import study  # noqa: E402

TOKENIZER = playground.make_tokenizer()


def text(y):
    return TOKENIZER.decode(y, skip_special_tokens=True)


def ids(y):
    return TOKENIZER(y + " <eos>").input_ids

X = ids("tell me about the fox and the cave")[:-1]
GOOD, FAIR, BAD = "the fox is lovely .", "the owl is lovely .", "the owl is ugly ."  # true reward 1, 0, −1


def pairs_of(changes, t, offline, *, sampled=(), logps=0.0, policies=None, **flags):
    """A method's review of iteration t. sampled: of each prompt the samples, all ended; logps: log π_θi(y|x) by i, y."""
    score = logps if callable(logps) else lambda i, y: logps
    samples = [[(ids(y), True) for y in row] for row in sampled]
    asked = SimpleNamespace(
        log_prob=lambda i, rows: torch.tensor([float(score(i, text(y))) for y in rows.responses]),
        sample=lambda i, prompts, n, seed: samples[: len(prompts)],
        eos_ids=[TOKENIZER.eos_token_id],
    )
    config = resolve(Config(device="cpu", beta=1.0, **flags))
    given = Preferences(offline)
    return changes.review(t, given, policies or asked, config, None)


def pair(chosen, rejected):
    return Pair(X, ids(chosen), ids(rejected))


def texts(review):
    return [(text(x), text(w), text(l)) for x, w, l in review.training_set.pairs]


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

    result = study.play(replace(variant, review=review), seed=0, beta=0.3, **flags)
    assert math.isfinite(result["3"]["kl"]) and result["3"]["kl"] != 0
    begins_with_d = method == "DICE"
    assert sources == {1: {"offline" if begins_with_d else "own"}, 2: {"own"}, 3: {"own"}}


def test_a_method_is_a_function_of_at_most_30_lines():
    for name in ("dice", "spin"):
        method = getattr(neighbours, name)
        assert len(inspect.getsource(method).splitlines()) <= 30, name
        assert "arXiv:" in method.__doc__
