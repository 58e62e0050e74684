"""A model and its tokenizer from a folder or the hub, as a policy that can be trained; what cannot be is refused.

`load` refuses by what the files hold. `check_before_training` refuses by what the model does: an architecture that is
scored, trained or sampled wrongly here gives other numbers on one pair, whatever its name.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file, find_adapter_config_file

from sera_min.bootstrap import sample_responses
from sera_min.logprobs import rope_limit, score, sequence_logprobs
from sera_min.machinery.errors import InputError, one_line
from sera_min.machinery.rows import is_lfs_pointer, is_path
from sera_min.pairs import Ids, Pair, rows_of

FLOATS = {"F64", "F32", "F16", "BF16"}  # safetensors' names of the types that weights may be stored in
MERGE = "AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(MERGED)"
STEPS = 8  # tokens that the check samples, at most bootstrap.STRIDE: all four rows stay in the batch


def load(path: str | Path, device: str) -> tuple[Any, Any]:
    """A policy in float32, on `device` and without noise, and its tokenizer; safetensors only, no remote code."""
    if not Path(path).exists() and is_path(str(path)):
        raise InputError(f"{path}: no such folder")
    refuse_pointers(Path(path))
    try:
        if find_adapter_config_file(str(path)):
            raise InputError(f"a LoRA adapter, not a model: merge it first, with PEFT: {MERGE}")
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        settings = without_dropout(AutoConfig.from_pretrained(path, trust_remote_code=False))
        if getattr(settings, "quantization_config", None):
            raise InputError("its weights are quantised: give the model that was quantised")
        options: dict[str, Any] = {"config": settings, "dtype": torch.float32, "use_safetensors": True}
        options |= {"trust_remote_code": False, "output_loading_info": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, **options)
        policy, info = loaded
        refuse_weights(path, policy, info)
        refuse_tokenizer(tokenizer, policy)
    except Exception as error:  # of files that are missing, broken, of another shape, or need another package
        raise InputError(f"{path}: {one_line(error)}") from None
    try:
        policy.generation_config.validate(strict=True)
    except ValueError:  # settings of sampling without do_sample, which transformers would not save
        policy.generation_config.do_sample = True
    return without_noise(policy.to(device)), tokenizer


def refuse_pointers(folder: Path) -> None:
    for file in sorted(folder.glob("*.*")):
        if file.is_file() and is_lfs_pointer(file):
            raise InputError(f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` there")


def refuse_weights(path: str | Path, policy: Any, info: dict[str, Any]) -> None:
    """Every tensor of the files is a weight of the model, every weight is there, stored as floats, and trains."""
    unexpected = {name for name in info["unexpected_keys"] if not name.endswith("masked_bias")}  # old GPT-2's constant
    for what, names in {
        "its weights lack": info["missing_keys"],
        "its files hold tensors that the model has no place for:": unexpected,
        "its weights have another shape than its config.json says:": {name for name, *_ in info["mismatched_keys"]},
        "its weights are stored as numbers that need a scale (quantised), not as floats:": set(quantised(path, policy)),
        "it has frozen weights:": {name for name, p in policy.named_parameters() if not p.requires_grad},
    }.items():
        if names:
            raise InputError(f"{what} {', '.join(sorted(names)[:3])}")


def quantised(path: str | Path, policy: Any) -> Iterator[str]:
    """Names of stored weights that are FP8, FP4 or integers: read as they are they would be wrong."""
    weights = {name for name, _ in policy.named_parameters()}
    folder = Path(str(cached_file(path, "config.json"))).parent  # of the hub: where it was downloaded to
    for file in folder.glob("model*.safetensors"):
        with open(file, "rb") as start:  # 8 bytes: the length of the header, which says of every tensor what it is
            header = json.loads(start.read(int.from_bytes(start.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__" and tensor["dtype"] not in FLOATS and (name in weights or "weight" in name):
                yield f"{name} ({tensor['dtype']})"


def refuse_tokenizer(tokenizer: Any, policy: Any) -> None:
    if tokenizer.eos_token_id is None:
        raise InputError("its tokenizer has no EOS token: no response could end")
    size = policy.get_input_embeddings().num_embeddings
    if len(tokenizer) > size:
        raise InputError(f"its tokenizer has {len(tokenizer)} ids, the model embeds {size}")
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        names = ", ".join(sorted(templates))
        raise InputError(f"its tokenizer has the chat templates {names}, and none is named default")


def without_dropout(settings: Any) -> Any:
    for part in (settings, settings.get_text_config()):  # within the former where the model sees or hears too
        for name, value in part.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
    return settings


def without_noise(policy: Any) -> Any:
    """What a model does only in training is off: dropout, router jitter, experts drawn at random, whatever its name.

    Only modules that compute their layers again, under gradient checkpointing, must know that they train.
    """
    policy.eval()
    for module in policy.modules():
        if not any(hasattr(part, "gradient_checkpointing") for part in module.modules()):
            module.train = stay_in_eval_mode
    return policy


def stay_in_eval_mode(mode: bool = True) -> None:
    """Instead of Module.train."""


def eos_ids_of(policy: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a response: the tokenizer's first, then what else the model's `generation_config` names."""
    ends = policy.generation_config.eos_token_id or []
    return list(dict.fromkeys([tokenizer.eos_token_id, *([ends] if isinstance(ends, int) else ends)]))


def pad_id_of(tokenizer: Any) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def check_positions(policy: Any, longest: int, flags: str) -> None:
    """The model has a position for every token of the longest row that the flags allow. Raises InputError."""
    positions = getattr(policy.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if longest > positions:
        raise InputError(f"{flags} is {longest}: the model has {positions} positions")
    if longest > (limit := rope_limit(policy.config)):
        raise InputError(f"{flags} is {longest}: beyond {limit} tokens this model's log-probs depend on the batch")


def check_before_training(policy: Any, pair: Pair, ends: list[int], checkpointing: bool = False) -> None:
    """In float32: log-probs are the logits', alike when scored, when trained and when sampled. Raises InputError.

    A model that has noise in training, looks at what comes after a token, reads padding, or whose cache is not carried
    on rightly gives other numbers here.
    """
    if checkpointing and not policy.supports_gradient_checkpointing:
        raise InputError(f"--gradient_checkpointing: {type(policy).__name__} has none")
    name = type(policy).__name__
    try:
        errors = differences(policy, pair, ends)
    except Exception as error:  # of the model's own code
        raise InputError(f"{name} cannot be trained here: {one_line(error)}") from None
    allowed = 1e-4 if policy.device.type == "cpu" else 1e-3  # nats a token
    for what, nats in errors.items():
        if not nats <= allowed:
            raise InputError(f"{what}, by {nats:.3g} nats a token: {name} cannot be trained here")
    print("check: log π(y|x) is the logits', π_θ scores as π_ref, and samples are drawn from it")


def differences(policy: Any, pair: Pair, ends: list[int]) -> dict[str, float]:
    """Largest difference of log π(y|x), in nats a token, between ways to compute it."""
    x, y = rows_of([pair])
    scored = score(policy, x, y, max_tokens=1)[0]  # (2,), as the reference is scored
    plain = torch.stack([log_prob_alone(policy, *row) for row in zip(x, y)])  # (2,)
    policy.train()
    with torch.no_grad():
        trained = sequence_logprobs(policy, x, y)[0].cpu()  # (2,), as the policy is trained, side by side
    policy.eval()
    return {
        "log π(y|x) differs from its logits'": largest(scored - plain, y),
        "log π_θ as it trains differs from log π_ref as it is scored": largest(trained - scored, y),
        "log π(y|x) as it is sampled differs from its logits'": sampling_difference(policy, pair.prompt, ends),
    }


def largest(differences: Tensor, responses: list[Ids]) -> float:
    """(R,) -> the largest, a token. NaN where one is no number."""
    return (differences.abs() / torch.tensor([len(y) for y in responses])).max().item()


@torch.no_grad()
def log_prob_alone(policy: Any, x: Ids, y: Ids) -> Tensor:
    """log π(y|x) of one row by the logits of the model, as its authors wrote it."""
    logits = policy(input_ids=torch.tensor([x + y], device=policy.device)).logits[0, len(x) - 1 : -1]  # (|y|, V)
    return -cross_entropy(logits.float().cpu(), torch.tensor(y), reduction="sum")


def sampling_difference(policy: Any, prompt: Ids, ends: list[int]) -> float:
    """Two prompts of unlike length are sampled side by side, twice each: their logits must be each row's alone.

    Padding is masked, so that it may be any token: here it is an ordinary one, whose embedding is surely not 0.
    """
    seen: list[Tensor] = []  # the last position's logits of every pass, (4, V)
    watch = policy.register_forward_hook(lambda _, args, output: seen.append(output.logits[:, -1].float().cpu()))
    prompts = [(prompt * STEPS)[: STEPS + 3], (prompt * 2)[:2]]
    ordinary = max(set(range(max(prompt))) - set(prompt), default=0)  # a token that the prompts lack
    try:
        samples = sample_responses(
            policy, prompts, 2, max_new_tokens=STEPS, temperature=1.0, top_p=1.0, eos_token_id=ends,
            pad_token_id=ordinary, seed=0, max_tokens=4 * (len(prompts[0]) + STEPS),  # in one batch
        )  # fmt: skip
    finally:
        watch.remove()
    rows = [(x, y) for x, of_prompt in zip(prompts, samples) for y, _ in of_prompt]
    steps = torch.stack(seen[-max(len(y) for _, y in rows) :], 1).log_softmax(-1)  # (4, steps, V)
    sampled = torch.stack([step[range(len(y)), y].sum() for step, (_, y) in zip(steps, rows)])  # (4,)
    return largest(sampled - torch.stack([log_prob_alone(policy, x, y) for x, y in rows]), [y for _, y in rows])
