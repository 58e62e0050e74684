"""SeRA around TRL's DPOTrainer, on many GPUs. Needs `pip install trl`; written against TRL 1.16.

    torchrun --nproc_per_node 8 experiments/with_trl.py --model_name_or_path DIR --dataset_name FILE --output_dir OUT
    accelerate launch --config_file fsdp.yaml experiments/with_trl.py …              FSDP or DeepSpeed, as TRL has them
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 experiments/with_trl.py …    two processes, no GPU

The review is train.py's, its log-probs and samples shared out over the processes. TRL trains on the token ids and the
log π_ref that it returns: no reference is in memory then. OUT/iteration-<t> gets pairs.jsonl, samples.jsonl, policy/.

  1. P processes give the results of one, but for rounding in training, if P × --per_device_train_batch_size ×
     --gradient_accumulation_steps stays the same and divides the pairs (else accelerate repeats some at the end).
  2. To score and to sample, every process loads the full model in float32 from policy/; several nodes share one OUT.
     ZeRO-3 needs stage3_gather_16bit_weights_on_model_save, and saves weights rounded to 16 bits, which loses small
     steps: prefer FSDP. Tested by us: DDP on two CPU processes, nothing else.
  3. Samples of another engine: run `--iterations 1`; answer each prompt of OUT/iteration-1/pairs.jsonl N times with
     OUT/iteration-1/policy (add the tokenizer's BOS and no template: it is in the text already); write JSONL of prompt,
     response, finish_reason; go on with `--samples FILE --iterations 2`. A prompt gives at most one pair then.
     To train elsewhere: `--pairs_only` stops before training; put your policy where policy/ would be, and go on.
  4. A run goes on after the last iteration whose policy/ is in OUT. Give the same flags: they are not compared.
  5. Every flag of TRL's DPOConfig is one here, with TRL's default except: one epoch, no checkpoints, bf16 on CUDA only.
     SimPO is not among DPOTrainer's losses, and nothing is held out to evaluate on.
"""

import gc
import io
import os
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm import tqdm
from transformers import HfArgumentParser
from trl import DPOConfig, DPOTrainer

from sera_min import data, folder, report
from sera_min.bootstrap import read_responses
from sera_min.compute import draw_samples, retry_on_oom, set_precision
from sera_min.config import Config, Resolved, flag, resolve, seed_of
from sera_min.files import in_one_line, read_rows
from sera_min.forms import InputError
from sera_min.logprobs import score, sum_and_least
from sera_min.models import check_before_training, check_positions, eos_ids_of
from sera_min.pairs import Ids, TrainingSet, format_counts
from sera_min.run import Run
from train import all_pairs, review

CHUNK = 64  # a task of one process is about so many rows or prompts; the samples depend on it
LOSSES = {"sigmoid": "dpo", "robust": "robust", "hinge": "slic", "ipo": "ipo"}  # TRL's name -> ours
SHARED = """model_name_or_path dataset_name dataset_config dataset_train_split max_train_pairs max_prompt_length
    iterations keep bootstrap samples_per_prompt ensemble_gamma select length_free token_floor temperature top_p
    max_new_tokens max_tokens beta max_length output_dir seed""".split()  # flags of train.py, some of them also TRL's
Flags = make_dataclass("Flags", [
    *((f.name, f.type, field(default=f.default, metadata=f.metadata)) for f in fields(Config)
      if f.name in SHARED and not hasattr(DPOConfig, f.name)),
    ("samples", str | None, flag(None, "JSONL of prompt, response, finish_reason: the samples of the next review")),
    ("pairs_only", bool, flag(False, "stop when the next pairs.jsonl is written")),
])  # fmt: skip
Samples = list[list[tuple[Ids, bool]]]  # of each prompt n, with whether they ended


class Trainer(DPOTrainer):
    """Takes token ids and reference log-probs as they are, under TRL's names; TRL would compute them again."""

    _prepare_dataset = _precompute_ref_logps = lambda self, dataset, *_: dataset


class Policies(folder.Policies):
    """π_θi in OUT/iteration-<i>/policy; every process has a full model in memory, one at a time."""

    def folder(self, i: int) -> str:
        return super().folder(i) if i == 0 else str(self.state.parent / f"iteration-{i}" / "policy")

    def get(self, i: int) -> Any:
        deepspeed = transformers.integrations.deepspeed
        with (
            mock.patch.object(deepspeed, "_hf_deepspeed_config_weak_ref", None),  # ZeRO-3 would load a shard
            mock.patch.dict(os.environ, FSDP_CPU_RAM_EFFICIENT_LOADING="false"),  # FSDP, on rank 0 alone
        ):
            return super().get(i)


def shared_out(n: int, work: Callable[[int, range], list], desc: str) -> list:
    """A result for each of n rows, on every process: of chunk c they are work(c, rows), whichever process has c."""
    state, chunks = PartialState(), -(-n // CHUNK)
    numbers = tqdm(range(state.process_index, chunks, state.num_processes), desc, disable=not state.is_main_process)
    results: list = [None] * n
    for c, values in gather_object([(c, work(c, range(c, n, chunks))) for c in numbers]):
        results[c::chunks] = values
    return results


@dataclass(frozen=True)
class SharedRun(Run):
    """A run of train.py whose log-probs and samples are shared out over processes, and whose policies TRL trains."""

    args: DPOConfig
    logps: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)  # by policy and `what`: log_prob's
    given: dict[int, Samples] = field(default_factory=dict)  # by policy: samples of another engine

    def log_prob(self, i: int, prompts: list[Ids], responses: list[Ids], what: str) -> torch.Tensor:
        """log π_θi(y|x) of R rows and the log-prob of each one's least likely token, nats: float32 (R, 2)."""
        if (i, what) not in self.logps:
            work = lambda _, rows: self.score(i, [prompts[r] for r in rows], [responses[r] for r in rows])  # noqa: E731
            under = self.policies.folder(i)
            logps = torch.tensor(shared_out(len(prompts), work, f"score {what} under {under}")).view(-1, 2)
            if not logps.isfinite().all():  # on every process alike: none waits for another that has ended
                row = int((~logps.isfinite()).nonzero()[0, 0])
                raise FloatingPointError(f"{what}, response {row}: log π(y|x) under {under} is {logps[row, 0]}")
            self.logps[i, what] = logps
        return self.logps[i, what]

    def score(self, i: int, prompts: list[Ids], responses: list[Ids]) -> list[list[float]]:
        """The same of a chunk, on this process, in the precision that TRL trains in."""
        policy = self.policies.get(i)

        def attempt(max_tokens: int) -> torch.Tensor:
            autocast = torch.autocast(policy.device.type, dtype=torch.bfloat16, enabled=bool(self.args.bf16))
            with autocast, in_one_line("the model fails"):
                return score(policy, prompts, responses, max_tokens=max_tokens, of=sum_and_least)[0]

        longest = max(len(x) + len(y) for x, y in zip(prompts, responses))
        return retry_on_oom(attempt, self.config.max_tokens, longest)[0].tolist()

    def sample(self, i: int, prompts: list[Ids]) -> Samples:
        """N samples of each prompt from π_θi, each chunk with its seed; or those of --samples."""
        if i in self.given:
            return self.given[i]
        n, options = self.config.samples_per_prompt, {"ends": self.eos_ids, "pad": self.eos_ids[0], "desc": None}

        def work(c: int, rows: range) -> Samples:
            seed, x = seed_of(self.config.seed, i + 1, f"samples {c}"), [prompts[r] for r in rows]
            return draw_samples(self.policies.get(i), x, n, self.config, seed=seed, **options)

        return shared_out(len(prompts), work, f"sample from {self.policies.folder(i)}")

    def read_samples(self, file: str) -> Samples:
        """Samples of another engine, n for each of D's prompts; cut-off ones, which are never paired, fill the gaps."""
        row_of = {self.text(pair.prompt): row for row, pair in enumerate(self.offline)}  # the last of equal ones
        try:
            texts, samples = read_responses(file, lambda y: data.continued(self.tokenizer, y), self.eos_ids[0])
        except ValueError as error:
            raise InputError(str(error)) from None
        refuse(not texts, f"{file}: no samples")
        result: Samples = [[] for _ in self.offline]
        for text, some in zip(texts, samples):
            refuse(text not in row_of, f"{file}: the prompt {text[:80]!r} is none of iteration-1/pairs.jsonl's")
            result[row_of[text]] = some
        n = max(map(len, result))
        print(f"{file}: samples for {len(texts)} prompts, {n} each; missing ones are counted as cut off")
        return [some + [(self.eos_ids[:1], False)] * (n - len(some)) for some in result]

    def train(self, t: int, training_set: TrainingSet) -> None:
        """π_θt from π_θ(t−1), by TRL and the engine that was launched, to its folder."""
        self.policies.hold(-1, None, self.tokenizer)  # free the memory
        gc.collect()
        args, names = self.args, ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
        args.precompute_ref_log_probs, args.max_length = True, None  # the pairs are cut already
        args.output_dir = str(self.out / f"iteration-{t}")
        columns = dict(zip(names, [*zip(*training_set.pairs), *training_set.reference.T.tolist()]))  # N values each
        policy = folder.load(self.policies.folder(t - 1), "cpu")[0]  # TRL places it
        trainer = Trainer(policy, args=args, train_dataset=Dataset.from_dict(columns), processing_class=self.tokenizer)
        trainer.train()
        if trainer.is_fsdp_enabled:  # save all of it, whatever its checkpoints are
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(self.out / ".policy"))
        trainer.accelerator.wait_for_everyone()
        if trainer.accelerator.is_main_process:
            report.log(self.out, *({**line, "phase": "train", "iteration": t} for line in trainer.state.log_history))
            (self.out / ".policy").rename(self.policies.folder(t))
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.free_memory()


def refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise InputError(message)


def resolved(flags: Any, args: DPOConfig) -> Resolved:
    """The config of the review. What cannot be is an InputError, on every process and before any work."""
    values, loss = vars(args) | vars(flags), " ".join(args.loss_type)
    refuse(not (flags.model_name_or_path and flags.dataset_name), "--model_name_or_path and --dataset_name are needed")
    refuse(loss not in LOSSES, f"--loss_type is {loss}: expected one of {', '.join(LOSSES)}")
    refuse(args.ld_alpha is not None or args.f_divergence_type != "reverse_kl",
           "--ld_alpha and --f_divergence_type change the reward that the review reads: not supported")  # fmt: skip
    refuse((Path(args.output_dir) / "config.json").exists(), f"{args.output_dir} holds a run of train.py")
    device = "cuda" if PartialState().device.type == "cuda" else "cpu"  # sets how many tokens are sampled at a time
    config = resolve(Config(**{name: values[name] for name in SHARED}, loss_type=LOSSES[loss], device=device))
    refuse(config.max_prompt_length + config.max_new_tokens > config.max_length, f"--max_new_tokens is "
           f"{config.max_new_tokens}: a sample must fit into --max_length less --max_prompt_length")  # fmt: skip
    return config


def main(flags: Any, args: DPOConfig) -> None:
    config = resolved(flags, args)
    out, name, last = Path(config.output_dir), str(config.dataset_name), config.iterations
    rows = read_rows(name, config.dataset_train_split, config.max_train_pairs, config.dataset_config)
    policies = Policies(out, config.model_name_or_path, str(PartialState().device))
    check_positions(policies.get(0), config.max_length, "--max_length")
    tokenizer, ends = policies.tokenizer, eos_ids_of(policies.get(0), policies.tokenizer)
    limits = {"max_length": config.max_length, "max_prompt_length": config.max_prompt_length}
    given, counts = data.encode_given(rows, tokenizer, name=name, eos_ids=ends, **limits)
    offline, numbers = [one.pair for one in given], [one.row for one in given]
    refuse(not offline, f"--dataset_name {name}: no pair is left to train on")
    first = next((t for t in range(1, last + 1) if not Path(policies.folder(t)).is_dir()), last + 1)
    print(f"data: {format_counts(counts)}\n{PartialState().num_processes} processes; iterations {first} to {last}")
    if first == 1:
        check_before_training(policies.get(0), offline[0], ends)
    set_precision(policies.device)
    run = SharedRun(config, out, policies, tokenizer, ends, args, offline=offline, offline_rows=numbers)
    if flags.samples:
        refuse(first == 1, f"--samples: nothing is reviewed before iteration 2; {policies.folder(1)} is missing")
        refuse(first > last, f"--samples: no iteration is left to review, for {policies.folder(last)} is there")
        refuse(round(config.bootstrap * len(offline)) == 0, "--samples: --bootstrap is too low for a single pair")
        run.given[first - 1] = run.read_samples(flags.samples)
    for t in range(first, last + 1):
        reviewed = all_pairs(run) if t == 1 else review(t, offline, run.log_prob, run.sample, config)
        training_set = reviewed.training_set
        refuse(not training_set.pairs, f"iteration {t}: no pair is left to train on; --keep or --bootstrap is too low")
        if PartialState().is_main_process:
            run.write_review(t, reviewed)
        if flags.pairs_only:
            break
        run.train(t, training_set)
    print(f"pairs and policies are in {out}")


def command_line(arguments: list[str] | None = None) -> None:
    """`main` from flags. What the user can mend ends in one line, on the first process, and exit status 1."""

    def fail(message: object) -> None:
        sys.exit(f"error: {message}" if os.environ.get("RANK", "0") == "0" else 1)

    parser = HfArgumentParser((Flags, DPOConfig), description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error = fail
    parser.set_defaults(num_train_epochs=1, save_strategy="no", bf16=torch.cuda.is_available())
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    flags, args = parser.parse_args_into_dataclasses(arguments)
    try:
        with redirect_stdout(sys.stdout if PartialState().is_main_process else io.StringIO()):
            main(flags, args)
    except (InputError, OSError, FloatingPointError) as error:
        fail(error)


if __name__ == "__main__":
    command_line()
