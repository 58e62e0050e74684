"""What a run says of itself, counted again from what it wrote, by the definitions of the README."""

import copy
import random
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from shared import read

import train
from sera_min import playground
from sera_min.machinery.config import Config, resolve

T, PAIRS = 3, 60


@pytest.fixture(scope="module")
def world(sft):
    """The playground with an SFT policy of a few seconds, and fewer prompts and pairs to evaluate on; no figures."""
    functions = {
        "make_sft_policy": lambda *_: (copy.deepcopy(sft[0]), sft[1]),
        "prompts": lambda part: playground.prompts(part)[: None if part == "train" else 50],
        "preferences": lambda n, part, **of: playground.preferences(n if part == "train" else 64, part, **of),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        yield SimpleNamespace(**{**vars(playground), **functions})


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """The folder of a run of three iterations, and what it returned."""
    out = tmp_path_factory.mktemp("reported") / "run"
    return out, run_in(world, config_of(out))


def run_in(world, flags):
    return train.main(flags, replace(train.SERA, world=world))


def config_of(out, **changed):
    return Config(**{"output_dir": str(out), "device": "cpu", "max_train_pairs": PAIRS, "learning_rate": 1e-3, "iterations": T, **changed})


def true_reward(prompt, response):
    """The mean over the sentences: +1 on the prompt's topic and kind, −1 off it and unkind, or broken, else 0."""
    words, scores = prompt.split(), []
    topic = {words[words.index("the") + 1], words[-1]}
    text = response.strip()
    for sentence in (text[:-1] if text.endswith(".") else text).split("."):
        match sentence.split():
            case ["the", noun, verb, tone] if noun in playground.NOUNS and verb in playground.VERBS and tone in (
                playground.KIND + playground.UNKIND
            ):
                on, kind = noun in topic, tone in playground.KIND
                scores.append(1 if on and kind else -1 if not on and not kind else 0)
            case _:
                scores.append(-1)
    return sum(scores) / len(scores)


def share_right(pairs):
    wins = [(true_reward(p["prompt"], p["chosen"]), true_reward(p["prompt"], p["rejected"])) for p in pairs]
    return sum(1.0 if w > l else 0.5 if w == l else 0.0 for w, l in wins) / len(wins) if wins else None


def test_what_the_playground_reports(world, run):
    out, final = run
    metrics = read(out / "metrics.jsonl")
    evaluations = [m for m in metrics if m["phase"] != "train"]
    assert [m["iteration"] for m in evaluations] == [0, 1, 2, T] and evaluations[-1] == final
    reference = [line["reference"] for line in read(out / "iteration-0" / "answers.jsonl")]
    given = read(out / "iteration-1" / "pairs.jsonl")
    ties = 0
    for t, shown in enumerate(evaluations):
        answers = read(out / f"iteration-{t}" / "answers.jsonl")
        assert [line["prompt"] for line in answers] == world.prompts("test") * 2
        assert [line["reference"] for line in answers] == reference  # drawn once, from the SFT policy
        rewards = [true_reward(line["prompt"], line["answer"]) for line in answers]
        before = [true_reward(line["prompt"], line["reference"]) for line in answers]
        wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(rewards, before)]
        ties += wins.count(0.5)
        assert shown["gold/reward"] == pytest.approx(sum(rewards) / len(rewards))
        assert shown["gold/win_rate"] == pytest.approx(sum(wins) / len(wins))
        assert shown["gold/length"] == pytest.approx(sum(len(line["answer"].split()) for line in answers) / len(answers))
        assert shown["data/label_accuracy"] == pytest.approx(share_right(given))
        pairs = read(out / f"iteration-{t}" / "pairs.jsonl") if t else []
        for name, source in {"select/precision": "offline", "bootstrap/precision": "bootstrap"}.items():
            assert shown.get(name) == pytest.approx(share_right([p for p in pairs if p["source"] == source]))
        others = [reference]
        if t:
            others.append([line["answer"] for line in read(out / f"iteration-{t - 1}" / "answers.jsonl")])
        for other in others:  # the samples are others than the reference's, at t = 0 too, and than the iteration's before
            assert sum(a["answer"] == b for a, b in zip(answers, other)) < 0.2 * len(answers)
    assert ties > 10  # else ½ is not seen
    assert len(given) == PAIRS and 0.6 < share_right(given) < 0.8  # 30 % of the labels are flipped


def test_the_table_is_what_the_metrics_say(run):
    out, _ = run
    lines = [line.strip("| ").split("|") for line in (out / "report.md").read_text().splitlines() if line.startswith("|")]
    table = [dict(zip([cell.strip() for cell in lines[0]], [cell.strip() for cell in line])) for line in lines[2:]]
    evaluations = [m for m in read(out / "metrics.jsonl") if m["phase"] != "train"]
    assert len(table) == len(evaluations) == T + 1
    for row, shown in zip(table, evaluations):
        for heading, name in {"true reward": "gold/reward", "win rate": "gold/win_rate", "words": "gold/length",
                              "accuracy": "eval_rewards/accuracies", "β·margin": "eval_rewards/margins"}.items():  # fmt: skip
            assert row[heading] == f"{shown[name]:.3f}", heading
    assert table[2]["precision"] == f"{evaluations[2]['select/precision']:.3f}"
    pairs = read(out / "iteration-2" / "pairs.jsonl")
    assert int(table[2]["kept"]) == sum(p["source"] == "offline" for p in pairs) == 0.7 * PAIRS


def test_evaluation_pairs_have_no_wrong_label(world, tmp_path):
    """Trained on labels that are all flipped, the policy is wrong about pairs that are rightly labelled."""
    final = run_in(world, config_of(tmp_path / "run", label_noise=1.0, iterations=1, epochs_per_iteration=6, max_new_tokens=5))
    assert final["data/label_accuracy"] == 0.0
    assert final["eval_rewards/accuracies"] < 0.4 and final["eval_rewards/margins"] < 0


def test_evaluation_prompts_are_none_that_are_trained_on(run):
    out, _ = run
    trained = {line["prompt"] for line in read(out / "iteration-1" / "pairs.jsonl")}
    assert not trained & {line["prompt"] for line in read(out / "iteration-1" / "answers.jsonl")}


def test_label_noise_and_length_bias_are_what_they_say():
    """Shares of 4,000 pairs, within 4 standard deviations."""
    for noise, bias in [(0.0, 0.0), (0.2, 0.0), (0.0, 1.0), (0.4, 0.5)]:
        rows = playground.preferences(4000, "train", label_noise=noise, length_bias=bias, seed=random.Random(1).randrange(99))
        longer = [len(row["chosen"].split()) > len(row["rejected"].split()) for row in rows
                  if len(row["chosen"].split()) != len(row["rejected"].split())]  # fmt: skip
        if bias == 0:
            assert share_right(rows) == pytest.approx(1 - noise, abs=4 * (noise * (1 - noise) / 4000) ** 0.5 + 1e-9)
            assert sum(longer) / len(longer) == pytest.approx(0.5, abs=0.04)
        else:  # of those that the bias took the longer one wins, of the others half; then labels are flipped
            share = bias + (1 - bias) / 2
            assert sum(longer) / len(longer) == pytest.approx(share * (1 - noise) + (1 - share) * noise, abs=0.035)


def test_what_a_run_without_flags_is():
    """The choices of train.py's header, and the playground's."""
    config = resolve(Config(device="cpu"))
    expected = {
        "iterations": 3, "keep": 0.7, "bootstrap": 0.3, "samples_per_prompt": 4, "ensemble_gamma": 0.5, "temperature": 1.0,
        "top_p": 1.0, "loss_type": "dpo", "beta": 1.0, "label_smoothing": 0.0, "learning_rate": 3e-4,
        "epochs_per_iteration": 1, "per_device_train_batch_size": 32, "seed": 0,
        "label_noise": 0.3, "max_train_pairs": 2000, "max_length": 64, "max_prompt_length": 16,
        "max_new_tokens": 32, "eval_split": "test", "save_steps": 500, "lora_r": 16, "lora_alpha": 32,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    user = resolve(Config(model_name_or_path="m", dataset_name="d", device="cpu"))
    assert (user.beta, user.learning_rate, user.max_length, user.max_prompt_length, user.max_new_tokens) == (0.1, 1e-6, 1024, 512, 512)
    assert user.eval_fraction == 0.05


def test_the_playground_is_that_of_the_flags(world, tmp_path):
    """D is of the seed, of training prompts, with the noise asked for; evaluation pairs are of others."""
    asked, seeds = [], []

    def preferences(n, part, **flags):
        asked.append((part, flags))
        return world.preferences(n, part, **flags)

    def make_sft_policy(seed, device):
        seeds.append(seed)
        return world.make_sft_policy(seed, device)

    watched = SimpleNamespace(**{**vars(world), "preferences": preferences, "make_sft_policy": make_sft_policy})
    texts = []
    for seed in (3, 4):
        flags = {"iterations": 1, "label_noise": 0.0, "eval_split": "validation", "max_train_pairs": 64, "max_new_tokens": 5}
        run_in(watched, config_of(tmp_path / str(seed), seed=seed, **flags))
        pairs = read(tmp_path / str(seed) / "iteration-1" / "pairs.jsonl")
        assert share_right(pairs) == 1
        answers = read(tmp_path / str(seed) / "iteration-1" / "answers.jsonl")
        assert [line["prompt"] for line in answers] == world.prompts("validation") * 2
        texts.append(str([(p["prompt"], p["chosen"]) for p in pairs]))
    assert texts[0] != texts[1] and seeds == [3, 4]
    assert [(part, flags["seed"]) for part, flags in asked] == [("train", 3), ("validation", 3), ("train", 4), ("validation", 4)]


def test_the_sft_policy_has_seen_no_evaluation_prompt(monkeypatch):
    parts, every = [], playground.prompts
    monkeypatch.setattr(playground, "prompts", lambda part: (parts.append(part), every(part))[1])
    playground.make_sft_policy(0, "cpu", steps=1, batch=2)
    assert parts == ["train"]
