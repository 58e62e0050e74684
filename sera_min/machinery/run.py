"""A run: what it reads, what it refuses before anything is computed, its steps, and what it writes."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sera_min.machinery import config as configuration
from sera_min.machinery import data, device, folder, report
from sera_min.machinery.config import Config, Resolved, seed_of
from sera_min.machinery.data import Given, preferences
from sera_min.machinery.device import autocast, has_bfloat16, prepare, uncompiled
from sera_min.machinery.errors import InputError, naming, print_replaces
from sera_min.machinery.models import check_before_training, check_positions
from sera_min.machinery.policies import REASON, LoRAPolicies, Policies, check_finite
from sera_min.pairs import Ids, Pair, Review, Samples, TrainingSet


@contextmanager
def open_run(flags: Config, variant: Any) -> Iterator["Run"]:
    """The run that the flags and train.Variant ask for, in a folder that belongs to this process meanwhile.

    Everything is read and checked before anything is written. Raises InputError.
    """
    print_replaces()
    folder.delete_state_of_ended(Path(folder.at_home(flags.resume_from_checkpoint or flags.output_dir)))
    if flags.resume_from_checkpoint:
        config = configuration.resumed(flags, variant.name)
    else:
        config = configuration.resolve(flags)
        folder.check_free(Path(config.output_dir))
    if config.in_playground and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # two would wait for each other at every small product
    run = Run(config, variant)
    run.check_model()
    if run.config.max_tokens is None:
        run.find_max_tokens()
    run.check_disk()
    with folder.locked(run.out):
        # Another run may have begun or ended there meanwhile.
        if flags.resume_from_checkpoint:
            folder.check_not_ended(run.out)
        else:
            folder.check_free(run.out)
        run.begin(variant.name)
        yield run


class Run:
    """What train.py needs beside the method."""

    def __init__(self, config: Resolved, variant: Any) -> None:
        self.config = config
        self.world = variant.world
        self.wants_report = variant.report
        self.bar: Any = None  # of the training steps
        self.evaluated: set[int] = set()  # iterations that metrics.jsonl has an evaluation of
        self.out = Path(config.output_dir)
        self.state = self.out / "state"
        if config.use_peft:
            self.policies: Policies = LoRAPolicies(self.out, config)
        else:
            self.policies = Policies(self.out, config)
        self.policies.compiled = not config.in_playground and device.can_compile(config.device)
        if config.in_playground and self.policies.newest() < 0:
            with self.policies.timed("SFT"):
                policy, tokenizer = self.world.make_sft_policy(config.seed, config.device)
            self.policies.hold(0, policy, tokenizer)
        policy = self.newest_policy()
        longest = max(config.max_length, config.max_prompt_length + config.max_new_tokens)
        check_positions(policy, longest, "--max_length or --max_prompt_length + --max_new_tokens")

        self.tokenizer = self.policies.tokenizer
        data.set_template(self.tokenizer)
        if (self.state / "data.json").exists():
            self.data = folder.read_json(self.state / "data.json")
            print(f"data: as read when the run began, {len(self.data['given'])} pairs to train on")
        else:
            self.data = data.read(config, self.world, self.tokenizer, self.policies.eos_ids)
        given = [Given(*one) for one in self.data["given"]]
        held_out = [Given(*one) for one in self.data["held_out"]]
        self.given, self.held_out = preferences(given), preferences(held_out)
        self.texts = {one.row: one.text for one in given}  # the prompts as people read them
        self.offline_rows = list(self.texts)
        self.prompts = self.data["prompts"]  # to be answered at every evaluation

    def newest_policy(self) -> Any:
        return self.policies.get(max(self.policies.newest(), 0))

    def check_model(self) -> None:
        """The GPU is set up; and before the first step log-probs are checked, in float32 and as the run computes."""
        policy = self.newest_policy()
        first, eos_ids = self.given.pairs[0], self.policies.eos_ids
        begins = self.policies.newest() < 1
        if begins:
            with uncompiled():
                check_before_training(policy, first, eos_ids)
        prepare(self.config.device)  # after the check, which is in float32
        if begins and has_bfloat16(self.config.device):
            with autocast(self.config.device):  # as the run computes
                check_before_training(policy, first, eos_ids, allowed=0.2)

    def check_disk(self) -> None:
        """There is room for the checkpoints of a new run. Raises InputError."""
        policy = self.newest_policy()
        # Four policies, and two checkpoints, each of weights and two moments.
        needed = 10 * sum(p.nbytes for p in trained_weights(policy).values())
        if self.config.use_peft:
            needed += 4 * sum(p.numel() for p in policy.parameters())  # policy/
        free = shutil.disk_usage(folder.existing(self.out)).free
        if free < needed and not (self.out / "config.json").exists():
            raise InputError(
                f"--output_dir {self.out}: {free / 1e9:.1f} GB free, and checkpoints take {needed / 1e9:.1f}"
            )

    def find_max_tokens(self) -> None:
        """As many as the GPU has room for; with gradient checkpointing where those would be few."""
        config, policy = self.config, self.newest_policy()
        tokens = device.training_tokens(policy, config.max_length, config.device)
        if tokens < device.FEW_TOKENS and not config.gradient_checkpointing and policy.supports_gradient_checkpointing:
            config = replace(config, gradient_checkpointing=True)
            self.policies.config = config
            self.policies.use_gradient_checkpointing(policy)
            tokens = device.training_tokens(policy, config.max_length, config.device)
        least = 2 * config.max_length  # a pair of the longest rows
        found = max(least, min(tokens, device.MOST_TOKENS))
        self.config = self.policies.config = replace(config, max_tokens=found)
        says = f"--max_tokens {found} fit into the GPU's memory"
        if tokens < least:
            says = f"--max_tokens {found}, one pair: even that may be too much for the GPU's memory"
        if config.gradient_checkpointing:
            says += ", with gradient checkpointing"
        print(says)

    def begin(self, variant: str) -> None:
        """Flags, data and π_ref are written, and metrics.jsonl ends where the run goes on."""
        folder.write(self.out / "config.json", configuration.config_json(self.config, variant))
        if not (self.state / "data.json").exists():
            folder.write(self.state / "data.json", json.dumps(self.data))
        if self.policies.newest() < 0:
            self.policies.save(0, self.policies.get(0))
        self.restore_metrics()

    # Steps that survive a kill

    def steps(self, t: int, batches: list[list[int]], policy: Any, optimizer: Any) -> Iterator[tuple[int, list[int]]]:
        """(step, batch), from the last checkpoint on, which policy and optimizer are set to.

        Every `save_steps` steps, and when a signal asks to stop, a checkpoint is written.
        """
        state = self.read_checkpoint(t)
        done = state["step"]
        if done > 0:
            policy.load_state_dict(state["policy"], strict=False)
            optimizer.load_state_dict(state["optimizer"])
        del state  # which is as large as both
        self.bar = tqdm(batches[done:], f"iteration {t}: train", initial=done, total=len(batches), unit="step")
        with folder.signals_noted() as signals, self.policies.timed("training"):
            for step, batch in enumerate(self.bar, done + 1):
                yield step, batch
                due = step % self.config.save_steps == 0 and step < len(batches)
                if due or signals:
                    self.save_checkpoint(t, step, policy, optimizer)
                if signals:
                    raise KeyboardInterrupt

    def save_checkpoint(self, t: int, step: int, policy: Any, optimizer: Any) -> None:
        check_finite(policy, f"iteration {t}, step {step}")
        state = {"step": step, "policy": trained_weights(policy), "optimizer": optimizer.state_dict()}
        with folder.writing(self.state / f"checkpoint-{t}.pt") as beside:
            torch.save(state, beside)

    def read_checkpoint(self, t: int) -> dict[str, Any]:
        file = self.state / f"checkpoint-{t}.pt"
        if not file.exists():
            return {"step": 0}
        with naming(f"{file} cannot be read"):
            return torch.load(file, weights_only=True, map_location="cpu", mmap=True)

    # metrics.jsonl

    def restore_metrics(self) -> None:
        """metrics.jsonl anew: the lines of all steps before the point where the run goes on."""
        ours = self.state / "metrics.jsonl"
        ours.touch()  # a new run has none
        t = self.policies.newest() + 1
        goes_on = (t, self.read_checkpoint(t)["step"])
        lines = []
        for text in ours.read_text(encoding="utf-8").split("\n")[:-1]:  # a kill may have cut off the last line
            line = json.loads(text)
            if (line["iteration"], line.get("step", 0)) <= goes_on:
                lines.append(line)
        self.evaluated = {line["iteration"] for line in lines if line["phase"] != "train"}
        folder.write_jsonl(ours, lines)
        folder.write_jsonl(self.out / "metrics.jsonl", lines)

    def log(self, line: dict[str, Any]) -> None:
        text = json.dumps(line) + "\n"
        for file in (self.state / "metrics.jsonl", self.out / "metrics.jsonl"):
            with open(file, "a", encoding="utf-8") as lines:
                lines.write(text)

    def log_step(self, t: int, step: int, batch: list[int], metrics: dict[str, Any]) -> None:
        """A line of metrics.jsonl. Raises FloatingPointError where a pair's loss or the gradient is not finite."""
        losses = metrics.pop("losses")
        self.log({"phase": "train", "iteration": t, "step": step, **metrics})
        shown = "loss {loss:.3f}, accuracy {rewards/accuracies:.3f}, β·margin {rewards/margins:.3f}"
        self.bar.set_postfix_str(shown.format_map(metrics))
        bad = [i + 1 for i, loss in zip(batch, losses) if not math.isfinite(loss)]
        norm = metrics["grad_norm"]
        if bad or not math.isfinite(norm):
            lines = sorted(bad) or sorted(i + 1 for i in batch)
            raise FloatingPointError(
                f"iteration {t}, step {step}, pairs.jsonl lines {lines}: the loss is {metrics['loss']:.3g}, "
                f"its gradient {norm:.3g}"
            )

    def log_evaluation(self, t: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """A line of metrics.jsonl, unless it is there from before a resume."""
        phase = "final" if t == self.config.iterations else "eval"
        line = {"phase": phase, "iteration": t, **metrics}
        if t not in self.evaluated:
            self.log(line)
        return line

    # What people read

    def write_review(self, t: int, review: Review) -> None:
        """iteration-<t>/pairs.jsonl, dropped.jsonl, samples.jsonl. InputError without a pair."""
        if not review.training_set.pairs:
            raise InputError(
                f"iteration {t}: no pair is left to train on: --keep and --bootstrap take too "
                "few, or no sample could be paired (cut-off ones need a larger --max_new_tokens)"
            )
        here = self.out / f"iteration-{t}"
        folder.write_jsonl(here / "pairs.jsonl", self.pair_lines(review.training_set))
        if review.not_selected is not None:
            folder.write_jsonl(here / "dropped.jsonl", self.pair_lines(review.not_selected))
        if review.samples is not None and review.rewards is not None:
            rewards = review.rewards.tolist()
            folder.write_jsonl(here / "samples.jsonl", self.sample_lines(review.samples, rewards))

    def pair_lines(self, chosen: TrainingSet) -> Iterator[dict[str, Any]]:
        """Pairs as texts; with their token ids where TRL reads others. `row` is that of the user's data."""
        margins = chosen.margins.tolist()
        for pair, margin, source, i in zip(chosen.pairs, margins, chosen.sources, chosen.pair_index):
            texts = self.pair_texts(pair)
            line = {**texts, "margin": margin, "source": source, "row": self.offline_rows[i]}
            if self.as_trl_reads(**texts) != pair:
                line["token_ids"] = pair._asdict()
            yield line

    def as_trl_reads(self, prompt: str, chosen: str, rejected: str) -> Pair:
        x, w, l = self.tokenizer([prompt, prompt + chosen, prompt + rejected]).input_ids
        end = [self.tokenizer.eos_token_id]
        return Pair(x, w[len(x) :] + end, l[len(x) :] + end)

    def pair_texts(self, pair: Pair) -> dict[str, str]:
        ends = [self.tokenizer.eos_token_id]  # which TRL adds itself
        return {
            "prompt": data.prompt_text(self.tokenizer, pair.prompt),
            "chosen": data.response_text(self.tokenizer, pair.prompt, pair.chosen, ends),
            "rejected": data.response_text(self.tokenizer, pair.prompt, pair.rejected, ends),
        }

    def sample_lines(self, samples: Samples, rewards: list[float]) -> Iterator[dict[str, Any]]:
        """The lines of samples.jsonl. A sample is usable if it ended and has a reward."""
        rewards_left = iter(rewards)  # those of samples that ended
        for pair, of_prompt in zip(self.given.pairs, samples):
            prompt = data.prompt_text(self.tokenizer, pair.prompt)
            for y, ended in of_prompt:
                reward: float | None = next(rewards_left) if ended else None
                if reward is not None and math.isnan(reward):
                    reward = None
                line = {"prompt": prompt, "response": self.answer_text(pair.prompt, y)}
                yield {**line, "finish_reason": REASON[ended], "usable": reward is not None, "reward": reward}

    def answer_text(self, prompt: Ids, response: Ids) -> str:
        return data.response_text(self.tokenizer, prompt, response, self.policies.eos_ids)

    def write_answers(self, t: int, answers: list[Ids]) -> dict[str, Any]:
        """Writes answers.jsonl. Returns how many pairs iteration t had.

        In the playground also how many of these are right, and the true reward of the answers.
        """
        seed = seed_of(self.config.seed, 0, "reference answers")
        references = self.policies.sample(0, self.prompts, 1, seed)
        rows = []
        for text, x, y, of_prompt in zip(self.data["texts"], self.prompts, answers, references):
            row = {"prompt": text, "answer": self.answer_text(x, y)}
            row["reference"] = self.answer_text(x, of_prompt[0][0])
            row["finish_reason"] = REASON[y[-1] in self.policies.eos_ids]
            rows.append(row)
        here = self.out / f"iteration-{t}"
        folder.write_jsonl(here / "answers.jsonl", rows)
        judged: dict[str, Any] = {}
        if self.config.in_playground:
            answered = [row["answer"] for row in rows]
            known = [row["reference"] for row in rows]
            judged = self.world.judge(self.data["texts"], answered, known)
            given = [self.pair_texts(pair) for pair in self.given.pairs]
            judged["data/label_accuracy"] = self.world.precision(given)
        if t > 0:
            judged |= self.count_pairs(folder.read_jsonl(here / "pairs.jsonl"))
        return judged

    def count_pairs(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        """Given and bootstrapped ones; in the playground the share of each that is right."""
        counts: dict[str, Any] = {}
        for name, source in {"select": "offline", "bootstrap": "bootstrap"}.items():
            of_source = [pair for pair in pairs if pair["source"] == source]
            counts[f"{name}/pairs"] = len(of_source)
            if self.config.in_playground:
                counts[f"{name}/precision"] = self.world.precision(of_source) if of_source else None
        return counts

    def finish(self) -> None:
        """The report; the last policy becomes policy/; state/ goes, nothing is left to resume."""
        if self.wants_report:
            is_flipped = self.world.is_flipped if self.config.in_playground else None
            report.write_report(self.out, self.texts, is_flipped)
        spent = [f"{s:.0f} {phase}" for phase, s in self.policies.seconds.most_common()]
        print("Seconds:", ", ".join(spent))
        self.policies.finish(self.out)
        shutil.rmtree(self.state)
        print(f"The policy is in {self.out / 'policy'}, the rest of the run in {self.out}.")


def trained_weights(policy: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}
