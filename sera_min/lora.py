"""LoRA: the weights stay as they are, and a product of two small matrices is trained beside each.

    y = W x + (α/r) · B A x       W (out, in) frozen;  A (r, in) random;  B (out, r), zero at first

With B = 0 the change is 0, and this model is the reference. So all policies of a run are one model
with other As and Bs, which are megabytes: a review loads nothing.

The sum is float32, whatever the type of W x. bfloat16 has 8 significant bits: as long as B A x is
much smaller than W x, a sum rounded to bfloat16 is W x again, and the policy equals the reference.

    add_lora(model, r=16, alpha=32)              then train those parameters that require gradients
    state = lora_state(model)                    a policy: As and Bs
    load_lora(model, state)                      any policy; load_lora(model, None) is the reference
    merge_lora(model)                            an ordinary model again, with W + (α/r)·B A for W

Copy this file alone: it needs torch.
From sera_min 0.1.0, Apache-2.0; LoRA, arXiv:2106.09685, section 4.1; for SeRA, arXiv:2410.09362.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


class LoRA(nn.Module):
    """A linear layer, and the two matrices that are trained beside it."""

    def __init__(self, layer: Any, r: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.layer = layer
        self.scale = alpha / r
        outputs, inputs = weight_of(layer).shape
        bound = 1 / math.sqrt(inputs)
        a = torch.empty(r, inputs).uniform_(-bound, bound, generator=generator)
        b = torch.zeros(outputs, r)
        self.A = nn.Parameter(a.to(layer.weight.device))
        self.B = nn.Parameter(b.to(layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:  # (…, in) -> (…, out)
        change = F.linear(F.linear(x, self.A), self.B)  # under autocast in bfloat16, as W x is
        return self.frozen(x) + self.scale * change.to(self.A.dtype)  # float32, as one of the two is

    def frozen(self, x: Tensor) -> Tensor:
        """W x. Outside autocast it is computed in the type of x, whatever that of W."""
        if self.layer.weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
            return self.layer(x)
        weights = {name: w.to(x.dtype) for name, w in self.layer.named_parameters()}
        return functional_call(self.layer, weights, (x,))


def add_lora(model, r: int, alpha: float, target_modules: list[str] | None = None, seed: int = 0) -> None:
    """Puts A and B, float32, beside linear layers of a model of transformers; only they require gradients.

    target_modules: the last names of the layers, as "q_proj"; None: all but the head. The same seed
    gives the same A on any device. These layers' weights may be bfloat16, if what they are given is
    float32. Raises ValueError where a name is that of no such layer, for a layer that shares its
    weights, and for a model that has LoRA already.
    """
    if lora_parts(model):
        raise ValueError("the model has LoRA already")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    layers = linear_layers(model)
    if target_modules is not None:
        layers = called(layers, target_modules)
    for name, layer in layers.items():
        put(model, name, LoRA(layer, r, alpha, generator))


def lora_state(model) -> dict[str, Tensor]:
    """The As and Bs by the names that PEFT gives them: the tensors themselves, as state_dict() does."""
    state = {}
    for name, part in lora_parts(model).items():
        state[f"base_model.model.{name}.lora_A.weight"] = part.A.detach()
        state[f"base_model.model.{name}.lora_B.weight"] = part.B.detach()
    return state


@torch.no_grad()
def load_lora(model, state: dict[str, Tensor] | None) -> None:
    """What `lora_state` gave is copied into the model. None: B = 0, the reference.

    Raises ValueError where the matrices are of other layers or of another shape.
    """
    if state is None:
        for part in lora_parts(model).values():
            part.B.zero_()
        return
    ours = lora_state(model)
    shapes = {name: matrix.shape for name, matrix in ours.items()}
    if shapes != {name: matrix.shape for name, matrix in state.items()}:
        raise ValueError("these are not the matrices of this model, r and target_modules")
    for name, matrix in ours.items():
        matrix.copy_(state[name])


@torch.no_grad()
def merge_lora(model) -> None:
    """W + (α/r)·B A, float32 or wider, takes the place of W; A and B are gone, and all weights can be trained.

    Of a model in bfloat16 call .float() first: the other weights keep their type.
    """
    for name, part in lora_parts(model).items():
        weight = weight_of(part.layer) + part.scale * part.B @ part.A  # (out, in)
        if is_transposed(part.layer):
            weight = weight.T.contiguous()
        part.layer.weight = nn.Parameter(weight)
        put(model, name, part.layer)
    model.requires_grad_(True)


# ------------------------------------------------------------------------------------------------
# You may skip what follows: which layers are linear, and where they are.
# ------------------------------------------------------------------------------------------------


def linear_layers(model) -> dict[str, nn.Module]:
    """name -> layer, without the head."""
    layers: dict[str, nn.Module] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if layer is model.get_output_embeddings():
            continue
        if isinstance(layer, nn.Linear) or is_transposed(layer):
            if any(layer.weight is other.weight for other in layers.values()):
                raise ValueError(f"{name} shares its weights with another layer: they cannot be told apart")
            layers[name] = layer
    if not layers:
        raise ValueError("the model has no linear layer but perhaps its head")
    return layers


def called(layers: dict[str, nn.Module], targets: list[str]) -> dict[str, nn.Module]:
    """As in PEFT: layers.0.self_attn.q_proj is called q_proj, and self_attn.q_proj too."""
    found: dict[str, nn.Module] = {}
    for target in targets:
        fitting = {name: layer for name, layer in layers.items() if f".{name}".endswith(f".{target}")}
        if not fitting:
            names = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise ValueError(f"no layer is called {target!r}; there are {names}, and the head cannot have LoRA")
        found |= fitting
    return found


def is_transposed(layer: nn.Module) -> bool:
    """GPT-2's linear layers are called Conv1D, and their weights are (in, out)."""
    return type(layer).__name__ == "Conv1D"


def weight_of(layer: Any) -> Tensor:
    """W, (out, in)"""
    if is_transposed(layer):
        return layer.weight.T
    return layer.weight


def lora_parts(model) -> dict[str, LoRA]:
    return {name: part for name, part in model.named_modules() if isinstance(part, LoRA)}


def put(model, name: str, part: nn.Module) -> None:
    """`part` in the place of the module of this name."""
    parent, _dot, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, part)
