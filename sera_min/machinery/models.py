"""A model and its tokenizer from a folder or the hub, as a policy that can be trained.

`load` refuses what the files show to be unusable. `check_before_training` refuses what a model
does: one that is trained or sampled wrongly here gives different numbers for one pair.
"""

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from sera_min.bootstrap import sample_responses
from sera_min.logprobs import plain_logprob, sequence_logprobs
from sera_min.machinery.adapters import adapter_settings, check_plain, merge_adapter
from sera_min.machinery.device import uncompiled
from sera_min.machinery.errors import InputError, naming
from sera_min.machinery.folder import at_home, is_lfs_pointer, is_path, make_readable
from sera_min.pairs import Ids, Pair, rows_of

# Causal masks, positions, …, which folders of older versions hold as weights.
OLD_CONSTANTS = (".attn.bias", ".attention.bias", "masked_bias", "causal_mask", "inv_freq", "position_ids", ".version")
BESIDE_WEIGHTS = ("*processor*.json", "*template*.j*", "*token*.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken")
STEPS = 8  # tokens that the check samples, no more than bootstrap.STRIDE: no row leaves the batch


def load(path: str | Path, device: str) -> tuple[Any, Any]:
    """A policy in float32, on `device` and without noise, and its tokenizer. Raises InputError."""
    path = at_home(path)
    if not Path(path).exists() and is_path(path):
        raise InputError(f"{path}: no such folder")
    for file in sorted(Path(path).glob("*.*")):
        if file.is_file() and is_lfs_pointer(file):
            raise InputError(f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` there")
    with naming(str(path)):  # files may be missing, broken, or need another package
        policy, tokenizer = read_model(path)
    policy.to(device)
    remove_noise(policy)
    return policy, tokenizer


def read_model(path: str | Path) -> tuple[Any, Any]:
    """Only safetensors are read, and no code that comes with the model is run."""
    adapter = adapter_settings(path)
    if adapter:
        check_plain(adapter)
        base = adapter["base_model_name_or_path"]
        with naming(f"its base {base}"):
            policy, tokenizer = read_model(str(base))
        merge_adapter(policy, path, adapter)
        if cached_file(path, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False):
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            check_tokenizer(policy, tokenizer)
        return policy, tokenizer
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        raise InputError("its weights are quantised: give the model that was quantised")
    for part in (config, config.get_text_config()):
        for name in ("output_router_logits", "output_attentions", "output_hidden_states"):
            if getattr(part, name, False):
                setattr(part, name, False)
    options: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, config=config, output_loading_info=True, **options)
    policy, info = loaded
    unexpected = [name for name in info["unexpected_keys"] if not name.endswith(OLD_CONSTANTS)]
    if info["missing_keys"]:
        raise InputError(f"its files lack {', '.join(sorted(info['missing_keys'])[:3])}")
    if unexpected:
        names = ", ".join(sorted(unexpected)[:3])
        raise InputError(f"its files hold tensors that the model has no place for: {names}")
    check_tokenizer(policy, tokenizer)
    check_savable(policy, tokenizer, path)
    return policy, tokenizer


def check_tokenizer(policy: Any, tokenizer: Any) -> None:
    if tokenizer.eos_token_id is None:
        raise InputError("its tokenizer has no EOS token: no response could end")
    size = policy.get_input_embeddings().num_embeddings
    if len(tokenizer) > size:
        raise InputError(f"its tokenizer has {len(tokenizer)} ids, the model embeds {size}")


def check_savable(policy: Any, tokenizer: Any, path: str | Path) -> None:
    """What transformers would refuse to write is an error now; what it leaves out, as a processor, is kept."""
    source = Path(path)
    if not source.is_dir():
        source = Path(snapshot_download(str(path), allow_patterns=list(BESIDE_WEIGHTS)))
    with TemporaryDirectory() as place:
        try:
            policy.save_pretrained(place, state_dict={})
        except ValueError:  # Llama 2 sets how to sample, but not do_sample
            policy.generation_config.do_sample = True
            policy.save_pretrained(place, state_dict={})
        tokenizer.save_pretrained(place)
        saved = {file.name for file in Path(place).iterdir()}
    files = [file for file in source.iterdir() if any(map(file.match, BESIDE_WEIGHTS))]
    policy.beside_weights = {file.name: file.read_bytes() for file in files if file.name not in saved}


def save_model(folder: Path, policy: Any, tokenizer: Any) -> None:
    """What `load` reads again, and other programs too."""
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, content in getattr(policy, "beside_weights", {}).items():
        (folder / name).write_bytes(content)
    make_readable(folder)


def remove_noise(policy: Any) -> None:
    """Dropout, router jitter, experts drawn at random: what a model does only in training is off for good.

    Modules stay in eval mode, but for those that gradient checkpointing needs in training mode:
    of these the dropout is 0.
    """
    policy.eval()
    for module in policy.modules():
        if not any(hasattr(part, "gradient_checkpointing") for part in module.modules()):
            module.train = lambda mode=True: None
            continue
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


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
        raise InputError(f"{flags} is {longest}: the model has {positions} positions, so give a smaller one")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type") != "longrope":
        return
    # Phi-3 and its like: all rows of a batch are rotated by the length of the longest.
    limit = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    if longest > limit:
        dependence = f"beyond {limit} tokens this model's log-probs depend on the batch"
        raise InputError(f"{flags} is {longest}: {dependence}")


@torch.no_grad()
def check_before_training(policy: Any, pair: Pair, ends: list[int], allowed: float | None = None) -> None:
    """log π(y|x) is as the logits of a row alone say, trained and sampled. Raises InputError.

    It differs for a model that has noise in training, looks at what comes after a token, reads
    padding, or continues its cache wrongly. allowed: nats a token, by default those of float32.
    """
    name = type(policy).__name__
    x, y = rows_of([pair])
    with naming(f"{name} cannot be trained here"):  # the model's own code may fail
        policy.train()
        trained, _lengths = sequence_logprobs(policy, x, y)  # (2,), side by side
        policy.eval()
        differences = {
            "log π(y|x) differs from its logits'": difference(policy, trained, x, y),
            "log π(y|x) as it is sampled differs from its logits'": sampled_difference(policy, pair.prompt, ends),
        }
    if allowed is None:
        allowed = 1e-4 if policy.device.type == "cpu" else 1e-3
    for problem, nats in differences.items():
        if not nats <= allowed:  # NaN is not
            raise InputError(f"{problem}, by {nats:.3g} nats a token: {name} cannot be trained here")
    print(f"check passed: in training and in sampling log π(y|x) is that of a row alone, to {allowed:g} nats a token")


def difference(policy: Any, logps: Tensor, prompts: list[Ids], responses: list[Ids]) -> float:
    """The largest difference of logps (R,) from those of each row alone, in nats a token; NaN where one is."""
    with torch.autocast(policy.device.type, enabled=False), uncompiled():
        alone = torch.stack([plain_logprob(policy, x, y) for x, y in zip(prompts, responses)])  # (R,)
    lengths = torch.tensor([len(y) for y in responses])
    return ((logps - alone).abs().cpu() / lengths).max().item()


def sampled_difference(policy: Any, prompt: Ids, ends: list[int]) -> float:
    """What four samples drawn side by side are drawn from, against each row alone.

    They are of two prompts of unlike length, so that one is padded. Padding is masked and may
    be any token: here an ordinary one, whose embedding is surely not 0.
    """
    passes: list[Tensor] = []  # of every pass the logits of the four rows' last position, (4, V)
    hook = policy.register_forward_hook(lambda module, args, output: passes.append(output.logits[:, -1].float()))
    long, short = (prompt * STEPS)[: STEPS + 3], (prompt * 2)[:2]
    ordinary = max(set(range(max(prompt))) - set(prompt), default=0)  # not in the prompts
    options: Any = {"max_new_tokens": STEPS, "temperature": 1.0, "top_p": 1.0, "seed": 0}
    options |= {"eos_token_id": ends, "pad_token_id": ordinary, "max_tokens": 4 * (len(long) + STEPS)}  # one batch
    with uncompiled():
        of_long, of_short = sample_responses(policy, [long, short], 2, **options)
    hook.remove()

    responses = [y for y, _ended in of_long + of_short]
    written = passes[-max(map(len, responses)) :]  # the passes before those read the prompts
    drawn_from = torch.stack(written, 1).log_softmax(-1)  # (4, steps, V)
    logps = [of_row[range(len(y)), y].sum() for of_row, y in zip(drawn_from, responses)]
    return difference(policy, torch.stack(logps), [long, long, short, short], responses)
