"""A run around the method: what its phases share, precision and memory, and what is refused at the start."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sera_min import bootstrap, data, folder, pairs, playground, report
from sera_min.config import Config, Resolved, resolve, seed_of
from sera_min.files import Rows, fingerprint, in_one_line, read_rows
from sera_min.forms import InputError
from sera_min.logprobs import score, sequence_logprobs, sum_and_least, token_batches
from sera_min.models import check_before_training, check_memory, check_positions, eos_ids_of, pad_id_of
from sera_min.pairs import (
    Given,
    Ids,
    Pair,
    Review,
    Samples,
    TrainingSet,
    format_counts,
    rows_of,
    split_by_prompt,
    tokens_of,
)


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run reads."""

    offline: list[Pair]  # D
    offline_rows: list[int] = field(default_factory=list)  # of D's pairs: the number of the row in the user's file
    offline_texts: list[str] = field(default_factory=list)  # of D's prompts, as people read them
    held_out: list[Pair] = field(default_factory=list)  # to evaluate on: none of their prompts is in D
    eval_prompts: list[Ids] = field(default_factory=list)  # to be answered
    eval_texts: list[str] = field(default_factory=list)  # as people read them
    file_prompts: list[Ids] = field(default_factory=list)  # those of --prompt_file, and their texts
    file_texts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Run(Data):
    """What all phases of a run share: its data, and these."""

    config: Resolved
    out: Path
    policies: folder.Policies
    tokenizer: Any
    eos_ids: list[int]  # the tokens that end a response

    def log_prob(self, i: int, prompts: list[Ids], responses: list[Ids], what: str) -> Tensor:
        """log π_θi(y|x) of R rows and the log-prob of each one's least likely token, (R, 2): a phase for i and what."""
        name, desc = f"logps-{what}-under-{i}", f"score {what} under {f'policy {i}' if i else 'the reference'}"
        logps = folder.phase(
            self.out, name, lambda: score_rows(self.policies.get(i), prompts, responses, self.config, desc)
        )
        assert len(logps) == len(responses), f"{name} was computed of {len(logps)} other rows: choose another name"
        return logps

    def sample(self, i: int, prompts: list[Ids]) -> list[list[tuple[Ids, bool]]]:
        """N responses a prompt from π_θi, for the review of iteration i + 1: a phase."""
        n, t = self.config.samples_per_prompt, i + 1
        *packed, ended = folder.phase(
            self.out, f"samples-{t}", lambda: pack_samples(self.draw(i, prompts, n, t, "samples"))
        )
        if (cut_off := 1 - ended.float().mean().item()) > 0.5:
            limit = f"--max_new_tokens {self.config.max_new_tokens}"
            print(f"iteration {t}: {cut_off:.0%} of the samples reach {limit} without an end, and cannot be paired: "
                  "a larger one uses more of them")  # fmt: skip
        samples = list(zip(pairs.unpack(*packed), ended.tolist()))  # P·n
        return [samples[first : first + n] for first in range(0, len(samples), n)]

    def answer(self, i: int, prompts: list[Ids], phase: str) -> list[Ids]:
        """One response a prompt from π_θi: a phase."""
        name = f"{phase.replace(' ', '-')}-{i}"
        return folder.phase(self.out, name, lambda: [y for [(y, _)] in self.draw(i, prompts, 1, i, phase)])

    @report.timed("sampling")
    def draw(self, i: int, prompts: list[Ids], n: int, t: int, phase: str) -> list[list[tuple[Ids, bool]]]:
        pad = pad_id_of(self.tokenizer)
        return draw_samples(self.policies.get(i), prompts, n, self.config, ends=self.eos_ids, pad=pad,
                            seed=seed_of(self.config.seed, t, phase), desc=f"iteration {t}: {phase}")  # fmt: skip

    def text(self, ids: Ids, after: Ids | None = None) -> str:
        return data.decode(self.tokenizer, ids, self.eos_ids, after)

    def texts(self, pairs: list[Pair]) -> Iterator[dict[str, str]]:
        """Pairs as TRL reads them to the same token ids: rendered by the template, and without the EOS that it adds."""
        ends = [self.tokenizer.eos_token_id]
        for x, *both in tqdm(pairs, "decode pairs", disable=len(pairs) < 10_000):
            chosen, rejected = data.decode_responses(self.tokenizer, x, both, ends)
            yield {"prompt": self.text(x), "chosen": chosen, "rejected": rejected}

    def write_review(self, t: int, review: Review) -> None:
        """iteration-<t>/pairs.jsonl, dropped.jsonl and samples.jsonl. Raises InputError where there is no pair."""
        if not review.training_set.pairs:
            raise InputError(f"iteration {t}: no pair is left to train on: --keep and --bootstrap take too few, or no "
                             "sample could be paired (cut-off samples need a larger --max_new_tokens)")  # fmt: skip
        here = self.out / f"iteration-{t}"
        folder.write_jsonl(here / "pairs.jsonl", self.pair_lines(review.training_set))
        if review.dropped is not None:
            folder.write_jsonl(here / "dropped.jsonl", self.pair_lines(review.dropped))
        if review.samples is not None:
            folder.write_jsonl(here / "samples.jsonl", self.sample_lines(review.samples))

    def pair_lines(self, some: TrainingSet) -> Iterator[dict[str, Any]]:
        """The lines of pairs.jsonl; `row` is that of the user's file, of a bootstrapped pair that of its prompt."""
        for texts, margin, source, i in zip(self.texts(some.pairs), some.margins.tolist(), some.sources, some.numbers):
            yield {**texts, "margin": margin, "source": source, "row": self.offline_rows[i]}

    def sample_lines(self, samples: Samples) -> Iterator[dict[str, Any]]:
        """The lines of samples.jsonl, with the prompts of pairs.jsonl."""
        columns = (samples.ended, samples.usable, samples.rewards)  # (P, n) each
        rows = zip(self.offline, samples.responses, *(column.tolist() for column in columns))
        several = len(self.offline) > 10_000
        for (x, _, _), written, *of_prompt in tqdm(rows, "decode samples", len(self.offline), disable=not several):
            prompt, texts = self.text(x), data.decode_responses(self.tokenizer, x, written, self.eos_ids)
            for text, ended, usable, reward in zip(texts, *of_prompt):
                yield {"prompt": prompt, "response": text, "finish_reason": "stop" if ended else "length",
                       "usable": usable, "reward": reward if usable else None}  # fmt: skip

    def count_pairs(self, t: int) -> dict[str, Any]:
        """Of iteration t's pairs.jsonl: how many were given and bootstrapped; in the playground, how many are right."""
        counts: dict[str, Any] = {}
        if self.config.in_playground:
            counts["data/label_accuracy"] = playground.precision(list(self.texts(self.offline)))
        rows = folder.read_jsonl(self.out / f"iteration-{t}" / "pairs.jsonl") if t else []
        for name, source in {"select": "offline", "bootstrap": "bootstrap"}.items():
            some = [row for row in rows if row["source"] == source]
            if rows:
                counts[f"{name}/pairs"] = len(some)
            if rows and self.config.in_playground:
                counts[f"{name}/precision"] = playground.precision(some) if some else None
        return counts

    def write_answers(self, t: int, before: list[Ids], answers: list[Ids]) -> tuple[list[str], list[str], list[str]]:
        """iteration-<t>/answers.jsonl: every evaluation prompt, π_θt's answer, the SFT policy's. Returns the three."""
        x = self.eval_prompts
        texts = (self.eval_texts, self.answer_texts(x, answers), self.answer_texts(x, before))
        ends = ["stop" if y[-1] in self.eos_ids else "length" for y in answers]
        names = ("prompt", "answer", "reference", "finish_reason")  # the last is the answer's
        rows = [dict(zip(names, row)) for row in zip(*texts, ends)]
        folder.write_jsonl(self.out / f"iteration-{t}" / "answers.jsonl", rows)
        return texts

    def answer_texts(self, prompts: list[Ids], answers: list[Ids]) -> list[str]:
        return [self.text(y, after=x) for x, y in zip(prompts, answers)]

    def finish(self) -> None:
        """samples.json in AlpacaEval's format, where --prompt_file asks for it; the report; the policy in its place."""
        last = self.config.iterations
        if self.file_prompts:
            answers = self.answer_texts(self.file_prompts, self.answer(last, self.file_prompts, "prompt file"))
            rows = [{"instruction": x, "output": y, "generator": str(self.out)}
                    for x, y in zip(self.file_texts, answers)]  # fmt: skip
            folder.write(self.out / "samples.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        flipped = playground.is_flipped if self.config.in_playground else None
        report.write_report(self.out, last, dict(zip(self.offline_rows, self.offline_texts)), flipped)
        folder.keep_policy(self.out, last)


@contextmanager
def opened(flags: Config) -> Iterator[Run]:
    """The run that the flags ask for, in its folder, which is this process's meanwhile. What cannot be is refused."""
    config = resolve(flags)
    out, values = Path(config.output_dir), asdict(config)
    folder.check(out, values, resume=flags.resume_from_checkpoint is not None)
    report.start()
    parts = read_parts(config)
    run = prepare(config, out, parts)
    needed = 10 * sum(p.nbytes for p in run.policies.policy.parameters())  # four policies, two checkpoints of three
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


def pack_samples(samples: list[list[tuple[Ids, bool]]]) -> tuple[Tensor, Tensor, Tensor]:
    """The token ids of P·n samples, their lengths, and which of them ended."""
    flat = [sample for of_prompt in samples for sample in of_prompt]
    return *pairs.pack([y for y, _ in flat]), torch.tensor([ended for _, ended in flat])


def prepare(config: Resolved, out: Path, parts: list[tuple[str, Rows]]) -> Run:
    """Everything is read and checked, nothing written. Raises InputError."""
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


def amp(device: str) -> torch.autocast:
    """Weights stay float32; on a GPU products are bfloat16. End it before a step: it keeps copies of the weights."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")


def retry_on_oom(attempt: Callable[[int], Any], tokens: int, least: int, name: str = "") -> tuple[Any, int]:
    """attempt(tokens) and what was enough: where memory runs out, again with half the tokens, at least `least`.

    `name` is put before what is said of an error.
    """
    while True:
        try:
            return attempt(tokens), tokens
        except torch.OutOfMemoryError:
            if tokens <= least:
                raise
        except (FloatingPointError, InputError) as error:
            raise type(error)(f"{name}{error}") from error
        tokens = max(tokens // 2, least)
        tqdm.write(f"out of memory: again, with {tokens} tokens at a time")


@report.timed("scoring")
def score_rows(model: Any, prompts: list[Ids], responses: list[Ids], config: Resolved, desc: str | None) -> Tensor:
    """log π(y|x) of R rows and the log-prob of each one's least likely token, nats: float32 (R, 2), on the CPU."""

    def attempt(max_tokens: int) -> Tensor:
        with amp(config.device), in_one_line("the model fails"):
            return score(model, prompts, responses, max_tokens=max_tokens, of=sum_and_least, desc=desc)[0]

    longest = max((len(x) + len(y) for x, y in zip(prompts, responses)), default=0)
    logps = retry_on_oom(attempt, config.max_tokens, longest)[0]
    if not logps.isfinite().all():
        row = int((~logps.isfinite()).nonzero()[0, 0])
        raise FloatingPointError(f"{desc or 'check'}: log π(y|x) of response {row} is {logps[row, 0]}")
    return logps


def draw_samples(
    model: Any, prompts: list[Ids], n: int, config: Resolved, *, ends: list[int], pad: int, seed: int, desc: str | None
) -> list[list[tuple[Ids, bool]]]:
    """n samples of each prompt, by the flags. Where memory runs out they are drawn anew in smaller batches: others."""

    def attempt(max_tokens: int) -> list[list[tuple[Ids, bool]]]:
        with amp(config.device), in_one_line("the model fails"):
            return bootstrap.sample_responses(
                model, prompts, n, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                top_p=config.top_p, eos_token_id=ends, pad_token_id=pad, seed=seed, max_tokens=max_tokens, desc=desc,
            )  # fmt: skip

    least = n * (config.max_prompt_length + config.max_new_tokens)  # longest prompts come first: it fails at once
    return retry_on_oom(attempt, bootstrap.CACHE_TOKENS[config.device], least, f"{desc or 'sampling'}: ")[0]


def backward_of_mean(policy: Any, pairs: list[Pair], losses_of: Callable, max_tokens: int, device: str) -> Tensor:
    """The gradient of the mean loss of b pairs is added to the policy's. Returns log π(y|x) of their responses, (b, 2).

    losses_of(logps, some): the losses (m,) of the pairs with the numbers `some`, of their log-probs (m, 2).
    The mean over the b pairs is the same however they are split: into micro-batches of pairs, the activations of
    `max_tokens` tokens in memory at a time; and, for speed, those into passes of rows of like length, a quarter of
    `max_tokens` each, so that there is little padding. Gradients go back pass by pass, one in memory at a time.
    """
    logps = torch.empty(len(pairs), 2)
    for some in token_batches([tokens_of(pair) for pair in pairs], max_tokens):
        x, y = rows_of([pairs[i] for i in some])  # 2m rows
        passes = token_batches([len(a) + len(b) for a, b in zip(x, y)], max_tokens // 4)
        with amp(device), in_one_line("the model fails"):
            sums = [sequence_logprobs(policy, [x[i] for i in rows], [y[i] for i in rows])[0] for rows in passes]
        by_length = torch.cat(sums).detach().requires_grad_()  # (2m,), in the order of the passes
        order = torch.tensor([i for rows in passes for i in rows]).argsort()  # back to the rows' order
        losses = losses_of(by_length[order].view(-1, 2), some)  # (2m,) -> (m, 2) -> (m,)
        (losses.sum() / len(pairs)).backward()  # as far as the log-probs
        for one, gradient in zip(sums, by_length.grad.split([len(rows) for rows in passes])):  # type: ignore[union-attr]
            one.backward(gradient)  # and through the model
        logps[some] = by_length.detach()[order].view(-1, 2).cpu()
    return logps


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's step, after which gradients go. Where memory runs out, an InputError: it is not repeated."""
    try:
        optimizer.step()
    except torch.OutOfMemoryError:
        raise InputError("AdamW's two moments of every weight do not fit the GPU beside the model") from None
    optimizer.zero_grad()  # gradients need not wait in memory for the next step
