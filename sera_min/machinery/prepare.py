"""A run is opened: what it reads, and what is refused before anything is computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sera_min import data, folder, pairs, playground, report
from sera_min.compute import check_memory, set_precision
from sera_min.config import Config, Resolved, resolve
from sera_min.files import Rows, fingerprint, read_rows
from sera_min.forms import InputError
from sera_min.models import check_before_training, check_positions, eos_ids_of
from sera_min.pairs import Given, Ids, Pair, format_counts, split_by_prompt
from sera_min.run import Data, Run


@contextmanager
def opened(flags: Config) -> Iterator[Run]:
    """The run that the flags ask for, in its folder, which is this process's meanwhile. What cannot be is refused."""
    config = resolve(flags)
    out, values = Path(config.output_dir), asdict(config)
    folder.check(out, values, resume=flags.resume_from_checkpoint is not None)
    report.start()
    parts = read_parts(config)
    run = prepare(config, out, parts)
    needed = 10 * sum(p.nbytes for p in run.policies.policy.parameters())  # four policies, two checkpoints
    with folder.claimed(out, values, fingerprint(parts), needed):
        if run.policies.newest() < 0:
            run.policies.put(0, run.policies.policy, run.tokenizer)
        if not folder.phase_file(out, "data").exists():  # else it has been read from there
            folder.phase(out, "data", lambda: packed_data(run))
        yield run


def read_parts(config: Resolved) -> list[tuple[str, Rows]]:
    """The name and the rows of D, of the evaluation data and of --prompt_file; no rows where there are none."""
    if config.in_playground:
        part = config.eval_split or "test"
        noise = {"label_noise": config.label_noise, "length_bias": config.length_bias}
        made = playground.preferences(config.max_train_pairs or 0, "train", seed=config.seed, **noise)
        clean = playground.preferences(512, part, seed=config.seed, label_noise=0, length_bias=0)
        return [("playground", made), (f"playground {part}", clean), ("", [])]
    name, other = str(config.dataset_name), config.eval_dataset_name or str(config.dataset_name)
    prompts = read_rows(config.prompt_file, "train") if config.prompt_file else []
    rows = read_rows(name, config.dataset_train_split, config.max_train_pairs, config.dataset_config)
    of_other = config.dataset_config if other == name else None
    test: Rows = read_rows(other, config.eval_split, config=of_other) if config.eval_split else []
    return [(name, rows), (other, test), (config.prompt_file or "", prompts)]


def packed_data(read: Data) -> dict[str, Any]:
    """What a run read, to be read again at a resume: a template may write today's date, and another tomorrow."""
    rows = {name: [ids for pair in getattr(read, name) for ids in pair] for name in ("offline", "held_out")}
    rows |= {"eval_prompts": read.eval_prompts, "file_prompts": read.file_prompts}
    others = {name: getattr(read, name) for name in ("eval_texts", "file_texts", "offline_rows", "offline_texts")}
    return {name: pairs.pack(ids) for name, ids in rows.items()} | others


def unpacked_data(state: dict[str, Any]) -> Data:
    fields: dict[str, Any] = {
        name: pairs.unpack(*part) if isinstance(part, tuple) else part for name, part in state.items()
    }
    for name in ("offline", "held_out"):
        rows = fields[name]
        fields[name] = [Pair(*rows[i : i + 3]) for i in range(0, len(rows), 3)]
    return Data(**fields)


def prepare(config: Resolved, out: Path, parts: list[tuple[str, Rows]]) -> Run:
    """Everything is read and checked; in the playground π_ref is trained. Nothing is written. Raises InputError."""
    policies = folder.Policies(out, config.model_name_or_path, config.device)
    if (newest := policies.newest()) < 0:
        policies.hold(0, *report.timed("SFT")(playground.make_sft_policy)(config.seed, config.device))
    policy, tokenizer = policies.get(max(newest, 0)), policies.tokenizer
    check_memory(policy, config.device)
    longest = max(config.max_length, config.max_prompt_length + config.max_new_tokens)
    check_positions(policy, longest, "--max_length or --max_prompt_length + --max_new_tokens")
    ends = eos_ids_of(policy, tokenizer)
    if folder.phase_file(out, "data").exists():
        data.set_template(tokenizer)
        read = unpacked_data(folder.phase(out, "data", dict))
        print(f"data: as read when the run began, {len(read.offline)} pairs, {len(read.held_out)} held out")
    else:
        read = encode_parts(config, tokenizer, ends, parts)
    if newest < 1:
        check_before_training(policy, read.offline[0], ends, config.gradient_checkpointing)
    set_precision(config.device)  # after the check, which is in float32
    return Run(config, out, policies, tokenizer, ends, **vars(read))


def encode_parts(config: Resolved, tokenizer: Any, ends: Ids, parts: list[tuple[str, Rows]]) -> Data:
    """The rows as token ids; what became of them is printed. Raises InputError, also where no pair is left."""
    limits: dict = {"eos_ids": ends, "max_length": config.max_length, "max_prompt_length": config.max_prompt_length}
    *pairs_of, (prompt_file, asked) = parts
    read = playground_pairs if config.in_playground else user_pairs
    given, held_out, eval_prompts, eval_texts = read(config, tokenizer, limits, *pairs_of)
    if not given:
        raise InputError(f"--dataset_name {config.dataset_name}: no pair is left to train on")
    for name, share in {"keep": config.keep, "bootstrap": config.bootstrap}.items():
        if share > 0 and round(share * len(given)) == 0:
            print(f"--{name} is {share:g}: of {len(given)} pairs that is less than one, so none")
    texts, prompts, counts = data.encode_prompts(asked, tokenizer, name=prompt_file, **limits)
    if prompt_file:
        print(f"prompts to answer: {format_counts(counts)}")
    offline, offline_texts, rows = (list(column) for column in zip(*given))
    return Data(
        offline=offline, offline_rows=rows, offline_texts=offline_texts, held_out=held_out, eval_prompts=eval_prompts,
        eval_texts=eval_texts, file_prompts=prompts, file_texts=texts,
    )  # fmt: skip


Part = tuple[str, Rows]
Read = tuple[list[Given], list[Pair], list[Ids], list[str]]  # D, held-out pairs, evaluation prompts, their texts


def playground_pairs(config: Resolved, tokenizer: Any, limits: dict, train: Part, test: Part) -> Read:
    """D, evaluation pairs without wrong labels, and the evaluation prompts, twice each, to be answered."""
    given, counts = data.encode_given(train[1], tokenizer, name=train[0], **limits)
    held_out, _ = data.encode(test[1], tokenizer, name=test[0], **limits)
    print(f"data: {format_counts(counts)}; {len(held_out)} held out")
    texts = playground.prompts(config.eval_split or "test") * 2
    return given, held_out, tokenizer(texts).input_ids, texts


def user_pairs(config: Resolved, tokenizer: Any, limits: dict, train: Part, test: Part) -> Read:
    """D; evaluation pairs, none of whose prompts is in D; up to 64 of their prompts (or of D's) to be answered."""
    if tokenizer.chat_template is None:
        print("template: the tokenizer has none, so dialogues read '\\n\\nHuman: … \\n\\nAssistant: …'")
    given, counts = data.encode_given(train[1], tokenizer, name=train[0], **limits)
    if config.eval_split is None:
        given, held = split_by_prompt(given, config.eval_fraction, config.seed)
        few = " (--eval_fraction of the prompts is less than one)" if config.eval_fraction and not held else ""
        print(f"data: {format_counts(counts)}; {len(held)} of them held out{few}")
    else:
        held, held_counts = data.encode_given(test[1], tokenizer, name=test[0], **limits)
        n, known = len(given), {tuple(one.pair.prompt) for one in held}
        given = [one for one in given if tuple(one.pair.prompt) not in known]
        counts["kept"], counts["dropped: the prompt is in the evaluation data"] = len(given), n - len(given)
        print(f"data: {format_counts(counts)}\nevaluation data: {format_counts(held_counts)}")
        if not held:
            raise InputError(f"{test[0]}, split '{config.eval_split}': no pair is left to evaluate on")
    text_of = {tuple(one.pair.prompt): one.text for one in held or given}
    prompts = list(text_of)[:64]
    return given, [one.pair for one in held], [list(x) for x in prompts], [text_of[x] for x in prompts]
