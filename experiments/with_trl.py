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
     steps: prefer FSDP. DeepSpeed's configuration must have no `scheduler`: it would be that of iteration 1's steps.
     Tested by us: DDP on two CPU processes, nothing else.
  3. Samples of another engine: with `--pause_before_sampling` a run stops where samples are due, and leaves the token
     ids of the prompts in OUT/state/prompts-….json. `experiments/sample_with_vllm.py OUT` answers them, or any other
     program that writes JSONL of {"prompt": [ids], "responses": [[ids], …], "finish_reasons": ["stop", "length", …]},
     a line a prompt: as OUT/state/samples-….jsonl, or anywhere, with `--samples FILE`. The same command goes on.
     To train elsewhere: `--pairs_only` stops before training; put your policy where policy/ would be, and go on.
  4. A run goes on after the last iteration whose policy/ is in OUT. Give the same flags: they are not compared.
  5. Every flag of TRL's DPOConfig is one here, with TRL's default except: one epoch, no checkpoints, bf16 on CUDA only.
     SimPO is not among DPOTrainer's losses, and nothing is held out to evaluate on.
"""

import gc
import io
import json
import math
import os
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import field, fields, make_dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from tqdm import tqdm
from transformers import HfArgumentParser
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from sera_min.logprobs import score
from sera_min.machinery import data, policies
from sera_min.machinery.config import Config, Resolved, flag, resolve, seed_of
from sera_min.machinery.device import has_bfloat16, prepare, retry_on_oom
from sera_min.machinery.errors import InputError, Paused, naming, one_line, print_replaces
from sera_min.machinery.folder import at_home, make_readable, write
from sera_min.machinery.models import check_before_training, check_positions, load
from sera_min.machinery.policies import check_log_probs, key_of, read_samples
from sera_min.machinery.run import Run
from sera_min.pairs import Ids, Rows, Samples, TrainingSet
from train import SERA

CHUNK = 64  # a task of one process is about so many rows or prompts; the samples depend on it
LOSSES = {"sigmoid": "dpo", "hinge": "slic", "ipo": "ipo"}  # TRL's name -> ours
SHARED = """model_name_or_path dataset_name dataset_config dataset_train_split max_train_pairs max_prompt_length
    iterations keep bootstrap samples_per_prompt ensemble_gamma temperature top_p max_new_tokens pause_before_sampling
    max_tokens beta max_length output_dir seed""".split()  # flags of train.py, some of them also TRL's
OURS = [f for f in fields(Config) if f.name in SHARED and not hasattr(DPOConfig, f.name)]
Flags = make_dataclass(
    "Flags",
    [
        *[(f.name, f.type, field(default=f.default, metadata=f.metadata)) for f in OURS],
        ("samples", str | None, flag(None, "JSONL of token ids: another engine's samples for the next review")),
        ("pairs_only", bool, flag(False, "stop when the next pairs.jsonl is written")),
    ],
)


class Trainer(DPOTrainer):
    """Takes token ids and reference log-probs as they are, under TRL's names; TRL would compute them again."""

    _prepare_dataset = _precompute_ref_logps = lambda self, dataset, *_: dataset


def is_main() -> bool:
    return PartialState().is_main_process


def shared_out(n: int, work: Callable[[int, range], list], desc: str) -> list:
    """A result for each of n rows, on every process: of chunk c they are work(c, rows), whichever process has c."""
    state = PartialState()
    chunks = math.ceil(n / CHUNK)
    numbers = range(state.process_index, chunks, state.num_processes)
    done, failed = [], None
    try:
        for c in tqdm(numbers, desc, disable=not is_main()):
            done.append((c, work(c, range(c, n, chunks))))
    except torch.OutOfMemoryError:
        failed = f"process {state.process_index}: out of GPU memory: a smaller --max_tokens or --max_length may help"
    except (InputError, OSError, FloatingPointError) as error:
        failed = f"process {state.process_index}: {one_line(error)}"
    for message in gather_object([failed]):  # so that all end, and the first process says why
        refuse(message is not None, str(message))
    results: list = [None] * n
    for c, values in gather_object(done):
        results[c::chunks] = values
    return results


class Policies(policies.Policies):
    """π_θi in OUT/iteration-<i>/policy; every process has a full model in memory, one at a time.

    The rows of log_prob and of sample are shared out over the processes, and every process gets all results.
    """

    bars = False  # `shared_out` has one, over all chunks
    most = 1  # policies in memory, of every process
    trains = False  # TRL does, with the engine that was launched

    def __init__(self, out: Path, config: Resolved, bf16: bool, samples: str | None = None) -> None:
        super().__init__(out, config)
        self.out, self.bf16 = out, bf16
        self.samples = samples  # a file of another engine, for the next review

    def folder(self, i: int) -> Path | str:
        if i == 0:
            return super().folder(0)
        return self.out / f"iteration-{i}" / "policy"

    def newest(self) -> int:
        newest = 0
        while Path(self.folder(newest + 1)).is_dir():
            newest += 1
        return newest

    def get(self, i: int) -> Any:
        deepspeed = transformers.integrations.deepspeed
        with (
            mock.patch.object(deepspeed, "_hf_deepspeed_config_weak_ref", None),  # ZeRO-3 would load a shard
            mock.patch.dict(os.environ, FSDP_CPU_RAM_EFFICIENT_LOADING="false"),  # FSDP, on rank 0 alone
        ):
            return super().get(i)

    def save(self, i: int, policy: DPOTrainer) -> None:
        """What TRL's trainer has trained becomes π_θi."""
        accelerator = policy.accelerator
        if policy.is_fsdp_enabled:  # all of it, whatever its checkpoints are
            accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        policy.save_model(str(self.out / ".policy"))
        accelerator.wait_for_everyone()
        if is_main():
            for name, content in policy.model.beside_weights.items():
                (self.out / ".policy" / name).write_bytes(content)
            make_readable(self.out / ".policy")
            (self.out / ".policy").rename(self.folder(i))
        accelerator.wait_for_everyone()

    def log_prob(self, i: int, rows: Rows) -> torch.Tensor:
        if i not in rows.logps:
            desc = f"score {len(rows.prompts)} responses under policy {i}"

            def work(c: int, chunk: range) -> list[float]:
                return self.score_chunk(i, [rows.prompts[r] for r in chunk], [rows.responses[r] for r in chunk])

            logps = torch.tensor(shared_out(len(rows.prompts), work, desc))
            check_log_probs(logps, desc)  # on every process alike: none waits for another that has ended
            rows.logps[i] = logps
        return rows.logps[i]

    def score_chunk(self, i: int, prompts: list[Ids], responses: list[Ids]) -> list[float]:
        """On this process, in the precision that TRL trains in; the head is float32, see `train`."""
        policy = self.get(i)
        longest = max(len(x) + len(y) for x, y in zip(prompts, responses))
        in_bfloat16 = torch.autocast(policy.device.type, dtype=torch.bfloat16, enabled=self.bf16)
        with in_bfloat16, naming("the model fails"):
            logps, _counts = retry_on_oom(partial(score, policy, prompts, responses), self.config.max_tokens, longest)
        return logps.tolist()

    def sample(self, i: int, prompts: list[Ids], n: int, seed: int) -> Samples:
        """n samples of each prompt from π_θi, each chunk with its seed; or those of another engine."""
        key = key_of(*prompts, [n, seed])
        file = self.state / f"samples-{i}-{key}.jsonl"
        if self.samples and i == self.newest():
            file = Path(self.samples)
        if self.samples or file.exists():
            return read_samples(file, prompts, self.request(i, prompts, n, seed))
        if self.config.pause_before_sampling:
            self.pause(file, self.state / f"prompts-{i}-{key}.json", self.request(i, prompts, n, seed))

        def work(c: int, chunk: range) -> Samples:
            of_chunk = seed_of(seed, c, "chunk")
            return self.draw(i, [prompts[r] for r in chunk], n, of_chunk)

        return shared_out(len(prompts), work, f"sample from policy {i}")

    def pause(self, file: Path, asked: Path, request: dict[str, Any]) -> None:
        if is_main():
            write(asked, json.dumps(request) + "\n")
        n = request["samples_per_prompt"]
        raise Paused(
            f"paused: {n} samples of each prompt in {asked} are needed, in {file} or any file that --samples names: "
            f"python experiments/sample_with_vllm.py {self.out}\nto go on: the same command again"
        )


class SharedRun(Run):
    """What is left of a run of train.py: `write_review`."""

    def __init__(self, config: Resolved, policies: Policies, given: list[data.Given]) -> None:
        self.config, self.policies, self.given = config, policies, data.preferences(given)
        self.offline_rows = [one.row for one in given]
        self.out, self.tokenizer = policies.out, policies.tokenizer


def train(t: int, data: TrainingSet, policies: Policies, args: DPOConfig) -> None:
    """π_θt from π_θ(t−1), by TRL and the engine that was launched, to its folder."""
    policies.forget()
    gc.collect()
    args.precompute_ref_log_probs, args.max_length = True, None  # the pairs are cut already
    args.output_dir = str(policies.out / f"iteration-{t}")
    columns = {
        "prompt_ids": [pair.prompt for pair in data.pairs],
        "chosen_ids": [pair.chosen for pair in data.pairs],
        "rejected_ids": [pair.rejected for pair in data.pairs],
        "ref_chosen_logps": data.reference[:, 0].tolist(),
        "ref_rejected_logps": data.reference[:, 1].tolist(),
    }
    policy, _tokenizer = load(policies.folder(t - 1), "cpu")  # TRL places it
    rows = Dataset.from_dict(columns)
    float32_head = partial(dpo_trainer.add_fused_lm_head, cast_lm_head_to_fp32=True)
    with (
        # TRL's head is rounded to bfloat16, but the reference's log-probs come from a float32 one.
        mock.patch.object(dpo_trainer, "add_fused_lm_head", float32_head),
        # Under FSDP TRL would load a reference in every process, and everywhere take a hash of all weights, to compute
        # and to store the log-probs that it is given here.
        mock.patch.object(dpo_trainer, "create_model_from_path", lambda *_, **__: None),
        mock.patch.object(dpo_trainer, "hash_module", lambda model: ""),
    ):
        trainer = Trainer(policy, args=args, train_dataset=rows, processing_class=policies.tokenizer)
    trainer.train()
    policies.save(t, trainer)
    if is_main():
        with open(policies.out / "metrics.jsonl", "a", encoding="utf-8") as lines:
            for line in trainer.state.log_history:
                lines.write(json.dumps({**line, "phase": "train", "iteration": t}) + "\n")
    trainer.accelerator.free_memory()


def refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise InputError(message)


def resolved(flags: Any, args: DPOConfig) -> Resolved:
    """The config of the review. What cannot be is an InputError, on every process and before any work."""
    loss = " ".join(args.loss_type)
    refuse(not (flags.model_name_or_path and flags.dataset_name), "--model_name_or_path and --dataset_name are needed")
    refuse(loss not in LOSSES, f"--loss_type is {loss}: expected one of {', '.join(LOSSES)}")
    refuse(
        args.ld_alpha is not None or args.f_divergence_type != "reverse_kl",
        "--ld_alpha and --f_divergence_type change the reward that the review reads: not supported",
    )
    refuse(args.label_smoothing > 0, "--label_smoothing has no effect on TRL's sigmoid, hinge and ipo")
    refuse(args.eval_strategy != "no", "--eval_strategy: nothing is held out to evaluate on")
    refuse(args.fp16, "--fp16: the review computes in bfloat16 or float32")
    again = "to go on, give the same flags as before, with the same --output_dir"
    refuse(args.resume_from_checkpoint is not None, f"--resume_from_checkpoint: {again}")
    one_each = "start a process for each, torchrun --nproc_per_node N, or set CUDA_VISIBLE_DEVICES=0"
    refuse(args.n_gpu > 1, f"one process and {args.n_gpu} GPUs: {one_each}")
    refuse((Path(args.output_dir) / "config.json").exists(), f"{args.output_dir} holds a run of train.py")
    values = vars(args) | vars(flags)
    shared = {name: values[name] for name in SHARED}
    device = str(PartialState().device)  # cuda:3, or cpu:0 where there are several processes
    if device.startswith("cpu"):
        device = "cpu"
    shared["max_tokens"] = shared["max_tokens"] or 16384  # of scoring
    config = resolve(Config(**shared, loss_type=LOSSES[loss], device=device, eval_fraction=0.0))
    refuse(
        config.max_prompt_length + config.max_new_tokens > config.max_length,
        f"--max_new_tokens is {config.max_new_tokens}: a sample must fit into --max_length less --max_prompt_length",
    )
    return config


def check_samples(flags: Any, first: int, config: Resolved, given: list, policies: Policies) -> None:
    if not flags.samples:
        return
    refuse(first == 1, f"--samples: nothing is reviewed before iteration 2; {policies.folder(1)} is missing")
    last = config.iterations
    refuse(first > last, f"--samples: no iteration is left to review, for {policies.folder(last)} is there")
    no_pair = round(config.bootstrap * len(given)) == 0
    refuse(no_pair, "--samples: --bootstrap is too low for a single pair")
    refuse(not Path(flags.samples).is_file(), f"--samples {flags.samples}: no such file")


def main(flags: Any, args: DPOConfig) -> None:
    config = resolved(flags, args)
    policies = Policies(Path(config.output_dir), config, bool(args.bf16), flags.samples)
    check_positions(policies.get(0), config.max_length, "--max_length")
    data.set_template(policies.tokenizer)
    given = data.read(config, None, policies.tokenizer, policies.eos_ids)["given"]
    first = policies.newest() + 1
    print(f"{PartialState().num_processes} processes; iterations {first} to {config.iterations}")
    check_samples(flags, first, config, given, policies)
    if first == 1:
        check_before_training(policies.get(0), given[0].pair, policies.eos_ids)
    prepare(config.device)
    run = SharedRun(config, policies, given)
    for t in range(first, config.iterations + 1):
        reviewed = SERA.review(t, run.given, policies, config, SERA)
        policies.samples = None  # they were of this review
        refuse(not reviewed.training_set.pairs, f"iteration {t}: no pair is left to train on")
        if is_main():
            run.write_review(t, reviewed)
        if flags.pairs_only:
            break
        train(t, reviewed.training_set, policies, args)
        # The trainer refers to itself, and would keep its memory through the next review.
        clear_device_cache(garbage_collection=True)
    print(f"pairs and policies are in {config.output_dir}")


def command_line(arguments: list[str] | None = None) -> None:
    """`main` from flags. What the user can mend ends in one line, on the first process, and exit status 1."""
    first = os.environ.get("RANK", "0") == "0"

    def fail(message: object) -> None:
        if not first:
            sys.exit(1)
        sys.exit(f"error: {message}")

    parser = HfArgumentParser((Flags, DPOConfig), description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error = fail
    bf16 = torch.cuda.is_available() and has_bfloat16("cuda")
    parser.set_defaults(num_train_epochs=1, save_strategy="no", bf16=bf16)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print_replaces()
    try:
        flags, args = parser.parse_args_into_dataclasses(arguments)
    except ValueError as error:  # TRL checks its flags
        fail(one_line(error))
    args.output_dir = at_home(args.output_dir)
    flags.samples = flags.samples and at_home(flags.samples)
    shown = sys.stdout
    if not first:
        shown = io.StringIO()
    try:
        with redirect_stdout(shown):
            main(flags, args)
    except Paused as pause:
        if first:
            print(pause)
    except (InputError, OSError, FloatingPointError) as error:
        fail(error)
    except torch.OutOfMemoryError:
        fail("out of GPU memory: a smaller --per_device_train_batch_size, --max_tokens or --max_length may help")


if __name__ == "__main__":
    command_line()
