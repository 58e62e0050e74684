"""The flags: name, default and help in one place; the command line; the seed of every draw."""

import json
import math
import re
import signal
import sys
import zlib
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import HfArgumentParser

from sera_min import playground
from sera_min.machinery import folder
from sera_min.machinery.errors import InputError, Paused


def seed_of(seed: int, t: int, phase: str) -> int:
    """A seed of its own for everything that an iteration draws."""
    return zlib.crc32(f"{seed} {t} {phase}".encode())


def flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """The flags as they are given; None where the default depends on others, see `resolve`."""

    keep: float = flag(0.7, "K: share of the given pairs that selection keeps")
    bootstrap: float = flag(0.3, "K̃: bootstrapped pairs, as a share of the given pairs")
    loss_type: str = flag("dpo", "dpo, ipo, slic or simpo")
    beta: float | None = flag(None, "β: larger stays closer to π_ref (0.1; playground 1; simpo 2)")
    learning_rate: float | None = flag(None, "at its peak (1e-6; playground: 3e-4)")

    model_name_or_path: str | None = flag(None, "SFT model π_ref (without one: the playground)")
    dataset_name: str | None = flag(None, "preferences D: hub name, json(l), csv, parquet, folder")
    dataset_config: str | None = flag(None, "configuration of dataset_name on the hub")
    output_dir: str = flag("runs/sera", "a new folder for all that the run writes")
    resume_from_checkpoint: str | None = flag(None, "output_dir of a run to go on with; its flags are read from there")
    dataset_train_split: str = flag("train", "the split of dataset_name to train on")
    eval_dataset_name: str | None = flag(None, "preferences to evaluate on")
    eval_split: str | None = flag(None, "of eval_dataset_name or dataset_name; playground: test or validation (test)")
    eval_fraction: float = flag(0.05, "without the two above: share of prompts held out")
    max_train_pairs: int | None = flag(None, "read this many rows (all; playground: 2000)")
    max_length: int | None = flag(
        None, "of prompt and response, in tokens; more is cut at the end (1024; playground: 64)"
    )
    max_prompt_length: int | None = flag(
        None, "a longer prompt loses its beginning (half of max_length; playground: 16)"
    )

    iterations: int = flag(3, "T: the first trains on all of D, each later one reviews it first")
    samples_per_prompt: int = flag(4, "N for each given pair's prompt: best against worst")
    ensemble_gamma: float = flag(0.5, "γ: the weight of the older policy's reward")
    temperature: float = flag(1.0, "of samples and answers")
    top_p: float = flag(1.0, "draw from the likeliest tokens of together this probability")
    max_new_tokens: int | None = flag(None, "longest sample (max_length less max_prompt_length; playground: 32)")
    pause_before_sampling: bool = flag(
        False, "stop where samples are due, for another engine (experiments/sample_with_vllm.py)"
    )

    label_smoothing: float = flag(0.0, "ε, dpo: the share of labels expected to be flipped")
    epochs_per_iteration: int = flag(1, "epochs over an iteration's pairs")
    per_device_train_batch_size: int = flag(32, "pairs per optimizer step")
    max_tokens: int = flag(16384, "tokens in memory at a time: lower it if memory runs out")
    gradient_checkpointing: bool = flag(False, "less memory for activations, a third more time")
    save_steps: int = flag(500, "steps between checkpoints within an iteration")
    device: str | None = flag(None, "cuda, cuda:1 or cpu (cuda where there is one)")
    seed: int = flag(0, "of the order of pairs, sampling, held-out prompts and the playground")

    label_noise: float = flag(0.3, "share of flipped labels")


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

    @property
    def compiles(self) -> bool:
        """Whether layers are compiled: not for the playground, whose run is as short as that takes."""
        return self.device != "cpu" and not self.in_playground


GROUPS = {  # of --help, by the flag that each begins with
    "keep": "the five that matter most",
    "model_name_or_path": "what is read and written",
    "iterations": "the review",
    "label_smoothing": "training",
    "label_noise": "the playground",
}
MEMORY = ("max_tokens", "gradient_checkpointing", "save_steps", "pause_before_sampling")


def resolve(flags: Config) -> Resolved:
    """Every choice that was left open is made; what cannot be is an InputError."""
    values: dict[str, Any] = {"max_length": 1024, "learning_rate": 1e-6, "beta": 0.1}
    if flags.model_name_or_path is None:
        values = playground.DEFAULTS | {"beta": 1.0}
    if flags.loss_type == "simpo":
        values["beta"] = 2.0
    values["device"] = "cpu"
    if torch.cuda.is_available():
        values["device"] = "cuda"
    if flags.model_name_or_path is None or flags.eval_dataset_name:
        values["eval_split"] = "test"
    for name, value in asdict(flags).items():
        if value is not None:
            values[name] = value
    values.setdefault("max_prompt_length", max(1, values["max_length"] // 2))
    values.setdefault("max_new_tokens", max(1, values["max_length"] - values["max_prompt_length"]))
    config = Resolved(**values)
    check_ranges(config)
    check_together(config, flags)
    return config


def expect(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise InputError(f"--{name} is {value!r}: expected {expected}")


def check_ranges(c: Resolved) -> None:
    for name in ("keep", "bootstrap", "eval_fraction", "label_noise", "ensemble_gamma"):
        value = getattr(c, name)
        expect(0 <= value <= 1, name, value, "between 0 and 1")
    for name in ("beta", "learning_rate", "temperature"):
        value = getattr(c, name)
        expect(0 < value < math.inf, name, value, "above 0")
    for f in fields(c):
        value = getattr(c, f.name)
        if type(value) is int and f.name != "seed":
            expect(value >= 1, f.name, value, "at least 1")
    losses = ("dpo", "ipo", "slic", "simpo")
    expect(c.loss_type in losses, "loss_type", c.loss_type, "one of " + ", ".join(losses))
    expect(c.iterations < 1000, "iterations", c.iterations, "below 1000")
    expect(0 <= c.seed < 2**40, "seed", c.seed, "at least 0 and below 2^40")
    expect(0 < c.top_p <= 1, "top_p", c.top_p, "above 0 and at most 1")
    expect(c.samples_per_prompt >= 2, "samples_per_prompt", c.samples_per_prompt, "at least 2")
    smoothing = c.label_smoothing
    expect(0 <= smoothing < 0.5, "label_smoothing", smoothing, "at least 0 and below 0.5")
    device = re.fullmatch(r"cpu|cuda(:\d+)?", c.device)
    expect(bool(device), "device", c.device, "cpu, cuda, or cuda:1 for the second GPU")
    gpu = int(c.device.partition(":")[2] or 0)
    if c.device != "cpu" and gpu >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InputError(f"--device is {c.device}: torch sees {count} CUDA GPUs")


def check_together(c: Resolved, flags: Config) -> None:
    """What the flags say together, and would otherwise be noticed hours later, or never."""

    def refuse(wrong: bool, message: str) -> None:
        if wrong:
            raise InputError(message)

    file = Path(c.dataset_name or "").is_file()
    splits = c.dataset_train_split != "train" or (flags.eval_split and not c.eval_dataset_name)
    own = (c.dataset_name, c.eval_dataset_name, c.dataset_config, c.dataset_train_split != "train")
    refuse(c.keep + c.bootstrap == 0, "--keep and --bootstrap are 0: no pair would be left")
    refuse(c.max_length <= c.max_prompt_length, "--max_length is not above --max_prompt_length: no room for a response")
    refuse(c.label_smoothing > 0 and c.loss_type != "dpo", "--label_smoothing is of dpo alone")
    refuse(
        c.in_playground and any(own),
        "--dataset_name and its like need --model_name_or_path: the playground has its own data",
    )
    refuse(not c.in_playground and not c.dataset_name, "--model_name_or_path needs --dataset_name")
    refuse(
        c.in_playground and c.eval_split not in ("test", "validation"),
        f"--eval_split is {c.eval_split!r}: the playground has test and validation prompts",
    )
    refuse(
        not c.in_playground and c.label_noise != Config.label_noise,
        "--label_noise is the playground's: data of your own has what it has",
    )
    refuse(
        c.eval_split is not None and c.eval_fraction != Config.eval_fraction,
        "--eval_fraction holds out pairs of your own data where no others are given to evaluate on",
    )
    refuse(file and bool(splits), f"--dataset_name {c.dataset_name} is a file: it has no splits")
    refuse(
        c.pause_before_sampling and (c.bootstrap == 0 or c.iterations == 1),
        "--pause_before_sampling: no samples would be drawn",
    )


def resumed(flags: Config, variant: str) -> Resolved:
    """The flags that a run was begun with. Beside the folder only MEMORY's may be given."""
    out = Path(str(flags.resume_from_checkpoint))
    if not (out / "config.json").exists():
        raise InputError(f"--resume_from_checkpoint {out}: no run has begun there")
    folder.check_not_ended(out)
    begun = folder.read_json(out / "config.json")
    if not isinstance(begun, dict):
        raise InputError(f"{out}/config.json cannot be read: expected an object of flags")
    other = begun.pop("variant", "SeRA")
    if other != variant:
        program = {"SeRA": "train.py"}.get(other, f"experiments/variants.py {other}")
        raise InputError(f"{out} is a run of {other}, to go on: python {program} --resume_from_checkpoint {out}")
    different = sorted(begun.keys() ^ {f.name for f in fields(Resolved)})
    if different:
        raise InputError(f"{out} was begun by another version: one of the two lacks the flags {different}")
    from_python = flags.seed is not None  # there a default counts as not given, see `parse`
    for f in fields(Config):
        value = getattr(flags, f.name)
        if f.name == "resume_from_checkpoint" or value is None or (from_python and value == f.default):
            continue
        if f.name in MEMORY:
            begun[f.name] = value
        elif begun[f.name] != value:
            raise InputError(
                f"{out} was begun with {f.name} = {begun[f.name]!r}, not {value!r}: "
                "--resume_from_checkpoint alone is enough"
            )
    return Resolved(**{**begun, "output_dir": str(out)})


def config_json(config: Resolved, variant: str) -> str:
    values = asdict(config)
    values["resume_from_checkpoint"] = None
    return json.dumps({**values, "variant": variant}, indent=2) + "\n"


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Every flag with its default, below a description that is left as it is written."""


def parse(arguments: list[str] | None, description: str | None) -> Config:
    """The flags of a command line. A wrong one ends in one line and exit status 1."""
    groups: list[Any] = []
    for f in fields(Config):
        if f.name in GROUPS:
            groups.append((GROUPS[f.name], []))
        groups[-1][1].append((f.name, f.type, field(default=f.default, metadata=f.metadata)))
    parts = [make_dataclass("Flags", of_group, namespace={"_argument_group_name": title}) for title, of_group in groups]
    parser = HfArgumentParser(parts, description=description, formatter_class=HelpFormatter)  # type: ignore[arg-type]
    parser.error = lambda message: sys.exit(f"error: {message}")  # type: ignore[method-assign]
    values = vars(parser.parse_args(arguments))
    if values["resume_from_checkpoint"]:
        parser.set_defaults(**dict.fromkeys(values))  # None is a flag that is not given
        values = vars(parser.parse_args(arguments))
    return Config(**values)


def command_line(main: Callable[[Config], Any], description: str | None, arguments: list[str] | None = None) -> None:
    """`main` from flags. What the user can mend ends in one line and exit status 1."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    flags = parse(arguments, description)
    out = Path(flags.resume_from_checkpoint or flags.output_dir)
    go_on = f"to go on: --resume_from_checkpoint {out}"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(flags)
    except Paused as pause:
        print(pause)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except FloatingPointError as error:
        sys.exit(f"error: {error}; what was saved before stays in {out}")
    except torch.OutOfMemoryError:
        sys.exit(
            "error: out of GPU memory, however few rows at a time: resume with "
            "--gradient_checkpointing, or begin with a smaller --max_length, --max_new_tokens or "
            "--samples_per_prompt"
        )
    except KeyboardInterrupt:
        if not (out / "config.json").exists():
            go_on = "nothing is saved yet"
        print(f"interrupted; {go_on}", file=sys.stderr)
        sys.exit(130)
