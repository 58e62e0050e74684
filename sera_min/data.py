"""Preference pairs, in the formats people publish them in, to token ids. Every row cut or dropped is counted.

| format | columns |
|---|---|
| strings, explicit prompt | `prompt`, `chosen`, `rejected` (taken as they are: no template, no separator)
| messages, explicit prompt | `prompt`: messages, or a string (one user turn); `chosen`, `rejected`: the answer's
| messages, implicit prompt | `chosen`, `rejected`: whole dialogues, the last turn the assistant's
| HH-RLHF, implicit prompt | `chosen`, `rejected`: "\\n\\nHuman: … \\n\\nAssistant: …"
| Alpaca | `instruction`, `input` (may be absent or empty), `chosen`, `rejected`

The last assistant turn is the response, everything before it the prompt, and both responses share one prompt's ids.
Dialogues go through the tokenizer's chat template. A prompt's ids never depend on the response: where tokens merge
across the border, the response is tokenised apart. A response ends with exactly one end of sequence, unless cut.
A field that is missing or of another type is an error; a text that is there but blank drops its pair.
"""

import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import datasets
import torch
from torch import Tensor
from tqdm import tqdm

# For tokenizers without a chat template: HH-RLHF's plain form, which a dialogue in that form survives unchanged.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ {'user': '\n\nHuman: ', 'assistant': '\n\nAssistant: ', 'system': ''}[m['role']] "
    "+ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
COLUMNS = ("prompt", "instruction", "input", "chosen", "rejected")  # all that is read

Ids = list[int]  # token ids
Messages = list[dict[str, str]]  # of a role and a content
Rows: TypeAlias = Sequence[Any] | datasets.Dataset


class Pair(NamedTuple):
    """A preference (x, y_w, y_l) as token ids; a response that was not cut ends with its end of sequence."""

    prompt: Ids
    chosen: Ids
    rejected: Ids


class InputError(ValueError):
    """What the user gave is not as expected. The message is one line: where, and what was expected."""


class Unusable(Exception):
    """A row of a right form that is no pair to train on: it is dropped, and counted under this message."""


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_rows(name: str, split: str, limit: int | None = None) -> Rows:
    """Rows, the first `limit`, of a hub data set, a .json, .jsonl or .parquet file, or a folder. Raises InputError."""
    path, suffixes = Path(name), (".json", ".jsonl", ".parquet")
    if path.is_file() and path.suffix not in suffixes:
        raise InputError(f"{name}: expected a .json, .jsonl or .parquet file")
    if not path.exists() and (path.suffix in suffixes or name.count("/") > 1 or name.startswith((".", "~", "/"))):
        raise InputError(f"{name}: no such file")
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors come back in ours, on one line
    try:
        if path.is_file() and path.suffix != ".parquet":
            return read_json(path)[:limit]
        source: dict = {"path": "parquet", "data_files": {split: name}} if path.is_file() else {"path": name}
        rows = datasets.load_dataset(**source, split=split, trust_remote_code=False)
        rows = rows.select_columns([column for column in COLUMNS if column in rows.column_names])
        return rows if limit is None else rows.select(range(min(len(rows), limit)))
    except Exception as error:  # pyarrow, pandas, huggingface_hub and datasets each raise their own, and wrap others'
        causes: list[str] = []
        cause: BaseException | None = error
        while cause is not None:
            causes += [one_line(cause)]
            cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
        raise InputError(f"{name}, split '{split}': cannot be read: {'; '.join(dict.fromkeys(causes))}") from None


def read_json(path: Path) -> list[Any]:
    """The values of a JSON list, or all values one after the other. Raises ValueError naming line and column.

    Not by `datasets`, whose reader has crashed the process on deep nesting, and wants a field of one type in all rows.
    """
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return json.loads(text)
    rows, parser, text = [], json.JSONDecoder(), text.rstrip()
    at = len(text) - len(text.lstrip())
    while at < len(text):
        row, at = parser.raw_decode(text, at)
        rows.append(row)
        while at < len(text) and text[at].isspace():
            at += 1
    if not rows:
        raise ValueError("it is empty")
    return rows


def decoded(rows: Rows, name: str) -> Iterator[Any]:
    """The rows one by one; what `datasets` cannot decode, and reads ahead, is an InputError."""
    each = iter(rows)
    for i in range(len(rows)):
        try:
            yield next(each)
        except Exception as error:
            raise InputError(f"{name}, row {i} or one after it: cannot be decoded: {one_line(error)}") from None


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        kind = "missing" if value is None else f"a {type(value).__name__}"
        raise InputError(f"{where} is {kind}: expected a text")
    if re.search("[\ud800-\udfff]", value):
        raise InputError(f"{where} holds half a surrogate pair, which no encoding has: expected Unicode text")
    if not value.strip():
        raise Unusable("a text is empty")
    return value


def _messages(value: Any, where: str) -> Messages:
    if not value:
        raise InputError(f"{where} is empty: expected messages")
    for j, message in enumerate(value):
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise InputError(f"{where}, message {j}: expected a role (system, user or assistant) and a content")
        _text(message.get("content"), f"{where}, message {j}: 'content'")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _human_assistant(text: str, where: str) -> Messages:
    """HH-RLHF's plain dialogue as messages, split at its turns."""
    before, *turns = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip("\n"))
    if before.strip() or not turns:
        raise InputError(f"{where}: expected 'prompt' or 'instruction' beside it, or a dialogue '\\n\\nHuman: …'")
    if turns[-2] == "Human":
        raise Unusable("a transcript ends without an answer")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": _text(c, where).strip()} for r, c in zip(turns[::2], turns[1::2])]


def _row_prompt(row: Any, where: str) -> str | Messages | None:
    """The prompt that a row names: a text, or the messages so far; None where it is in the responses."""
    if not isinstance(row, dict):
        raise InputError(f"{where} is a {type(row).__name__}: expected fields and their values")
    if (prompt := row.get("prompt")) is not None:
        return (_messages if isinstance(prompt, list) else _text)(prompt, f"{where}: 'prompt'")
    if row.get("instruction") is None:
        return None
    question = _text(row["instruction"], f"{where}: 'instruction'")
    if row.get("input") not in (None, ""):
        question += "\n\n" + _text(row["input"], f"{where}: 'input'")
    return [{"role": "user", "content": question}]


def preference(row: Any, where: str) -> tuple[str | Messages, list[str]]:
    """A row of any of the formats as its prompt, a text or the messages so far, and [chosen, rejected].

    Raises InputError naming the row and the field, and Unusable.
    """
    prompt = _row_prompt(row, where)
    (x, chosen), (other_x, rejected) = (
        _split_dialogue(prompt, row.get(field), f"{where}: '{field}'") for field in ("chosen", "rejected")
    )
    if x != other_x:
        raise Unusable("the responses answer different prompts")
    return x, [chosen, rejected]


def question(row: Any, where: str) -> str | Messages:
    """A row of `prompt` or `instruction` as a prompt to answer. Raises as `preference` does."""
    if (prompt := _row_prompt(row, where)) is None:
        raise InputError(f"{where}: expected 'prompt' or 'instruction'")
    return prompt


def _split_dialogue(prompt: str | Messages | None, value: Any, where: str) -> tuple[str | Messages, str]:
    """What the row's prompt, if it has one, and its `chosen` or `rejected` together ask, and the answer."""
    if not isinstance(value, list):
        text = _text(value, where)
        if prompt is not None:
            return prompt, text
        dialogue = _human_assistant(text, where)
    else:
        dialogue = _messages(value, where)
        if isinstance(prompt, list) and dialogue[: len(prompt)] != prompt:
            dialogue = prompt + dialogue
        elif isinstance(prompt, str) and [m["role"] for m in dialogue] == ["assistant"]:
            dialogue = [{"role": "user", "content": prompt}, *dialogue]
    if len(dialogue) < 2 or dialogue[-1]["role"] != "assistant":
        raise InputError(f"{where}: expected a dialogue that ends with the assistant's turn")
    return dialogue[:-1], dialogue[-1]["content"]


def continued(tokenizer: Any, text: str) -> Ids:
    """Token ids of a text that goes on after a line break: SentencePiece puts a space before the first word of all."""
    before, ids = tokenizer(["\n", "\n" + text], add_special_tokens=False).input_ids
    return ids[len(before) :] if ids[: len(before)] == before else tokenizer(text, add_special_tokens=False).input_ids


def tokenise(tokenizer: Any, x: str | Messages, ys: list[str], eos_ids: Ids, where: str) -> list[Ids]:
    """Token ids of the prompt and of each response, which gets exactly one end of sequence. Raises InputError."""
    prompt, wholes = x, [str(x) + y for y in ys]
    if isinstance(x, list):
        try:
            prompt = tokenizer.apply_chat_template(x, add_generation_prompt=True, tokenize=False)
            answers = [[*x, {"role": "assistant", "content": y}] for y in ys]
            wholes = [tokenizer.apply_chat_template(answer, tokenize=False) for answer in answers]
        except Exception as error:  # of jinja, and whatever the template's own code comes to
            raise InputError(f"{where}: the chat template does not take this dialogue: {one_line(error)}") from None
        if not all(whole.startswith(prompt) for whole in wholes):
            raise InputError(f"{where}: the chat template does not begin an answered dialogue with its own prompt")
    prompt_ids, *whole_ids = tokenizer([prompt, *wholes], add_special_tokens=False).input_ids
    responses = []
    for whole, ids in zip(wholes, whole_ids):
        n = len(prompt_ids)  # where tokens merge across the border, the response is tokenised apart
        y = ids[n:] if ids[:n] == prompt_ids else continued(tokenizer, whole[len(prompt) :])
        end = next((j for j, token in enumerate(y) if token in eos_ids), None)
        responses.append(y[: end + 1] if end is not None else [*y, eos_ids[0]] if y else [])
    return [prompt_ids, *responses]


def cut(prompt: Ids, responses: list[Ids], bos: int | None, max_length: int, max_prompt_length: int) -> list[Ids]:
    """The prompt's last `max_prompt_length` tokens (and its BOS), of each response the first max_length − |prompt|."""
    if len(prompt) > max_prompt_length:
        first = prompt[:1] if prompt[0] == bos else []
        prompt = first + prompt[len(prompt) - max_prompt_length + len(first) :]
    return [prompt, *(y[: max_length - len(prompt)] for y in responses)]


def added_bos(tokenizer: Any) -> Ids:
    """The BOS that the tokenizer puts before a text by itself, or nothing."""
    return [i for i in tokenizer("a").input_ids[:1] if i == tokenizer.bos_token_id]


def forgery_pattern(tokenizer: Any, eos_ids: Ids) -> re.Pattern[str]:
    """What no text may spell: a special token of the tokenizer, or a turn of PLAIN_TEMPLATE where that is used.

    Turns that a template marks by plain text, as `[INST]`, are not recognised.
    """
    added = tokenizer.added_tokens_decoder.items()
    specials = [re.escape(str(token)) for i, token in added if token.special or i in eos_ids]
    turns = ["\n\n(?:Human|Assistant):"] if str(tokenizer.chat_template).endswith(PLAIN_TEMPLATE) else []
    return re.compile("|".join([*specials, *turns]) or "(?!)")


def encode_row(
    x: str | Messages, ys: list[str], tokenizer: Any, where: str, forged: re.Pattern[str], counts: Counter,
    *, eos_ids: Ids, max_length: int, max_prompt_length: int,
) -> list[Ids]:  # fmt: skip
    """Token ids of a prompt and of its responses, cut to the limits, which is counted. Raises Unusable, InputError."""
    ys = [y.removesuffix(tokenizer.eos_token) for y in ys]
    if any(forged.search(text) for text in [*ys, *(m["content"] for m in ([] if isinstance(x, str) else x))]):
        raise Unusable("a text spells a special token")
    prompt, *responses = tokenise(tokenizer, x, ys, eos_ids, where)
    if isinstance(x, str) and prompt[:1] != (bos := added_bos(tokenizer)):  # a template writes its own
        prompt = bos + prompt
    ids = cut(prompt, responses, tokenizer.bos_token_id, max_length, max_prompt_length)
    if not all(ys) or not all(ids):
        raise Unusable("no token of the prompt or a response")
    if ids[1:] and ids[1] == ids[2]:
        raise Unusable("chosen equals rejected")
    counts["prompts cut"] += len(prompt) > max_prompt_length
    counts["responses cut"] += sum(kept != y for kept, y in zip(ids[1:], responses))
    return ids


def set_template(tokenizer: Any) -> None:
    """A tokenizer without a chat template is given PLAIN_TEMPLATE, and keeps it where it is saved."""
    if tokenizer.chat_template is None:
        tokenizer.chat_template = "{{ bos_token }}" * len(added_bos(tokenizer)) + PLAIN_TEMPLATE


def encode(rows: Rows, tokenizer: Any, *, name: str, eos_ids: Ids, **limits: int) -> tuple[list[Pair], Counter]:
    """Rows of any of the formats as pairs of token ids, and the count of rows read, kept, cut and dropped, with why.

    eos_ids: the tokens that end a response, the one to append first. limits: max_length, max_prompt_length.
    A dialogue or response that spells a special token is dropped: it would forge a turn or an end.
    """
    set_template(tokenizer)
    forged, counts, pairs = forgery_pattern(tokenizer, eos_ids), Counter({"read": 0, "kept": 0}), []
    for i, row in enumerate(tqdm(decoded(rows, name), f"reading {name}", len(rows), unit="row", leave=False)):
        where = f"{name}, row {i}"
        counts["read"] += 1
        try:
            x, ys = preference(row, where)
            pairs.append(Pair(*encode_row(x, ys, tokenizer, where, forged, counts, eos_ids=eos_ids, **limits)))
        except Unusable as why:
            counts[f"dropped: {why}"] += 1
    counts["kept"] = len(pairs)
    return pairs, counts


def encode_prompts(
    rows: Rows, tokenizer: Any, *, name: str, eos_ids: Ids, **limits: int
) -> tuple[list[str], list[Ids], Counter]:
    """Prompts to answer, rows of `prompt` or `instruction` as above: their texts, their token ids, and the counts.

    Raises InputError where a row is none.
    """
    set_template(tokenizer)
    forged, counts = forgery_pattern(tokenizer, eos_ids), Counter({"read": len(rows)})
    texts: list[str] = []
    prompts: list[Ids] = []
    for i, row in enumerate(decoded(rows, name)):
        where = f"{name}, row {i}"
        try:
            x = question(row, where)
            prompts += encode_row(x, [], tokenizer, where, forged, counts, eos_ids=eos_ids, **limits)
        except Unusable as why:
            raise InputError(f"{where} is no prompt to answer: {why}") from None
        texts.append(x if isinstance(x, str) else "\n\n".join(message["content"] for message in x))
    return texts, prompts, counts


def format_counts(counts: Counter) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items()) or "none"


class TrainingSet(NamedTuple):
    """What an iteration trains on: N pairs; log π_ref of their responses; their margins, and where they come from."""

    pairs: list[Pair]
    reference: Tensor  # (N, 2), nats
    margins: Tensor  # (N,), nats; 0 at t = 1, where nothing is reviewed
    sources: list[str]  # offline or bootstrap


class Samples(NamedTuple):
    """n samples of each of P prompts, and what the review makes of them."""

    responses: list[list[Ids]]
    ended: Tensor  # (P, n) bool
    usable: Tensor  # (P, n) bool: ended, and not below --token_floor
    rewards: Tensor  # (P, n), nats, those that rank; NaN where a sample is not usable
    reference: Tensor  # (P, n), nats: log π_ref(y|x)


def rows_of(pairs: Sequence[Pair]) -> tuple[list[Ids], list[Ids]]:
    """Prompts and responses of N pairs as 2N rows: chosen, rejected, chosen, rejected, …"""
    return [pair.prompt for pair in pairs for _ in "wl"], [y for pair in pairs for y in (pair.chosen, pair.rejected)]


def tokens_of(pair: Pair) -> int:
    return 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def lengths_of(pairs: Sequence[Pair]) -> Tensor:
    return torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in pairs])  # (N, 2)


def union(some: TrainingSet, others: TrainingSet) -> TrainingSet:
    return TrainingSet(some.pairs + others.pairs, torch.cat([some.reference, others.reference]),
                       torch.cat([some.margins, others.margins]), some.sources + others.sources)  # fmt: skip


def split_by_prompt(pairs: list[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """The pairs to train on and those held out: a random `share` of the prompts, none of which is in both."""
    prompts = list(dict.fromkeys(tuple(pair.prompt) for pair in pairs))
    held = set(random.Random(seed).sample(prompts, round(share * len(prompts))))
    in_held = [tuple(pair.prompt) in held for pair in pairs]
    return [p for p, out in zip(pairs, in_held) if not out], [p for p, out in zip(pairs, in_held) if out]


def fingerprint(*parts: Sequence[Any]) -> str:
    """How many rows each part has, and a checksum of their token ids, by which a resumed run knows its data again."""
    crc = 0
    for row in (row for rows in parts for row in rows):
        crc = zlib.crc32(repr(row).encode(), crc)
    return f"{' + '.join(str(len(rows)) for rows in parts)} rows, CRC {crc:08x}"


def decode(tokenizer: Any, ids: Ids, eos_ids: Ids, after: Ids | None = None) -> str:
    """A prompt without its BOS, a response without its end: what `datasets` and TRL expect, for they add them.

    after: the prompt, where `ids` is a response. Alone it would lose the space that SentencePiece begins a word with.
    """
    if after:
        return decode(tokenizer, after + ids, eos_ids)[len(decode(tokenizer, [*after, eos_ids[0]], eos_ids)) :]
    ids = ids[ids[:1] == [tokenizer.bos_token_id] : len(ids) - (ids[-1] in eos_ids)]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)  # the clean-up would write " ," as ","
