"""What report.md and the figures tell of a run, counted again from small files."""

import json
import re
import sys

import pytest

from sera_min.machinery import report

ROWS = (3, 5, 8, 9)


def given(row, margin, **more):
    return {"prompt": f"x{row}", "chosen": "good", "rejected": "bad", "margin": margin, "source": "offline", "row": row, **more}


def write(out, t, kept, dropped, bootstrapped=(), rewards=()):
    (out / f"iteration-{t}").mkdir()
    for name, rows in {"pairs": [*kept, *bootstrapped], "dropped": dropped, "samples": [{"reward": r} for r in rewards]}.items():
        if rows or name == "dropped":
            (out / f"iteration-{t}/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def is_flipped(pair):
    return pair["row"] == 3


@pytest.fixture
def folder(tmp_path):
    """Rows 3, 5, 8, 9 of a user's file; 3 is mislabelled. Two samples a prompt, of which 5's were cut off."""
    own = given(8, 1.5, source="bootstrap")
    write(tmp_path, 2, [given(9, 2.0), given(5, 1.0)], [given(3, -3.0), given(8, 0.5)], [own], [0, 1, None, 2, 1.5, 0, 1, 1])
    write(tmp_path, 3, [given(9, 3.0), given(8, 2.0)], [given(3, -4.0), given(5, -1.0)])
    return tmp_path


@pytest.fixture
def reviews(folder):
    return {t: report.read_review(folder / f"iteration-{t}", is_flipped) for t in (2, 3)}


def test_the_pairs_of_a_review_are_in_the_order_of_their_margins(reviews):
    got = [(pair["row"], pair["margin"], pair["kept"], pair["group"]) for pair in reviews[2]]
    assert got == [
        (3, -3.0, False, "flipped label"), (8, 0.5, False, "right label"), (5, 1.0, True, "right label"),
        (8, 1.5, True, "bootstrapped"), (9, 2.0, True, "right label"),
    ]  # fmt: skip


def test_a_review_is_summed_up_in_a_line(reviews):
    first, second = ([pair for pair in pairs if pair["source"] == "offline"] for pairs in reviews.values())
    told = "2 of 4 given pairs kept, 2 not selected; 25% of the margins are negative"
    assert report.summarise(first, {9, 5}, set()) == told
    assert report.summarise(second, {9, 8}, {9, 5}) == (
        "2 of 4 given pairs kept, 2 not selected; 50% of the margins are negative; 50% of the kept were kept the time before"
    )


def test_nobody_knows_the_labels_of_a_user_s_file(folder):
    groups = {pair["group"] for pair in report.read_review(folder / "iteration-2", None)}
    assert groups == {"given", "bootstrapped"}


def test_a_text_of_several_lines_is_named_once():
    assert report.block({"prompt": "a\nb", "chosen": "c"}) == "    prompt: a\n            b\n    chosen: c"


def test_a_long_text_loses_its_middle_and_says_so():
    assert report.block({"a": "a" * 400}) == "    a: " + "a" * 400
    assert report.block({"a": "a" * 300 + "b" * 300}) == "    a: " + "a" * 200 + " … 200 characters … " + "b" * 200


def test_the_picture_has_every_pair_and_the_cut(folder, reviews):
    from matplotlib.figure import Figure

    unknown = {t: report.read_review(folder / f"iteration-{t}", None) for t in (2, 3)}
    for shown, names, counts in [
        (reviews, ["right label: 3", "flipped label: 1", "bootstrapped: 1"], [[3, 1, 1], [3, 1]]),
        (unknown, ["given: 4", "bootstrapped: 1"], [[4, 1], [4]]),
    ]:
        figure = Figure()
        report.draw_reviews(figure, shown)
        assert [[sum(bar.get_height() for bar in group) for group in bars_of(axes)] for axes in figure.axes] == counts
        assert [[line.get_xdata()[0] for line in axes.lines] for axes in figure.axes] == [[1.0], [2.0]]
        legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert sorted(legend) == sorted([*names, "given pairs kept: right of it"])
        assert [axes.get_title() for axes in figure.axes] == [f"iteration {t}: 2 of 4 given pairs kept" for t in shown]


def bars_of(axes):
    """The groups of bars of a histogram."""
    return [group for group in axes.containers if len(group)]


def test_there_is_no_cut_where_pairs_are_kept_at_random(tmp_path):
    from matplotlib.figure import Figure

    write(tmp_path, 2, [given(1, -1.0)], [given(2, 1.0)])
    figure = Figure()
    report.draw_reviews(figure, {2: report.read_review(tmp_path / "iteration-2", None)})
    assert not figure.axes[0].lines


def test_the_table_has_the_columns_that_any_evaluation_has():
    evaluations = [
        {"iteration": 0, "kl": 0.0, "bootstrap/precision": None},
        {"iteration": 1, "kl": float("nan"), "select/pairs": 70, "bootstrap/precision": None},
    ]
    text = report.describe_results(evaluations, [])
    assert text.split("\n\n")[0] == (
        "| iteration | kept |    KL |\n| --------: | ---: | ----: |\n|         0 |    – | 0.000 |\n|         1 |   70 |     – |"
    )
    assert [line.split(":")[0] for line in text.split("\n\n")[1].splitlines()] == ["- iteration", "- kept", "- KL"]


def metrics():
    steps = [{"phase": "train", "iteration": t, "step": step, "loss": 1.0 / (step + t), "rewards/accuracies": 0.5, "rewards/margins": 0.1 * t}
             for t in (1, 2, 3) for step in (1, 2)]  # fmt: skip
    evaluations = [{"phase": "final" if t == 3 else "eval", "iteration": t, "kl": 0.5 * t} for t in range(4)]
    return [*evaluations[:1], *(line for t in (1, 2, 3) for line in [*steps[2 * t - 2 : 2 * t], evaluations[t]])]


@pytest.fixture
def ended(folder):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics()))
    answers = [{"prompt": f"p{i}", "answer": f"a{i}", "reference": f"r{i}", "finish_reason": "stop"} for i in range(6)]
    (folder / "iteration-3/answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    write(folder, 1, [given(row, 0.0) for row in ROWS], [])
    (folder / "iteration-1/dropped.jsonl").unlink()
    return folder


def test_the_report_has_the_table_five_answers_every_review_and_the_figures(ended, capsys):
    report.write_report(ended, {row: f"user: {row}?" for row in ROWS}, is_flipped)
    text, printed = (ended / "report.md").read_text(), capsys.readouterr().out
    shown, first, second = re.split(r"\n## The review of iteration \d\n", text)
    assert text.startswith("# Results\n\n| iteration |") and shown.split("\n", 2)[2].strip() in printed
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines() if line.startswith("|")]
    assert table[0] == ["iteration", "KL"]
    assert table[2:] == [["0", "0.000"], ["1", "0.500"], ["2", "1.000"], ["3", "1.500"]]
    legend = [line.split(":")[0] for line in shown.splitlines() if line.startswith("- ")]
    assert legend == ["- iteration", "- KL"]
    assert "    prompt: p4\n    before: r4\n     after: a4" in shown and "p5" not in shown
    assert "iteration 2\n" in text and "iteration 3\n" in text and "iteration 1\n" not in text
    assert first.startswith("\n2 of 4 given pairs kept") and "\niteration 2: 2 of 4 given pairs kept" in printed
    assert "\niteration 3: 2 of 4 given pairs kept" in printed and "were kept the time before" in printed.split("\niteration 3:")[1]
    assert text.count("flipped label") == 4 and "user: 3?" not in printed
    assert second.endswith("\n\n![review.png](review.png)\n\n![curves.png](curves.png)\n")
    assert all((ended / name).read_bytes()[1:4] == b"PNG" for name in ("review.png", "curves.png"))


def test_the_most_distrusted_and_trusted_pairs_are_shown_with_their_rows(ended, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # slow, and not what is tested here
    report.write_report(ended, {row: f"user: {row}?" for row in ROWS}, is_flipped)
    text = (ended / "report.md").read_text().split("\n## The review of iteration ")[1]
    given_pairs, sampled = text.split("Pairs of its own samples:")
    distrusted, trusted = given_pairs.split("The given pairs with the largest margins:")
    assert [distrusted.index(f"row {row}") for row in (3, 8, 5, 9)] == sorted(distrusted.index(f"row {row}") for row in ROWS)
    assert [trusted.index(f"row {row}") for row in (9, 5, 8, 3)] == sorted(trusted.index(f"row {row}") for row in ROWS)
    assert "      margin: -3.00, row 3, flipped label\n      prompt: user: 3?\n      chosen: good" in distrusted
    assert "margin: 1.50, row 8, bootstrapped" in sampled and "x8" not in text


def test_a_run_that_reviewed_nothing_has_no_picture_of_it(ended):
    for t in (2, 3):
        (ended / f"iteration-{t}/dropped.jsonl").unlink()
    report.write_report(ended, {}, None)
    text = (ended / "report.md").read_text()
    assert "review" not in text and (ended / "curves.png").exists()
    assert not (ended / "review.png").exists()


def test_the_curves_go_on_from_iteration_to_iteration():
    from matplotlib.figure import Figure

    figure = Figure()
    report.draw_curves(figure, [line for line in metrics() if line["phase"] == "train"])
    assert [axes.get_title() for axes in figure.axes] == ["loss", "rewards/accuracies", "rewards/margins"]
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines]
    assert drawn == [([1, 2], [1 / 2, 1 / 3]), ([3, 4], [1 / 3, 1 / 4]), ([5, 6], [1 / 4, 1 / 5])]
    assert [text.get_text() for text in figure.axes[2].get_legend().get_texts()] == [f"iteration {t}" for t in (1, 2, 3)]


def test_without_matplotlib_there_is_a_report_without_figures(ended, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report.write_report(ended, dict.fromkeys(ROWS, ""), None)
    assert re.search("^no figures: .*matplotlib", capsys.readouterr().out, re.M)
    assert ".png" not in (ended / "report.md").read_text() and not [*ended.glob("*.png")]
