"""What report.md and review.png tell of the reviews, counted again from small files."""

import json
from itertools import pairwise

import pytest

from sera_min import seen


def given(row, margin, **more):
    return {"prompt": f"x{row}", "chosen": "good", "rejected": "bad", "margin": margin, "source": "offline", "row": row, **more}


def write(out, t, kept, dropped, bootstrapped=(), rewards=()):
    (out / f"iteration-{t}").mkdir()
    for name, rows in {"pairs": [*kept, *bootstrapped], "dropped": dropped, "samples": [{"reward": r} for r in rewards]}.items():
        if rows or name == "dropped":
            (out / f"iteration-{t}/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def reviews(tmp_path):
    """Rows 3, 5, 8, 9 of a user's file; 3 is mislabelled. Two samples a prompt, of which 5's were cut off."""
    own = given(8, 1.5, source="bootstrap")
    write(tmp_path, 2, [given(9, 2.0), given(5, 1.0)], [given(3, -3.0), given(8, 0.5)], [own], [0, 1, None, 2, 1.5, 0, 1, 1])
    write(tmp_path, 3, [given(9, 3.0), given(8, 2.0)], [given(3, -4.0), given(5, -1.0)])
    return [seen.read_review(tmp_path, t) for t in (2, 3)]


def is_flipped(pair):
    return pair["row"] == 3


def test_a_review_is_summed_up_in_a_line(reviews):
    first, second = reviews
    assert seen.summarise(first, None) == "2 of 4 given pairs kept, 2 dropped; 25% of the margins are negative"
    # orders of 3 5 8 9: at t = 2 1 3 2 4, at t = 3 1 2 3 4: 1 − 6·(0+1+1+0) / (4·15) = 0.8
    assert seen.summarise(second, first) == (
        "2 of 4 given pairs kept, 2 dropped; 50% of the margins are negative; 50% of the kept were kept the time before; "
        "Spearman's correlation of all margins with those then 0.80"
    )


def test_the_margins_of_samples_are_of_usable_ones_that_differ(reviews):
    assert reviews[0].sampled == {3: 1.0, 8: 1.5} and reviews[1].sampled == {}


def test_the_most_distrusted_and_trusted_pairs_are_shown_with_their_rows(reviews):
    lines = [*seen.describe(reviews[0], "a line", {row: f"user: {row}?" for row in (3, 5, 8, 9)}, is_flipped)]
    text = "\n".join(lines)
    given_pairs, sampled = text.split("Pairs of its own samples:")
    distrusted, trusted = given_pairs.split("The given pairs with the largest margins:")
    assert [distrusted.index(f"row {row}") for row in (3, 8, 5, 9)] == sorted(distrusted.index(f"row {row}") for row in (3, 8, 5, 9))
    assert [trusted.index(f"row {row}") for row in (9, 5, 8, 3)] == sorted(trusted.index(f"row {row}") for row in (9, 5, 8, 3))
    assert "      margin: -3.00, row 3; the label is flipped\n      prompt: user: 3?\n      chosen: good" in distrusted
    assert text.count("flipped") == 2 and "margin: 1.50, row 8" in sampled and "x8" not in text
    assert "flipped" not in "".join(seen.describe(reviews[0], "a line", dict.fromkeys((3, 5, 8, 9), ""), None))


def test_a_text_of_several_lines_is_named_once():
    assert seen.block({"prompt": "a\nb", "chosen": "c"}) == ["    prompt: a", "            b", "    chosen: c"]


def test_a_long_text_loses_its_middle_and_says_so():
    assert seen.shortened("a" * 400) == "a" * 400
    assert seen.shortened("a" * 300 + "b" * 300) == "a" * 200 + " … 200 characters … " + "b" * 200


def test_the_picture_has_every_pair_and_the_cut(reviews):
    from matplotlib.figure import Figure

    for flipped, names in [(is_flipped, ["right label: 3", "flipped label: 1"]), (None, ["kept: 2", "not kept: 2"])]:
        figure = Figure()
        seen.draw(figure, reviews, flipped)
        bars = [[sum(bar.get_height() for bar in group) for group in axes.containers] for axes in figure.axes]
        assert bars == [[3, 1] if flipped else [2, 2]] * 2 + [[1, 1], [0, 0]]
        cuts = [[line.get_xdata()[0] for line in axes.lines] for axes in figure.axes]
        assert cuts == [[1.0], [2.0], [1.5], []]
        assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [*names, "kept: right of it"]
        titles = [axes.get_title() for axes in figure.axes]
        assert titles[0] == "iteration 2: 2 of 4 given pairs kept" and titles[2] == "iteration 2: 1 of 2 new pairs kept"
        for axes, cut in zip(figure.axes, [1.0, 2.0, 1.5]):  # a bar is on one side of it
            assert all(bar.get_x() + bar.get_width() <= cut + 1e-9 or bar.get_x() >= cut for bar in axes.patches)


def test_there_is_no_cut_where_pairs_are_kept_at_random(tmp_path):
    from matplotlib.figure import Figure

    write(tmp_path, 2, [given(1, -1.0)], [given(2, 1.0)])
    figure = Figure()
    seen.draw(figure, [seen.read_review(tmp_path, 2)], None)
    assert not figure.axes[0].lines
    assert all(a <= b for a, b in pairwise(pair["margin"] for pair in seen.read_review(tmp_path, 2).given()))
