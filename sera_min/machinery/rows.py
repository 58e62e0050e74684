"""Rows of preference data: where they come from, and what each of them says.

`read_rows` takes a file, a folder or a data set of the hub. `preference` turns a row of any of
these forms into a prompt, two answers, and options for the chat template:

| form | columns |
|---|---|
| texts | `prompt`, `chosen`, `rejected`: texts, taken as they are, without a template
| messages | `prompt`: messages, or a text (one user turn); `chosen`, `rejected`: the answer
| dialogues | `chosen`, `rejected`: messages up to the answer
| transcripts | `chosen`, `rejected`: "\\n\\nHuman: … \\n\\nAssistant: …" (HH-RLHF)
| instructions | `instruction` or `question`, `input` (may be absent or empty), `chosen`, `rejected`
| other trainers | any of these under the other names in COLUMNS

The last turn of the assistant is the answer, everything before it the prompt. `system`, `history`,
`tools` and `chat_template_kwargs` may stand beside all forms but texts. A missing field, or one of
a wrong type, is an InputError; a blank text or a dialogue without an answer is Unusable.
"""

import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import datasets

from sera_min.machinery.errors import InputError, Unusable, one_line

TEXT_FILES = (".json", ".jsonl", ".csv", ".json.gz", ".jsonl.gz", ".csv.gz")
SUFFIXES = (*TEXT_FILES, ".parquet")
COLUMNS = {  # a field, and the names of its column: where a row has several, the first counts
    "prompt": ("prompt", "conversations", "messages"),
    "instruction": ("instruction", "question"),
    "input": ("input",),
    "chosen": ("chosen", "chosen_response", "chosen_conversations"),
    "rejected": ("rejected", "rejected_response", "rejected_messages", "rejected_conversations"),
    "system": ("system",),
    "history": ("history",),  # pairs of what the user asked and the assistant answered
    "tools": ("tools",),
    "chat_template_kwargs": ("chat_template_kwargs",),
}
OPTIONAL = ("input", "system", "history", "tools", "chat_template_kwargs")
KNOWN = set().union(*COLUMNS.values())  # every column that is read
FORMS = (
    "prompt, chosen, rejected; dialogues in chosen, rejected; "
    "instruction or question, chosen, rejected; conversations or messages, chosen, rejected; "
    "messages, rejected_response; chosen_conversations, rejected_conversations"
)
ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_FIELDS = ({"role", "content"}, {"from", "value"}, {"role", "tool_calls"})
OTHER_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}

Rows: TypeAlias = Sequence[Any] | datasets.Dataset
Message = dict[str, Any]  # `role`, `content`, and whatever other fields it has
Messages = list[Message]


# Where rows come from


def read_rows(name: str, split: str, limit: int | None = None, config: str | None = None) -> Rows:
    """The rows, at most `limit`, of a file, a folder, or a hub data set and its configuration.

    Raises InputError.
    """
    path = Path(name)
    if path.is_file() and not name.endswith(SUFFIXES):
        raise InputError(f"{name}: expected a file that ends with one of {', '.join(SUFFIXES)}")
    if not path.exists() and (name.endswith(SUFFIXES) or is_path(name)):
        raise InputError(f"{name}: no such file")
    source = name if path.is_file() else f"{name}, split '{split}'"
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are told in ours
    try:
        rows = read_file(path) if path.is_file() else read_data_set(name, split, config)
    except Exception as error:  # each library underneath raises its own
        raise InputError(f"{source}: cannot be read: {with_causes(error)}") from None
    if isinstance(rows, datasets.Dataset):
        return rows.select(range(len(rows))[:limit])
    return rows[:limit]


def is_path(name: str) -> bool:
    """Whether this cannot be a name on the hub, which is "owner/name"."""
    return name.count("/") > 1 or name.startswith((".", "~", "/")) or name.endswith("/")


def with_causes(error: BaseException) -> str:
    """`datasets` wraps the errors of others, and its own words only say that something failed."""
    messages = [one_line(error)]
    while error.__cause__ is not None:
        error = error.__cause__
        messages.append(one_line(error))
    return "; ".join(messages)


def read_data_set(name: str, split: str, config: str | None) -> Rows:
    """A folder that `save_to_disk` wrote, a folder of files, or a data set of the hub."""
    folder = Path(name)
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        saved = datasets.load_from_disk(name)
        if isinstance(saved, datasets.Dataset):
            saved = {str(saved.split or "train"): saved}
        if split not in saved:
            raise ValueError(f"its splits are {', '.join(saved)}")
        return saved[split]
    if folder.is_dir():
        builder = datasets.load_dataset_builder(name, config)  # knows which files a split has
        files = (builder.config.data_files or {}).get(split, [])
        if files and all(file.endswith(TEXT_FILES) for file in files):
            return read_files(files)
    return datasets.load_dataset(name, config, split=split, trust_remote_code=False)


def read_files(files: Iterable[str]) -> list[Any]:
    rows: list[Any] = []
    for file in files:
        try:
            rows += read_file(Path(file))
        except Exception as error:
            raise ValueError(f"{file}: {one_line(error)}") from None
    return rows


def read_file(path: Path) -> Rows:
    if is_lfs_pointer(path):
        raise ValueError("it is a Git-LFS pointer to a file, which `git lfs pull` downloads")
    if path.suffix == ".parquet":
        return datasets.Dataset.from_parquet(str(path))
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        text = file.read()
    rows = read_csv(text) if ".csv" in path.suffixes[-2:] else read_json(text)
    if not rows:
        raise ValueError("it is empty")
    return rows


def is_lfs_pointer(file: Path) -> bool:
    """Whether these are Git LFS's three lines about a file that was never downloaded."""
    with open(file, "rb") as start:
        return start.read(24) == b"version https://git-lfs."


def read_json(text: str) -> list[Any]:
    """The values of a JSON list, or all values one after the other.

    Not by `datasets`, whose reader has crashed on deep nesting, takes some texts for dates, and
    wants a field to have one type in all rows. Raises ValueError naming the row and its line.
    """
    if text.lstrip().startswith("["):
        return json.loads(text)
    rows: list[Any] = []
    decoder = json.JSONDecoder()
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        try:
            row, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:  # which may name a later line of the row
            line = text.count("\n", 0, at) + 1
            place = f"row {len(rows)}, which begins in line {line}"
            raise ValueError(f"{place}: {error}") from None
        rows.append(row)
    return rows


def read_csv(text: str) -> list[Any]:
    """Rows of texts. Not by `datasets`, which reads "NA" as null and "4" as a number."""
    csv.field_size_limit(sys.maxsize)
    return list(csv.DictReader(io.StringIO(text), strict=True))


def each_row(rows: Rows, name: str) -> Iterator[Any]:
    """The rows one by one, without the columns of a table that no form reads."""
    if isinstance(rows, datasets.Dataset):
        columns = [column for column in rows.column_names if column in KNOWN]
        if not columns:
            raise unknown_form(rows.column_names, name)
        rows = rows.select_columns(columns)
    iterator = iter(rows)
    for i in range(len(rows)):
        try:
            row = next(iterator)
        except Exception as error:  # `datasets` decodes several rows at once
            place = f"{name}, row {i} or one after it"
            raise InputError(f"{place}: cannot be decoded: {one_line(error)}") from None
        yield row


# What a row says


class Reading(NamedTuple):
    """What a row says. The answers are texts if the prompt is a text, messages if it is messages."""

    prompt: str | Messages
    answers: list[Any]
    options: dict[str, Any]  # for the chat template
    columns: set[str]  # that were read


class Field(NamedTuple):
    value: Any  # None where the row has none
    where: str  # file, row and column
    column: str = ""


def preference(row: Any, where: str) -> Reading:
    """A row of any form. Raises InputError naming the row and the field, and Unusable."""
    fields = fields_of(row, where)
    prompt, answer = prompt_of(fields)
    chosen, rejected = fields["chosen"], fields["rejected"]
    if chosen.value is None:
        chosen = chosen._replace(value=answer)
    if chosen.value is None and rejected.value is None:
        raise unknown_form(row, where)
    asked, good = asked_and_answered(prompt, chosen)
    asked_too, bad = asked_and_answered(prompt, rejected)
    if asked != asked_too:
        raise Unusable("the responses answer different prompts")
    return in_context(asked, [good, bad], fields)


def question(row: Any, where: str) -> Reading:
    """A row as a prompt to answer, without answers. Raises as `preference` does."""
    fields = fields_of(row, where)
    prompt, _ = prompt_of(fields)
    if not prompt:
        raise InputError(f"{where}: expected 'prompt' or 'instruction'")
    return in_context(prompt, [], fields)


def fields_of(row: Any, where: str) -> dict[str, Field]:
    """All fields of COLUMNS; the value is None where the row has none."""
    if not isinstance(row, dict):
        raise InputError(f"{where} is of type {type(row).__name__}: expected fields and their values")
    fields: dict[str, Field] = {}
    for name, columns in COLUMNS.items():
        filled = [column for column in columns if row.get(column) is not None]
        column = filled[0] if filled else name
        value = row.get(column)
        if name in OPTIONAL and is_blank(value):
            value = None
        if name in ("instruction", "input") and fields["prompt"].value is not None:
            value = None
        fields[name] = Field(value, f"{where}: '{column}'", column)
    if all(fields[name].value is None for name in ("prompt", "instruction", "input", "chosen", "rejected")):
        raise unknown_form(row, where)
    return fields


def unknown_form(columns: Iterable[Any], where: str) -> InputError:
    names = " ".join(", ".join(map(str, columns)).split())[:300] or "(none)"
    return InputError(f"{where} has the columns {names}: expected those of one of these: {FORMS}")


def prompt_of(fields: dict[str, Field]) -> tuple[str | Messages | None, Messages | None]:
    """The prompt that a row names, if any, and the answer that ends it in `conversations` and `messages`."""
    field = fields["prompt"]
    if field.value is None:
        parts = [fields["instruction"], fields["input"]]
        texts = [text_of(part) for part in parts if part.value is not None]
        return [{"role": "user", "content": "\n\n".join(texts)}] if texts else None, None
    prompt = text_or_messages(field)
    if isinstance(prompt, str) or field.column == "prompt" or prompt[-1]["role"] != "assistant":
        return prompt, None
    return prompt[:-1], prompt[-1:]


def asked_and_answered(prompt: str | Messages | None, field: Field) -> tuple[str | Messages, Any]:
    """What the row's prompt and its `chosen` or `rejected` together ask, and the answer."""
    answer = text_or_messages(field)
    if isinstance(prompt, str):
        if isinstance(answer, str):
            return prompt, answer
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}] if prompt else transcript(field)
    dialogue = joined(prompt or [], answer)
    if dialogue[-1]["role"] != "assistant":
        raise Unusable("a dialogue ends without an answer")
    if len(dialogue) < 2:
        raise InputError(f"{field.where}: expected a dialogue that ends with the assistant's turn")
    return dialogue[:-1], dialogue[-1]


def joined(prompt: Messages, dialogue: Messages) -> Messages:
    """The prompt and the dialogue that goes on after it, or the dialogue that repeats it. Raises Unusable."""
    roles = [turn["role"] for turn in dialogue]
    if not prompt:
        if len(roles) > 2 and roles[-2:] == ["assistant", "assistant"]:
            raise Unusable("two turns of the assistant follow each other")
        return dialogue
    users_turn = prompt[-1]["role"] in ("system", "assistant")
    if roles[0] in ("assistant", "tool") or (roles[0] == "user" and users_turn):
        return prompt + dialogue
    asked = [squeezed(turn["content"]) for turn in dialogue if turn["role"] == "user"]
    asked_before = squeezed("".join(turn["content"] for turn in prompt))
    repeated = asked_before in "".join(asked) or (bool(asked) and asked[-1] in asked_before)
    if not repeated:
        raise Unusable("the prompt says something else than the dialogues beside it")
    return dialogue


def transcript(field: Field) -> Messages:
    """HH-RLHF's plain dialogue as messages."""
    before, *turns = re.split(r"\n\n(Human|Assistant):", "\n\n" + field.value.lstrip("\n"))
    if before.strip() or not turns:
        expected = "'prompt' or 'instruction' beside it, or a dialogue '\\n\\nHuman: …'"
        raise InputError(f"{field.where}: expected {expected}")
    if turns[-2] == "Human":
        raise Unusable("a transcript ends without an answer")
    messages = []
    for speaker, content in zip(turns[::2], turns[1::2]):
        role = "user" if speaker == "Human" else "assistant"
        messages.append({"role": role, "content": text_of(Field(content, field.where)).strip()})
    return messages


def in_context(prompt: str | Messages, answers: list[Any], fields: dict[str, Field]) -> Reading:
    """With the row's `system` and `history` before the prompt, and its options."""
    columns = {field.column for field in fields.values() if field.value is not None}
    before = turns_before(fields)
    options = options_of(fields)
    if isinstance(prompt, str):
        if before or options:
            found = "is a text, taken as it is, beside a system, history or tools"
            expected = "write them into the text, or the prompt as messages"
            raise InputError(f"{fields['prompt'].where} {found}: {expected}")
        return Reading(prompt, answers, {}, columns)
    if before and prompt[0]["role"] == "system":
        if prompt[0] != before[0]:
            raise Unusable("'system' or 'history' stands beside a dialogue with its own system turn")
        prompt = prompt[1:]
    return Reading(before + prompt, answers, options, columns)


def turns_before(fields: dict[str, Field]) -> Messages:
    """The row's system turn, and the exchanges of its history."""
    turns = []
    system, history = fields["system"], fields["history"]
    if system.value is not None:
        turns.append({"role": "system", "content": text_of(system)})
    if history.value is None:
        return turns
    for exchange in listed(history.value):
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise InputError(f"{history.where}: expected pairs of what the user and the assistant said")
        for role, content in zip(("user", "assistant"), exchange):
            turns.append({"role": role, "content": text_of(Field(content, history.where))})
    return turns


def options_of(fields: dict[str, Field]) -> dict[str, Any]:
    """What else the chat template is given: the row's tools and `chat_template_kwargs`."""
    field = fields["chat_template_kwargs"]
    options = from_json(field.value or {})
    if not isinstance(options, dict):
        raise InputError(f"{field.where} is of type {type(options).__name__}: expected names and their values")
    tools = from_json(fields["tools"].value)
    if is_blank(tools):
        return options
    return {"tools": tools, **options}


# What a field says


def text_or_messages(field: Field) -> str | Messages:
    """A text, or messages: a list of them or one alone, also as JSON, as a .csv holds them."""
    values = from_json(field.value)
    if isinstance(field.value, str) and not are_messages(values):
        return text_of(field)
    if not isinstance(values, list | dict):
        return text_of(field)  # which is none, and says so
    messages = []
    for j, value in enumerate(listed(values)):
        message = message_of(Field(value, f"{field.where}, message {j}"))
        if message["content"] is not None:
            messages.append(message)
    if not messages:
        raise InputError(f"{field.where} is empty: expected messages")
    return messages


def are_messages(values: Any) -> bool:
    """Whether one or each of several has the fields of a message. Their values may still be wrong."""
    for value in listed(values):
        names = set(value) if isinstance(value, dict) else set()
        if not any(names >= fields for fields in MESSAGE_FIELDS):
            return False
    return bool(values)


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def message_of(field: Field) -> Message:
    """Role, content and other fields. The content is None of a system turn that has none."""
    message = field.value if isinstance(field.value, dict) else {}
    role = message.get("role") or message.get("from")
    role = OTHER_ROLES.get(str(role), role)
    if role not in ROLES:
        raise InputError(f"{field.where}: expected a role ({', '.join(ROLES)}) and a content")
    content = message.get("content")
    if content is None:
        content = message.get("value")
    if isinstance(content, list):
        content = "".join([text_of_part(part, field.where) for part in content])
    others = {name: value for name, value in message.items() if not is_blank(value)}
    for name in ("role", "from", "content", "value"):
        others.pop(name, None)
    may_be_empty = role == "system" or "tool_calls" in others  # calls may be all that is said
    if content or not may_be_empty:
        content = text_of(Field(content, f"{field.where}: 'content'"))
    elif role != "system":
        content = ""
    return {"role": role, "content": content, **others}


def text_of_part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        raise InputError(f"{where}: 'content' has a part that is no text: images and sounds are not read")
    return text


def text_of(field: Field) -> str:
    """A text that is not blank."""
    value, where, _ = field
    if not isinstance(value, str):
        kind = "missing or null" if value is None else f"of type {type(value).__name__}"
        raise InputError(f"{where} is {kind}: expected a text")
    if re.search("[\ud800-\udfff]", value):
        raise InputError(f"{where} holds half a surrogate pair, which no encoding has: expected Unicode text")
    if not value.strip():
        raise Unusable("a text is empty")
    return value


def from_json(value: Any) -> Any:
    """What a text of JSON holds, and anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def is_blank(value: Any) -> bool:
    """Whether this says nothing: null, an empty list or object, a text of white space."""
    return value in (None, [], {}) or (isinstance(value, str) and not value.strip())


def squeezed(text: str) -> str:
    """Without white space, in which a template may differ from what it is given."""
    return "".join(text.split())
