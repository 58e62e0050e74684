"""log π(y|x), and the implicit reward made of it. Copy this file alone: it needs torch and tqdm.

    log π(y|x) = Σ_i log π(y_i | x, y_<i)           in nats, over the response's tokens, its EOS included
    r(x, y)    = log π_θ(y|x) − log π_ref(y|x)      the implicit reward (DPO, arXiv:2305.18290, eq. 5, without β
                                                    and without a term of x alone, which cancels in every margin)

Three ideas keep this exact and small in memory, for any `AutoModelForCausalLM`:
1. Rows are padded on the right, and there is no attention mask. A causal model never looks to the right, so padding
   cannot change a real token.
2. Only the positions that predict a response token go through the head, a chunk at a time, and their logits
   are computed again in the backward pass: (B, T, V) logits never exist.
3. The head is the model's own (see `body_returns`), so soft caps (gemma2), scaled logits (cohere, granite) and biases
   (phi) are applied by the code that defines them. Autocast is off for it, so it runs in the type of its weights. Load
   them in float32: bfloat16 keeps 8 bits of a logit, and a response's sum would be wrong by tenths of a nat.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

TokenIds = list[int]
HEAD_LOGITS = {"cuda": 2**26, "cpu": 2**23}  # logits at a time: enough to keep a GPU busy, few enough for a CPU's cache


@contextmanager
def body_returns(body, output) -> Iterator[None]:
    """While this is open, `body(...)` computes nothing and returns `output`.

    model(...) is head(body(...)). We give it hidden states of the body that we have already, so it runs only its head,
    and whatever else it does to logits. `forward` of the body is replaced meanwhile: use a model from one thread at a
    time. Models of PEFT, adapters on the head included, and of `torch.compile` were tried and give the same numbers.
    Under DDP, wrap a module of yours whose forward calls this, with static_graph=True; not the model itself.
    """
    with patch.object(body, "forward", lambda *args, **kwargs: output):
        yield


def body_of(model):
    """The part of the model that embeds the tokens and whose hidden states the head reads."""
    body, embeddings = model.get_decoder() or model.base_model, model.get_input_embeddings()
    if body is not model and embeddings in body.modules():
        return body
    return next(part for part in model.children() if embeddings in part.modules())  # llama4, modernbert-decoder


def rope_limit(config) -> float:
    """Tokens beyond which positions are rotated by the longest row of the batch (rope "longrope", "dynamic")."""
    config = config.get_text_config()  # the language model's part, where the model also has images or sound
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    limits = [math.inf]
    for part in (rope, *rope.values()):  # some models have one a type of layer
        kind = part.get("rope_type") if isinstance(part, dict) else None
        if kind == "longrope":
            limits.append(part.get("original_max_position_embeddings") or config.original_max_position_embeddings)
        if kind == "dynamic":
            limits.append(config.max_position_embeddings)
    return min(limits)


def token_logprobs(model, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]) -> tuple[Tensor, ...]:
    """log π(y_i|x, y_<i) in nats of every response token, for B (prompt, response) pairs of token ids.

    Returns B float32 tensors, (|y|,) each. Differentiable by `.backward()`, but not by `torch.autograd.grad`, and not
    into a head above a frozen body. Dropout is the model's: call `model.eval()`, or set it to 0, before you compare
    policy and reference. Raises ValueError where a prompt or a response is empty, TypeError where one is no list.
    """
    check_token_ids(prompts, responses)
    device = next(model.parameters()).device
    counts = [len(y) for y in responses]
    # The body reads x + y without its last token, which predicts nothing we need.
    inputs = pad_sequence([torch.tensor((x + y)[:-1]) for x, y in zip(prompts, responses)], batch_first=True)  # (B, T)
    body = body_of(model)
    output = body(input_ids=inputs.to(device), use_cache=False, return_dict=True)

    # Position |x|−1+i of a row predicts y_i. R = Σ|y| of the B·T positions are needed.
    firsts = [row * inputs.shape[1] + len(x) - 1 for row, x in enumerate(prompts)]  # in the flat (B·T,)
    positions = torch.cat([torch.arange(i, i + n) for i, n in zip(firsts, counts)]).to(device)  # (R,)
    targets = torch.cat([torch.tensor(y) for y in responses]).to(device)  # (R,)
    hidden = output.last_hidden_state.flatten(0, 1).index_select(0, positions)  # (B, T, H) -> (B·T, H) -> (R, H)
    output_type = type(output)
    del output  # (B, T, H) need not wait in memory for the backward pass

    def head_logprobs(h: Tensor, y: Tensor) -> Tensor:  # (r, H), (r,) -> (r,)
        with body_returns(body, output_type(last_hidden_state=h[None])), torch.autocast(device.type, enabled=False):
            # input_ids tells only the shape: the body returns h, whatever it is given
            logits = model(input_ids=y[None], use_cache=False, return_dict=True).logits[0]  # (r, V)
        quarters = zip(logits.float().chunk(4), y.chunk(4))  # for speed: a quarter's log-softmax stays in the cache
        return -torch.cat([F.cross_entropy(part, ids, reduction="none") for part, ids in quarters])  # (r,)

    weight = model.get_output_embeddings().weight  # (V, H)
    rows = max(1, HEAD_LOGITS.get(device.type, 2**26) // weight.shape[0])  # r
    chunks = list(zip(hidden.to(weight.dtype).split(rows), targets.split(rows)))
    if torch.is_grad_enabled():
        # Reentrant, so that a chunk's gradient of the head is added to .grad at once: the other kind of checkpoint
        # holds two more (V, H).
        logps = [checkpoint(head_logprobs, h, y, use_reentrant=True, preserve_rng_state=False) for h, y in chunks]
    else:
        logps = [head_logprobs(h, y) for h, y in chunks]
    return torch.cat(logps).split(counts)  # (R,) -> B of (|y|,)


def check_token_ids(prompts: Sequence[TokenIds], responses: Sequence[TokenIds]) -> None:
    for row, both in enumerate(zip(prompts, responses, strict=True)):
        for name, ids in zip(("prompt", "response"), both):
            if not isinstance(ids, list):
                raise TypeError(f"row {row}: the {name} is a {type(ids).__name__}, expected a list of token ids")
            if not ids:
                raise ValueError(f"row {row}: an empty {name} has no log-probability")


def sequence_logprobs(model, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]) -> tuple[Tensor, Tensor]:
    """log π(y|x) in nats for B (prompt, response) pairs of token ids; differentiable as `token_logprobs` is.

    A response that ended holds its EOS: append it, nothing here does. Returns float32 (B,) sums and int64 (B,) token
    counts, apart, so that averaging is the caller's visible choice. Raises as `token_logprobs` does.
    """
    rows = token_logprobs(model, prompts, responses)
    sums = torch.stack([row.sum() for row in rows])  # B of (|y|,) -> (B,)
    return sums, torch.tensor([len(y) for y in responses], device=sums.device)


def token_batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Row numbers, longest first, in batches of rows × longest row ≤ `max_tokens`; a longer row is alone."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@torch.no_grad()
def score(
    model,
    prompts: list[TokenIds],
    responses: list[TokenIds],
    *,
    max_tokens: int,
    of: Callable[[Tensor], Tensor] = torch.sum,
    desc: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`sequence_logprobs` of any number of rows, without gradients, in eval mode, in batches of `max_tokens` tokens.

    Longest first: there is next to no padding, and a batch that does not fit the memory fails at once.
    Returns CPU tensors in the rows' order: float32 (N,) sums in nats, int64 (N,) counts. `desc` shows a progress bar.
    of: what to make of a response's (|y|,) token log-probs instead of their sum, such as `sum_and_least`: (N, …).
    """
    modes, limit = [(part, part.training) for part in model.modules()], rope_limit(model.config)
    lengths = [len(x) + len(y) for x, y in zip(prompts, responses, strict=True)]
    model.eval()
    batches = token_batches([n if n <= limit else max(n, max_tokens) for n in lengths], max_tokens)  # beyond: alone
    parts = []
    try:
        for batch in tqdm(batches, desc=desc, unit="batch", disable=desc is None):
            rows = token_logprobs(model, [prompts[i] for i in batch], [responses[i] for i in batch])
            parts.append(torch.stack([of(row) for row in rows]))
    finally:
        for part, mode in modes:  # not model.train(): a part of yours may be frozen in eval mode
            part.training = mode
    results = torch.empty(len(prompts), *of(torch.zeros(1)).shape)  # (N, …)
    if parts:
        results[[i for batch in batches for i in batch]] = torch.cat(parts).cpu()  # back to the rows' order
    return results, torch.tensor([len(y) for y in responses], dtype=torch.int64)


def sum_and_least(logps: Tensor) -> Tensor:
    """A response's log π(y|x) and its least likely token's log π(y_i|x, y_<i), in nats: (|y|,) -> (2,)."""
    return torch.stack([logps.sum(), logps.min()])


def implicit_reward(policy_logps: Tensor, reference_logps: Tensor, lengths: Tensor | None = None) -> Tensor:
    """r(x, y) = log π_θ(y|x) − log π_ref(y|x), in nats; per token, r/|y|, where `lengths` (the token counts) is given.

    All of one shape; differentiable in either log-prob. A reward without a reference (SimPO) has reference_logps = 0.
    """
    reward = policy_logps - reference_logps
    return reward if lengths is None else reward / lengths
