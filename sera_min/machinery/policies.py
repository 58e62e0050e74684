"""The policies π_θ0 = π_ref, π_θ1, …: two in memory, the others in folders. And what they say.

train.py asks six things of this object: get, forget, save, newest, log_prob and sample. What has been
computed is kept on disk under a key made of the policy's number and all the token ids, so a
result cannot be taken for that of other rows.
"""

import copy
import hashlib
import json
import shutil
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sera_min import bootstrap
from sera_min.logprobs import score
from sera_min.lora import add_lora, linear_layers, load_lora, merge_lora
from sera_min.machinery import device
from sera_min.machinery.adapters import MATRICES, adapter_settings, write_adapter
from sera_min.machinery.config import Resolved, seed_of
from sera_min.machinery.device import autocast, compile_layers, retry_on_oom, sampling_tokens, uncompiled
from sera_min.machinery.errors import InputError, Paused, naming
from sera_min.machinery.folder import read_json, read_jsonl, write, write_jsonl, writing
from sera_min.machinery.models import eos_ids_of, load, pad_id_of, save_model
from sera_min.pairs import Ids, Rows, Samples

REASON = {True: "stop", False: "length"}  # finish_reason, by whether a sample ended


def key_of(*rows: Ids) -> str:
    """A name for lists of token ids that no other lists have."""
    hashed = hashlib.sha1()
    for ids in rows:
        hashed.update(array("q", [len(ids), *ids]))
    return hashed.hexdigest()[:12]


class Policies:
    bars = True  # whether sampling shows its progress
    most = 2  # policies in memory at a time; while one is trained it is alone
    trains = True  # in this process, which then needs memory for it

    def __init__(self, out: Path, config: Resolved) -> None:
        self.config = config
        self.state = out / "state"
        self.seconds: Counter = Counter()  # of this process
        self.compiled = False  # whether the layers of those that are loaded are compiled
        self.held: dict[int, Any] = {}  # the policies in memory, the one used last at the end
        self.tokenizer: Any = None

    def folder(self, i: int) -> Path | str:
        if i == 0 and self.config.model_name_or_path:
            return self.config.model_name_or_path
        return self.state / f"policy-{i}"

    def newest(self) -> int:
        """The number of the newest policy on disk; −1 where not even π_θ0 is."""
        for i in range(self.config.iterations, -1, -1):
            if (self.state / f"policy-{i}").exists():
                return i
        if self.config.model_name_or_path:
            return 0
        return -1

    def get(self, i: int) -> Any:
        """π_θi, from its folder unless it is in memory."""
        if i not in self.held:
            if len(self.held) == self.most:
                oldest = next(iter(self.held))
                del self.held[oldest]
            policy, tokenizer = load(self.folder(i), "cpu")
            self.hold(i, policy, tokenizer)
        self.held[i] = self.held.pop(i)  # the one used last is at the end
        return self.held[i]

    def hold(self, i: int, policy: Any, tokenizer: Any) -> None:
        """Takes this model as π_θi: checks its size, moves it to the device and prepares it."""
        self.tokenizer = self.tokenizer or tokenizer  # all have the same
        if self.trains:
            device.check_memory(policy, self.config.device)
        policy.to(self.config.device)
        self.make_ready(policy)
        self.held[i] = policy

    def make_ready(self, policy: Any) -> None:
        self.eos_ids = eos_ids_of(policy, self.tokenizer)  # the tokens that end a response
        self.vocabulary_size = policy.get_input_embeddings().num_embeddings
        if self.config.gradient_checkpointing:
            self.use_gradient_checkpointing(policy)
        if self.compiled:
            compile_layers(policy)

    def use_gradient_checkpointing(self, policy: Any) -> None:
        with naming("--gradient_checkpointing"):  # not every model has it
            policy.gradient_checkpointing_enable({"use_reentrant": False})

    def forget(self) -> None:
        """None stays in memory: one is about to be trained, and needs the room."""
        self.held.clear()

    def save(self, i: int, policy: Any) -> None:
        """Keep a policy as π_θi, and remove what nothing will ask for any more."""
        check_finite(policy, f"policy-{i}")
        with writing(self.state / f"policy-{i}") as beside:
            self.write(i, policy, beside)
        self.held[i] = policy
        for checkpoint in self.state.glob("checkpoint-*"):
            checkpoint.unlink()
        if i > 2:
            shutil.rmtree(self.state / f"policy-{i - 2}", ignore_errors=True)

    def write(self, i: int, policy: Any, folder: Path) -> None:
        save_model(folder, policy, self.tokenizer)

    def finish(self, out: Path) -> None:
        """The last policy becomes out/policy."""
        (self.state / f"policy-{self.config.iterations}").rename(out / "policy")

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[phase] += time.monotonic() - began  # type: ignore[assignment]

    def log_prob(self, i: int, rows: Rows) -> Tensor:
        """log π_θi(y|x) of R rows, float32 (R,) on the CPU, nats. Computed once."""
        if i not in rows.logps:
            file = self.state / f"logps-{i}-{key_of(*rows.prompts, *rows.responses)}.json"
            if not file.exists():
                with self.timed("scoring"):
                    write(file, json.dumps(self.score(i, rows).tolist()))
            rows.logps[i] = torch.tensor(read_json(file), dtype=torch.float32)
        return rows.logps[i]

    def score(self, i: int, rows: Rows) -> Tensor:
        desc = f"score {len(rows.prompts)} responses under policy {i}"
        attempt = partial(score, self.get(i), rows.prompts, rows.responses, desc=desc)
        longest = 0
        for x, y in zip(rows.prompts, rows.responses):
            longest = max(longest, len(x) + len(y))
        with autocast(self.config.device), naming(f"{desc}: the model fails"):
            logps, _counts = retry_on_oom(attempt, self.config.max_tokens, longest)
        check_log_probs(logps, desc)
        return logps

    def sample(self, i: int, prompts: list[Ids], n: int, seed: int) -> Samples:
        """n responses to each prompt from π_θi, each with whether it ended. Drawn once.

        Another engine may have drawn them: a file of its samples is read like one of ours.
        """
        key = key_of(*prompts, [n, seed])
        file = self.state / f"samples-{i}-{key}.jsonl"
        if not file.exists():
            if n > 1 and self.config.pause_before_sampling:
                self.pause(file, self.state / f"prompts-{i}-{key}.json", self.request(i, prompts, n, seed))
            with self.timed("sampling"):
                samples = self.draw(i, prompts, n, seed)
            write_jsonl(file, sample_rows(prompts, samples))
        return read_samples(file, prompts, self.request(i, prompts, n, seed))

    def draw(self, i: int, prompts: list[Ids], n: int, seed: int) -> Samples:
        """If memory runs out, sampling starts again in smaller batches, which draws other samples."""
        config, policy = self.config, self.get(i)
        desc = f"sample from policy {i}"
        bar = None
        if self.bars:
            bar = desc
        attempt = partial(
            bootstrap.sample_responses,
            policy,
            prompts,
            n,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            eos_token_id=self.eos_ids,
            pad_token_id=pad_id_of(self.tokenizer),
            seed=seed,
            desc=bar,
        )
        longest = config.max_prompt_length + config.max_new_tokens
        cache = sampling_tokens(policy, longest, config.device)
        with autocast(config.device), uncompiled(), naming(f"{desc}: the model fails"):
            return retry_on_oom(attempt, cache, n * longest)

    # Samples of another engine

    def request(self, i: int, prompts: list[Ids], n: int, seed: int) -> dict[str, Any]:
        """All that another engine has to know to sample as we would."""
        return {
            "policy": str(Path(self.folder(i)).absolute()),  # wherever the engine is started
            "samples_per_prompt": n,
            "max_new_tokens": self.config.max_new_tokens,
            "temperature": self.config.temperature,
            "top_p": self.config.top_p,
            "eos_token_ids": self.eos_ids,
            "vocabulary_size": self.vocabulary_size,
            "seed": seed,
            "prompts": prompts,
        }

    def pause(self, file: Path, asked: Path, request: dict[str, Any]) -> None:
        """Writes the request to `asked`, and stops until there are samples in `file`."""
        write(asked, json.dumps(request) + "\n")
        out = self.config.output_dir
        raise Paused(
            f"paused: {request['samples_per_prompt']} samples of each prompt in {asked} are needed, in {file}: "
            f"python experiments/sample_with_vllm.py {out}\n"
            f"to go on: the same program with --resume_from_checkpoint {out}"
        )


class LoRAPolicies(Policies):
    """With --use_peft: one model is in memory, and a policy is a folder of matrices, in PEFT's format."""

    model: Any = None

    def get(self, i: int) -> Any:
        """The model, with the matrices of π_θi."""
        if self.model is None:
            reference, tokenizer = load(self.folder(0), "cpu")
            self.hold(0, reference, tokenizer)
        if i not in self.held:
            state = None  # the reference has none
            if i > 0:
                state = load_file(self.state / f"policy-{i}" / MATRICES)
            load_lora(self.model, state)
            self.held = {i: self.model}
        return self.model

    def hold(self, i: int, policy: Any, tokenizer: Any) -> None:
        config = self.config
        seed = seed_of(config.seed, 0, "LoRA")
        with naming("--use_peft"):
            add_lora(policy, config.lora_r, config.lora_alpha, config.lora_target_modules, seed)
        if device.has_bfloat16(config.device):
            for layer in linear_layers(policy).values():
                device.halve(layer)
        super().hold(i, policy, tokenizer)
        self.model = policy

    def write(self, i: int, policy: Any, folder: Path) -> None:
        if i > 0:
            write_adapter(folder, policy, self.folder(0), self.config.lora_alpha)
            return
        reference = copy.deepcopy(policy)  # the playground's
        merge_lora(reference)
        super().write(i, reference, folder)

    def finish(self, out: Path) -> None:
        """out/adapter, for PEFT; and out/policy, float32: rounded to 16 bits most of a small step would be lost."""
        last = self.config.iterations
        if adapter_settings(self.folder(0)):
            print("no adapter/ is written: π_ref is itself an adapter, merged into its base")
        else:
            with writing(out / "adapter") as beside:
                shutil.copytree(self.state / f"policy-{last}", beside)
        policy = self.get(last).to("cpu").float()
        merge_lora(policy)
        with writing(out / "policy") as beside:
            super().write(last, policy, beside)


def check_finite(policy: Any, name: str) -> None:
    if not all(p.isfinite().all() for p in policy.parameters()):
        raise FloatingPointError(f"{name}: its weights are not finite numbers")


def check_log_probs(logps: Tensor, desc: str) -> None:
    if not logps.isfinite().all():
        row = int((~logps.isfinite()).nonzero()[0])
        raise FloatingPointError(f"{desc}: log π(y|x) of response {row} is {logps[row]}")


def sample_rows(prompts: list[Ids], samples: Samples) -> Iterator[dict[str, Any]]:
    """The lines of a file of samples, as token ids: {"prompt", "responses", "finish_reasons"}."""
    for x, of_prompt in zip(prompts, samples):
        yield {
            "prompt": x,
            "responses": [y for y, _ended in of_prompt],
            "finish_reasons": [REASON[ended] for _y, ended in of_prompt],
        }


def read_samples(file: Path, prompts: list[Ids], asked: dict[str, Any]) -> Samples:
    """A file of samples, whoever wrote it: a line for each prompt, in order. Raises InputError."""
    rows = read_jsonl(file)
    if len(rows) != len(prompts):
        raise InputError(f"{file}: {len(rows)} lines, expected one for each of {len(prompts)} prompts")
    n = asked["samples_per_prompt"]
    samples = []
    for number, (row, x) in enumerate(zip(rows, prompts), 1):
        where = f"{file}, line {number}"
        if not isinstance(row, dict) or row.get("prompt") != x:
            raise InputError(f"{where}: prompt is not the ids of this prompt in prompts-*.json")
        responses, reasons = row.get("responses"), row.get("finish_reasons")
        if not isinstance(responses, list) or not isinstance(reasons, list) or not len(responses) == len(reasons) == n:
            raise InputError(f"{where}: expected {n} responses and {n} finish_reasons")
        for j, (y, reason) in enumerate(zip(responses, reasons)):
            wrong = wrong_sample(y, reason, asked)
            if wrong:
                raise InputError(f"{where}, sample {j}: {wrong}")
        samples.append([(y, reason == "stop") for y, reason in zip(responses, reasons)])
    return samples


def wrong_sample(y: Any, reason: Any, asked: dict[str, Any]) -> str:
    """What is wrong with a response of token ids and its finish_reason; "" where nothing is."""
    size, limit, ends = asked["vocabulary_size"], asked["max_new_tokens"], asked["eos_token_ids"]
    if not isinstance(y, list) or not y:
        return "expected a list of token ids"
    for token in y:
        if type(token) is not int or not 0 <= token < size:
            return f"{token!r} is no token id: expected 0 to {size - 1}"
    if len(y) > limit:
        return f"it has {len(y)} tokens, and --max_new_tokens is {limit}"
    if any(token in ends for token in y[:-1]):
        return f"it goes on after one of the eos_token_ids, {ends}"
    expected = REASON[y[-1] in ends]
    if reason != expected:
        return f"its finish_reason is {reason!r}: expected {expected!r}, as its last token is {y[-1]}"
    return ""
