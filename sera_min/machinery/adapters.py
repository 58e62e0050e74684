"""LoRA adapters as PEFT writes and reads them: a folder of adapter_config.json and adapter_model.safetensors."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers.utils import cached_file, find_adapter_config_file

from sera_min.lora import add_lora, is_transposed, load_lora, lora_parts, lora_state, merge_lora
from sera_min.machinery.errors import InputError
from sera_min.machinery.folder import make_readable

MATRICES = "adapter_model.safetensors"
READ = (  # settings that are read here, or change nothing that an adapter computes
    "auto_mapping base_model_name_or_path bias exclude_modules fan_in_fan_out inference_mode init_lora_weights "
    "layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core peft_type peft_version "
    "qalora_group_size r revision runtime_config target_modules task_type"
).split()
PLAIN: dict[str, list] = {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, False, "gaussian"]}


def adapter_settings(path: str | Path) -> dict[str, Any]:
    """What adapter_config.json says; {} where there is none."""
    file = find_adapter_config_file(str(path))
    if file is None:
        return {}
    return json.loads(Path(file).read_text(encoding="utf-8"))


def check_plain(settings: dict[str, Any]) -> None:
    """Raises InputError where the settings ask for more than W + (α/r)·B A."""
    if not settings.get("base_model_name_or_path"):
        raise InputError("an adapter that names no base")
    more = {name for name, value in settings.items() if value and name not in READ}
    for name, values in PLAIN.items():
        if settings.get(name, values[0]) not in values:
            more.add(name)
    if more:
        names = ", ".join(sorted(more))
        raise InputError(f"an adapter, but no plain LoRA ({names}): merge it first, with PEFT's merge_and_unload")


def merge_adapter(base: Any, path: str | Path, settings: dict[str, Any]) -> None:
    """The base becomes the model that the adapter makes of it."""
    state = load_file(str(cached_file(path, MATRICES)))
    layers = [name.split(".lora_")[0].removeprefix("base_model.model.") for name in state]
    add_lora(base, settings["r"], settings["lora_alpha"], layers)
    load_lora(base, state)
    merge_lora(base)


def write_adapter(folder: Path, policy: Any, base: str | Path, alpha: int) -> None:
    parts = lora_parts(policy)
    first = next(iter(parts.values()))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": len(first.A),
        "lora_alpha": alpha,
        "target_modules": list(parts),
        "fan_in_fan_out": is_transposed(first.layer),
        "inference_mode": True,
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_file(lora_state(policy), folder / MATRICES)
    make_readable(folder)
