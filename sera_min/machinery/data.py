"""What a run trains and evaluates on: read once, and then kept with the run as JSON.

A resume does not read it again: a template may write today's date, and another one tomorrow.
"""

from random import Random
from typing import Any

from sera_min.machinery import encoding
from sera_min.machinery.config import Resolved
from sera_min.machinery.encoding import Given
from sera_min.machinery.errors import InputError, format_counts
from sera_min.machinery.rows import read_rows
from sera_min.pairs import Ids, Pair, Preferences

Data = dict[str, Any]  # "given" and "held_out": lists of Given; "prompts" to be answered, and their "texts"


def read(config: Resolved, world: Any, tokenizer: Any, eos_ids: Ids) -> Data:
    """D and the evaluation pairs as token ids; what became of every row is printed. InputError."""
    limits: dict[str, Any] = {
        "eos_ids": eos_ids,
        "max_length": config.max_length,
        "max_prompt_length": config.max_prompt_length,
    }
    if config.in_playground:
        made = of_playground(config, world, tokenizer, limits)
        warn_of_shares(config, len(made["given"]))
        return made
    if str(tokenizer.chat_template).endswith(encoding.PLAIN_TEMPLATE):
        print("template: the tokenizer has none, so dialogues read '\\n\\nHuman: … \\n\\nAssistant: …'")
    given, held_out = of_user(config, tokenizer, limits)
    if not given:
        raise InputError(f"--dataset_name {config.dataset_name}: no pair is left to train on")
    warn_of_shares(config, len(given))
    to_answer = {tuple(one.pair.prompt): one.text for one in held_out or given}
    first = list(to_answer)[:64]
    texts = [to_answer[prompt] for prompt in first]
    return {"given": given, "held_out": held_out, "prompts": [list(x) for x in first], "texts": texts}


def warn_of_shares(config: Resolved, n: int) -> None:
    for name, share in {"keep": config.keep, "bootstrap": config.bootstrap}.items():
        if share > 0 and round(share * n) == 0:
            print(f"--{name} is {share:g}: of {n} pairs that is less than one, so none")


def of_playground(config: Resolved, world: Any, tokenizer: Any, limits: dict[str, Any]) -> Data:
    """D with flipped labels, evaluation pairs without, and the evaluation prompts twice."""
    part, noise = str(config.eval_split), config.label_noise
    made = world.preferences(config.max_train_pairs, "train", label_noise=noise, seed=config.seed)
    clean = world.preferences(512, part, label_noise=0, seed=config.seed)
    given, counts = encoding.encode_given(made, tokenizer, name="playground", **limits)
    held_out, _ = encoding.encode_given(clean, tokenizer, name=f"playground {part}", **limits)
    print(f"data: {format_counts(counts)}; {len(held_out)} held out")
    texts = world.prompts(part) * 2
    prompts = tokenizer(texts).input_ids
    return {"given": given, "held_out": held_out, "prompts": prompts, "texts": texts}


def of_user(config: Resolved, tokenizer: Any, limits: dict[str, Any]) -> tuple[list[Given], list[Given]]:
    """The pairs to train on and those to evaluate on. No prompt is in both."""
    name, subset = str(config.dataset_name), config.dataset_config
    rows = read_rows(name, config.dataset_train_split, config.max_train_pairs, subset)
    given, counts = encoding.encode_given(rows, tokenizer, name=name, **limits)
    if config.eval_split is None:
        given, held_out = split_by_prompt(given, config.eval_fraction, config.seed)
        few = ""
        if config.eval_fraction and not held_out:
            few = " (--eval_fraction of the prompts is less than one)"
        print(f"data: {format_counts(counts)}; {len(held_out)} of them held out{few}")
        return given, held_out

    other = config.eval_dataset_name or name
    if other != name:
        subset = None
    rows = read_rows(other, config.eval_split, config=subset)
    held_out, held_counts = encoding.encode_given(rows, tokenizer, name=other, **limits)
    known = {tuple(one.pair.prompt) for one in held_out}
    kept = [one for one in given if tuple(one.pair.prompt) not in known]
    counts["kept"] = len(kept)
    counts["dropped: the prompt is in the evaluation data"] = len(given) - len(kept)
    print(f"data: {format_counts(counts)}\nevaluation data: {format_counts(held_counts)}")
    if not held_out:
        raise InputError(f"{other}, split '{config.eval_split}': no pair is left to evaluate on")
    return kept, held_out


def split_by_prompt(given: list[Given], share: float, seed: int) -> tuple[list[Given], list[Given]]:
    """The pairs to train on and those held out: a random share of the prompts."""
    prompts = list(dict.fromkeys(tuple(one.pair.prompt) for one in given))
    held = set(Random(seed).sample(prompts, round(share * len(prompts))))
    train = [one for one in given if tuple(one.pair.prompt) not in held]
    return train, [one for one in given if tuple(one.pair.prompt) in held]


def preferences(given: list[Given]) -> Preferences:
    pairs, texts, rows = [], [], []
    for ids, text, row in given:
        pairs.append(Pair(*ids))
        texts.append(text)
        rows.append(row)
    return Preferences(pairs, rows, texts)
