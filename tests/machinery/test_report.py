"""What report.md, the figures and TensorBoard tell of a run, counted again from small files."""

import json
import re
import sys
import time
from itertools import pairwise
from types import ModuleType

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
    return [report.read_review(folder / f"iteration-{t}", t, is_flipped) for t in (2, 3)]


def test_a_review_is_summed_up_in_a_line(reviews):
    first, second = reviews
    assert report.summarise(first, None) == "2 of 4 given pairs kept, 2 not selected; 25% of the margins are negative"
    # orders of 3 5 8 9: at t = 2 1 3 2 4, at t = 3 1 2 3 4: 1 − 6·(0+1+1+0) / (4·15) = 0.8
    assert report.summarise(second, first) == (
        "2 of 4 given pairs kept, 2 not selected; 50% of the margins are negative; 50% of the kept were kept the time before; "
        "Spearman's correlation of all margins with those then 0.80"
    )


def test_the_margins_of_samples_are_of_usable_ones_that_differ(reviews):
    assert reviews[0].sampled == {3: 1.0, 8: 1.5} and reviews[1].sampled == {}


def test_the_most_distrusted_and_trusted_pairs_are_shown_with_their_rows(reviews):
    lines = report.describe_review(reviews[0], "a line", {row: f"user: {row}?" for row in ROWS})
    text = "\n".join(lines)
    given_pairs, sampled = text.split("Pairs of its own samples:")
    distrusted, trusted = given_pairs.split("The given pairs with the largest margins:")
    assert [distrusted.index(f"row {row}") for row in (3, 8, 5, 9)] == sorted(distrusted.index(f"row {row}") for row in ROWS)
    assert [trusted.index(f"row {row}") for row in (9, 5, 8, 3)] == sorted(trusted.index(f"row {row}") for row in ROWS)
    assert "      margin: -3.00, row 3; the label is flipped\n      prompt: user: 3?\n      chosen: good" in distrusted
    assert text.count("flipped") == 2 and "margin: 1.50, row 8" in sampled and "x8" not in text
    unknown = reviews[0]._replace(flipped=set())
    assert "flipped" not in "".join(report.describe_review(unknown, "a line", dict.fromkeys(ROWS, "")))


def test_nobody_knows_the_labels_of_a_user_s_file(folder):
    assert report.read_review(folder / "iteration-2", 2, is_flipped).flipped == {3}
    assert report.read_review(folder / "iteration-2", 2, None).flipped == set()


def test_a_text_of_several_lines_is_named_once():
    assert report.block({"prompt": "a\nb", "chosen": "c"}) == "    prompt: a\n            b\n    chosen: c"


def test_a_long_text_loses_its_middle_and_says_so():
    assert report.shortened("a" * 400) == "a" * 400
    assert report.shortened("a" * 300 + "b" * 300) == "a" * 200 + " … 200 characters … " + "b" * 200


def test_the_picture_has_every_pair_and_the_cut(reviews):
    from matplotlib.figure import Figure

    for flipped, names in [({3}, ["right label: 3", "flipped label: 1"]), (set(), ["kept: 2", "not kept: 2"])]:
        figure = Figure()
        report.draw_reviews(figure, [review._replace(flipped=flipped) for review in reviews])
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
    review = report.read_review(tmp_path / "iteration-2", 2, None)
    figure = Figure()
    report.draw_reviews(figure, [review])
    assert not figure.axes[0].lines
    assert all(a <= b for a, b in pairwise(pair["margin"] for pair in review.given))


def test_the_table_has_the_columns_that_any_evaluation_has():
    evaluations = [
        {"iteration": 0, "kl": 0.0, "bootstrap/precision": None},
        {"iteration": 1, "kl": float("nan"), "select/pairs": 70, "bootstrap/precision": None},
    ]
    assert report.table(evaluations) == (
        "| iteration | kept |    KL |\n| --------: | ---: | ----: |\n|         0 |    – | 0.000 |\n|         1 |   70 |     – |"
    )


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
    report.write_report(ended, {2: 61.6, 3: 5.0}, {row: f"user: {row}?" for row in ROWS}, is_flipped)
    text, printed = (ended / "report.md").read_text(), capsys.readouterr().out
    shown, review = text.split("\n## What the review saw\n")
    assert text.startswith(f"# {ended.name}\n\n| iteration |") and shown.split("\n", 2)[2].strip() in printed
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines() if line.startswith("|")]
    assert table[0] == ["iteration", "KL", "seconds"]
    assert table[2:] == [["0", "0.000", "–"], ["1", "0.500", "–"], ["2", "1.000", "62"], ["3", "1.500", "5"]]
    legend = [line.split(":")[0] for line in shown.splitlines() if line.startswith("- ")]
    assert legend == ["- iteration", "- KL", "- seconds"]
    assert "    prompt: p4\n    before: r4\n     after: a4" in shown and "p5" not in shown
    assert review.index("### Iteration 2") < review.index("### Iteration 3") and "### Iteration 1" not in review
    assert "### Iteration 2\n\n2 of 4 given pairs kept" in review and "\niteration 2: 2 of 4 given pairs kept" in printed
    assert "\niteration 3: 2 of 4 given pairs kept" in printed and "were kept the time before" in printed.split("\niteration 3:")[1]
    assert review.count("the label is flipped") == 4 and "user: 3?" not in printed
    assert review.endswith("\n\n![review.png](review.png)\n![curves.png](curves.png)\n")
    assert all((ended / name).read_bytes()[1:4] == b"PNG" for name in ("review.png", "curves.png"))


def test_a_run_that_reviewed_nothing_has_no_picture_of_it(ended):
    for t in (2, 3):
        (ended / f"iteration-{t}/dropped.jsonl").unlink()
    report.write_report(ended, {}, {}, None)
    text = (ended / "report.md").read_text()
    assert "review" not in text.split("\n", 1)[1] and "seconds" not in text and (ended / "curves.png").exists()
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
    report.write_report(ended, {}, dict.fromkeys(ROWS, ""), None)
    assert re.search("^no figures: .*matplotlib", capsys.readouterr().out, re.M)
    assert ".png" not in (ended / "report.md").read_text() and not [*ended.glob("*.png")]


def scalars(out, curve, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard" / curve)).Reload().Scalars(name)
    assert len({event.step for event in events}) == len(events)
    return {event.step: event.value for event in events}


def test_tensorboard_has_a_curve_an_iteration_and_one_of_the_evaluations(tmp_path):
    """A resumed run adds its lines again, from the first or from where it goes on: each is there once."""
    for lines in (metrics()[:8], metrics(), metrics()[5:]):
        time.sleep(1.1)  # TensorBoard orders its files by the second in their names
        curves = report.Curves(tmp_path)
        for line in lines:
            curves.add({**line, "loss": line["loss"] + len(lines)} if "loss" in line else line)
        curves.close()
    assert sorted(path.name for path in (tmp_path / "tensorboard").iterdir()) == ["evaluation", *(f"iteration-{t}" for t in (1, 2, 3))]
    assert scalars(tmp_path, "evaluation", "kl") == pytest.approx({0: 0, 1: 0.5, 2: 1.0, 3: 1.5})
    assert scalars(tmp_path, "iteration-1", "loss") == pytest.approx({1: 1 / 2 + 10, 2: 1 / 3 + 10})
    assert scalars(tmp_path, "iteration-2", "loss") == pytest.approx({1: 1 / 3 + 10, 2: 1 / 4 + 5})


def test_without_tensorboard_nothing_happens(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    curves = report.Curves(tmp_path)
    for line in metrics():
        curves.add(line)
    curves.close()
    assert not [*tmp_path.iterdir()] and capsys.readouterr().out == ""


def test_a_broken_tensorboard_is_named_once(tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise TypeError("Descriptors cannot\nbe created")

    module = ModuleType("tensorboard")
    module.SummaryWriter = broken
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    curves = report.Curves(tmp_path)
    for line in metrics():
        curves.add(line)
    curves.close()
    assert capsys.readouterr().out == "no TensorBoard: Descriptors cannot be created\n"
