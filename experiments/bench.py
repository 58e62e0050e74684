"""How fast, and how lean: sera_min beside TRL's DPOTrainer in one process, and every trick removed in turn.

    python experiments/bench.py                        all parts, on the CUDA GPU if there is one, else on the CPU
    python experiments/bench.py --parts fair score     some of them
    python experiments/bench.py --shape 1.1B           a model of that shape, with random weights
    python experiments/bench.py --parts precision --model DIR --data FILE    what bfloat16 costs, on a real model

Both sides take their steps in turn, A B A B …, from the same weights, on the same pairs in the same order. A rate is
real (unpadded) tokens by the median of the timed steps. Peak memory is a fresh process's: how far it grows above the
model's weights while it trains. TRL is timed twice: as fair as we know how (FAIR), and as it comes (SHIPPED). FLOPs are
of 790 TFLOP/s, about what a large bfloat16 product reaches on an H100 or H200.
Writes experiments/results/bench-<device>-<shape>.json and .md after each part; a part not asked for keeps its rows.
"""

import argparse
import contextlib
import copy
import gc
import io
import json
import math
import multiprocessing
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import train
from sera_min import bootstrap, logprobs
from sera_min.machinery.config import Resolved, resolve
from sera_min.machinery.data import encode
from sera_min.machinery.device import autocast
from sera_min.machinery.models import eos_ids_of, load
from sera_min.machinery.policies import Policies
from sera_min.machinery.rows import read_rows
from sera_min.machinery.run import Run
from sera_min.pairs import Pair, TrainingSet, rows_of

SHAPES = {  # hidden size, intermediate size, layers, heads, key-value heads, vocabulary
    "small": (256, 688, 4, 4, 4, 32_000), "135M": (576, 1536, 30, 9, 3, 49_152),
    "1.1B": (2048, 5632, 22, 32, 4, 32_000), "3B": (3072, 8192, 28, 24, 8, 128_256),
    "8B": (4096, 14336, 32, 32, 8, 128_256),
}  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Prompt and response lengths are log-normal about these means, so that random batches of 8 pairs are half padding.
PROMPT, RESPONSE, MAX_TOKENS, PAIRS = (200, 300, 16384, 32) if DEVICE == "cuda" else (100, 150, 2048, 16)
LEARNING_RATE, TRL_BATCH, N = 1e-6, 8, 4
FAIR = {"precompute_ref_log_probs": True, "gradient_checkpointing": False, "logging_strategy": "no"}
SHIPPED: dict = {}


def made_model(shape: str, vocabulary: int | None = None):
    hidden, intermediate, layers, heads, kv_heads, size = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary or size, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=2048,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return LlamaForCausalLM(config)


def made_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Words w2, w3, …, one a token."""
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def made_pairs(n: int, vocabulary: int, response: int = RESPONSE) -> list[Pair]:
    rng = random.Random(0)

    def ids(mean: int, sigma: float, cap: int) -> list[int]:
        length = round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))
        return [rng.randrange(2, vocabulary) for _ in range(max(8, min(cap, length)))]

    return [
        Pair(ids(PROMPT, 0.8, 512), ids(response, 0.6, 4 * response), ids(response, 0.6, 4 * response))
        for _ in range(n)
    ]


def padded(rows: list[list[int]]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(DEVICE)


def tokens_of(pairs) -> int:
    return sum(2 * len(x) + len(w) + len(l) for x, w, l in pairs)


def settings(**changed) -> Resolved:
    config = resolve(train.Config(model_name_or_path="made", dataset_name="made", device=DEVICE))
    return replace(config, max_tokens=MAX_TOKENS, learning_rate=LEARNING_RATE, **changed)


def median(values: list[float]) -> float:
    return statistics.median(values)


def clock() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def turns(sides: dict, repeats: int, desc: str) -> dict[str, list[float]]:
    """Seconds of every side, called in turn; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in tqdm(range(repeats + 1), desc, leave=False):
        for name, side in sides.items():
            began = clock()
            side()
            seconds[name] += [clock() - began] if i else []
    return seconds


def training_set(pairs: list[Pair], reference: torch.Tensor) -> TrainingSet:
    return TrainingSet(pairs, reference, torch.zeros(len(pairs)), ["offline"] * len(pairs), list(range(len(pairs))))


def pair_logps(model, pairs: list[Pair], config: Resolved) -> torch.Tensor:
    with autocast(DEVICE):
        logps, _ = logprobs.score(model, *rows_of(pairs), max_tokens=config.max_tokens)
    return logps.view(-1, 2)  # (2N,) -> (N, 2)


class Ours:
    """train.py's own step, on `pairs` in order, against reference log-probs made once."""

    def __init__(self, model, pairs, config: Resolved):
        self.model, self.config, self.at, self.losses = model.train(), config, 0, []
        self.variant = train.SERA
        self.data = training_set(pairs, pair_logps(model, pairs, config))
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True)

    def step(self) -> None:
        first = self.at % len(self.data.pairs)
        batch = slice(first, first + PAIRS)
        self.at += PAIRS
        pairs, reference = self.data.pairs[batch], self.data.reference[batch]
        metrics = train.train_step(self.model, self.optimizer, pairs, reference, self.config, self.variant)
        self.losses.append(metrics["loss"])


def trl_trainer(model, pairs, steps: int, batch: int, **options):
    """TRL's DPOTrainer on token ids, in the pairs' order; `losses` are its optimizer steps'."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback
    from trl import DPOConfig, DPOTrainer

    class Trainer(DPOTrainer):
        losses: list  # of the micro-batches

        def _prepare_dataset(self, dataset, *_):
            return dataset

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.losses.append(loss.detach())
            return loss

    rows = Dataset.from_list([{"prompt_ids": x, "chosen_ids": w, "rejected_ids": l} for x, w, l in pairs])
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), max_steps=steps, learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
        per_device_train_batch_size=batch, gradient_accumulation_steps=PAIRS // batch,
        train_sampling_strategy="sequential", max_length=4096, save_strategy="no", report_to="none",
        use_cpu=DEVICE == "cpu", bf16=DEVICE == "cuda", disable_tqdm=True, **options,
    )  # fmt: skip
    reference = None if config.precompute_ref_log_probs else copy.deepcopy(model)
    trainer = Trainer(model, reference, args=config, train_dataset=rows, processing_class=made_tokenizer(2))
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.losses = []
    return trainer


@contextlib.contextmanager
def compact_head(on: bool):
    """TRL's head scores only response positions where it has Triton; elsewhere it is made to, for it is the faster."""
    import trl.trainer.utils as utils

    with mock.patch.object(utils, "_use_triton", lambda device: True) if on else contextlib.nullcontext():
        yield


def side_by_side(shape: str, options: dict, batch: int, warm_up: int, steps: int, desc: str) -> dict:
    """Ours takes its step in a callback at the beginning of each of TRL's: A B A B …, in one process."""
    model = made_model(shape)
    pairs = made_pairs(4 * PAIRS, model.config.vocab_size)
    ours, seconds = Ours(copy.deepcopy(model), pairs, settings()), {"ours": [], "TRL": []}
    bar = tqdm(total=warm_up + steps, desc=desc, leave=False)

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            began = clock()
            ours.step()
            self.began = clock()
            seconds["ours"].append(self.began - began)

        def on_step_end(self, *args, **kwargs):
            seconds["TRL"].append(clock() - self.began)
            bar.update()

    with compact_head(options is FAIR):
        trainer = trl_trainer(model, pairs, warm_up + steps, batch, **options)
        trainer.add_callback(Turns())
        trainer.train()
    bar.close()
    micro = torch.stack(trainer.losses).view(warm_up + steps, -1)  # (S, PAIRS / batch)
    theirs = micro.mean(1)
    difference = (theirs.cpu() - torch.tensor(ours.losses)).abs().max().item()
    starts = [i * PAIRS % len(pairs) for i in range(warm_up + steps)]
    tokens = [tokens_of(pairs[i : i + PAIRS]) for i in starts]
    rate = {k: median([n / s for n, s in list(zip(tokens, v))[warm_up:]]) for k, v in seconds.items()}
    ratio = median([b / a for a, b in list(zip(seconds["ours"], seconds["TRL"]))[warm_up:]])
    print(f"losses of the first and last step: {ours.losses[0]:.6f}, {ours.losses[-1]:.6f};",
          f"TRL's: {theirs[0]:.6f}, {theirs[-1]:.6f}")  # fmt: skip
    return {"rate": rate, "ratio": ratio, "loss difference": difference}


def resident(what: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(what)[1].split()[0])


def growth(
    shape: str,
    side: str,
    pairs_: int,
    vocabulary: int | None = None,
    response: int = RESPONSE,
    trick: str = "ours",
    batch: int | None = None,
) -> dict:
    """Bytes by which memory peaks above model and pairs, and seconds, of training on all the pairs. A process's own."""
    import trl  # noqa: F401  # neither side's memory

    transformers.logging.set_verbosity_error()
    model = made_model(shape, vocabulary)
    pairs = made_pairs(pairs_, model.config.vocab_size, response)
    before, steps = start_of_peak(), pairs_ // PAIRS
    with compact_head(side == "fair"):
        if side == "ours":
            ours = Ours(model, pairs, settings())
            context = without(ours)[trick]
        else:
            trainer = trl_trainer(model, pairs, steps, batch or TRL_BATCH, **(FAIR if side == "fair" else SHIPPED))
        start_of_peak()
        began = clock()
        for _ in range(steps if side == "ours" else 0):
            with context():
                ours.step()
        if side != "ours":
            trainer.train()
        seconds = clock() - began
    return {"bytes": peak() - before, "seconds": seconds}


def start_of_peak() -> int:
    """Bytes in use; the peak is counted from here."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS:")


def peak() -> int:
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else resident("VmHWM:")


def in_a_process_of_its_own(function, *args):
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def fair_part(shape: str, steps: int) -> list[tuple]:
    """Beside TRL at its default batch, and at the fastest of those that make up a step."""
    tokens, grew = tokens_of(made_pairs(3 * PAIRS, SHAPES[shape][-1])), {}
    for batch in tqdm((1, 2, 4, 8), "TRL's batches", leave=False):
        grew[batch] = in_a_process_of_its_own(growth, shape, "fair", 3 * PAIRS, None, RESPONSE, "ours", batch)
    best = min(grew, key=lambda batch: grew[batch]["seconds"])
    rows: list[tuple] = []
    for batch, got in grew.items():
        name = f"TRL fair, {batch} a pass, 3 steps with the first"
        rows += [(f"{name}: real tokens/s", None, tokens / got["seconds"], None),
                 (f"{name}: peak memory growth, MiB", None, got["bytes"] / 2**20, None)]  # fmt: skip
    for batch in dict.fromkeys((TRL_BATCH, best)):
        rows += beside(shape, "fair", FAIR, batch, steps, grew[batch]["bytes"])
    if DEVICE == "cuda":
        rows.append(("train step: model FLOPs utilisation (of 790 TFLOP/s)", mfu(shape, rows[-3][1]), None, None))
    return rows


def shipped_part(shape: str, steps: int) -> list[tuple]:
    """Beside TRL as it comes: its own batch, its own checkpointing."""
    grew = in_a_process_of_its_own(growth, shape, "shipped", 3 * PAIRS)["bytes"]
    return beside(shape, "shipped", SHIPPED, TRL_BATCH, steps, grew)


def beside(shape: str, name: str, options: dict, batch: int, steps: int, theirs: int) -> list[tuple]:
    got = side_by_side(shape, options, batch, 5, steps, f"train step beside TRL, {name}")
    ours = in_a_process_of_its_own(growth, shape, "ours", 3 * PAIRS)["bytes"]
    what = f"train step, TRL {name}, {batch} a pass"
    return [
        (f"{what}: real tokens/s", got["rate"]["ours"], got["rate"]["TRL"], got["ratio"]),
        (f"{what}: peak memory growth, MiB", ours / 2**20, theirs / 2**20, ours / theirs),
        (f"{what}: largest difference of a step's loss", got["loss difference"], None, None),
    ]


def mfu(shape: str, tokens_per_second: float) -> float:
    """6 FLOPs a parameter and token (the head's only at response tokens), and causal attention's."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    body = layers * (hidden * hidden * 2 * (1 + kv_heads / heads) + 3 * hidden * intermediate)
    head = hidden * vocabulary * RESPONSE / (PROMPT + RESPONSE)
    attention = layers * hidden * (PROMPT + RESPONSE)
    return tokens_per_second * 6 * (body + head + attention) / 790e12


@torch.no_grad()
def score_part(shape: str, repeats: int) -> list[tuple]:
    model, config = made_model(shape).eval(), settings()
    pairs = made_pairs(8 * PAIRS, model.config.vocab_size)
    x, y = rows_of(pairs)
    batches = logprobs.token_batches([len(a) + len(b) for a, b in zip(x, y)], MAX_TOKENS)
    inputs = [padded([(x[i] + y[i])[:-1] for i in b]) for b in batches]
    responses = [sum(len(y[i]) for i in b) for b in batches]
    chunk = logprobs.HEAD_LOGITS[DEVICE] // model.config.vocab_size

    def bare(head: bool) -> None:
        with autocast(DEVICE):
            for ids, count in zip(inputs, responses):
                hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[:count]
                for h in hidden.split(chunk) if head else ():
                    F.linear(h, model.lm_head.weight)

    seconds = turns({
        "ours": lambda: pair_logps(model, pairs, config), "body": lambda: bare(False),
        "body and head": lambda: bare(True),
    }, repeats, "scoring pass")  # fmt: skip
    rate = {name: tokens_of(pairs) / median(s) for name, s in seconds.items()}
    over = {name: median([a / b for a, b in zip(seconds["ours"], s)]) for name, s in seconds.items()}
    return [
        ("scoring, floor the body's forward: real tokens/s", rate["ours"], rate["body"], 1 / over["body"]),
        ("scoring, floor body and head's product: real tokens/s", rate["ours"], rate["body and head"],
         1 / over["body and head"]),
    ]  # fmt: skip


def sampling_settings(model) -> dict:
    ends = list(range(1, model.config.vocab_size, RESPONSE))  # ends of random text: RESPONSE tokens on average
    return {"max_new_tokens": 2 * RESPONSE, "eos_token_id": ends, "pad_token_id": 0}


def sample_ours(model, prompts, n=N, **changed) -> int:
    with autocast(DEVICE):
        rows = bootstrap.sample_responses(
            model, prompts, n, temperature=1.0, top_p=1.0, seed=0, **{**sampling_settings(model), **changed}
        )
    return sum(len(y) for row in rows for y, _ in row)


def sample_plain(model, prompts) -> int:
    """What one writes first: 8 prompts at a time, in the order they come."""
    config = GenerationConfig(do_sample=True, top_k=0, num_return_sequences=N, **sampling_settings(model))
    count = 0
    for i in range(0, len(prompts), 8):
        some = prompts[i : i + 8]
        width = max(map(len, some))
        ids = torch.tensor([[0] * (width - len(x)) + x for x in some], device=DEVICE)
        mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in some], device=DEVICE)
        with autocast(DEVICE):
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:]
        ends = torch.isin(output, torch.tensor(config.eos_token_id, device=DEVICE)).int()
        count += ((ends.cumsum(1) - ends) == 0).sum().item()  # up to the first end
    return count


def sample_continuous(model, prompts) -> int:
    """transformers' continuous batching."""
    config = GenerationConfig(do_sample=True, top_k=0, **sampling_settings(model))
    outputs = model.generate_batch([x for x in prompts for _ in range(N)], generation_config=config, progress_bar=False)
    return sum(len(o.generated_tokens) for o in outputs.values())


def sample_part(shape: str, repeats: int) -> list[tuple]:
    model = made_model(shape).eval()
    if DEVICE == "cuda":
        model.bfloat16()  # for all three: autocast does not reach the thread of generate_batch
    prompts = [x for x, _, _ in made_pairs(32 if DEVICE == "cpu" else 512, model.config.vocab_size)]
    rows: list[tuple] = []

    def counted(key, side) -> None:
        tokens[key].append(side(model, prompts))

    for name, other in {"generate, 8 prompts at a time": sample_plain, "generate_batch": sample_continuous}.items():
        tokens: dict[str, list[int]] = {"ours": [], name: []}
        sides = {"ours": partial(counted, "ours", sample_ours), name: partial(counted, name, other)}
        try:
            seconds = turns(sides, repeats, f"sampling beside {name}")
            rates = {key: [n / s for n, s in zip(tokens[key][1:], some)] for key, some in seconds.items()}
            ratio = median([a / b for a, b in zip(rates["ours"], rates[name])])
            rows.append((f"sampling, {name}: new tokens/s", median(rates["ours"]), median(rates[name]), ratio))
        except Exception as error:  # where it does not run, the row says so
            print(f"{name} does not run here: {error!r}"[:300])
            rows.append((f"sampling, {name} (does not run here: {type(error).__name__})", None, None, None))
    return rows


def iteration_part(shape: str, n: int = 4 * PAIRS, max_tokens: int | None = MAX_TOKENS) -> list[tuple]:
    """train.py itself, two iterations from files, by phase: seconds, and pairs a second."""
    model = made_model(shape)
    tokenizer = made_tokenizer(model.config.vocab_size)
    model.generation_config.eos_token_id = sampling_settings(model)["eos_token_id"]
    ends = set(model.generation_config.eos_token_id)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model")
        tokenizer.save_pretrained(f"{folder}/model")
        keys = "prompt", "chosen", "rejected"
        rows = [{k: " ".join(f"w{i}" for i in ids if i not in ends) for k, ids in zip(keys, pair)}
                for pair in made_pairs(n, len(tokenizer))]  # fmt: skip
        Path(f"{folder}/pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            train.main(train.Config(
                model_name_or_path=f"{folder}/model", dataset_name=f"{folder}/pairs.jsonl", device=DEVICE, iterations=2,
                output_dir=f"{folder}/run", max_tokens=max_tokens, max_new_tokens=2 * RESPONSE,
                learning_rate=LEARNING_RATE, per_device_train_batch_size=PAIRS,
            ))  # fmt: skip
    spent = re.search("Seconds: (.*)", printed.getvalue())[1]  # 12 training, 3 scoring, …
    phases = [(float(seconds), phase) for seconds, phase in (part.split(" ") for part in spent.split(", "))]
    return [(f"train.py, 2 iterations of {n} pairs, {phase}: seconds", seconds, None, None)
            for seconds, phase in phases]  # fmt: skip


def growth_part(shape: str) -> list[tuple]:
    def of(name: str, *args) -> dict:
        got = in_a_process_of_its_own(growth, shape, "ours", *args)
        got["name"] = f"training on {name}"
        return got

    rows, hidden = [], SHAPES[shape][0]
    runs = [of(f"{k * 4 * PAIRS} pairs", k * 4 * PAIRS) for k in (1, 2, 4)]
    n = 4 * PAIRS
    runs += [of(f"{n} pairs, responses of {2 * RESPONSE} tokens instead of {RESPONSE}", n, None, 2 * RESPONSE)]
    for size in (32_000, 128_000):
        got = of(f"{n} pairs, vocabulary {size:,}, less 2 gradients and 2 moments of embedding and head", n, size)
        # Of both, in float32: the gradient, one chunk's or pass's on its way into it, and two moments.
        got["bytes"] -= (1 + 1 + 2) * 2 * 4 * size * hidden
        runs.append(got)
    for got in runs:
        rows += [(f"{got['name']}: peak memory growth, MiB", got["bytes"] / 2**20, None, None)]
        rows += [(f"{got['name']}: seconds", got["seconds"], None, None)] if "vocabulary" not in got["name"] else []
    return rows


def saving(shape: str, save_steps: int) -> dict:
    """Seconds of 101 steps of 4 pairs, those spent on checkpoints, and how far memory grows. A process's own."""
    model = made_model(shape)
    pairs = made_pairs(404, model.config.vocab_size)
    config = settings(per_device_train_batch_size=4, save_steps=save_steps)
    before = start_of_peak()
    with tempfile.TemporaryDirectory() as place:
        run = BareRun(Path(place), config, model)
        began = clock()
        train.train(1, training_set(pairs, torch.zeros(404, 2)), run, config, train.SERA)
    return {"seconds": clock() - began, "saving": run.saving, "bytes": peak() - before}


class BareRun(Run):
    """What `train.train` needs: steps with checkpoints, whose seconds are counted, and nothing else that is written."""

    def __init__(self, out: Path, config: Resolved, model) -> None:
        self.config, self.out, self.state, self.saving = config, out, out / "state", 0.0
        self.policies = Policies(out, config)
        self.policies.hold(0, model, made_tokenizer(2))
        self.policies.save = lambda *_: None

    def save_checkpoint(self, *args) -> None:
        began = clock()
        super().save_checkpoint(*args)
        self.saving += clock() - began

    def log(self, line: dict) -> None:
        pass


def checkpoint_part(shape: str) -> list[tuple]:
    often, never = (in_a_process_of_its_own(saving, shape, save_steps) for save_steps in (50, 10**9))
    mib = [got["bytes"] / 2**20 for got in (often, never)]
    name = "101 steps of 4 pairs"
    share = often["saving"] / often["seconds"]
    return [
        (f"{name}, beside its 2 checkpoints: seconds, share of the latter", often["seconds"], often["saving"], share),
        (f"{name} with 2 checkpoints, beside none: peak memory growth, MiB", *mib, mib[0] / mib[1]),
    ]


def naive(model, prompts, responses):
    """log π(y|x) as it is first written: padding mask, (B, T, V) logits, log_softmax, gather."""
    rows = [x + y for x, y in zip(prompts, responses)]
    ids = padded(rows)  # (B, T)
    column = torch.arange(ids.shape[1], device=DEVICE)
    ends = torch.tensor([[len(row)] for row in rows], device=DEVICE)
    starts = torch.tensor([[len(x)] for x in prompts], device=DEVICE)
    logits = model(input_ids=ids, attention_mask=(column < ends).long()).logits[:, :-1].float()  # (B, T-1, V)
    logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
    return logps.where((column >= starts)[:, 1:] & (column < ends)[:, 1:], 0.0).sum(1), None


def with_mask(model):
    forward = model.model.forward
    return mock.patch.object(model.model, "forward", lambda *args, **kwargs: forward(
        *args, **kwargs, attention_mask=(kwargs["input_ids"] != 0).long()))  # fmt: skip


def naive_losses(policy, pairs, reference, config):
    """`train.pair_losses` on `naive`'s log-probs."""
    logps, _ = naive(policy, *rows_of(pairs))
    lengths = torch.tensor([[len(w), len(l)] for _, w, l in pairs])
    logps = logps.view(-1, 2)
    r = train.reward(logps, reference.to(logps.device), lengths, config)
    return train.loss_of(train.margins_of(r), config), logps


def without(ours: Ours) -> dict:
    """The tricks of a train step: what it is like without each, and a context in which it is."""
    patch, group = mock.patch.object, ours.optimizer.param_groups[0]
    return {
        "ours": contextlib.nullcontext,
        "with a padding mask": lambda: with_mask(ours.model),
        "a step in one micro-batch": lambda: patch(ours, "config", replace(ours.config, max_tokens=2**30)),
        "AdamW not fused": lambda: mock.patch.dict(group, fused=False, foreach=True),
        "mask, full logits, log_softmax": lambda: patch(ours, "variant", train.Variant(pair_losses=naive_losses)),
    }  # fmt: skip


def ablation_part(shape: str, repeats: int) -> list[tuple]:
    """Every trick removed in turn: the time of the step or the sampling, and how far the step's memory grows."""
    model, config = made_model(shape), settings()
    pairs = made_pairs(PAIRS, model.config.vocab_size)
    ours = Ours(model, pairs, config)

    def step(context) -> None:
        with context():
            ours.step()

    sides = {name: partial(step, context) for name, context in without(ours).items()}
    sides["the reference scored in every step"] = lambda: (pair_logps(model, pairs, config), ours.step())
    seconds = turns(sides, repeats, "training without each trick")
    grew = {name: in_a_process_of_its_own(growth, shape, "ours", 2 * PAIRS, None, RESPONSE, name)["bytes"]
            for name in tqdm(without(ours), "memory without each trick", leave=False)}  # fmt: skip
    rows = ratios("training", seconds, {name: bytes_ / grew["ours"] for name, bytes_ in grew.items()})
    prompts = [x for x, _, _ in made_pairs(32 if DEVICE == "cpu" else 512, model.config.vocab_size)]

    seconds = turns({
        "ours": lambda: sample_ours(model, prompts),
        "a prompt read for each of its samples": lambda: sample_ours(model, [x for x in prompts for _ in range(N)], 1),
        "a quarter of the batch": lambda: sample_ours(model, prompts, max_tokens=bootstrap.CACHE_TOKENS[DEVICE] // 4),
    }, max(1, repeats // 2), "sampling without each trick")  # fmt: skip
    return rows + ratios("sampling", seconds, {})


def precision_part(model: str | None, data: str | None) -> list[tuple]:
    """Log-probs and margins of 64 pairs under bfloat16 against float32: with train.py's float32 head, and without it.

    The margins are those after four steps of 16 pairs. Once the model's weights are numbers of bfloat16, as most models
    are published: a step that is smaller than half the distance to the next such number rounds back to nothing, in
    bfloat16. And once they are no such numbers, as after much training.
    """
    if model is None or data is None:
        sys.exit("error: --parts precision needs --model and --data")
    policy, tokenizer = load(model, DEVICE)
    limits = {"eos_ids": eos_ids_of(policy, tokenizer), "max_length": 256, "max_prompt_length": 128}
    given, _ = encode(read_rows(data, "train", 80), tokenizer, name=data, **limits)
    pairs = [one.pair for one in given[:64]]
    tokens = statistics.mean(len(y) for pair in pairs for y in (pair.chosen, pair.rejected))
    rows: list[tuple] = []
    for weights in ("published in bfloat16", "between its numbers"):
        with torch.no_grad():
            for p in policy.parameters():
                published, distance = p.bfloat16().float(), p.abs() * 2**-8  # to the next number, at least
                p.copy_(published if "published" in weights else published + distance * torch.rand_like(p))
        before = logps_by_precision(policy, pairs)
        rows.append((f"{weights}: log π(y|x), {tokens:.0f} tokens: noise, nats", *noise(before), None))
        for rate in (1e-6, 1e-5):
            ours = Ours(copy.deepcopy(policy), pairs, replace(settings(), learning_rate=rate))
            for _ in range(len(pairs) // PAIRS):
                ours.step()
            after = logps_by_precision(ours.model, pairs)
            margins = {side: (after[side] - before[side]) @ torch.tensor([1.0, -1.0]) for side in after}
            spread, steps = margins["float32"].std().item(), len(pairs) // PAIRS
            what = f"{weights}: margins of ± {spread:.2g} nats after {steps} steps at {rate:g}"
            rows += [(f"{what}: noise, nats", *noise(margins), None),
                     (f"{what}: rank correlation with float32's", *rank_correlations(margins), None)]  # fmt: skip
    return rows


def logps_by_precision(policy, pairs: list[Pair]) -> dict[str, torch.Tensor]:  # (N, 2) each
    """In float32; as train.py has it on a GPU; and with the head under autocast too."""
    x, y = rows_of(pairs)
    bfloat16 = torch.autocast(DEVICE, dtype=torch.bfloat16)
    no_exception = mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    results = {}
    for name, contexts in {"float32": [], "ours": [bfloat16], "other": [bfloat16, no_exception]}.items():
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            results[name] = logprobs.score(policy, x, y, max_tokens=MAX_TOKENS)[0].view(-1, 2)
    return results


def noise(values: dict[str, torch.Tensor]) -> list[float]:
    """Standard deviation of what is added to float32's, with the float32 head and without it."""
    return [(values[side] - values["float32"]).std().item() for side in ("ours", "other")]


def rank_correlations(margins: dict[str, torch.Tensor]) -> list[float]:
    """Spearman's: the correlation of the places that the pairs have in two orders."""
    places = {side: m.argsort().argsort().double() for side, m in margins.items()}
    return [torch.corrcoef(torch.stack([places[side], places["float32"]]))[0, 1].item() for side in ("ours", "other")]


def ratios(what: str, seconds: dict[str, list[float]], grew: dict[str, float]) -> list[tuple]:
    return [(f"{what}: {name}", None, grew.get(name), median([b / a for a, b in zip(seconds["ours"], s)]))
            for name, s in seconds.items() if name != "ours"]  # fmt: skip


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def table(results: dict) -> str:
    """Markdown: what was measured, ours, the other's, and ours against it; above each part its machine, if another."""

    def cell(value: float | None) -> str:
        if value is None:
            return "–"
        if abs(value) < 0.01:
            return f"{value:.1e}"
        if abs(value) < 100:
            return f"{value:,.2f}"
        return f"{value:,.0f}"

    lines, before = [], None
    for part, rows in results["parts"].items():
        machine = results["machines"][part]
        if machine != before:
            lines += ["", f"On {machine}:"]
        before = machine
        if part == "ablation":
            lines += ["", "| without the trick | time, ours 1 | peak memory growth, ours 1 |", "|---|--:|--:|"]
            lines += [f"| {name} | {cell(ratio)} | {cell(grew)} |" for name, _, grew, ratio in rows]
        elif part == "precision":
            lines += ["", "| bfloat16 against float32 | float32 head (ours) | bfloat16 head |", "|---|--:|--:|"]
            lines += [f"| {name} | {ours:.2f} | {other:.2f} |" for name, ours, other, _ in rows]
        else:
            lines += ["", "| measured | ours | other | ratio |", "|---|--:|--:|--:|"]
            lines += [f"| {name} | {cell(ours)} | {cell(other)} | {cell(ratio)} |" for name, ours, other, ratio in rows]
    return "\n".join(lines).strip()


PARTS = {
    "fair": lambda a: fair_part(a.shape, a.steps), "shipped": lambda a: shipped_part(a.shape, a.steps),
    "score": lambda a: score_part(a.shape, 5), "sample": lambda a: sample_part(a.shape, 2),
    "iteration": lambda a: iteration_part(a.shape, 4 * PAIRS if DEVICE == "cpu" else 1024),
    "growth": lambda a: growth_part(a.shape),
    "checkpoints": lambda a: checkpoint_part(a.shape), "ablation": lambda a: ablation_part(a.shape, 5),
    "precision": lambda a: precision_part(a.model, a.data),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS)[:-1], help="all but precision")
    parser.add_argument("--model", help="of precision: a model folder")
    parser.add_argument("--data", help="of precision: preferences, as train.py reads them")
    parser.add_argument("--shape", choices=SHAPES, default="135M" if DEVICE == "cuda" else "small")
    parser.add_argument("--steps", type=int, default=20, help="timed train steps of each side, after 5 of warm-up")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    file = ROOT / "experiments" / "results" / f"bench-{DEVICE}-{arguments.shape}.json"
    results = json.loads(file.read_text()) if file.exists() else {"parts": {}}
    cpu = f"{torch.get_num_threads()} CPU threads, {platform.machine()}, {cpu_name()}"
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else cpu
    machine = f"{where}, torch {torch.__version__}, transformers {transformers.__version__}"
    for part in arguments.parts:
        results["parts"][part] = PARTS[part](arguments)
        results["machines"] = {**results.get("machines", {}), part: machine}
        results["parts"] = {name: results["parts"][name] for name in PARTS if name in results["parts"]}
        file.write_text(json.dumps(results, indent=1) + "\n")
        file.with_suffix(".md").write_text(f"{table(results)}\n")
        gc.collect()
    print(table(results))


if __name__ == "__main__":
    main()
