"""Seconds and memory of an iteration without the model, on 61,000 chat rows, as many as UltraFeedback has.

    OMP_NUM_THREADS=1 python experiments/bookkeeping.py [--rows 61000]

A prompt and an answer are some 400 tokens, of words drawn at random; the tokenizer is a byte-level BPE trained on them.
Log-probs are random numbers and the 4 samples a prompt are answers of other pairs, so that all of `train.review` runs
but the model's passes. Printed: seconds by step, those of the clock and those of the processor, and the most memory.
"""

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))
from sera_min import data, files, folder, run
from sera_min.config import Config, resolve
from sera_min.pairs import format_counts, split_by_prompt, tokens_of
from train import batches_of, review

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SECONDS = [0.0, 0.0]  # of the clock, of the processor


def timed(name: str, compute: Callable[[], Any]) -> Any:
    clock, processor = time.monotonic(), time.process_time()
    result = compute()
    spent = (time.monotonic() - clock, time.process_time() - processor)
    SECONDS[:] = [before + more for before, more in zip(SECONDS, spent)]
    print_line(name, *spent)
    return result


def print_line(name: str, clock: float, processor: float) -> None:
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name:>35}: {clock:6.1f} s, {processor:6.1f} s of processor, at most {memory:.2f} GiB", flush=True)


def write_rows(file: Path, n: int) -> list[str]:
    """n rows as UltraFeedback has them; returns some of their texts, to train a tokenizer on."""
    rng = random.Random(0)
    letters = "etaoinshrdlcumwfgypbvk"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(4000)]

    def text(tokens: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(tokens // 2, tokens + tokens // 2)))

    some = []
    with open(file, "w", encoding="utf-8") as out:
        for i in range(n):
            x = {"role": "user", "content": text(65)}
            answers = [[x, {"role": "assistant", "content": text(165)}] for _ in "wl"]
            row = {"prompt": x["content"], "prompt_id": str(i), "chosen": answers[0], "rejected": answers[1]}
            out.write(json.dumps(row | {"messages": answers[0], "score_chosen": 8.0, "score_rejected": 4.0}) + "\n")
            if len(some) < 500:
                some.append(x["content"])
    return some


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": specials, "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=8000, **options)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>")
    fast.chat_template = CHATML
    return fast


def iterate(file: Path, out: Path, tokenizer: Any) -> None:
    """What an iteration does beside the model's passes, step by step."""
    config = resolve(Config(model_name_or_path="model", dataset_name=str(file), device="cpu"))
    ends = [tokenizer.eos_token_id]
    limits = {"eos_ids": ends, "max_length": 1024, "max_prompt_length": 512}
    rows = timed("read the rows", lambda: files.read_rows(str(file), "train"))
    given, counts = timed("tokenise", lambda rows=rows: data.encode_given(rows, tokenizer, name="rows", **limits))
    timed("fingerprint", lambda rows=rows: files.fingerprint([("rows", rows)]))
    del rows
    tokens = sum(tokens_of(one.pair) for one in given) / 2 / len(given)
    print(f"{format_counts(counts)}; prompt and answer: {tokens:.0f} tokens")
    given, _ = timed("split", lambda: split_by_prompt(given, 0.05, 0))
    offline = [one.pair for one in given]
    it = run.Run(config, out, None, tokenizer, ends, offline=offline, offline_rows=[one.row for one in given])
    generator, rng = torch.Generator().manual_seed(0), random.Random(0)

    def log_prob(i: int, prompts: list, responses: list, what: str) -> torch.Tensor:
        compute = lambda: torch.randn(len(prompts), 2, generator=generator)  # noqa: E731
        return folder.phase(out, f"logps-{what}-under-{i}", compute)

    answers = [y for pair in offline for y in pair[1:]]
    order = [rng.randrange(len(answers)) for _ in range(4 * len(offline))]
    drawn = [(torch.tensor(answers[i]).tolist(), rng.random() < 0.95) for i in order]  # new lists, as a model's are
    waiting = [[drawn[4 * k : 4 * k + 4] for k in range(len(offline))]]
    del drawn
    object.__setattr__(it, "draw", lambda *_: waiting.pop())
    reviewed = timed("review", lambda: review(2, offline, log_prob, it.sample, config))
    timed("write pairs.jsonl, dropped.jsonl and samples.jsonl", lambda: it.write_review(2, reviewed))
    timed("count the pairs", lambda: it.count_pairs(2))
    timed("order the batches", lambda: batches_of(len(reviewed.training_set.pairs), 2, config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=61_000)
    n = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "rows.jsonl"
        tokenizer = make_tokenizer(write_rows(file, n))
        iterate(file, Path(place) / "out", tokenizer)
    print_line("all", *SECONDS)


if __name__ == "__main__":
    main()
