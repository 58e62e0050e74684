"""The flags: name, default and help in one place; what cannot be; `--help`; and the seed of every draw."""

import argparse
import math
import re
import signal
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import HfArgumentParser

from sera_min import playground
from sera_min.forms import InputError, Paused
from sera_min.losses import LOSSES


def seed_of(seed: int, t: int, phase: str) -> int:
    """A seed of its own for everything that an iteration draws, made of the run's seed, the iteration and the phase."""
    return zlib.crc32(f"{seed} {t} {phase}".encode())


GROUPS = {  # of --help, by the flag that each begins with
    "keep": "the five that matter most", "model_name_or_path": "what is read and written", "iterations": "the review",
    "label_smoothing": "training", "label_noise": "the playground",
}  # fmt: skip


def flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """The flags as they are given; None where the default depends on other flags. `resolve` makes a `Resolved`."""

    keep: float = flag(0.7, "K: share of the given pairs that selection keeps")
    bootstrap: float = flag(0.3, "K̃: pairs of the policy's own samples, as a share of the given pairs")
    loss_type: str = flag("dpo", "dpo, robust (DPO for flipped labels), ipo, slic or simpo")
    beta: float | None = flag(None, "β: a larger one stays closer to the reference (0.1; playground 1; with simpo 2)")
    learning_rate: float | None = flag(None, f"at its peak (1e-6; playground: {playground.LEARNING_RATE:g})")

    model_name_or_path: str | None = flag(None, "SFT model π_ref, a hub name or a folder (without: the playground)")
    dataset_name: str | None = flag(None, "preferences D: a hub name, a .json(l), .csv or .parquet file, or a folder")
    dataset_config: str | None = flag(None, "the configuration of dataset_name, where the hub has several")
    output_dir: str = flag("runs/sera", "a new folder for all that the run writes")
    resume_from_checkpoint: str | None = flag(None, "output_dir of a run to go on with, under the same flags")
    dataset_train_split: str = flag("train", "the split of dataset_name to train on")
    eval_dataset_name: str | None = flag(None, "preferences to evaluate on, as dataset_name")
    eval_split: str | None = flag(
        None, "the split to evaluate on, of eval_dataset_name (test) or of dataset_name (without either: eval_fraction "
        "is held out); playground: test or validation prompts (test)")  # fmt: skip
    eval_fraction: float = flag(0.05, "without the two above: share of the prompts, with their pairs, that is held out")
    prompt_file: str | None = flag(
        None, "JSON rows of instruction or prompt: the final policy answers them in samples.json, as AlpacaEval has it")
    max_train_pairs: int | None = flag(None, "read only this many rows (all; playground: makes 2000 pairs)")
    max_length: int | None = flag(None, "prompt and response, in tokens: more is cut at the end (1024; playground: 64)")
    max_prompt_length: int | None = flag(
        None, "in tokens: a longer prompt loses its beginning (half of max_length; playground: 16)")  # fmt: skip

    iterations: int = flag(3, "T: the first trains on all of D, each later one reviews it first")
    samples_per_prompt: int = flag(4, "N: samples of which the best and the worst become a pair")
    ensemble_gamma: float = flag(0.5, "γ: the weight of the older policy's reward")
    temperature: float = flag(1.0, "of samples and answers")
    top_p: float = flag(1.0, "draw from the likeliest tokens that together have this probability")
    max_new_tokens: int | None = flag(None, "longest sample (max_length - max_prompt_length; playground: 32)")
    select: str = flag("margin", "how K and K̃ are chosen: by margin, or at random (the control)")
    length_free: bool = flag(False, "ours: review by the part of the reward that length does not explain")
    token_floor: float = flag(
        0.0, "ours: a sample is never paired if its least likely token under π_ref is below this quantile of the same "
        "over D's responses; 0.01 keeps out broken text")  # fmt: skip

    pause_before_sampling: bool = flag(
        False, "stop where samples are due, for another engine to write them (experiments/sample_with_vllm.py)"
    )
    label_smoothing: float = flag(0.0, "ε, dpo and robust: the share of labels that the loss expects to be flipped")
    epochs_per_iteration: int = flag(1, "epochs over an iteration's pairs")
    steps_per_iteration: int | None = flag(None, "this many optimizer steps an iteration, whatever K and K̃")
    per_device_train_batch_size: int = flag(32, "pairs per optimizer step")
    max_tokens: int = flag(16384, "tokens in memory at a time, in training and scoring: lower it if memory runs out")
    gradient_checkpointing: bool = flag(False, "recompute activations in backward: less memory, a third more time")
    save_steps: int = flag(500, "steps between checkpoints within an iteration; its end is always saved")
    device: str | None = flag(None, "cuda, cuda:1 or cpu (cuda where there is one)")
    seed: int = flag(0, "of the order of pairs, sampling, the held-out prompts and the playground")

    label_noise: float = flag(0.3, "share of flipped labels")
    length_bias: float = flag(0.0, "share of pairs whose longer response is preferred, whatever it says")


@dataclass(frozen=True)
class Resolved(Config):
    """The same with every choice made: what a run reads, prints and saves."""

    beta: float = 0.0
    learning_rate: float = 0.0
    max_length: int = 0
    max_prompt_length: int = 0
    max_new_tokens: int = 0
    device: str = ""

    @property
    def in_playground(self) -> bool:
        return self.model_name_or_path is None


RANGES = [  # flags, where they are given: names, check, what it expects
    ("eval_fraction label_noise length_bias keep bootstrap ensemble_gamma", lambda v: 0 <= v <= 1, "between 0 and 1"),
    ("token_floor", lambda v: 0 <= v < 1, "at least 0 and below 1"),
    ("iterations", lambda v: 1 <= v < 1000, "at least 1 and below 1000"),
    ("seed", lambda v: 0 <= v < 2**40, "at least 0 and below 2^40"),
    ("epochs_per_iteration per_device_train_batch_size max_tokens max_prompt_length max_new_tokens "
     "max_length max_train_pairs save_steps steps_per_iteration", lambda v: v >= 1, "at least 1"),
    ("beta learning_rate temperature", lambda v: 0 < v < math.inf, "above 0"),
    ("top_p", lambda v: 0 < v <= 1, "above 0 and at most 1"),
    ("samples_per_prompt", lambda v: v >= 2, "at least 2"),
    ("label_smoothing", lambda v: 0 <= v < 0.5, "at least 0 and below 0.5"),
    ("loss_type", LOSSES.__contains__, "one of " + ", ".join(LOSSES)),
    ("select", ("margin", "random").__contains__, "margin or random"),
    ("device", lambda v: re.fullmatch(r"cpu|cuda(:\d+)?", v), "cpu, cuda, or cuda:1 for the second GPU"),
]  # fmt: skip


def resolve(flags: Config) -> Resolved:
    """Every choice that was left open is made; what cannot be is an InputError."""
    for names, holds, expected in RANGES:
        for name in names.split():
            if (value := getattr(flags, name)) is not None and not holds(value):
                raise InputError(f"--{name} is {value!r}: expected {expected}")
    given = {f.name: getattr(flags, f.name) for f in fields(Config) if getattr(flags, f.name) is not None}
    playing = flags.model_name_or_path is None
    chosen: dict[str, Any] = dict(playground.DEFAULTS if playing else {"max_length": 1024, "learning_rate": 1e-6})
    chosen["beta"] = playground.BETA[flags.loss_type] if playing else LOSSES[flags.loss_type].beta
    chosen["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if playing or flags.eval_dataset_name is not None:
        chosen["eval_split"] = "test"
    values = {**chosen, **given}
    values.setdefault("max_prompt_length", max(1, values["max_length"] // 2))
    values.setdefault("max_new_tokens", values["max_length"] - values["max_prompt_length"])
    values["output_dir"] = str(Path(flags.resume_from_checkpoint or flags.output_dir))
    refuse_contradictions(flags, Resolved(**values))
    gpu = int(values["device"].partition(":")[2] or 0)
    if values["device"] != "cpu" and gpu >= (count := torch.cuda.device_count()):
        raise InputError(f"--device is {values['device']}: torch sees {count} CUDA GPUs")
    return Resolved(**{**values, "resume_from_checkpoint": None})


def refuse_contradictions(flags: Config, c: Resolved) -> None:
    """Flags that are right one by one and cannot be together are an InputError."""
    playing = c.in_playground

    def changed(*names: str) -> bool:
        return any(getattr(c, name) != getattr(Config, name) for name in names)

    def same(folder: str, *others: str) -> bool:
        return Path(folder).resolve() in [Path(other).resolve() for other in others]

    for wrong, message in [
        (c.keep + c.bootstrap == 0, "--keep and --bootstrap are both 0: nothing would be left to train on"),
        (c.max_length <= c.max_prompt_length, "--max_length is not above --max_prompt_length: no room for a response"),
        (c.label_smoothing > 0 and c.loss_type not in ("dpo", "robust"),
         f"--label_smoothing is of dpo and robust: {c.loss_type} has none"),
        ((c.dataset_name is None) != playing, "--model_name_or_path and --dataset_name go together"),
        (playing and c.eval_split not in ("test", "validation"),
         f"--eval_split is {c.eval_split!r}: the playground has test and validation prompts"),
        (playing and changed("eval_dataset_name", "prompt_file"),
         "--eval_dataset_name and --prompt_file are for a model of your own: the playground has its own prompts"),
        (playing and changed("dataset_train_split"), "--dataset_train_split is of --dataset_name"),
        (playing and changed("dataset_config"), "--dataset_config is of --dataset_name"),
        (changed("dataset_config") and Path(c.dataset_name or "").exists(),
         f"--dataset_config is for data sets of the hub: {c.dataset_name} is here"),
        (not playing and changed("label_noise", "length_bias"),
         "--label_noise and --length_bias are the playground's: data of your own has what it has"),
        (Path(c.dataset_name or "").is_file() and (changed("dataset_train_split")
         or (flags.eval_split is not None and not c.eval_dataset_name)),
         f"--dataset_name {c.dataset_name} is a file, which has no splits: --eval_dataset_name takes another file"),
        (changed("eval_fraction") and (playing or c.eval_split is not None),
         "--eval_fraction holds out pairs of your own data, where no others are given to evaluate on"),
        (changed("steps_per_iteration") and changed("epochs_per_iteration"),
         "--steps_per_iteration and --epochs_per_iteration: give one of them"),
        (c.token_floor > 0 and c.bootstrap == 0, "--token_floor is for bootstrapped pairs, and --bootstrap is 0"),
        (c.pause_before_sampling and 0 in (c.bootstrap, c.iterations - 1), "--pause_before_sampling: none are drawn"),
        (flags.resume_from_checkpoint is not None and not same(flags.output_dir, c.output_dir, Config.output_dir),
         "--output_dir: a run that is resumed stays where it is"),
    ]:  # fmt: skip
        if wrong:
            raise InputError(message)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """--help: the description as it is written, and every flag with its default in the place of a value."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=120)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.dest == "help":
            return super()._format_action_invocation(action)
        value = "…" if action.default is None else action.default
        return f"--{action.dest}" if value is False else f"--{action.dest} {value}"


def parse(arguments: list[str] | None, description: str | None) -> Config:
    """The flags of a command line; `--help` shows them in their groups. A wrong one ends in one line and status 1."""
    usage = "python train.py [--flag value ...]"
    options: dict[str, Any] = {"usage": usage, "description": description, "formatter_class": HelpFormatter}
    parser = HfArgumentParser(Config, **options)  # type: ignore[arg-type]
    actions, group = parser._optionals._group_actions, parser._optionals
    for f in fields(Config):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        [action] = [action for action in actions if action.dest == f.name]
        actions.remove(action)
        group._group_actions.append(action)
    parser.error = lambda message: sys.exit(f"error: {message}")  # type: ignore[method-assign]
    return Config(**vars(parser.parse_args(arguments)))


def command_line(main: Callable[[Config], Any], description: str | None, arguments: list[str] | None = None) -> None:
    """`main` from flags; what the user can mend ends in one line and exit status 1."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    flags = parse(arguments, description)
    out = Path(flags.resume_from_checkpoint or flags.output_dir)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(flags)
    except Paused as pause:
        print(pause)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except FloatingPointError as error:
        begun = (out / "config.json").exists()
        sys.exit(f"error: {error}" + f"; what was saved before stays, the steps are in {out / 'metrics.jsonl'}" * begun)
    except torch.OutOfMemoryError:
        sys.exit("error: out of GPU memory, however few rows at a time: resume with --gradient_checkpointing, or begin "
                 "with a smaller --max_length, --max_new_tokens or --samples_per_prompt")  # fmt: skip
    except KeyboardInterrupt:
        how = f"to go on: the same command with --resume_from_checkpoint {out}"
        print("interrupted;", how if (out / "config.json").exists() else "nothing is saved yet", file=sys.stderr)
        sys.exit(130)
