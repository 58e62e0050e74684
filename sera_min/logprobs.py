"""log π(y|x), and the implicit reward.

    log π(y|x) = Σ_i log π(y_i | x, y_<i)       in nats; y includes its end of sequence
    r(x, y)    = log π_θ(y|x) − log π_ref(y|x)

r is DPO's implicit reward (arXiv:2305.18290, eq. 5) without the factor β, and without a term that
depends on x alone and cancels in the difference of two responses to x.

Copy this file alone: it needs torch and tqdm, and a causal language model of transformers.
From sera_min 0.1.0, Apache-2.0; SeRA, arXiv:2410.09362.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

Ids = list[int]  # token ids


def plain_logprob(model, prompt: Ids, response: Ids) -> Tensor:
    """log π(y|x) in nats of one response, as one first writes it: a tensor of no dimension."""
    ids = torch.tensor([prompt + response], device=model.device)  # (1, T)
    logits = model(input_ids=ids).logits[0]  # (T, V)
    logits = logits[len(prompt) - 1 : -1]  # (|y|, V): a position predicts the token after it
    logps = logits.log_softmax(-1)  # (|y|, V)
    targets = ids[0, len(prompt) :]  # (|y|,)
    return logps.gather(1, targets[:, None]).sum()  # (|y|, 1) -> ()


# This is right, and too expensive to train with:
#   - One row at a time leaves a GPU idle.
#   - (T, V) logits are computed for the prompt's positions too, which nobody needs. With 128,000
#     words and 1,000 tokens they are half a gigabyte in float32; the log-softmax is as much again,
#     and so is the gradient.
#   - In bfloat16, logits have 8 bits, and the sum over a long response is wrong by whole nats.
#
# `token_logprobs` computes the same, for any causal model of transformers, with three ideas:
#   1. Rows are padded on the right, without an attention mask. A causal model never looks to the
#      right, so padding cannot change a real token.
#   2. The model is called in two halves. Its body turns tokens into hidden states, (B, T, H). Its
#      head turns only those that predict a response's token into logits, a chunk at a time, and
#      computes a chunk's logits again in the backward pass instead of keeping them.
#   3. The head runs in the type of its own weights, outside autocast: load them in float32.


def token_logprobs(model, prompts: list[Ids], responses: list[Ids]) -> tuple[Tensor, ...]:
    """log π(y_i|x, y_<i) in nats of every response token of B unpadded pairs (x, y) of token ids.

    Returns B tensors, (|y|,) each, float32 (float64 if the model is), differentiable. Dropout is
    the model's own: switch it off before you compare a policy with a reference. Raises ValueError
    for an empty prompt or response and for ids that the model does not have, TypeError for what is
    no list of ids.
    """
    head = model.get_output_embeddings().weight  # (V, H)
    check_token_ids(prompts, responses, vocab_size=head.shape[0])
    inputs, needed = pad_right(prompts, responses)  # (B, T), (B, T)
    body = body_of(model)
    output = body(input_ids=inputs.to(model.device), use_cache=False, return_dict=True)

    # Of B·T positions the R = Σ|y| that predict a response's token go on.
    positions = needed.flatten().nonzero().squeeze(1)  # (R,)
    hidden = output.last_hidden_state.flatten(0, 1)  # (B·T, H)
    hidden = hidden.index_select(0, positions.to(model.device)).to(head.dtype)  # (R, H)
    targets = torch.cat([torch.tensor(y) for y in responses]).to(model.device)  # (R,)
    output_type = type(output)
    del output  # (B, T, H) need not stay in memory until the backward pass

    logps = []
    size = max(1, HEAD_LOGITS.get(model.device.type, 2**26) // head.shape[0])
    for h, y in zip(hidden.split(size), targets.split(size)):  # (r, H), (r,)
        chunk = checkpoint(head_logprobs, model, output_type, h, y, use_reentrant=False)
        logps.append(chunk)  # (r,)
    lengths = [len(y) for y in responses]
    return torch.cat(logps).split(lengths)  # (R,) -> B of (|y|,)


def head_logprobs(model, output_type: type, hidden: Tensor, targets: Tensor) -> Tensor:
    """log π of r tokens from the hidden states that predict them: (r, H), (r,) -> (r,)."""
    output = output_type(last_hidden_state=hidden[None])  # (1, r, H)
    outside_autocast = torch.autocast(hidden.device.type, enabled=False)
    with body_returns(body_of(model), output), outside_autocast:
        # Of the ids only the shape counts: the body returns `output`, whatever it is given.
        logits = model(input_ids=targets[None], use_cache=False, return_dict=True).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (r, V)
    of_targets = logits.gather(1, targets[:, None]).squeeze(1)  # (r,)
    return of_targets - logits.logsumexp(-1)  # (r,): log-softmax, of the targets alone


def sequence_logprobs(model, prompts: list[Ids], responses: list[Ids]) -> tuple[Tensor, Tensor]:
    """log π(y|x) in nats of B unpadded pairs (x, y) of token ids, differentiable.

    A response that ended holds its end of sequence: append it, nothing here does. Returns the sums,
    float32 (B,), and the numbers of tokens |y|, int64 (B,): apart, so that averaging is the
    caller's visible choice. Raises as `token_logprobs` does.
    """
    rows = token_logprobs(model, prompts, responses)
    sums = torch.stack([row.sum() for row in rows])  # B of (|y|,) -> (B,)
    counts = torch.tensor([len(y) for y in responses], device=sums.device)
    return sums, counts


@torch.no_grad()
def score(
    model, prompts: list[Ids], responses: list[Ids], *, max_tokens: int, desc: str | None = None
) -> tuple[Tensor, Tensor]:
    """`sequence_logprobs` of any number of rows N, in eval mode and without gradients.

    In batches of at most `max_tokens` tokens, padding included. Returns CPU tensors in the order of
    the rows: float32 (N,) sums in nats, int64 (N,) numbers of tokens. `desc` shows a progress bar.
    """
    lengths = [len(x) + len(y) for x, y in zip(prompts, responses, strict=True)]
    batches = token_batches(alone_if_long(model, lengths, max_tokens), max_tokens)
    sums = torch.empty(len(prompts))
    with eval_mode(model):
        for batch in tqdm(batches, desc=desc, unit="batch", disable=desc is None):
            x = [prompts[i] for i in batch]
            y = [responses[i] for i in batch]
            of_batch, _ = sequence_logprobs(model, x, y)
            sums[batch] = of_batch.cpu()
    counts = torch.tensor([len(y) for y in responses], dtype=torch.int64)
    return sums, counts


def token_batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Numbers of rows, longest first, in batches of rows × longest row ≤ `max_tokens`.

    Rows of like length need next to no padding, and a batch that is too large for the memory is the
    first. A row longer than `max_tokens` is alone.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches:
            batch = batches[-1]
            longest = lengths[batch[0]]
            if (len(batch) + 1) * longest <= max_tokens:
                batch.append(i)
                continue
        batches.append([i])
    return batches


def implicit_reward(
    policy_logps: Tensor, reference_logps: Tensor, lengths: Tensor | None = None
) -> Tensor:  # fmt: skip
    """r(x, y) = log π_θ(y|x) − log π_ref(y|x) in nats; r/|y| where `lengths`, the |y|, are given.

    Tensors of one shape, differentiable in both log-probs. For a reward without a reference
    (SimPO's) give zeros. Raises ValueError where shapes differ: (B, 1) and (B,) would give (B, B).
    """
    check_same_shape(policy_logps, reference_logps)
    reward = policy_logps - reference_logps
    if lengths is None:
        return reward
    check_same_shape(reward, lengths)
    return reward / lengths


# ------------------------------------------------------------------------------------------------
# You may skip what follows: checks, padding, and how a model is called in two halves.
# ------------------------------------------------------------------------------------------------

# Logits at a time: enough to keep a GPU busy, few enough for the cache of a CPU.
HEAD_LOGITS = {"cuda": 2**26, "cpu": 2**23}


def check_token_ids(prompts: list[Ids], responses: list[Ids], vocab_size: int) -> None:
    for row, (x, y) in enumerate(zip(prompts, responses, strict=True)):
        for name, ids in (("prompt", x), ("response", y)):
            if not isinstance(ids, list):
                kind = type(ids).__name__
                raise TypeError(f"row {row}: the {name} is a {kind}, expected a list of token ids")
            if not ids:
                raise ValueError(f"row {row}: an empty {name} has no log-probability")
            if min(ids) < 0 or max(ids) >= vocab_size:
                ends = f"{min(ids)} to {max(ids)}"
                raise ValueError(f"row {row}: the {name} has ids {ends}, not 0 to {vocab_size - 1}")


def check_same_shape(one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:
        raise ValueError(f"shapes differ: {tuple(one.shape)} and {tuple(other.shape)}")


def pad_right(prompts: list[Ids], responses: list[Ids]) -> tuple[Tensor, Tensor]:
    """What the body reads, int64 (B, T), and where it predicts a response's token, bool (B, T).

    The last token of a row is left out: it predicts nothing that is needed.
    """
    rows = [torch.tensor((x + y)[:-1]) for x, y in zip(prompts, responses)]
    inputs = pad_sequence(rows, batch_first=True)  # (B, T)
    needed = torch.zeros_like(inputs, dtype=torch.bool)
    for row, (x, y) in enumerate(zip(prompts, responses)):
        first = len(x) - 1  # predicts y_1
        needed[row, first : first + len(y)] = True
    return inputs, needed


def body_of(model):
    """The part of the model that embeds tokens and makes the hidden states that the head reads."""
    body = model.get_decoder() or model.base_model
    embeddings = model.get_input_embeddings()
    if body is not model and embeddings in body.modules():
        return body
    for part in model.children():  # llama4, modernbert-decoder
        if embeddings in part.modules():
            return part
    raise ValueError(f"{type(model).__name__} has no body: no part of it embeds the tokens")


@contextmanager
def body_returns(body, output) -> Iterator[None]:
    """While this is open, `body(...)` computes nothing and returns `output`.

    model(...) is head(body(...)). We already have the hidden states, so we make the body return
    them, and calling the model runs the head alone, with all else that the model does to logits:
    soft caps (gemma2), scaling (cohere, granite), biases (phi). While this is open, use the model
    from one thread only. Models of PEFT and of `torch.compile` give the same numbers.
    """
    with patch.object(body, "forward", lambda *args, **kwargs: output):
        yield


@contextmanager
def eval_mode(model) -> Iterator[None]:
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes:  # not model.train(): a part may have been in eval mode before
            part.training = mode


def alone_if_long(model, lengths: list[int], max_tokens: int) -> list[int]:
    """Row lengths for `token_batches`, where a row beyond `rope_limit` fills a batch by itself."""
    limit = rope_limit(model.config)
    filled = list(lengths)
    for row, length in enumerate(lengths):
        if length > limit:
            filled[row] = max(length, max_tokens)
    return filled


def rope_limit(config) -> float:
    """Length in tokens of the longest row that does not change other rows of its batch.

    Beyond it, the rope types "longrope" and "dynamic" rotate the positions of all rows by the
    length of the longest.
    """
    config = config.get_text_config()  # the language model's part, where there are others
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    limits = [math.inf]
    for part in (rope, *rope.values()):  # some models have one for each type of layer
        kind = part.get("rope_type") if isinstance(part, dict) else None
        if kind == "longrope":
            own = part.get("original_max_position_embeddings")
            limits.append(own or config.original_max_position_embeddings)
        if kind == "dynamic":
            limits.append(config.max_position_embeddings)
    return min(limits)
