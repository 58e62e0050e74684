"""A model and its tokenizer from a folder or the hub, as a policy that can be trained.

`load` refuses what the files show to be unusable. `check_before_training` refuses what a model
does: one that is scored, trained or sampled wrongly here gives different numbers for one pair.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file, find_adapter_config_file

from sera_min.bootstrap import sample_responses
from sera_min.logprobs import plain_logprob, rope_limit, score, sequence_logprobs
from sera_min.machinery.errors import InputError, one_line
from sera_min.machinery.rows import is_lfs_pointer, is_path
from sera_min.pairs import Ids, Pair, rows_of

FLOATS = {"F64", "F32", "F16", "BF16"}  # safetensors' names of what weights may be stored as
MERGE = "AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(DIR)"
STEPS = 8  # tokens that the check samples, no more than bootstrap.STRIDE: no row leaves the batch


def load(path: str | Path, device: str) -> tuple[Any, Any]:
    """A policy in float32, on `device` and without noise, and its tokenizer. Raises InputError.

    Only safetensors are read, and no code that comes with the model is run.
    """
    if not Path(path).exists() and is_path(str(path)):
        raise InputError(f"{path}: no such folder")
    refuse_pointers(Path(path))
    try:
        policy, tokenizer = read_model(path)
    except Exception as error:  # files that are missing, broken, or need another package
        raise InputError(f"{path}: {one_line(error)}") from None
    try:
        policy.generation_config.validate(strict=True)
    except ValueError:  # it sets how to sample, but not do_sample: transformers would not save it
        policy.generation_config.do_sample = True
    policy.to(device)
    remove_noise(policy)
    return policy, tokenizer


def read_model(path: str | Path) -> tuple[Any, Any]:
    if find_adapter_config_file(str(path)):
        raise InputError(f"a LoRA adapter, not a model: merge it first, with PEFT: {MERGE}")
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        raise InputError("its weights are quantised: give the model that was quantised")
    remove_dropout(config)
    options: dict[str, Any] = {"config": config, "dtype": torch.float32, "use_safetensors": True}
    options |= {"trust_remote_code": False, "output_loading_info": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, **options)
    policy, info = loaded
    refuse_weights(path, policy, info)
    refuse_tokenizer(tokenizer, policy)
    return policy, tokenizer


def refuse_pointers(folder: Path) -> None:
    for file in sorted(folder.glob("*.*")):
        if file.is_file() and is_lfs_pointer(file):
            pointer = f"{file} is a Git LFS pointer, not the file itself"
            raise InputError(f"{pointer}: run `git lfs pull` there")


def refuse_weights(path: str | Path, policy: Any, info: dict[str, Any]) -> None:
    """Files and model hold the same weights, stored as floats, and all of them can be trained."""
    weights = dict(policy.named_parameters())
    # Old folders of GPT-2 hold a constant, masked_bias.
    unexpected = [name for name in info["unexpected_keys"] if not name.endswith("masked_bias")]
    frozen = [name for name, weight in weights.items() if not weight.requires_grad]
    need_scale = "its weights are stored as numbers that need a scale (quantised), not as floats:"
    problems = {
        "its weights lack": info["missing_keys"],
        "its files hold tensors that the model has no place for:": unexpected,
        need_scale: list(quantised(path, set(weights))),
        "it has frozen weights:": frozen,
    }
    for problem, names in problems.items():
        if names:
            raise InputError(f"{problem} {', '.join(sorted(names)[:3])}")


def quantised(path: str | Path, weights: set[str]) -> Iterator[str]:
    """Stored weights that are FP8, FP4 or integers: without their scale they would be wrong."""
    folder = Path(str(cached_file(path, "config.json"))).parent  # of the hub: the download
    for file in folder.glob("model*.safetensors"):
        with open(file, "rb") as start:  # 8 bytes of length, then a header that names all tensors
            header = json.loads(start.read(int.from_bytes(start.read(8), "little")))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            if tensor["dtype"] not in FLOATS and (name in weights or "weight" in name):
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


def remove_dropout(config: Any) -> None:
    for part in (config, config.get_text_config()):  # two, where a model also has images or sound
        for name, value in part.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)


def remove_noise(policy: Any) -> None:
    """Router jitter, experts drawn at random: what a model does only in training is off for good.

    Modules stay in eval mode, but for those that must know that they train to compute their
    layers again under gradient checkpointing.
    """
    policy.eval()
    for module in policy.modules():
        if not any(hasattr(part, "gradient_checkpointing") for part in module.modules()):
            module.train = lambda mode=True: None


def eos_ids_of(policy: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a response: the tokenizer's first, then those of generation_config."""
    ends = policy.generation_config.eos_token_id
    if ends is None:
        ends = []
    if isinstance(ends, int):
        ends = [ends]
    return list(dict.fromkeys([tokenizer.eos_token_id, *ends]))


def pad_id_of(tokenizer: Any) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def check_positions(policy: Any, longest: int, flags: str) -> None:
    """Raises InputError where the longest row that the flags allow is too long for the model."""
    config = policy.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    if longest > positions:
        raise InputError(f"{flags} is {longest}: the model has {positions} positions")
    limit = rope_limit(policy.config)
    if longest > limit:
        dependence = f"beyond {limit} tokens this model's log-probs depend on the batch"
        raise InputError(f"{flags} is {longest}: {dependence}")


def check_before_training(policy: Any, pair: Pair, ends: list[int], checkpointing: bool = False) -> None:
    """log π(y|x) is the same as the logits say, scored, trained and sampled. Raises InputError.

    It differs for a model that has noise in training, looks at what comes after a token, reads
    padding, or continues its cache wrongly.
    """
    name = type(policy).__name__
    if checkpointing and not policy.supports_gradient_checkpointing:
        raise InputError(f"--gradient_checkpointing: {name} has none")
    try:
        errors = differences(policy, pair, ends)
    except Exception as error:  # from the model's own code
        raise InputError(f"{name} cannot be trained here: {one_line(error)}") from None
    allowed = 1e-4 if policy.device.type == "cpu" else 1e-3  # nats a token
    for problem, nats in errors.items():
        if not nats <= allowed:  # NaN is not
            excess = f"by {nats:.3g} nats a token"
            raise InputError(f"{problem}, {excess}: {name} cannot be trained here")
    print("check: log π(y|x) is the logits', π_θ scores as π_ref, and samples are drawn from it")


@torch.no_grad()
def differences(policy: Any, pair: Pair, ends: list[int]) -> dict[str, float]:
    """The largest difference of log π(y|x), in nats a token, between ways to compute it."""
    x, y = rows_of([pair])
    plain = torch.stack([plain_logprob(policy, *row).cpu() for row in zip(x, y)])  # (2,)
    scored = score(policy, x, y, max_tokens=1)[0]  # (2,), a row at a time
    policy.train()
    trained = sequence_logprobs(policy, x, y)[0].cpu()  # (2,), side by side
    policy.eval()
    sampled = sampling_difference(policy, pair.prompt, ends)
    return {
        "log π(y|x) differs from its logits'": largest(scored - plain, y),
        "log π_θ as it trains differs from log π_ref as it is scored": largest(trained - scored, y),
        "log π(y|x) as it is sampled differs from its logits'": sampled,
    }


def largest(differences: Tensor, responses: list[Ids]) -> float:
    """The largest of differences (R,) a token; NaN where one is."""
    lengths = torch.tensor([len(y) for y in responses])
    return (differences.abs() / lengths).max().item()


def sampling_difference(policy: Any, prompt: Ids, ends: list[int]) -> float:
    """Samples are drawn from the logits that a row has alone, though four are drawn side by side.

    They are of two prompts of unlike length, so that one is padded. Padding is masked and may
    be any token: here an ordinary one, whose embedding is surely not 0.
    """
    logits: list[Tensor] = []  # of the last position of the four rows, (4, V), at every pass
    hook = policy.register_forward_hook(lambda module, args, output: logits.append(output.logits[:, -1].float().cpu()))
    prompts = [(prompt * STEPS)[: STEPS + 3], (prompt * 2)[:2]]
    ordinary = max(set(range(max(prompt))) - set(prompt), default=0)  # not in the prompts
    options: Any = {"max_new_tokens": STEPS, "temperature": 1.0, "top_p": 1.0, "seed": 0}
    options |= {"eos_token_id": ends, "pad_token_id": ordinary}
    options |= {"max_tokens": 4 * (len(prompts[0]) + STEPS)}  # one batch
    try:
        samples = sample_responses(policy, prompts, 2, **options)
    finally:
        hook.remove()

    rows: list[tuple[Ids, Ids]] = []
    for x, of_prompt in zip(prompts, samples):
        rows += [(x, y) for y, _ in of_prompt]
    responses = [y for _, y in rows]
    written = logits[-max(map(len, responses)) :]  # the passes before those read the prompts
    drawn_from = torch.stack(written, 1).log_softmax(-1)  # (4, steps, V)
    differences = [
        logps[range(len(y)), y].sum() - plain_logprob(policy, x, y).cpu() for logps, (x, y) in zip(drawn_from, rows)
    ]
    return largest(torch.stack(differences), responses)
