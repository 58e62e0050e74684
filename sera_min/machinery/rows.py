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
| other trainers | any of these under the other names in FIELDS

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import datasets

from sera_min.machinery.errors import InputError, Unusable, in_one_line, one_line

TEXT_FILES = (".json", ".jsonl", ".csv", ".json.gz", ".jsonl.gz", ".csv.gz")
SUFFIXES = (*TEXT_FILES, ".parquet")
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
        reason = error
        if isinstance(error, datasets.exceptions.DatasetGenerationError):
            reason = error.__cause__ or error  # by itself it only says that something failed
        raise InputError(f"{source}: cannot be read: {one_line(reason)}") from None
    if isinstance(rows, datasets.Dataset):
        return rows.select(range(len(rows))[:limit])
    return rows[:limit]


def is_path(name: str) -> bool:
    """Whether this cannot be a name on the hub, which is "owner/name"."""
    return name.count("/") > 1 or name.startswith((".", "~", "/")) or name.endswith("/")


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
        with in_one_line(file):
            rows += read_file(Path(file))
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


# What a field says. Errors begin where the place ends, which `naming` puts before them.


@contextmanager
def naming(place: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}{error}") from None


def text_of(value: Any) -> str:
    """A text that is not blank."""
    if not isinstance(value, str):
        kind = "missing or null" if value is None else f"of type {type(value).__name__}"
        raise InputError(f" is {kind}: expected a text")
    if re.search("[\ud800-\udfff]", value):
        raise InputError(" holds half a surrogate pair, which no encoding has: expected Unicode text")
    if not value.strip():
        raise Unusable("a text is empty")
    return value


def text_or_messages(value: Any) -> str | Messages:
    """A text, or messages: a list of them or one alone, also as JSON, as a .csv holds them."""
    values = from_json(value)
    if isinstance(values, dict):
        values = [values]
    if not isinstance(values, list):
        return text_of(value)
    are_messages = bool(values) and all(is_message(one) for one in values)
    if isinstance(value, str) and not are_messages:
        return text_of(value)  # an answer in JSON
    messages = []
    for j, one in enumerate(values):
        with naming(f", message {j}"):
            message = message_of(one)
        if message["content"] is not None:
            messages.append(message)
    if not messages:
        raise InputError(" is empty: expected messages")
    return messages


def is_message(value: Any) -> bool:
    """Whether it has the fields of a message. Their values may still be wrong."""
    names = set(value) if isinstance(value, dict) else set()
    return any(names >= fields for fields in MESSAGE_FIELDS)


def message_of(value: Any) -> Message:
    """Role, content and other fields. The content is None of a system turn that has none."""
    message = value if isinstance(value, dict) else {}
    role = message.get("role") or message.get("from")
    role = OTHER_ROLES.get(str(role), role)
    if role not in ROLES:
        raise InputError(f": expected a role ({', '.join(ROLES)}) and a content")
    content = message.get("content")
    if content is None:
        content = message.get("value")
    if isinstance(content, list):
        content = "".join([text_of_part(part) for part in content])
    others = {name: field for name, field in message.items() if not is_blank(field)}
    for name in ("role", "from", "content", "value"):
        others.pop(name, None)
    may_be_empty = role == "system" or "tool_calls" in others  # calls may be all that is said
    if content or not may_be_empty:
        with naming(": 'content'"):
            content = text_of(content)
    elif role != "system":
        content = ""
    return {**turn(role, content), **others}


def text_of_part(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        raise InputError(": 'content' has a part that is no text: images and sounds are not read")
    return text


def turn(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


def system_turn(value: Any) -> Messages:
    return [turn("system", text_of(value))]


def exchanges(value: Any) -> Messages:
    """Turns from pairs of what the user and the assistant said."""
    turns = []
    pairs = value if isinstance(value, list) else [value]
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(": expected pairs of what the user and the assistant said")
        turns += [turn("user", text_of(pair[0])), turn("assistant", text_of(pair[1]))]
    return turns


def options_of(value: Any) -> dict[str, Any]:
    options = from_json(value)
    if not isinstance(options, dict):
        raise InputError(f" is of type {type(options).__name__}: expected names and their values")
    return options


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


# What a row says

Reader = Callable[[Any], Any]
FIELDS: dict[str, tuple[Reader, tuple[str, ...]]] = {  # its columns: where a row has several, the first counts
    "prompt": (text_or_messages, ("prompt", "conversations", "messages")),
    "instruction": (text_of, ("instruction", "question")),
    "input": (text_of, ("input",)),
    "chosen": (text_or_messages, ("chosen", "chosen_response", "chosen_conversations")),
    "rejected": (text_or_messages, ("rejected", "rejected_response", "rejected_messages", "rejected_conversations")),
    "system": (system_turn, ("system",)),
    "history": (exchanges, ("history",)),
    "tools": (from_json, ("tools",)),
    "chat_template_kwargs": (options_of, ("chat_template_kwargs",)),
}
REQUIRED = ("prompt", "instruction", "chosen", "rejected")  # where they are there, blank is not absent
KNOWN = set().union(*(columns for _, columns in FIELDS.values()))


class Reading(NamedTuple):
    """What a row says. The answers are texts if the prompt is a text, messages if it is messages."""

    prompt: str | Messages
    answers: list[Any]
    options: dict[str, Any]  # for the chat template
    unread: set[str]  # columns that say something else


def preference(row: Any, where: str) -> Reading:
    """A row of any form. Raises InputError naming the row and the field, and Unusable."""
    columns = columns_of(row, where)
    fields = fields_of(row, columns, where)
    prompt, answer = prompt_of(fields, columns)
    fields.setdefault("chosen", answer)
    if fields["chosen"] is None and "rejected" not in fields:
        raise unknown_form(row, where)
    prompts, answers = [], []
    for name in ("chosen", "rejected"):
        with naming(f"{where}: '{columns.get(name, name)}'"):
            asked, answer = asked_and_answered(prompt, fields.get(name))
        prompts.append(asked)
        answers.append(answer)
    if prompts[0] != prompts[1]:
        raise Unusable("the responses answer different prompts")
    x, options = in_context(prompts[0], fields, f"{where}: '{columns.get('prompt')}'")
    return Reading(x, answers, options, unread_columns(row, columns))


def question(row: Any, where: str) -> Reading:
    """A row as a prompt to answer, whose own answers are not read. Raises as `preference` does."""
    columns = columns_of(row, where)
    columns.pop("chosen", None)
    columns.pop("rejected", None)
    fields = fields_of(row, columns, where)
    prompt, _ = prompt_of(fields, columns)
    if not prompt:
        raise InputError(f"{where}: expected 'prompt' or 'instruction'")
    x, options = in_context(prompt, fields, f"{where}: '{columns.get('prompt')}'")
    return Reading(x, [], options, unread_columns(row, columns))


def columns_of(row: Any, where: str) -> dict[str, str]:
    """The fields that a row has, and the column of each."""
    if not isinstance(row, dict):
        raise InputError(f"{where} is of type {type(row).__name__}: expected fields and their values")
    columns = {}
    for name, (_, names) in FIELDS.items():
        filled = [column for column in names if row.get(column) is not None]
        if filled and (name in REQUIRED or not is_blank(row[filled[0]])):
            columns[name] = filled[0]
    if "prompt" in columns:
        columns.pop("instruction", None)
        columns.pop("input", None)
    if columns.keys().isdisjoint((*REQUIRED, "input")):
        raise unknown_form(row, where)
    return columns


def unread_columns(row: Message, columns: dict[str, str]) -> set[str]:
    filled = {column for column, value in row.items() if not is_blank(value)}
    return filled - set(columns.values())


def fields_of(row: Message, columns: dict[str, str], where: str) -> dict[str, Any]:
    fields = {}
    for name, column in columns.items():
        reader, _ = FIELDS[name]
        with naming(f"{where}: '{column}'"):
            fields[name] = reader(row[column])
    return fields


def unknown_form(columns: Iterable[Any], where: str) -> InputError:
    names = " ".join(", ".join(map(str, columns)).split())[:300] or "(none)"
    return InputError(f"{where} has the columns {names}: expected those of one of these: {FORMS}")


def prompt_of(fields: dict[str, Any], columns: dict[str, str]) -> tuple[str | Messages | None, Messages | None]:
    """The prompt that a row names, if any, and the answer that ends it in `conversations` and `messages`."""
    if "prompt" not in fields:
        texts = [fields[name] for name in ("instruction", "input") if name in fields]
        if not texts:
            return None, None
        return [turn("user", "\n\n".join(texts))], None
    prompt = fields["prompt"]
    if columns["prompt"] == "prompt" or isinstance(prompt, str) or prompt[-1]["role"] != "assistant":
        return prompt, None
    return prompt[:-1], prompt[-1:]


def asked_and_answered(prompt: str | Messages | None, answer: Any) -> tuple[str | Messages, Any]:
    """What the row's prompt and its `chosen` or `rejected` together ask, and the answer."""
    if answer is None:
        raise InputError(" is missing or null: expected a text")
    if isinstance(prompt, str):
        if isinstance(answer, str):
            return prompt, answer
        prompt = [turn("user", prompt)]
    if isinstance(answer, str):
        answer = [turn("assistant", answer)] if prompt else transcript(answer)
    dialogue = joined(prompt or [], answer)
    if dialogue[-1]["role"] != "assistant":
        raise Unusable("a dialogue ends without an answer")
    if len(dialogue) < 2:
        raise InputError(": expected a dialogue that ends with the assistant's turn")
    return dialogue[:-1], dialogue[-1]


def transcript(text: str) -> Messages:
    """HH-RLHF's plain dialogue as messages."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip("\n"))
    if before.strip() or not parts:
        raise InputError(": expected 'prompt' or 'instruction' beside it, or a dialogue '\\n\\nHuman: …'")
    if parts[-2] == "Human":
        raise Unusable("a transcript ends without an answer")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [turn(roles[speaker], text_of(part).strip()) for speaker, part in zip(parts[::2], parts[1::2])]


def joined(prompt: Messages, dialogue: Messages) -> Messages:
    """The prompt and the dialogue that goes on after it, or the dialogue that repeats it. Raises Unusable."""
    roles = [message["role"] for message in dialogue]
    if not prompt:
        if len(roles) > 2 and roles[-2:] == ["assistant", "assistant"]:
            raise Unusable("two turns of the assistant follow each other")
        return dialogue
    users_turn = prompt[-1]["role"] in ("system", "assistant")
    if roles[0] in ("assistant", "tool") or (roles[0] == "user" and users_turn):
        return prompt + dialogue
    asked = [squeezed(message["content"]) for message in dialogue if message["role"] == "user"]
    asked_before = squeezed("".join(message["content"] for message in prompt))
    repeated = asked_before in "".join(asked) or (bool(asked) and asked[-1] in asked_before)
    if not repeated:
        raise Unusable("the prompt says something else than the dialogues beside it")
    return dialogue


def in_context(prompt: str | Messages, fields: dict[str, Any], where: str) -> tuple[str | Messages, dict[str, Any]]:
    """The prompt after the row's `system` and `history`, and the options for the chat template."""
    before = fields.get("system", []) + fields.get("history", [])
    options = fields.get("chat_template_kwargs", {})
    if not is_blank(fields.get("tools")):
        options = {"tools": fields["tools"], **options}
    if isinstance(prompt, str):
        if before or options:
            found = "is a text, taken as it is, beside a system, history or tools"
            raise InputError(f"{where} {found}: write them into the text, or the prompt as messages")
        return prompt, {}
    if before and prompt[0]["role"] == "system":
        if prompt[0] != before[0]:
            raise Unusable("'system' or 'history' stands beside a dialogue with its own system turn")
        prompt = prompt[1:]
    return before + prompt, options
