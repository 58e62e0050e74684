"""Seconds and memory of an iteration without the model, on 61,000 chat rows, as many as UltraFeedback has.

    OMP_NUM_THREADS=1 python experiments/bookkeeping.py [--rows 61000]

A prompt and an answer are some 400 tokens, of words drawn at random; the tokenizer is a byte-level BPE trained on them.
In the place of the policies stands `Drawn`: log-probs are random numbers, and the 4 samples a prompt are answers of
other pairs. So all of `train.review` runs but the model's passes. Printed: seconds by step, those of the clock and
those of the processor, and the most memory.
"""

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))
from sera_min.machinery import data
from sera_min.machinery.config import Config
from sera_min.machinery.data import encode
from sera_min.machinery.errors import format_counts
from sera_min.machinery.rows import read_rows
from sera_min.machinery.run import open_run
from sera_min.pairs import Ids, Preferences, Rows
from train import SERA, batches_of, review

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


def save_model(place: Path, tokenizer: Any) -> None:
    """A model that is never asked, as a run wants to have one."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place)
    tokenizer.save_pretrained(place)


class Drawn:
    """What `review` asks of the policies, without a model."""

    def __init__(self, given: Preferences) -> None:
        self.generator, rng = torch.Generator().manual_seed(0), random.Random(0)
        answers = given.rows.responses
        self.samples = []
        for _ in given.pairs:
            drawn = [torch.tensor(rng.choice(answers)).tolist() for _ in range(4)]  # new lists, as a model's are
            self.samples.append([(y, rng.random() < 0.95) for y in drawn])

    def log_prob(self, i: int, rows: Rows) -> torch.Tensor:
        if i not in rows.logps:
            rows.logps[i] = torch.randn(len(rows.responses), generator=self.generator)
        return rows.logps[i]

    def sample(self, i: int, prompts: list[Ids], n: int, seed: int) -> list:
        return self.samples


def iterate(file: Path, place: Path, tokenizer: Any) -> None:
    """What an iteration does beside the model's passes, step by step."""
    save_model(place / "model", tokenizer)
    limits = {"eos_ids": [tokenizer.eos_token_id], "max_length": 1024, "max_prompt_length": 512}
    rows = timed("read the rows", lambda: read_rows(str(file), "train"))
    given, counts = timed("tokenise", partial(encode, rows, tokenizer, name="rows", **limits))
    del rows
    tokens = sum(2 * len(x) + len(w) + len(l) for (x, w, l), _, _ in given) / 2 / len(given)
    print(f"{format_counts(counts)}; prompt and answer: {tokens:.0f} tokens")
    given, _ = timed("split", partial(data.split_by_prompt, given, 0.05, 0))
    preferences = data.preferences(given)
    offline_rows = [one.row for one in given]
    del given
    flags = Config(
        model_name_or_path=str(place / "model"), dataset_name=str(file), max_train_pairs=20,
        output_dir=str(place / "run"), device="cpu",
    )  # fmt: skip
    with open_run(flags, SERA) as run:  # of 20 rows, and then of all
        run.given, run.offline_rows = preferences, offline_rows
        policies = Drawn(preferences)
        reviewed = timed("review", lambda: review(2, run.given, policies, run.config, SERA))
        timed("write pairs.jsonl, dropped.jsonl and samples.jsonl", lambda: run.write_review(2, reviewed))
        written = (place / "run" / "iteration-2" / "pairs.jsonl").read_text().splitlines()
        timed("count the pairs", lambda: run.count_pairs([json.loads(line) for line in written]))
        timed("order the batches", lambda: batches_of(len(reviewed.training_set.pairs), 2, run.config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=61_000)
    n = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "rows.jsonl"
        tokenizer = make_tokenizer(write_rows(file, n))
        iterate(file, Path(place), tokenizer)
    print_line("all", *SECONDS)


if __name__ == "__main__":
    main()
