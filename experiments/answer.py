"""Answers to a file of prompts, by any policy: the JSON that AlpacaEval reads, [{instruction, output, generator}, …].

    python experiments/answer.py --policy OUT/policy --prompt_file FILE --output answers.json

A row of FILE (JSON, JSONL, CSV, Parquet) has an instruction or a prompt: a text or messages. It gets one answer.
"""

import argparse
import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers

from sera_min import bootstrap
from sera_min.machinery.data import Encoder, as_text, response_text
from sera_min.machinery.device import autocast, devices, prepare, retry_on_oom
from sera_min.machinery.errors import InputError, Unusable, format_counts, naming, print_replaces
from sera_min.machinery.folder import at_home, write
from sera_min.machinery.models import check_before_training, check_positions, eos_ids_of, load, pad_id_of
from sera_min.machinery.rows import Reading, asked, in_context, read_rows
from sera_min.pairs import Ids, Pair


def parse(arguments: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    device = "cpu"
    if torch.cuda.is_available():
        device = "cuda"
    parser.add_argument("--policy", required=True, help="folder of a model and its tokenizer")
    parser.add_argument("--prompt_file", required=True, help="rows of instruction, question or prompt")
    parser.add_argument("--output", type=at_home, default="answers.json", help="answers.json unless given")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="of an answer (512)")
    parser.add_argument("--max_prompt_length", type=int, default=512, help="a longer one loses its beginning (512)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the answers (1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=device)
    return parser.parse_args(arguments)


def question(row: Any) -> Reading:
    """A row as a prompt to answer, whose own answers are not read. Raises InputError and Unusable."""
    prompt, _answer = asked(row)
    if not prompt:
        raise InputError("expected 'prompt' or 'instruction'")
    return in_context(prompt, [], row)


def encode_prompts(
    rows: list[Any], tokenizer: Any, *, name: str, eos_ids: Ids, **limits: int
) -> tuple[list[str], list[Ids], Counter]:
    """Prompts to answer, rows of any form without answers: as people read them, as token ids, and the counts.

    Raises InputError where a row is no prompt.
    """
    encoder = Encoder(tokenizer, eos_ids, **limits)
    texts, prompts = [], []
    for i, row in enumerate(rows):
        try:
            with naming(f"{name}, row {i}"):
                reading = question(row)
                [prompt] = encoder.ids(reading)
        except Unusable as reason:
            raise InputError(f"{name}, row {i} is no prompt to answer: {reason}") from None
        prompts.append(prompt)
        texts.append(as_text(reading.prompt))
    return texts, prompts, Counter({"read": len(rows), **encoder.counts})


def main(flags: argparse.Namespace) -> None:
    for name in ("max_new_tokens", "max_prompt_length", "temperature"):
        if not getattr(flags, name) > 0:
            raise InputError(f"--{name} is {getattr(flags, name)}: expected above 0")
    if flags.device not in devices():
        raise InputError(f"--device is {flags.device!r}: expected one of {', '.join(devices())}")
    if Path(flags.output).is_dir():
        raise InputError(f"--output {flags.output} is a folder: expected a file")
    policy, tokenizer = load(flags.policy, flags.device)
    longest = flags.max_prompt_length + flags.max_new_tokens
    check_positions(policy, longest, "--max_prompt_length + --max_new_tokens")
    ends = eos_ids_of(policy, tokenizer)
    rows = read_rows(flags.prompt_file, "train")
    limits = {"max_length": longest, "max_prompt_length": flags.max_prompt_length}
    texts, prompts, counts = encode_prompts(rows, tokenizer, name=flags.prompt_file, eos_ids=ends, **limits)
    print(f"prompts: {format_counts(counts)}")
    if not prompts:
        raise InputError(f"{flags.prompt_file}: no prompt to answer")
    check_before_training(policy, Pair(prompts[0], ends[:1], ends[:1]), ends)  # is it sampled rightly?
    prepare(flags.device)

    attempt = partial(
        bootstrap.sample_responses,
        policy,
        prompts,
        1,
        max_new_tokens=flags.max_new_tokens,
        temperature=flags.temperature,
        top_p=1.0,
        eos_token_id=ends,
        pad_token_id=pad_id_of(tokenizer),
        seed=flags.seed,
        desc="answer",
    )
    cache = bootstrap.CACHE_TOKENS[torch.device(flags.device).type]
    with autocast(flags.device), naming("the model fails"):
        samples = retry_on_oom(attempt, cache, longest)
    answers = []
    cut_off = 0
    for text, x, of_prompt in zip(texts, prompts, samples):
        y, ended = of_prompt[0]  # the only one
        cut_off += not ended
        output = response_text(tokenizer, x, y, ends)
        answers.append({"instruction": text, "output": output, "generator": flags.policy})
    write(Path(flags.output), json.dumps(answers, indent=1, ensure_ascii=False) + "\n")
    print(f"{flags.output}: {len(answers)} answers; {cut_off} of them end at --max_new_tokens {flags.max_new_tokens}")


def command_line(arguments: list[str] | None = None) -> None:
    """`main` from flags. What the user can mend ends in one line and exit status 1."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print_replaces()
    try:
        main(parse(arguments))
    except (InputError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except torch.OutOfMemoryError:
        sys.exit("error: out of GPU memory: a smaller --max_new_tokens or --max_prompt_length may help")


if __name__ == "__main__":
    command_line()
