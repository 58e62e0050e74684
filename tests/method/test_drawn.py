"""What is drawn at random: from which distribution, and by which seed. What follows from it is test_oracle.py's."""

import json
import random
from dataclasses import replace

import pytest
import torch
from shared import Drawn, read, tiny_model, word_tokenizer
from transformers import AutoModelForCausalLM

import train
from sera_min import bootstrap
from sera_min.machinery.config import Config

WORDS = "b c d e f g h".split()
UNEVALUATED = replace(train.SERA, evaluate=lambda *_: {}, report=False)  # most of these tests ask for neither


@pytest.fixture(scope="module")
def standing(tmp_path_factory):
    """A model, and pairs to one prompt, for runs whose learning rate is next to nothing: every policy is π_ref."""
    here = tmp_path_factory.mktemp("standing")
    tokenizer = word_tokenizer(WORDS)
    tokenizer.save_pretrained(here / "model")
    model = tiny_model("llama", vocab_size=len(tokenizer), num_hidden_layers=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)  # a first token that is far from evenly distributed
    model.save_pretrained(here / "model")
    rng = random.Random(0)
    rows = [{"prompt": "b c", "chosen": " ".join(rng.choices(WORDS, k=3)), "rejected": " ".join(rng.choices(WORDS, k=2))}
            for _ in range(60)]  # fmt: skip
    (here / "one.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = [" ".join(rng.sample(WORDS, 3)) for _ in range(20)] * 2
    rows = [{"prompt": x, "chosen": "b c " + " ".join(rng.choices(WORDS, k=3)), "rejected": "d"} for x in prompts]
    (here / "many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return here


def config_of(standing, out, **changed):
    return Config(**{
        "model_name_or_path": str(standing / "model"), "dataset_name": str(standing / "one.jsonl"), "output_dir": str(out),
        "max_length": 24, "max_prompt_length": 8, "max_new_tokens": 6, "learning_rate": 1e-12, "eval_fraction": 0.0,
        "iterations": 2, "device": "cpu", **changed,
    })  # fmt: skip


def samples_of(out, t):
    return [line["response"].split() for line in read(out / f"iteration-{t}" / "samples.jsonl")]


def texts_of(out, t=1):
    return [(line["prompt"], line["chosen"], line["rejected"]) for line in read(out / f"iteration-{t}" / "pairs.jsonl")]


def first_token_distribution(standing, temperature, top_p):
    """By hand: softmax(logits / temperature), of the fewest likeliest words that together reach top_p."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(standing / "model").eval(), word_tokenizer(WORDS)
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer("b c").input_ids])).logits[0, -1].double() / temperature
    p = {tokenizer.convert_ids_to_tokens(i): logits.softmax(-1)[i].item() for i in range(len(logits))}
    kept, total = {}, 0.0
    for word in sorted(p, key=lambda word: -p[word]):
        if total >= top_p:
            break
        kept[word] = p[word]
        total += p[word]
    return {word: value / total for word, value in kept.items()}


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.4, 1.0), (1.5, 0.8)])
def test_samples_are_of_the_distribution_asked_for(standing, tmp_path, monkeypatch, temperature, top_p):
    """960 samples to one prompt: how often each first token comes, by a chi-square test at 5 standard deviations."""
    Drawn(monkeypatch)
    config = config_of(standing, tmp_path / "run", temperature=temperature, top_p=top_p, samples_per_prompt=16)
    train.main(config, UNEVALUATED)
    firsts = [(words or ["</s>"])[0] for words in samples_of(tmp_path / "run", 2)]
    expected = first_token_distribution(standing, temperature, top_p)
    assert len(firsts) == 960 and {*firsts} <= expected.keys()
    chi_square = sum((firsts.count(word) - 960 * p) ** 2 / (960 * p) for word, p in expected.items())
    freedom = len(expected) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5 + 5


def test_samples_end_or_are_as_long_as_asked_for(standing, tmp_path, monkeypatch):
    Drawn(monkeypatch)
    train.main(config_of(standing, tmp_path / "run", max_new_tokens=3), UNEVALUATED)
    lines = read(tmp_path / "run" / "iteration-2" / "samples.jsonl")
    lengths = {reason: {len(line["response"].split()) for line in lines if line["finish_reason"] == reason}
               for reason in ("stop", "length")}  # fmt: skip
    assert lengths["length"] == {3} and max(lengths["stop"]) == 2


def test_samples_differ_between_iterations_and_seeds_and_are_a_function_of_these(standing, tmp_path, monkeypatch):
    """The policy stands still: whatever differs was drawn anew."""
    Drawn(monkeypatch)
    runs = {"a": {}, "seed": {"seed": 1}, "order": {"per_device_train_batch_size": 20, "epochs_per_iteration": 2}}
    for name, changed in runs.items():
        train.main(config_of(standing, tmp_path / name, iterations=3, max_train_pairs=30, **changed), UNEVALUATED)
    drawn = {(name, t): samples_of(tmp_path / name, t) for name in runs for t in (2, 3)}
    assert drawn["a", 2] == drawn["order", 2] and drawn["a", 3] == drawn["order", 3]
    different = [drawn["a", 2], drawn["a", 3], drawn["seed", 2], drawn["seed", 3]]
    for i, one in enumerate(different):
        for other in different[:i]:
            assert sum(a == b for a, b in zip(one, other)) < 0.5 * len(one)
    n = 30 * 4 // 2
    assert drawn["a", 2][:n] != drawn["a", 2][n:]  # nor do they begin again within an iteration


def likeliest(model, prompt, most):
    """The words of a model's greedy response to a prompt, up to its end."""
    tokenizer = word_tokenizer(WORDS)
    ids = start = tokenizer(prompt).input_ids
    with torch.no_grad():
        while len(ids) < len(start) + most and ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, model(torch.tensor([ids])).logits[0, -1].argmax().item()]
    words = tokenizer.convert_ids_to_tokens(ids[len(start) :])
    return [word for word in words if word != tokenizer.eos_token]


def test_samples_are_those_of_the_newest_policy(standing, tmp_path, monkeypatch):
    """With top_p next to 0 they are its likeliest words; those of the policy before it are others."""
    drawn, many = Drawn(monkeypatch), standing / "many.jsonl"
    train.main(config_of(standing, tmp_path / "run", dataset_name=str(many), top_p=1e-6, learning_rate=0.03, iterations=3,
                         max_train_pairs=15), UNEVALUATED)
    prompts, model = [row["prompt"] for row in read(many)][:15], AutoModelForCausalLM.from_pretrained(standing / "model").eval()
    expected = {1: [likeliest(model, x, 6) for x in prompts]}  # of π_ref
    for t, policy in zip((2, 3), drawn.policies):
        model.load_state_dict(policy)
        expected[t] = [likeliest(model, x, 6) for x in prompts]
        assert samples_of(tmp_path / "run", t)[::4] == expected[t] != expected[t - 1]


def test_samples_of_every_batch_are_drawn_anew(standing, tmp_path, monkeypatch):
    """60 times the same prompt, a few at a time: no batch draws what another drew."""
    Drawn(monkeypatch)
    monkeypatch.setattr(bootstrap, "CACHE_TOKENS", {"cpu": 64})  # 2 prompts of 8 tokens, 4 samples each
    train.main(config_of(standing, tmp_path / "run"), UNEVALUATED)
    samples = samples_of(tmp_path / "run", 2)
    batches = [str(samples[start : start + 8]) for start in range(0, len(samples), 8)]
    assert len({*batches}) == len(batches) == 30


def test_draws_are_fine_enough_for_what_is_improbable(monkeypatch):
    """A vocabulary of 100,000 words of 2e-8 each beside a likely one: float32, which is good to 6e-8, mixes them up."""
    p = torch.full((1, 100_001), 2e-8)  # float32, as a softmax gives it
    p[0, 0] = 0.998
    cdf = p[0].double().cumsum(-1)
    for word in (7, 40_000, 99_998):
        u = (cdf[word] - 1e-8) / cdf[-1]  # the middle of what is the word's
        monkeypatch.setattr(torch, "rand", lambda *size, dtype=None, u=u, **_: (1 - u).to(dtype or torch.float32).expand(*size))
        assert bootstrap.draw_tokens(p).item() == word


def test_the_order_of_pairs_is_of_the_epoch_the_iteration_and_the_seed(standing, tmp_path, monkeypatch):
    changes = {"a": {}, "b": {"temperature": 0.5, "samples_per_prompt": 3}, "seed": {"seed": 1}}
    orders = {}
    for name, changed in changes.items():
        drawn = Drawn(monkeypatch)
        plain = {"keep": 1.0, "bootstrap": 0.0, "epochs_per_iteration": 2, "iterations": 3, "max_train_pairs": 30}
        train.main(config_of(standing, tmp_path / name, **plain, **changed), UNEVALUATED)
        orders[name] = [p.tolist() for p in drawn.permutations]
        monkeypatch.undo()
    assert orders["a"] == orders["b"] and all(sorted(order) == list(range(30)) for order in orders["a"])
    assert len({*map(tuple, orders["a"] + orders["seed"])}) == 2 * 3 * 2  # two epochs, three iterations, two seeds
    assert [*range(30)] not in orders["a"]


def test_no_two_things_are_drawn_by_one_seed(standing, tmp_path, monkeypatch):
    """Order of pairs, samples and answers, in every iteration: each has a seed of its own."""
    seeds, plain, generator = [], torch.manual_seed, torch.Generator

    class Watched(generator):
        def manual_seed(self, seed):
            seeds.append(seed)
            return super().manual_seed(seed)

    Drawn(monkeypatch)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: (seeds.append(seed), plain(seed))[1])
    monkeypatch.setattr(torch, "Generator", Watched)
    train.main(config_of(standing, tmp_path / "run", iterations=3))
    assert len(seeds) == len({*seeds}) >= 3 + 2 + 2  # orders, samples, answers before and after


def test_a_share_of_the_prompts_is_held_out_by_the_seed(standing, tmp_path, monkeypatch):
    """Which ones is a function of the seed; a prompt is held out with all its pairs."""
    Drawn(monkeypatch)
    every, trained = {row["prompt"] for row in read(standing / "many.jsonl")}, {}
    config = config_of(standing, tmp_path, dataset_name=str(standing / "many.jsonl"), eval_fraction=0.2, iterations=1)
    for name, seed in {"a": 0, "b": 0, "seed": 1}.items():
        train.main(replace(config, output_dir=str(tmp_path / name), seed=seed), UNEVALUATED)
        texts = texts_of(tmp_path / name)
        trained[name] = {x for x, _, _ in texts}
        assert len(every - trained[name]) == round(0.2 * len(every)) and len(texts) == 2 * len(trained[name])
    assert trained["a"] == trained["b"] != trained["seed"]


def test_answers_are_of_the_seed(standing, tmp_path, monkeypatch):
    """Before and after, though the policy stands still; and the same again by the same seed."""
    Drawn(monkeypatch)
    drawn = {}
    for name, seed in {"a": 0, "b": 0, "seed": 1}.items():
        config = config_of(standing, tmp_path / name, dataset_name=str(standing / "many.jsonl"), eval_fraction=0.3, seed=seed)
        train.main(replace(config, iterations=1, eval_fraction=0.0))  # the same five prompts, whatever the seed
        rows = read(tmp_path / name / "iteration-1" / "answers.jsonl")
        drawn[name] = [[row[who] for row in rows] for who in ("reference", "answer")]
    assert drawn["a"] == drawn["b"] and all(a != b for a, b in zip(drawn["a"], drawn["seed"]))
    assert drawn["a"][0] != drawn["a"][1]


def test_a_sample_ends_at_every_end_that_the_model_names(standing, tmp_path, monkeypatch):
    """Those of its generation_config beside the tokenizer's: here the word h."""
    Drawn(monkeypatch)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(standing / "model"), word_tokenizer(WORDS)
    model.generation_config.eos_token_id = [1, tokenizer.convert_tokens_to_ids("h")]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [row for row in read(standing / "one.jsonl") if "h" not in row["chosen"] + row["rejected"]]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = config_of(standing, tmp_path / "run", max_new_tokens=12)
    train.main(replace(config, model_name_or_path=str(tmp_path / "model"), dataset_name=str(tmp_path / "d.jsonl")), UNEVALUATED)
    assert not any("h" in words for words in samples_of(tmp_path / "run", 2))
