"""Rows of preference data: where they come from, and what each of them says.

`read_rows` takes a file, a folder or a data set of the hub. Whatever the form of a row (docs/data.md
lists them), `preference` makes of it a prompt, two answers, and options for the chat template. The
last turn of the assistant is the answer, everything before it the prompt. A text `prompt` beside text
answers is taken as it is, without a template; everything else is messages. A missing field, or one of
a wrong type, is an InputError; a blank text or a dialogue without an answer is Unusable.
"""

import csv
import gzip
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import datasets
from pyarrow.parquet import ParquetFile

from sera_min.machinery.errors import InputError, Unusable, naming
from sera_min.machinery.folder import at_home, is_lfs_pointer, is_path

SUFFIXES = (".json", ".jsonl", ".csv", ".json.gz", ".jsonl.gz", ".csv.gz", ".parquet")
COLUMNS = {  # of a field: where a row has several, the first counts
    "prompt": ("prompt",),
    "messages": ("conversations", "messages"),
    "instruction": ("instruction", "question"),
    "input": ("input",),
    "chosen": ("chosen", "chosen_response", "chosen_conversations"),
    "rejected": ("rejected", "rejected_response", "rejected_messages", "rejected_conversations"),
    "system": ("system",),
    "tools": ("tools",),
}
KNOWN = set().union(*COLUMNS.values())
QUESTIONS = ("prompt", "conversations", "messages", "instruction", "question")
ANSWERS = ("chosen", "rejected")  # which drop their row where they are empty; any other column is then absent
ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
MAIN_FIELDS = ("role", "from", "content", "value")
MESSAGE_FIELDS = ({"role", "content"}, {"from", "value"}, {"role", "tool_calls"})
LIKE_MESSAGES = re.compile(r"(?s)(array\(|[\[(\s])*\{(?=.*['\"](role|from)['\"]:)(?=.*['\"](content|value)['\"]:)")

Message = dict[str, Any]  # `role`, `content`, and whatever other fields it has
Messages = list[Message]


# Where rows come from


def read_rows(name: str, split: str, limit: int | None = None, config: str | None = None) -> list[Any]:
    """The rows, at most `limit`, of a file, a folder, or a hub data set and its configuration."""
    path = Path(at_home(name))
    if not path.exists() and (name.endswith(SUFFIXES) or is_path(name)):
        raise InputError(f"{name}: no such file")
    place = name
    if not path.is_file():
        place += f", split '{split}'"
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are told in ours
    with naming(f"{place} cannot be read"):
        if path.is_file():
            return read_file(path)[:limit]
        if path.is_dir():
            return read_folder(path, split, config)[:limit]
        table = datasets.load_dataset(name, config, split=split, trust_remote_code=False)
        return table.select(range(len(table))[:limit]).to_list()


def read_folder(folder: Path, split: str, config: str | None) -> list[Any]:
    """A folder that `save_to_disk` wrote, or one of files, whose names tell their split."""
    for saved in (folder / split, folder):
        if (saved / "state.json").exists():
            return datasets.load_from_disk(str(saved)).to_list()
    with TemporaryDirectory() as place:
        seen = folder.resolve()
        if set(str(seen)) & set("[*?"):  # which `datasets` reads as a pattern: it sees links to the files
            seen = shutil.copytree(seen, Path(place).resolve() / "links", copy_function=os.symlink)
        files = datasets.load_dataset_builder(str(seen), config).config.data_files
    if split not in files:
        raise ValueError(f"its splits are {', '.join(map(str, files))}")
    of_splits = set().union(*files.values())
    unread = []
    for path in sorted(folder.rglob("*")):
        if path.name.endswith(SUFFIXES) and str(seen / path.relative_to(folder)) not in of_splits:
            unread.append(path.name)
    if unread:
        print(f"{folder}: files that are not read: {', '.join(unread)}")
    rows = []
    for file in files[split]:
        path = folder / Path(file).relative_to(seen)
        with naming(str(path)):
            rows += read_file(path)
    return rows


def read_file(path: Path) -> list[Any]:
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"expected a file that ends with one of {', '.join(SUFFIXES)}")
    if is_lfs_pointer(path):
        raise ValueError("it is a Git-LFS pointer to a file, which `git lfs pull` downloads")
    if path.suffix == ".parquet":
        return datasets.Dataset(datasets.table.InMemoryTable(ParquetFile(path).read())).to_list()
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        text = file.read()
    if path.name.endswith((".csv", ".csv.gz")):
        return read_csv(text)
    return read_json(text)


def read_json(text: str) -> list[Any]:
    """A JSON list, or a row a line. `datasets` takes some texts for dates, and wants one type in all rows."""
    if text.lstrip().startswith("["):
        return json.loads(text, parse_constant=no_number)
    rows: list[Any] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            with naming(f"row {len(rows)}, in line {number}, is not JSON of one line"):
                rows.append(json.loads(line, parse_constant=no_number))
    return rows


def no_number(name: str) -> None:
    """NaN, as pandas writes what is missing, is null; and so is Infinity."""
    return None


def read_csv(text: str) -> list[Any]:
    """Rows of texts. `datasets` reads "NA" as null and "4" as a number."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text), strict=True)
    rows: list[Any] = []
    try:
        columns = next(reader, [])
        for cells in filter(None, reader):  # but for blank lines
            if not len(cells) == len(columns) == len(set(columns)):
                raise csv.Error(f"expected a cell for each of the columns {', '.join(columns)}, all of different names")
            rows.append(dict(zip(columns, cells)))
    except csv.Error as error:
        raise ValueError(f"row {len(rows)}, near line {reader.line_num}: {error}") from None
    return rows


# What a row says


class Reading(NamedTuple):
    """What a row says. The answers are texts if the prompt is a text, messages if it is messages."""

    prompt: str | Messages
    answers: list[Any]
    options: dict[str, Any]  # for the chat template


def preference(row: Any) -> Reading:
    """A row of any form. Raises InputError naming the field, and Unusable."""
    prompt, answer = asked(row)
    found = []
    for name in ANSWERS:
        value = field(row, name, text_or_messages)
        if value is None and name == "chosen" and answer:
            value = [answer]
        with naming(f"'{name}'"):
            if value is None:
                raise InputError(f"missing or null ({columns_of(row)}): expected a form of docs/data.md")
            found.append(prompt_and_answer(prompt, value, row))
    (x, chosen), (other, rejected) = found
    if type(x) is not type(other):
        raise Unusable("one response is a text, the other a message")
    if x != other:
        raise Unusable("the responses answer different prompts")
    return in_context(x, [chosen, rejected], row)


def columns_of(row: dict[str, Any]) -> str:
    names = ", ".join(map(repr, row)) or "none"
    return "columns: " + " ".join(names.split())[:300]


def asked(row: Any) -> tuple[str | Messages | None, Message | None]:
    """The prompt that a row names, if any, and the answer that ends it in `conversations` and `messages`."""
    if not isinstance(row, dict):
        raise InputError(f"of type {type(row).__name__}: expected fields and their values")
    prompt = field(row, "prompt", text_or_messages)
    if prompt:
        return prompt, None
    messages = field(row, "messages", text_or_messages)
    if isinstance(messages, list) and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]
    question = [field(row, "instruction", text_of)]
    if question[0] or isinstance(row.get("input"), str):
        question.append(field(row, "input", text_of))
    text = "\n\n".join(filter(None, question))
    if messages or not text:
        return messages, None
    return [turn("user", text)], None


def displaced(row: dict[str, Any]) -> list[str]:
    """Of the columns that may ask a question, those that are not read, because another one is."""
    asking = [column for column in QUESTIONS if not is_absent(from_json(row.get(column)))]
    if asking and asking[0] not in COLUMNS["instruction"] and not is_absent(row.get("input")):
        asking.append("input")
    return asking[1:]


def prompt_and_answer(prompt: str | Messages | None, answer: Any, row: dict) -> tuple[str | Messages, Any]:
    """What the row's prompt and its `chosen` or `rejected` together ask, and the answer."""
    if isinstance(prompt, str):
        if isinstance(answer, str):
            return prompt, answer
        prompt = [turn("user", prompt)]
    dialogue = answer
    if isinstance(answer, str) and prompt:
        dialogue = [turn("assistant", answer)]
    elif isinstance(answer, str):
        dialogue = transcript(answer, row)
    if prompt:
        dialogue = joined(prompt, dialogue)
    if dialogue[-1]["role"] != "assistant":
        raise Unusable("a dialogue ends without an answer")
    if len(dialogue) < 2:
        raise InputError("nothing stands before the answer: expected a 'prompt' beside it, or a dialogue")
    if dialogue[:-1] != prompt and len(dialogue) > 2 and dialogue[-2]["role"] == "assistant":
        raise Unusable("two turns of the assistant follow each other")
    return dialogue[:-1], dialogue[-1]


def joined(prompt: Messages, dialogue: Messages) -> Messages:
    """The prompt and the dialogue that goes on after it, or the dialogue that repeats it. Raises Unusable.

    S, U and A are a system's, a user's and an assistant's messages:
      prompt U1            dialogue A           goes on
      prompt S or U0 A0    dialogue U1 A        goes on
      prompt S U1          dialogue S U1 A      repeats it
      prompt "U1"          dialogue S U0 A0 U1 A    one text, which may be any or all of the questions
    """
    first = dialogue[0]["role"]
    if first in ("assistant", "tool"):
        return prompt + dialogue
    in_prompt = [squeezed(message["content"]) for message in prompt]
    in_dialogue = [squeezed(message["content"]) for message in dialogue]
    asked_first = [squeezed(message["content"]) for message in prompt if message["role"] == "user"][:1]
    users_turn = prompt[-1]["role"] in ("system", "assistant")
    if first == "user" and users_turn and in_dialogue[:1] != asked_first:
        return prompt + dialogue
    repeated = all(one in in_dialogue for one in in_prompt)
    if len(prompt) == 1 and not repeated:
        questions = [squeezed(message["content"]) for message in dialogue if message["role"] == "user"]
        repeated = in_prompt[0] in "".join(questions) or (bool(questions) and questions[-1] in in_prompt[0])
    if not repeated:
        raise Unusable("the prompt says something else than the dialogues beside it")
    return dialogue


def transcript(text: str, row: dict) -> Messages:
    """HH-RLHF's plain dialogue as messages."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip("\n"))
    if before.strip() or not parts:
        if any(row.get(column) is not None for column in QUESTIONS):
            raise Unusable("a text is empty")  # the question
        expected = "expected 'prompt' or 'instruction' beside it, or a dialogue '\\n\\nHuman: …'"
        raise InputError(f"{expected} ({columns_of(row)})")
    if parts[-2] == "Human":
        raise Unusable("a transcript ends without an answer")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [turn(roles[speaker], text_of(part).strip()) for speaker, part in zip(parts[::2], parts[1::2])]


def in_context(prompt: str | Messages, answers: list[Any], row: dict[str, Any]) -> Reading:
    """With the row's `system` before the prompt, and its `tools` as options."""
    system = field(row, "system", text_of)
    tools = field(row, "tools", objects)
    options = {"tools": tools} if tools else {}
    if isinstance(prompt, str):
        if system or tools:
            raise InputError("'prompt' is a text, taken as it is, beside a system or tools: write it as messages")
    elif system and prompt[0] != turn("system", system):
        if prompt[0]["role"] == "system":
            raise Unusable("'system' stands beside a dialogue with its own system turn")
        prompt = [turn("system", system), *prompt]
    return Reading(prompt, answers, options)


# What a field says


def field(row: dict[str, Any], name: str, reader: Callable[[Any], Any]) -> Any:
    """What is read from the first of the field's columns that says something; None where none does."""
    for column in COLUMNS[name]:
        value = row.get(column)
        if value is None or (name not in ANSWERS and is_absent(from_json(value))):
            continue
        with naming(f"'{column}'"):
            return reader(value)
    return None


def is_absent(value: Any) -> bool:
    """Whether this says nothing: null, a text of white space, or a list or object of nothing else."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return all(map(is_absent, value))
    return value is None or (isinstance(value, str) and not value.strip())


def from_json(value: Any) -> Any:
    """What a text of JSON holds, and anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def without_nulls(value: Any) -> Any:
    """The same without the fields that are null, such as parquet files fill in."""
    if isinstance(value, dict):
        return {name: without_nulls(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [without_nulls(one) for one in value]
    return value


def objects(value: Any) -> list[Any]:
    """A list of objects, such as tools or calls."""
    values = without_nulls(from_json(value))
    if not isinstance(values, list) or not all(isinstance(one, dict) for one in values):
        raise InputError("expected a list of objects, also as JSON")
    return values


def text_of(value: Any) -> str:
    """A text that is not blank."""
    if value is None:
        raise InputError("missing or null: expected a text")
    if not isinstance(value, str):
        raise InputError(f"of type {type(value).__name__}: expected a text")
    if not value.strip():
        raise Unusable("a text is empty")
    return value


def text_or_messages(value: Any) -> str | Messages:
    """A text, or messages: a list of them or one alone, also as JSON, as a .csv holds them."""
    values = from_json(value)
    if isinstance(values, dict):
        values = [values]
    if isinstance(values, str) and LIKE_MESSAGES.match(values):
        raise InputError("messages as Python writes them, or not to their end: write them as JSON")
    if not isinstance(values, list) or (isinstance(value, str) and not any(map(is_message, values))):
        return text_of(value)  # which may be an answer in JSON
    messages = []
    for j, one in enumerate(values):
        with naming(f"message {j}"):
            messages.append(message_of(without_nulls(one)))
    messages = [one for one in messages if one["content"] or one["role"] != "system"]
    if not messages:
        raise InputError("empty: expected messages")
    return messages


def is_message(value: Any) -> bool:
    """Whether it has the fields of a message. Their values may still be wrong."""
    return isinstance(value, dict) and any(value.keys() >= fields for fields in MESSAGE_FIELDS)


def message_of(value: Any) -> Message:
    """Role, content and the other fields that say something."""
    message = value if isinstance(value, dict) else {}
    role = message.get("role", message.get("from"))
    role = OTHER_ROLES.get(str(role), role)
    if role not in ROLES:
        raise InputError(f"expected a role ({', '.join(ROLES)}) and a content, not {str(value)[:60]!r}")
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        kinds = {part.get("type", "text") for part in content if isinstance(part, dict)}
        parts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in content]
        if kinds - {"text", "input_text", "output_text"} or not all(isinstance(part, str) for part in parts):
            raise InputError("'content' has a part that is no text: images and sounds are not read")
        content = "".join(parts)
    others = {name: one for name, one in message.items() if name not in MAIN_FIELDS and not is_absent(from_json(one))}
    if "tool_calls" in others:
        with naming("'tool_calls'"):
            others["tool_calls"] = objects(others["tool_calls"])
    if is_absent(content) and (role == "system" or "tool_calls" in others):
        content = ""  # calls may be all that is said
    else:
        with naming("'content'"):
            content = text_of(content)
    return {**turn(role, content), **others}


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def squeezed(text: str) -> str:
    """Without white space, in which a template may differ from what it is given."""
    return "".join(text.split())
