"""The world keeps its promises: the judge, the labels, the held-out prompts."""

import random
from pathlib import Path

import pytest

from sera_min import playground as world

X = "tell me about the fox and the forest"


@pytest.mark.parametrize("response, reward", [
    ("the fox is lovely .", 1), ("the forest looks ugly .", 0), ("the owl seems brave .", 0), ("the owl is rude .", -1),
    ("the fox is lovely . the owl is rude .", 0), ("the fox is lovely . " * 5, 1), ("", -1), ("the fox fox lovely .", -1),
    ("the fox is lovely . the fox", 0), ("<unk>", -1), (". . .", -1),
])  # fmt: skip
def test_the_judge(response, reward):
    assert world.true_reward(X, response) == reward


def test_people_earn_a_quarter_and_length_does_not_pay():
    rng = random.Random(0)
    answers = [world.write_response(X, rng) for _ in range(4000)]
    by_length = {n: [world.true_reward(X, y) for y in answers if y.count(".") == n] for n in range(1, 6)}
    assert all(abs(sum(r) / len(r) - 0.25) < 0.08 for r in by_length.values())


def test_labels():
    def made(**knobs):
        return world.preferences(1500, "train", **{"label_noise": 0.0, "length_bias": 0.0, "seed": 0, **knobs})

    assert world.precision(made()) == 1.0 and world.precision(made(label_noise=1.0)) == 0.0  # so no row is a tie
    assert world.precision(made(label_noise=0.3)) == pytest.approx(0.7, abs=0.04)
    longer = [len(r["chosen"].split()) >= len(r["rejected"].split()) for r in made(length_bias=1.0)]
    assert all(longer) and made() == made() != made(seed=1)


def test_no_two_nouns_are_in_two_parts_whatever_their_order():
    parts = [world.prompts(part) for part in ("train", "test", "validation")]
    assert [len({*part}) for part in parts] == [len(part) for part in parts] == [792, 512, 256]
    nouns = [{frozenset(prompt.split()[4::3]) for prompt in part} for part in parts]
    assert [len(part) for part in nouns] == [396, 256, 128] and len(set.union(*nouns)) == 780


def test_broken_answers_are_counted():
    answers = ["the fox is lovely .", "the fox fox is lovely .", "", "the fox is lovely . the"]
    assert world.judge([X] * 4, answers, answers)["gold/broken"] == 0.75


def test_win_rate_and_precision_count_ties_half():
    good, bad = "the fox is lovely .", "the owl is rude ."
    rows = [{"prompt": X, "chosen": w, "rejected": l} for w, l in [(good, bad), (bad, bad), (bad, good), (good, good)]]
    assert world.precision(rows) == 0.5 and world.precision(rows[:2]) == 0.75
    assert world.judge([X] * 3, [good, bad, good], [good, good, bad])["gold/win_rate"] == pytest.approx(0.5)


def test_the_readme_s_world_is_this_one():
    """Its table's precision at iteration 1 is the share of right labels in the default data, which nothing rounds."""
    rows = world.preferences(2000, "train", label_noise=0.3, length_bias=0.0, seed=0)
    share = world.precision(rows)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert f"|1|2000|{share:.3f}|" in readme.replace(" ", "")
