"""log π(y|x), and the implicit reward.

    log π(y|x) = Σ_i log π(y_i | x, y_<i)       in nats; y includes its end of sequence
    r(x, y)    = log π_θ(y|x) − log π_ref(y|x)

r is DPO's implicit reward (arXiv:2305.18290, eq. 5) without the factor β, and without a term that
depends on x alone and cancels in the difference of two responses to x.

Copy this file alone: it needs torch and tqdm, and a causal language model of transformers.
From sera_min 0.1.0, Apache-2.0; SeRA, arXiv:2410.09362.
"""

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
    """log π(y|x) in nats of one response, as one would first write it: a 0-dimensional tensor."""
    ids = torch.tensor([prompt + response], device=model.device)  # (1, T)
    logits = model(input_ids=ids).logits[0]  # (T, V)
    logits = logits[len(prompt) - 1 : -1]  # (|y|, V): a position predicts the token after it
    logps = logits.log_softmax(-1)  # (|y|, V)
    targets = ids[0, len(prompt) :]  # (|y|,)
    return logps.gather(1, targets[:, None]).sum()  # (|y|, 1) -> ()


# This is right, and too expensive to train with:
#   - One row at a time leaves a GPU idle.
#   - (T, V) logits are computed for the prompt's positions too, which nobody needs. With a
#     vocabulary of 128,000 and 1,000 tokens they are half a gigabyte in float32; the log-softmax is
#     as much again, and so is the gradient.
#   - In bfloat16, logits have 8 significant bits, and the sum over a long response is wrong by whole nats.
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

    Returns B tensors, (|y|,) each, float32 (float64 if the model is), differentiable.

      - Dropout is the model's own: switch it off before you compare a policy with a reference.
      - Remove padding before: a padding id would be scored.
      - Load the model in float32, for the reason above, and hand in the model itself. For several
        GPUs wrap (DDP, FSDP2) a module of your own whose forward calls this.
      - To compile, call `compile()` of the model's body or layers, not of the whole model.

    Raises ValueError for an empty batch, prompt or response, for ids that the model does not have and
    for models that this cannot read, TypeError for anything but a list of ids.
    """
    check_model(model)
    head = model.get_output_embeddings().weight  # (V, H)
    check_token_ids(prompts, responses, vocab_size=head.shape[0])
    inputs, positions = pad_right(prompts, responses)  # (B, T), (R,)
    # positions: the R = Σ|y| places, among B·T, that predict a response's token
    targets = torch.cat([torch.tensor(y) for y in responses])  # (R,)
    # `non_blocking`: the host does not wait for the GPU.
    inputs = inputs.to(model.device, non_blocking=True)
    positions = positions.to(model.device, non_blocking=True)
    targets = targets.to(model.device, non_blocking=True)

    body = body_of(model)
    output = body(input_ids=inputs, use_cache=False, return_dict=True)
    hidden = output.last_hidden_state.flatten(0, 1)  # (B·T, H)
    hidden = hidden.index_select(0, positions).to(head.dtype)  # (R, H)
    output_type = type(output)  # head_logprobs hands hidden states back in one of these
    del output  # (B, T, H) need not stay in memory until the backward pass

    logps = []
    # As many tokens at a time as have that many logits
    size = max(1, HEAD_LOGITS.get(model.device.type, 2**26) // head.shape[0])
    for h, y in zip(hidden.split(size), targets.split(size)):  # (r, H), (r,)
        chunk = checkpoint(head_logprobs, model, body, output_type, h, y, use_reentrant=False)
        logps.append(chunk)  # (r,)
    lengths = list(map(len, responses))
    return torch.cat(logps).split(lengths)  # (R,) -> B of (|y|,)


def body_of(model):
    """The part of the model that embeds tokens and makes the hidden states that the head reads."""
    embeddings = model.get_input_embeddings()
    for part in (model.get_decoder(), *model.children()):  # llama4's decoder is the whole model
        if part not in (None, model) and embeddings in part.modules():
            return part
    raise ValueError(f"{type(model).__name__} has no body: no part of it embeds the tokens")


def head_logprobs(model, body, output_type: type, hidden: Tensor, targets: Tensor) -> Tensor:
    """log π of r tokens from the hidden states that predict them: (r, H), (r,) -> (r,).

    model(...) is head(body(...)), and some models also cap (gemma2), scale (cohere, granite) or shift
    (phi) the logits. To have all of that without the body, we replace body.forward, for this one
    call, by a function that returns our hidden states, and call the model. Not thread-safe.
    """
    output = output_type(last_hidden_state=hidden[None])  # (1, r, H)
    body_returns = patch.object(body, "forward", lambda *args, **kwargs: output)
    outside_autocast = torch.autocast(hidden.device.type, enabled=False)
    with body_returns, outside_autocast:
        # Only the shape of the ids matters: nothing reads them.
        logits = model(input_ids=targets[None], use_cache=False, return_dict=True).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (r, V)
    of_targets = logits.gather(1, targets[:, None]).squeeze(1)  # (r,)
    return of_targets - logits.logsumexp(-1)  # (r,): log-softmax, of the targets alone


def sequence_logprobs(model, prompts: list[Ids], responses: list[Ids]) -> tuple[Tensor, Tensor]:
    """log π(y|x) in nats of B unpadded pairs (x, y) of token ids, differentiable.

    Append the end of sequence to a response that ended: nothing here does. Returns the sums,
    float32 (B,) (float64 if the model is), and the token counts |y|, int64 (B,), so that you can
    divide, for averages. What `token_logprobs` says of dropout, padding and errors holds here.
    """
    rows = token_logprobs(model, prompts, responses)
    sums = torch.stack([row.sum() for row in rows])  # B of (|y|,) -> (B,)
    counts = torch.tensor([len(y) for y in responses]).to(sums.device, non_blocking=True)
    return sums, counts


@torch.no_grad()
def score(
    model, prompts: list[Ids], responses: list[Ids], *, max_tokens: int, desc: str | None = None
) -> tuple[Tensor, Tensor]:
    """`sequence_logprobs` of any number of rows N, in eval mode and without gradients.

    In batches of at most `max_tokens` tokens, padding included. Returns CPU tensors in the order of
    the rows: float32 (N,) sums in nats, int64 (N,) token counts. `desc` shows a progress bar.
    A row longer than the `original_max_position_embeddings` of a rope "longrope" (Phi-3) changes the
    log-probs of its batch: score such rows one at a time. Under FSDP all ranks need equally many batches.
    """
    check_model(model)
    if prompts:
        check_token_ids(prompts, responses, vocab_size=model.get_output_embeddings().weight.shape[0])
    lengths = [len(x) + len(y) for x, y in zip(prompts, responses, strict=True)]
    batches = token_batches(lengths, max_tokens)
    sums = torch.empty(len(prompts))
    with eval_mode(model):
        for batch in tqdm(batches, desc=desc, unit="batch", disable=desc is None):
            x = [prompts[i] for i in batch]
            y = [responses[i] for i in batch]
            of_batch, _counts = sequence_logprobs(model, x, y)
            sums[batch] = of_batch.float().cpu()
    counts = torch.tensor(list(map(len, responses)), dtype=torch.int64)
    return sums, counts


def token_batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices of rows, longest row first, in batches of rows × longest row ≤ `max_tokens`.

    Rows of like length need next to no padding, and if any batch exceeds the memory, the first
    does. A row longer than `max_tokens` is alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = []
    while order:
        longest = max(1, lengths[order[0]])
        rows = max(1, max_tokens // longest)
        batches.append(order[:rows])
        order = order[rows:]
    return batches


def implicit_reward(policy_logps: Tensor, reference_logps: Tensor, lengths: Tensor | None = None) -> Tensor:
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
# You may skip what follows: checks, padding, and eval mode.
# ------------------------------------------------------------------------------------------------

# Logits at a time: enough to keep a GPU busy, few enough for the cache of a CPU.
HEAD_LOGITS = {"cuda": 2**26, "cpu": 2**23}


def check_model(model) -> None:
    if not hasattr(model, "get_output_embeddings"):
        raise TypeError(f"{type(model).__name__} is no model of transformers: see token_logprobs on wrapped ones")
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError("a model with prompt or prefix tuning: what was learnt would be left out")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} has an encoder: expected a causal language model")
    if model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} has no head over the vocabulary: expected AutoModelForCausalLM's")


def check_token_ids(prompts: list[Ids], responses: list[Ids], vocab_size: int) -> None:
    if not prompts:
        raise ValueError("an empty batch has no log-probabilities")
    for row, (x, y) in enumerate(zip(prompts, responses, strict=True)):
        for name, ids in (("prompt", x), ("response", y)):
            if not isinstance(ids, list):
                kind = type(ids).__name__
                raise TypeError(f"row {row}: the {name} is a {kind}, expected a list of token ids")
            if not ids:
                raise ValueError(f"row {row}: an empty {name} has no log-probability")
            if any(isinstance(i, float) for i in ids):
                raise TypeError(f"row {row}: the {name} has ids that are no integers")
            if min(ids) < 0 or max(ids) >= vocab_size:
                ends = f"{min(ids)} to {max(ids)}"
                raise ValueError(f"row {row}: the {name} has ids {ends}, not 0 to {vocab_size - 1}")


def check_same_shape(one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:
        raise ValueError(f"shapes differ: {tuple(one.shape)} and {tuple(other.shape)}")


def pad_right(prompts: list[Ids], responses: list[Ids]) -> tuple[Tensor, Tensor]:
    """What the body reads, int64 (B, T); and where, of B·T positions, a response's token is predicted.

    The last token of a row is left out: it predicts nothing that is needed.
    """
    rows = [torch.tensor((x + y)[:-1]) for x, y in zip(prompts, responses)]
    inputs = pad_sequence(rows, batch_first=True)  # (B, T)
    positions: list[int] = []
    for row, (x, y) in enumerate(zip(prompts, responses)):
        first = row * inputs.shape[1] + len(x) - 1  # predicts y_1
        positions += range(first, first + len(y))
    return inputs, torch.tensor(positions)  # (R,)


@contextmanager
def eval_mode(model) -> Iterator[None]:
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes:  # not model.train(): a part may have been in eval mode before
            part.training = mode
