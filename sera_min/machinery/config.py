"""The flags: name, default and help in one place; the command line; the seed of every draw."""

import json
import math
import signal
import sys
import zlib
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import HfArgumentParser

from sera_min import playground
from sera_min.machinery import folder
from sera_min.machinery.device import devices
from sera_min.machinery.errors import InputError, Paused, naming, print_replaces


def seed_of(seed: int, t: int, phase: str) -> int:
    """A seed of its own for everything that an iteration draws."""
    return zlib.crc32(f"{seed} {t} {phase}".encode())


def flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """The flags. None is a choice that `resolve` makes, as the default depends on other flags."""

    keep: float = flag(0.7, "K: share of the given pairs that selection keeps")
    bootstrap: float = flag(0.3, "K̃: bootstrapped pairs, as a share of the given pairs")
    loss_type: str = flag("dpo", "dpo, ipo, slic or simpo")
    beta: float = flag(None, "β: larger stays closer to π_ref (0.1; playground 1; simpo 2)")
    learning_rate: float = flag(None, "at its peak (1e-6, with LoRA 1e-5; playground: 3e-4, with LoRA 1e-3)")

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
    max_length: int = flag(None, "tokens of prompt and response; more is cut at the end (1024; playground: 64)")
    max_prompt_length: int = flag(None, "a longer one loses its beginning (half of max_length; playground: 16)")

    iterations: int = flag(3, "T: the first trains on all of D, each later one reviews it first")
    samples_per_prompt: int = flag(4, "N for each given pair's prompt: best against worst")
    ensemble_gamma: float = flag(0.5, "γ: the weight of the older policy's reward")
    temperature: float = flag(1.0, "of samples and answers")
    top_p: float = flag(1.0, "draw from the likeliest tokens of together this probability")
    max_new_tokens: int = flag(None, "longest sample (max_length less max_prompt_length; playground: 32)")
    pause_before_sampling: bool = flag(False, "where samples are due stop, for another engine, as vLLM, to draw them")

    label_smoothing: float = flag(0.0, "ε, dpo: the share of labels expected to be flipped")
    epochs_per_iteration: int = flag(1, "epochs over an iteration's pairs")
    per_device_train_batch_size: int = flag(32, "pairs per optimizer step")
    max_tokens: int = flag(None, "tokens in memory at a time (16384; on a GPU as many as fit, at most 32768)")
    gradient_checkpointing: bool = flag(False, "less memory for activations, a third more time")
    save_steps: int = flag(500, "steps between checkpoints within an iteration")
    device: str = flag(None, "cuda, cuda:1 or cpu (cuda where there is one)")
    seed: int = flag(0, "of the order of pairs, sampling, held-out prompts, LoRA and the playground")

    use_peft: bool = flag(False, "train small matrices beside frozen weights: LoRA")
    lora_r: int = flag(16, "r: their rank")
    lora_alpha: int = flag(32, "α: their product counts α/r times")
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "as q_proj v_proj (all linear layers)", "metavar": "NAME"}
    )

    label_noise: float = flag(0.3, "share of flipped labels")

    @property
    def in_playground(self) -> bool:
        return self.model_name_or_path is None


Resolved = Config  # with every choice made, and so every value of its type: what a run reads and saves
GROUPS = {  # of --help, by the flag that each begins with
    "keep": "the five that matter most",
    "model_name_or_path": "what is read and written",
    "iterations": "the review",
    "label_smoothing": "training",
    "use_peft": "LoRA",
    "label_noise": "the playground",
}
PATHS = ("model_name_or_path", "dataset_name", "eval_dataset_name", "output_dir")
MAY_CHANGE = ("max_tokens", "gradient_checkpointing", "save_steps", "pause_before_sampling")  # at a resume
SHARES = ("keep", "bootstrap", "ensemble_gamma", "top_p", "eval_fraction", "label_noise")
ABOVE_0 = ("beta", "learning_rate", "temperature", "top_p")


def resolve(flags: Config) -> Resolved:
    """Every choice that was left open is made; what cannot be is an InputError."""
    values: dict[str, Any] = {"max_length": 1024, "learning_rate": 1e-6, "beta": 0.1}
    with_lora = 1e-5
    if flags.in_playground:
        values = playground.DEFAULTS | {"beta": 1.0}
        with_lora = playground.LORA_LEARNING_RATE
    if flags.loss_type == "simpo":
        values["beta"] = 2.0
    if flags.use_peft:
        values["learning_rate"] = with_lora
    values["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if (flags.device or values["device"]) == "cpu":
        values["max_tokens"] = 16384
    if flags.in_playground or flags.eval_dataset_name:
        values["eval_split"] = "test"
    values |= {name: value for name, value in asdict(flags).items() if value is not None}
    for name in PATHS:
        if values.get(name):
            values[name] = folder.at_home(values[name])
    if values.get("model_name_or_path"):
        values["model_name_or_path"] = full_name(values["model_name_or_path"])
    values.setdefault("max_prompt_length", max(1, values["max_length"] // 2))
    values.setdefault("max_new_tokens", max(1, values["max_length"] - values["max_prompt_length"]))
    config = Resolved(**values)
    check_values(config)
    check_together(config)
    return config


def full_name(model: str) -> str:
    """The path of its folder from the root, for a resume that begins elsewhere; a name on the hub as it is."""
    if Path(model).is_dir():
        return str(Path(model).absolute())
    return model


def check_values(c: Resolved) -> None:
    choices = {"loss_type": ["dpo", "ipo", "slic", "simpo"], "device": devices()}
    if c.in_playground:
        choices["eval_split"] = ["test", "validation"]
    for f in fields(c):
        value = getattr(c, f.name)
        expected = ""
        if f.name in choices and value not in choices[f.name]:
            expected = "one of " + ", ".join(choices[f.name])
        if f.name in SHARES and not 0 <= value <= 1:
            expected = "between 0 and 1"
        if f.name in ABOVE_0 and not 0 < value < math.inf:
            expected = "above 0"
        if f.type in (int, int | None) and f.name != "seed" and value is not None and value < 1:
            expected = "at least 1"
        if expected:
            raise InputError(f"--{f.name} is {value!r}: expected {expected}")


def check_together(c: Resolved) -> None:
    """What would otherwise be noticed hours later, or never."""
    no_effect = {}
    if c.in_playground:
        for name in ("dataset_name", "dataset_config", "dataset_train_split", "eval_dataset_name", "eval_fraction"):
            no_effect[name] = "in the playground: --model_name_or_path is missing"
    else:
        no_effect["label_noise"] = "on data of your own"
        if c.eval_split is not None:
            no_effect["eval_fraction"] = "beside --eval_split or --eval_dataset_name"
    if not c.use_peft:
        for name in ("lora_r", "lora_alpha", "lora_target_modules"):
            no_effect[name] = "without --use_peft"
    if c.loss_type != "dpo":
        no_effect["label_smoothing"] = f"on {c.loss_type}"
    for name, where in no_effect.items():
        if getattr(c, name) != getattr(Config, name):
            raise InputError(f"--{name} has no effect {where}")
    if not 0 <= c.label_smoothing < 0.5:
        raise InputError(f"--label_smoothing is {c.label_smoothing}: expected from 0 to below 0.5")
    if c.samples_per_prompt == 1:
        raise InputError("--samples_per_prompt is 1: the best of them is paired with the worst")
    if c.keep + c.bootstrap == 0:
        raise InputError("--keep and --bootstrap are 0: no pair would be left")
    if c.max_length <= c.max_prompt_length:
        raise InputError("--max_length is not above --max_prompt_length: no room for a response")
    if not c.in_playground and not c.dataset_name:
        raise InputError("--model_name_or_path needs --dataset_name")


def resumed(flags: Config, variant: str) -> Resolved:
    """The flags that a run was begun with. Only those of MAY_CHANGE may now have other values. Raises InputError.

    From Python a flag that has its default counts as not given.
    """
    out = Path(folder.at_home(str(flags.resume_from_checkpoint)))
    file = out / "config.json"
    if not file.exists():
        raise InputError(f"--resume_from_checkpoint {out}: no run has begun there")
    folder.check_not_ended(out)
    with naming(f"{file} cannot be read"):
        begun = json.loads(file.read_text(encoding="utf-8")) | {"output_dir": str(out)}
        other = begun.pop("variant", "SeRA")
        config = Resolved(**begun)
    if other != variant:
        program = "train.py"
        if other != "SeRA":
            program = f"experiments/variants.py {other}"
        raise InputError(f"{out} is a run of {other}, to go on: python {program} --resume_from_checkpoint {out}")
    # From a command line, what is not given is None (see `parse`).
    with_defaults = [getattr(flags, f.name) for f in fields(Config) if f.default is not None]
    from_python = None not in with_defaults
    for f in fields(Config):
        value, then = getattr(flags, f.name), getattr(config, f.name)
        if value is None or (from_python and value == f.default) or f.name == "resume_from_checkpoint":
            continue
        if f.name == "model_name_or_path":
            value = full_name(folder.at_home(value))
        if value != then and f.name not in MAY_CHANGE:
            raise InputError(
                f"{out} was begun with {f.name} = {then!r}, not {value!r}: --resume_from_checkpoint alone is enough"
            )
        begun[f.name] = value
    config = Resolved(**begun)
    check_values(config)
    return config


def config_json(config: Resolved, variant: str) -> str:
    return json.dumps(asdict(config) | {"variant": variant}, indent=2) + "\n"


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Every flag with its default, below a description that is left as it is written."""

    def _get_help_string(self, action: Action) -> str | None:
        if action.default is None:  # the help itself says what it then is
            return action.help
        return super()._get_help_string(action)


def parse(arguments: list[str] | None, description: str | None) -> Config:
    """The flags of a command line. A wrong one ends in one line and exit status 1."""
    groups: list[list] = []
    for f in fields(Config):
        if f.name in GROUPS:
            groups.append([])
        groups[-1].append((f.name, f.type, field(default=f.default, metadata=f.metadata)))
    parts = []
    for title, flags in zip(GROUPS.values(), groups):
        parts.append(make_dataclass("Flags", flags, namespace={"_argument_group_name": title}))
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
    print_replaces()
    flags = parse(arguments, description)
    out = Path(folder.at_home(flags.resume_from_checkpoint or flags.output_dir))
    if signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:  # if it was ignored at the start, it stays so
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(flags)
    except Paused as pause:
        print(pause)
    except (InputError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        remedy = "begin with --gradient_checkpointing or --use_peft"
        if (out / "config.json").exists():
            remedy = "resume with --gradient_checkpointing"
        smaller = "--max_length, --max_new_tokens or --samples_per_prompt"
        sys.exit(f"error: out of GPU memory: {remedy}, or begin with a smaller {smaller}")
    except KeyboardInterrupt:
        saved = "nothing is saved yet"
        if (out / "config.json").exists():
            saved = f"to go on: the same program with --resume_from_checkpoint {out}"
        print(f"interrupted; {saved}", file=sys.stderr)
        sys.exit(130)
