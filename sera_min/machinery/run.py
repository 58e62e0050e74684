"""A run around the method: what its phases share, and what they write."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sera_min import data, folder, pairs, playground, report
from sera_min.compute import draw_samples, score_rows
from sera_min.config import Resolved, seed_of
from sera_min.forms import InputError, Paused
from sera_min.models import pad_id_of
from sera_min.pairs import Ids, Pair, Review, Samples, TrainingSet


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
        """log π_θi(y|x) of R rows and the log-prob of each one's least likely token, (R, 2): a phase."""
        name, desc = f"logps-{what}-under-{i}", f"score {what} under {f'policy {i}' if i else 'the reference'}"
        logps = folder.phase(
            self.out, name, lambda: score_rows(self.policies.get(i), prompts, responses, self.config, desc)
        )
        assert len(logps) == len(responses), f"{name} was computed of {len(logps)} other rows: choose another name"
        return logps

    def sample(self, i: int, prompts: list[Ids]) -> list[list[tuple[Ids, bool]]]:
        """N responses a prompt from π_θi, for the review of iteration i + 1: a phase, or what another engine wrote."""
        n, t = self.config.samples_per_prompt, i + 1
        given = self.out / "state" / f"samples-{t}.jsonl"

        def compute() -> tuple[Tensor, Tensor, Tensor]:
            if given.exists():
                return pack_samples(read_samples(given, prompts, self.sampling_request(i, prompts)))
            if self.config.pause_before_sampling:
                self.pause(t, self.sampling_request(i, prompts))
            return pack_samples(self.draw(i, prompts, n, t, "samples"))

        *packed, ended = folder.phase(self.out, f"samples-{t}", compute)
        if (cut_off := 1 - ended.float().mean().item()) > 0.5:
            limit = f"--max_new_tokens {self.config.max_new_tokens}"
            print(f"iteration {t}: {cut_off:.0%} of the samples reach {limit} without an end, and cannot be paired: "
                  "a larger one uses more of them")  # fmt: skip
        samples = list(zip(pairs.unpack(*packed), ended.tolist()))  # P·n
        return [samples[first : first + n] for first in range(0, len(samples), n)]

    def sampling_request(self, i: int, prompts: list[Ids]) -> dict[str, Any]:
        """What another engine has to know to sample as we would."""
        names = ("samples_per_prompt", "max_new_tokens", "temperature", "top_p")
        flags = {name: getattr(self.config, name) for name in names}
        seed = seed_of(self.config.seed, i + 1, "samples")
        size = self.policies.get(i).get_input_embeddings().num_embeddings
        return {"policy": f"policy-{i}", **flags, "eos_token_ids": self.eos_ids, "vocabulary_size": size, "seed": seed,
                "prompts": prompts}  # fmt: skip

    def pause(self, t: int, request: dict[str, Any]) -> None:
        file = self.out / "state" / f"prompts-{t}.json"
        folder.write(file, json.dumps(request) + "\n")
        raise Paused(
            f"paused: iteration {t} needs {request['samples_per_prompt']} samples of each prompt in {file}, in "
            f"{file.with_name(f'samples-{t}.jsonl')}: python experiments/sample_with_vllm.py {self.out}\n"
            f"to go on: the same command with --resume_from_checkpoint {self.out}"
        )

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

    def texts(self, some: list[Pair]) -> Iterator[dict[str, str]]:
        """Pairs as TRL reads them to the same token ids: rendered by the template, and without the EOS that it adds."""
        ends = [self.tokenizer.eos_token_id]
        for x, *both in tqdm(some, "decode pairs", disable=len(some) < 10_000):
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


def batches_of(n: int, t: int, config: Resolved) -> list[list[int]]:
    """The numbers of every step's pairs: epoch after epoch, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed_of(config.seed, t, "order"))
    size = config.per_device_train_batch_size
    steps = config.steps_per_iteration or config.epochs_per_iteration * math.ceil(n / size)
    epochs = math.ceil(steps / math.ceil(n / size))
    return [b.tolist() for _ in range(epochs) for b in torch.randperm(n, generator=generator).split(size)][:steps]


def read_samples(file: Path, prompts: list[Ids], asked: dict[str, Any]) -> list[list[tuple[Ids, bool]]]:
    """Another engine's samples: a JSON object a line, of each prompt in order, with all ids as the engine had them:

        {"prompt": [ids], "responses": [[ids], …], "finish_reasons": ["stop" or "length", …]}

    A response that stopped has the end of sequence that it stopped at, another has none. Raises InputError.
    """
    rows, n = folder.read_jsonl(file), asked["samples_per_prompt"]
    if len(rows) != len(prompts):
        raise InputError(f"{file}: {len(rows)} lines, expected one for each of the {len(prompts)} prompts")
    samples = []
    for number, (row, x) in enumerate(zip(rows, prompts), 1):
        where = f"{file}, line {number}"
        if not isinstance(row, dict) or row.get("prompt") != x:
            raise InputError(f"{where}: prompt is not the ids of this prompt in prompts-*.json")
        responses, reasons = row.get("responses"), row.get("finish_reasons")
        if not (isinstance(responses, list) and isinstance(reasons, list) and len(responses) == len(reasons) == n):
            raise InputError(f"{where}: expected {n} responses and {n} finish_reasons")
        for j, (y, reason) in enumerate(zip(responses, reasons)):
            if wrong := wrong_sample(y, reason, asked):
                raise InputError(f"{where}, sample {j}: {wrong}")
        samples.append([(y, reason == "stop") for y, reason in zip(responses, reasons)])
    return samples


def wrong_sample(y: Any, reason: Any, asked: dict[str, Any]) -> str:
    """What is wrong with a response of token ids and its finish_reason; "" where nothing is."""
    size, limit, ends = asked["vocabulary_size"], asked["max_new_tokens"], asked["eos_token_ids"]
    if reason not in ("stop", "length"):
        return f'its finish_reason is {reason!r}: expected "stop" or "length"'
    if not (isinstance(y, list) and y and all(type(token) is int and 0 <= token < size for token in y)):
        return f"expected a list of token ids, 0 to {size - 1}"
    if len(y) > limit:
        return f"it has {len(y)} tokens, and --max_new_tokens is {limit}"
    if any(token in ends for token in y[:-1]):
        return f"it goes on after one of the eos_token_ids, {ends}"
    if (reason == "stop") != (y[-1] in ends):
        return f'its finish_reason is "{reason}", and its last token is {y[-1]}: what stopped ends with one of {ends}'
    return ""


def pack_samples(samples: list[list[tuple[Ids, bool]]]) -> tuple[Tensor, Tensor, Tensor]:
    """The token ids of P·n samples, their lengths, and which of them ended."""
    flat = [sample for of_prompt in samples for sample in of_prompt]
    return *pairs.pack([y for y, _ in flat]), torch.tensor([ended for _, ended in flat])
