"""SeRA around TRL's DPOTrainer, on many GPUs. Needs `pip install trl`; written against TRL 1.16.

    torchrun --nproc_per_node 8 experiments/with_trl.py --model_name_or_path DIR --dataset_name FILE --output_dir OUT
    accelerate launch --config_file fsdp.yaml experiments/with_trl.py …              FSDP or DeepSpeed, as TRL has them
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 experiments/with_trl.py …    two processes, no GPU

For t = 1 … T, with D the given pairs and π_θ0 = π_ref, the model given:
  1. once, and t > 1: log-probs of D under π_ref, and under π_θ(t−1) and π_θ(t−2)      each process a share of the rows
  2. t > 1: the K pairs of D with the largest margin                                   every process, alike
  3. t > 1: N samples a prompt from π_θ(t−1), scored under the three models            each process a share
  4. t > 1: best against worst, and the K̃ such pairs with the largest margin           every process, alike
  5. OUT/iteration-<t>/pairs.jsonl: D at t = 1, else the union
  6. DPOTrainer trains π_θt on it, from π_θ(t−1)                                        whatever engine was launched
     and OUT/iteration-<t>/policy is a model folder, which 1 and 3 read.

What to know:
  1. The work is cut into CHUNKs of rows, a process takes every P-th, and a chunk's samples and log-probs are the same
     whoever makes them. So P changes nothing but rounding in 6, if P × --per_device_train_batch_size ×
     --gradient_accumulation_steps stays what it was and divides the pairs (else accelerate repeats some at the end).
  2. TRL trains on the token ids that were scored, against their log π_ref: it makes neither again, and holds no π_ref.
  3. For 1 and 3 every process reads a whole model, float32, from the folder that 6 wrote: the same way for DDP, FSDP
     and DeepSpeed, and on several nodes one shared OUT. ZeRO-3 needs stage3_gather_16bit_weights_on_model_save, and
     hands over weights rounded to 16 bits, in which small steps are lost: prefer FSDP. Shown by us is DDP on two
     CPU processes (tests/test_with_trl.py); FSDP and DeepSpeed, which accelerate has on accelerators only, are not.
  4. A serving engine instead of 3: run `--iterations 1`; let it answer the prompts of OUT/iteration-1/pairs.jsonl with
     OUT/iteration-1/policy (a tokenizer's BOS before them, no template: they are rendered), N times each, as JSONL of
     prompt, response, finish_reason; go on with `--samples FILE --iterations 2`. `--pairs_only` stops at 5, for who
     trains elsewhere; put that policy where 6 would have.
  5. A run goes on after the last iteration whose policy/ is in OUT. Give it the same flags: they are not compared.
  6. Every flag of TRL's DPOConfig is one here, at TRL's default but: one epoch, no checkpoints, bf16 on CUDA only.
"""

import argparse
import copy
import gc
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm import tqdm
from transformers import HfArgumentParser
from trl import DPOConfig, DPOTrainer

from sera_min import bootstrap, data, run
from sera_min.data import InputError
from sera_min.logprobs import implicit_reward, score
from sera_min.losses import LOSSES
from sera_min.select import ensemble_margin, select_top

CHUNK = 64  # prompts, or rows, of a share of work; the samples depend on it
OURS = {"sigmoid": "dpo", "hinge": "slic", "ipo": "ipo"}  # TRL's loss_type -> the loss whose reward reviews


def flag(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Sera:
    model_name_or_path: str = flag(None, "SFT model π_ref, a hub name or folder")
    dataset_name: str = flag(None, "preferences: a hub name, a .json, .jsonl or .parquet file, or a folder")
    dataset_train_split: str = flag("train", "the split of dataset_name to train on")
    max_train_pairs: int | None = flag(None, "use the first so many pairs")
    max_prompt_length: int = flag(512, "tokens of a prompt: a longer one loses its beginning")
    iterations: int = flag(3, "T: the first trains on all pairs, each later one reviews them")
    keep: float = flag(0.7, "share of the given pairs that selection keeps (K)")
    bootstrap: float = flag(0.3, "pairs that the policy writes and ranks itself, as a share of those given (K̃)")
    samples_per_prompt: int = flag(4, "N: samples of which the best and the worst become a pair")
    ensemble_gamma: float = flag(0.5, "γ: the weight of the older policy's reward")
    temperature: float = flag(1.0, "samples are drawn at this temperature")
    top_p: float = flag(1.0, "samples are drawn from the likeliest words that together have this probability")
    max_new_tokens: int | None = flag(None, "longest sample (None: max_length - max_prompt_length)")
    max_tokens: int = flag(16384, "tokens scored at a time, padding included")
    samples: str | None = flag(None, "JSONL of prompt, response, finish_reason: the next review's samples")
    pairs_only: bool = flag(False, "stop once the next pairs.jsonl is written")


class Trainer(DPOTrainer):
    """On token ids, against reference log-probs that are there: TRL's own columns, which it would make again."""

    def _prepare_dataset(self, dataset, *_):
        return dataset

    def _precompute_ref_logps(self, dataset, *_):
        return dataset


held: dict[str, tuple[Any, Any]] = {}  # the one whole model, and its tokenizer, on this process's device


def whole(folder: str) -> tuple[Any, Any]:
    """The model of `folder`, all of it on this process's device, though the launched engine shards what it loads."""
    if folder not in held:
        held.clear()  # before the next is read
        engine = transformers.integrations.deepspeed
        with (
            mock.patch.object(engine, "_hf_deepspeed_config_weak_ref", None),  # ZeRO-3 would load a shard
            mock.patch.dict(os.environ, FSDP_CPU_RAM_EFFICIENT_LOADING="false"),  # FSDP, on rank 0 alone
        ):
            held[folder] = run.load(folder, str(PartialState().device))
    return held[folder]


def shared_out(n: int, work: Callable[[int, range], Sequence], desc: str) -> list:
    """work(c, rows) of every chunk c of n rows, done by process c mod P: a result a row, in order, on every process."""
    state, count = PartialState(), -(-n // CHUNK)
    mine = tqdm(range(state.process_index, count, state.num_processes), desc, disable=not state.is_main_process)
    results: list = [None] * n
    for c, values in gather_object([(c, list(work(c, range(c, n, count)))) for c in mine]):
        results[c::count] = values
    return results


@dataclass
class Run:
    """What stays the same over the iterations: flags, tokenizer, D, and log π(y|x) of D under the models so far."""

    sera: Sera
    args: DPOConfig
    tokenizer: Any
    eos_ids: list[int]
    offline: list[data.Pair]
    logps: dict[str, torch.Tensor] = field(default_factory=dict)  # model folder -> (N, 2)

    def folder(self, t: int) -> str:
        return str(Path(self.args.output_dir) / f"iteration-{t}" / "policy") if t else self.sera.model_name_or_path

    @property
    def wanted(self) -> int:
        """K̃."""
        return round(self.sera.bootstrap * len(self.offline))

    def amp(self):
        device = PartialState().device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=bool(self.args.bf16))

    def score(self, t: int, prompts: list, responses: list) -> torch.Tensor:
        """log π_θt(y|x) of any number of rows, in nats, float32, on every process."""

        def work(_, rows: range) -> list[float]:
            some = [prompts[i] for i in rows], [responses[i] for i in rows]
            with self.amp():
                return score(whole(self.folder(t))[0], *some, max_tokens=self.sera.max_tokens)[0].tolist()

        logps = torch.tensor(shared_out(len(prompts), work, f"score under {self.folder(t)}"))
        if not logps.isfinite().all():
            raise FloatingPointError(f"{self.folder(t)}: log π(y|x) of row {int((~logps.isfinite()).nonzero()[0])}"
                                     " is no number")  # fmt: skip
        return logps

    def pair_logps(self, t: int) -> torch.Tensor:
        """The same of D's chosen and rejected responses, once a model: float32 (N, 2)."""
        if self.folder(t) not in self.logps:
            x, y = [x for x, _, _ in self.offline for _ in "wl"], [y for _, *both in self.offline for y in both]
            self.logps[self.folder(t)] = self.score(t, x, y).view(-1, 2)  # (2N,) -> (N, 2)
        return self.logps[self.folder(t)]

    def reward(self, logps: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        per_token = LOSSES[OURS[self.args.loss_type[0]]][1]
        return implicit_reward(logps, reference, lengths if per_token else None)

    def rows(self, pairs: list[data.Pair], reference: torch.Tensor, margins: torch.Tensor, source: str) -> list[dict]:
        """Pairs as TRL's columns of token ids and reference log-probs, and for pairs.jsonl their margin and source."""
        names = "prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps", "margin", "source"
        values = zip(pairs, reference.tolist(), margins.tolist())
        return [dict(zip(names, (*pair, *logps, margin, source))) for pair, logps, margin in values]

    def select(self, t: int) -> list[dict]:
        """The K pairs of D with the largest margin under π_θ(t−1) and π_θ(t−2); all of them at t = 1."""
        reference = self.pair_logps(0)  # (N, 2)
        if t == 1:
            return self.rows(self.offline, reference, torch.zeros(len(self.offline)), "offline")
        lengths = torch.tensor([[len(w), len(l)] for _, w, l in self.offline])  # (N, 2)
        r = [self.reward(self.pair_logps(i), reference, lengths) for i in (t - 2, t - 1) if i]
        newest, *older = [r_w - r_l for r_w, r_l in (one.T for one in reversed(r))]  # (N,) each
        margins = ensemble_margin(newest, *older, gamma=self.sera.ensemble_gamma)
        kept = select_top(margins, round(self.sera.keep * len(self.offline)))
        return self.rows([self.offline[i] for i in kept], reference[kept], margins[kept], "offline")

    def sample(self, t: int) -> tuple[list[list[int]], list[list[tuple[list[int], bool]]]]:
        """D's prompts and N samples of π_θ(t−1) each: a chunk's are drawn together, by a seed of its own."""
        sera, prompts = self.sera, [x for x, _, _ in self.offline]
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eos_ids[0]

        def work(c: int, rows: range) -> list:
            with self.amp():
                return bootstrap.sample_responses(
                    whole(self.folder(t - 1))[0], [prompts[i] for i in rows], sera.samples_per_prompt,
                    max_new_tokens=sera.max_new_tokens or self.args.max_length - sera.max_prompt_length,
                    temperature=sera.temperature, top_p=sera.top_p, eos_token_id=self.eos_ids, pad_token_id=pad,
                    seed=(1000 * self.args.seed + t) * 2**20 + c,
                )  # fmt: skip

        return prompts, shared_out(len(prompts), work, f"sample from {self.folder(t - 1)}")

    def read_samples(self, file: str) -> tuple[list[list[int]], list[list[tuple[list[int], bool]]]]:
        """The same from a file; a prompt must be one of D's, as pairs.jsonl has it. Raises InputError."""
        known = {data.decode(self.tokenizer, x, self.eos_ids): x for x, _, _ in self.offline}
        try:
            encode = lambda text: data.continued(self.tokenizer, text)  # noqa: E731
            prompts, samples = bootstrap.read_responses(file, encode, self.eos_ids[0])
        except ValueError as error:
            raise InputError(str(error)) from None
        for text in prompts:
            if text not in known:
                raise InputError(f"{file}: the prompt {text[:80]!r} is none of iteration-1/pairs.jsonl's")
        return [known[text] for text in prompts], samples

    def bootstrapped(self, t: int, samples: str | None) -> list[dict]:
        """The K̃ pairs of samples, best against worst under π_θ(t−1) and π_θ(t−2), with the largest margin."""
        if t == 1 or not self.wanted:
            return []
        prompts, written = self.read_samples(samples) if samples else self.sample(t)
        responses, ended = ([[one[k] for one in row] for row in written] for k in (0, 1))
        flat = [(x, y) for x, row in zip(prompts, written) for y, is_whole in row if is_whole]  # W that ended
        x, y = [x for x, _ in flat], [y for _, y in flat]
        newest, reference = self.score(t - 1, x, y), self.score(0, x, y)  # (W,)
        lengths = torch.tensor([len(one) for one in y])
        older = [self.reward(self.score(t - 2, x, y), reference, lengths)] if t > 2 else []
        r = ensemble_margin(self.reward(newest, reference, lengths), *older, gamma=self.sera.ensemble_gamma)

        def by_prompt(flat: torch.Tensor) -> list[list[float]]:  # (W,) -> a list a prompt, NaN for what was cut off
            values = iter(flat.tolist())
            return [[next(values) if is_whole else torch.nan for is_whole in row] for row in ended]

        triples, margins, dropped = bootstrap.best_worst_pairs(by_prompt(r), ended, responses)
        kept = select_top(margins, min(self.wanted, len(triples)))
        if PartialState().is_main_process:
            print(f"iteration {t}: {len(triples)} pairs of samples, {len(kept)} kept of the {self.wanted} wanted;",
                  "dropped:", ", ".join(f"{count} {what}" for what, count in dropped.items()) or "none")  # fmt: skip
        taken, logps = [triples[i] for i in kept], by_prompt(reference)
        pairs = [(prompts[i], responses[i][best], responses[i][worst]) for i, best, worst in taken]
        their = torch.tensor([[logps[i][best], logps[i][worst]] for i, best, worst in taken]).view(-1, 2)
        return self.rows(pairs, their, margins[kept], "bootstrap")

    def train(self, t: int, rows: list[dict]) -> None:
        """π_θt from π_θ(t−1) on the rows, by TRL and whatever engine was launched, to its folder."""
        held.clear()
        gc.collect()
        out, its = Path(self.args.output_dir), copy.copy(self.args)
        its.output_dir, its.precompute_ref_log_probs, its.max_length = str(out / f"iteration-{t}"), True, None
        model = run.load(self.folder(t - 1), "cpu")[0]  # TRL places it
        trainer = Trainer(model, args=its, train_dataset=Dataset.from_list(rows), processing_class=self.tokenizer)
        trainer.train()
        if trainer.is_fsdp_enabled:  # all of it, whatever its checkpoints are
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(out / ".policy"))
        trainer.accelerator.wait_for_everyone()
        if trainer.accelerator.is_main_process:
            for line in trainer.state.log_history:
                run.log(out, phase="train", iteration=t, **line)
            (out / ".policy").rename(self.folder(t))  # whole or not there
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.free_memory()


def check(sera: Sera, args: DPOConfig) -> None:
    """What cannot be is an InputError, alike on every process and before any work."""
    room = args.max_length - sera.max_prompt_length if args.max_length else 0
    for wrong, message in [
        (not (sera.model_name_or_path and sera.dataset_name), "--model_name_or_path and --dataset_name are needed"),
        (len(args.loss_type) > 1 or args.loss_type[0] not in OURS,
         f"--loss_type is {' '.join(args.loss_type)}: expected one of {', '.join(OURS)}"),
        (args.ld_alpha is not None or args.f_divergence_type != "reverse_kl",
         "--ld_alpha and --f_divergence_type change the reward that the review reads: not supported"),
        (room < 1, "--max_length is not above --max_prompt_length: no room for a response"),
        ((sera.max_new_tokens or 1) > room, f"--max_new_tokens is {sera.max_new_tokens}: a sample must fit into "
         f"--max_length less --max_prompt_length, {room}"),
        (not 0 <= sera.keep <= 1 or not 0 <= sera.bootstrap <= 1 or sera.keep + sera.bootstrap == 0,
         "--keep and --bootstrap: expected shares between 0 and 1, not both 0"),
        (sera.iterations < 1, "--iterations: expected at least 1"),
        (sera.samples_per_prompt < 2, "--samples_per_prompt: expected at least 2"),
        ((Path(args.output_dir) / "config.json").exists(), f"{args.output_dir} holds a run of train.py"),
    ]:  # fmt: skip
        if wrong:
            raise InputError(message)


def main(sera: Sera, args: DPOConfig) -> None:
    check(sera, args)
    policy, tokenizer = whole(sera.model_name_or_path)
    eos_ids = run.eos_ids_of(policy, tokenizer)
    run.check_positions(policy, args.max_length, "--max_length")
    del policy
    read = data.read_rows(sera.dataset_name, sera.dataset_train_split, sera.max_train_pairs)
    limits = {"max_length": args.max_length, "max_prompt_length": sera.max_prompt_length}
    offline, counts = data.encode(read, tokenizer, name=sera.dataset_name, eos_ids=eos_ids, **limits)
    if not offline:
        raise InputError(f"--dataset_name {sera.dataset_name}: no pair is left to train on")
    state, samples, out = PartialState(), sera.samples, Path(args.output_dir)
    this = Run(sera, args, tokenizer, eos_ids, offline)
    asked = range(1, sera.iterations + 1)
    first = next((t for t in asked if not Path(this.folder(t)).is_dir()), sera.iterations + 1)
    if state.is_main_process:
        print("data:", ", ".join(f"{count} {what}" for what, count in counts.items()))
        print(f"{state.num_processes} processes; iterations {first} to {sera.iterations}")
    if samples and first == 1:
        raise InputError(f"--samples: nothing is reviewed before iteration 2, and {this.folder(1)} is not there")
    if samples and first > sera.iterations:
        raise InputError(f"--samples: no iteration is left to review, for {this.folder(sera.iterations)} is there")
    if samples and not this.wanted:
        raise InputError(f"--samples: --bootstrap {sera.bootstrap} of {len(offline)} pairs is none, so none is read")
    for t in range(first, sera.iterations + 1):
        rows = this.select(t) + this.bootstrapped(t, samples)
        if not rows:
            raise InputError(f"iteration {t}: no pair is left to train on; --keep and --bootstrap take too few")
        if state.is_main_process:
            texts = ({"prompt": data.decode(tokenizer, row["prompt_ids"], eos_ids),
                      **{name: data.decode(tokenizer, row[f"{name}_ids"], eos_ids, row["prompt_ids"])
                         for name in ("chosen", "rejected")}} for row in rows)  # fmt: skip
            run.write_jsonl(out / f"iteration-{t}" / "pairs.jsonl", (
                {**text, "margin": row["margin"], "source": row["source"]} for text, row in zip(texts, rows)
            ))  # fmt: skip
        if sera.pairs_only:
            break
        this.train(t, rows)
        samples = None  # another engine's are the next review's alone
    if state.is_main_process:
        print(f"pairs and policies are in {out}")


def command_line(arguments: list[str] | None = None) -> None:
    """`main` from flags; what the user can mend ends in one line, on the first process, and exit status 1."""

    def fail(message) -> None:
        sys.exit(f"error: {message}" if os.environ.get("RANK", "0") == "0" else 1)

    plain = argparse.RawDescriptionHelpFormatter
    parser = HfArgumentParser((Sera, DPOConfig), description=__doc__, formatter_class=plain)  # type: ignore[arg-type]
    parser.error = fail  # type: ignore[method-assign, assignment]
    parser.set_defaults(num_train_epochs=1, save_strategy="no", bf16=torch.cuda.is_available())
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    sera, args = parser.parse_args_into_dataclasses(arguments)
    try:
        main(sera, args)
    except (InputError, OSError, FloatingPointError) as error:
        fail(error)


if __name__ == "__main__":
    command_line()
