"""The README's numbers, names, links and code, each against what it speaks of."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from shared import tiny_model

import train
from sera_min import playground
from sera_min.logprobs import implicit_reward
from sera_min.machinery.config import Config, resolve
from sera_min.select import select_top

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
LINK = re.compile(r"\]\(([\w/.-]+)\)")


def section(title):
    text = README.split(f"\n{title}\n")[1]
    return re.split(r"\n##+ ", text)[0]


def rows_of(text):
    """The cells of every row of the tables in a text, headings left out; | inside a cell is written \\|."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    bodies = [i for i, row in enumerate(rows) if set("".join(row)) <= set(":-")]
    return [row for i, row in enumerate(rows) if i not in bodies and i + 1 not in bodies]


def number(text):
    return float(text.split("=")[-1].replace("−", "-"))


BY_HAND = section("### One pair by hand")


def logps_by_hand():
    """log π_ref and log π_θ of the tokens of both responses, as the README's first table has them."""
    logps = {"chosen": [], "rejected": []}
    for row in rows_of(BY_HAND):
        if row[0] in logps:
            logps[row[0]].append([number(row[2]), number(row[3])])
    return torch.tensor(logps["chosen"]), torch.tensor(logps["rejected"])


def test_the_rewards_and_the_margin_by_hand():
    chosen, rejected = logps_by_hand()
    assert (len(chosen), len(rejected)) == (3, 2)
    reference_w, policy_w = chosen.sum(0)
    reference_l, policy_l = rejected.sum(0)
    r_w = implicit_reward(policy_w, reference_w)
    r_l = implicit_reward(policy_l, reference_l)
    written = [number(found) for found in re.findall(r"−?\d\.\d", BY_HAND.split("\n\n")[2])]
    computed = [reference_w, policy_w, policy_w, reference_w, r_w, reference_l, policy_l, r_l]
    computed += [r_w, r_l, r_w - r_l]
    assert written == pytest.approx([value.item() for value in computed], abs=5e-4)


@pytest.mark.parametrize("name", ["DPO", "IPO", "SLiC", "SimPO"])
def test_the_losses_by_hand(name):
    [row] = [row for row in rows_of(BY_HAND) if row[0] == name]
    beta, written_w, written_l, written_margin = map(number, row[1:5])
    config = resolve(Config(loss_type=name.lower(), beta=beta, device="cpu"))
    rewards = []
    for logps in logps_by_hand():
        reference, policy = logps.sum(0)
        rewards.append(train.reward(policy, reference, torch.tensor(len(logps)), config))
    margin = rewards[0] - rewards[1]
    loss = train.loss_of(margin[None], config)
    computed = [*rewards, margin, loss]
    written = [written_w, written_l, written_margin, number(row[6])]
    assert written == pytest.approx([value.item() for value in computed], abs=5e-4)


def test_which_pairs_are_kept_by_hand():
    last = BY_HAND.strip().split("\n\n")[-1]
    others = [number(found) for found in re.findall(r"margins of (\S+) and (\S+),", last)[0]]
    [k] = re.findall(r"K = (\d)", last)
    kept = [number(found) for found in re.findall(r"keeps the margins (\S+) and (\S+)\.", last)[0]]
    margins = torch.tensor([2.0, *others])
    assert margins[select_top(margins, int(k))].tolist() == pytest.approx(kept)


def test_the_playground_is_the_one_described():
    """Precision at iteration 1 is the share of right labels in the default data, which nothing rounds."""
    rows = playground.preferences(2000, "train", label_noise=0.3, length_bias=0.0, seed=0)
    share = f"{playground.precision(rows):.3f}"
    table = {row[0]: row for row in rows_of(section("### What you should see"))}
    assert table["1"][1:3] == ["2000", share] and list(table) == ["0", "1", "2", "3"]
    assert f"from {share} to {table['2'][2]}" in README


def test_the_verdict_s_numbers_are_those_of_the_results():
    """Each number of "When to use it" and of the ensemble beside what it is a number of."""
    verdict = (ROOT / "experiments/results/claims.md").read_text()
    when = section("## When to use it").replace("−", "-")
    for method in ("selection only", "SeRA", "plain DPO"):
        win_rate = re.search(rf"\|{method}\|[\d.]+\|[^|]*\|([^|]*)\|", verdict)[1]
        assert win_rate in when
    differences = re.findall(r" less [\w ]+\|[^|]*\|([+-][\d.]+ [^|]*)\|", verdict)
    assert len(differences) == 3 and [one for one in differences if one not in when] == []
    of_iteration = re.search(r"\|bootstrapped pairs right\|γ = 0\.5\|(.*)\|", verdict)[1].split("|")
    for t in (2, 6):
        assert of_iteration[t - 1].split(" ")[0] in when
    for k in (0.8, 0.9):  # of all given pairs
        [less] = re.findall(rf"\|{k}, 40% flipped\|.*\|([^|]*)\|[^|]*\|\n", verdict)
        assert less in when
    at_the_end = verdict[verdict.index("|t = 6, 40 seeds") :]
    for gamma in (0.5, 0.7):
        less_none = re.search(rf"\|γ = {gamma} less γ = 0\.0\|[^|]*\|([^|]*)\|", at_the_end)[1]
        assert less_none in when
    of_sentiment = (ROOT / "experiments/results/sentiment.md").read_text()
    auc = re.search(r"\|plain DPO\|[\d.]+\|2\|(.*)\|", of_sentiment)[1].split("|")[6]  # of the review after iteration 1
    assert f"AUC for wrong labels was {auc}" in when


PAGES = ["README.md", "experiments/README.md", "experiments/results/README.md"]
PAGES += [f"docs/{name}.md" for name in ("data", "exercises", "related", "results", "running", "speed")]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_commands_name_what_is_there(page):
    text = (ROOT / page).read_text()
    paths = [(ROOT / page).parent / path for path in LINK.findall(text)]
    paths += [ROOT / path for path in re.findall(r"python ((?:experiments/)?\w+\.py)", text)]
    assert paths and [path for path in paths if not path.exists()] == []


def test_the_equations_stand_beside_names_that_are_there():
    for _, code in rows_of(section("## The method in equations and code")):
        [file] = LINK.findall(code)
        source = (ROOT / file).read_text()
        names = re.findall(r"`(\w+)`", code)
        assert [name for name in names if f"\ndef {name}(" not in source] == []


def test_the_readme_is_short_and_its_first_commands_run():
    assert len(README.split()) <= 1900
    for command in (
        "python3 -m venv .venv && . .venv/bin/activate",
        "pip install -e . && python train.py",
        "pip install -e '.[test]' && pytest",
    ):
        assert f"\n{command}\n" in README


def test_the_copied_files_run_as_shown(tmp_path, monkeypatch):
    for name, copy in [("logprobs", "logprobs"), ("losses", "losses"), ("select", "selection")]:
        shutil.copy(ROOT / f"sera_min/{name}.py", tmp_path / f"{copy}.py")
        monkeypatch.delitem(sys.modules, copy, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    policy, reference, policy_before = tiny_model(), tiny_model(), tiny_model()
    with torch.no_grad():
        policy_before.get_input_embeddings().weight.mul_(2)
    given = {
        "policy": policy,
        "reference": reference,
        "policy_before": policy_before,
        "prompts": [[2, 5], [2, 6, 7], [2, 6]],
        "chosen": [[8, 9, 1], [8, 1], [9, 1]],
        "rejected": [[10, 1], [11, 12, 1], [12, 1]],
    }
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(code, given)
    assert given["newest"].tolist() == [0, 0, 0]  # policy and reference are alike
    largest_first = sorted(range(3), key=lambda i: -given["previous"][i])
    assert given["previous"].unique().numel() == 3 and given["kept"].tolist() == largest_first[:2]
    assert any(p.grad is not None and p.grad.any() for p in policy.parameters())
