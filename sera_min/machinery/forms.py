"""What a row of preference data says, in whatever form it is published: a prompt and two answers.

| form | columns |
|---|---|
| texts | `prompt`, `chosen`, `rejected` (taken as they are: no template, no separator)
| messages | `prompt`: messages, or a text (one user turn); `chosen`, `rejected`: the answer
| dialogues | `chosen`, `rejected`: messages up to the answer, or "\\n\\nHuman: … \\n\\nAssistant: …" (HH-RLHF)
| instructions | `instruction` or `question`, `input` (may be absent or empty), `chosen`, `rejected`
| of other trainers | the same under the other names of COLUMNS

The last turn of the assistant is the answer, everything before it the prompt. `system`, `history`, `tools` and
`chat_template_kwargs` may stand beside all but texts. A field that is missing or of another type is an error; a text
that is there but blank, or a dialogue that nobody answers, drops its pair.
"""

import json
import re
from typing import Any, NamedTuple

from sera_min.machinery.errors import InputError, Unusable

COLUMNS = {  # what is read, and the names it has: of several in a row, the first
    "prompt": ("prompt", "conversations", "messages"),
    "instruction": ("instruction", "question"),
    "input": ("input",),
    "chosen": ("chosen", "chosen_response", "chosen_conversations"),
    "rejected": ("rejected", "rejected_response", "rejected_messages", "rejected_conversations"),
    "system": ("system",),
    "history": ("history",),  # pairs of what the user and the assistant said before
    "tools": ("tools",),
    "chat_template_kwargs": ("chat_template_kwargs",),
}
FORMS = (
    "prompt, chosen, rejected; dialogues in chosen, rejected; instruction or question, chosen, rejected; conversations "
    "or messages, chosen, rejected; messages, rejected_response; chosen_conversations, rejected_conversations"
)
ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {"human": "user", "gpt": "assistant", "observation": "tool"}  # in messages of `from` and `value`

Message = dict[str, Any]  # of a role, a content, and whatever else it says
Messages = list[Message]


class Reading(NamedTuple):
    """A prompt, its answers, and what else the chat template is given. A text has texts, messages have messages."""

    prompt: str | Messages
    answers: list[Any]
    options: dict[str, Any]


def columns_of(row: Any, where: str) -> dict[str, str]:
    """What is read of a row, and the columns it is in. Raises InputError where there is nothing."""
    if not isinstance(row, dict):
        raise InputError(f"{where} is of type {type(row).__name__}: expected fields and their values")
    found = {what: name for what, names in COLUMNS.items() for name in reversed(names) if row.get(name) is not None}
    if "prompt" in found:
        found = {what: name for what, name in found.items() if what not in ("instruction", "input")}
    if found.keys().isdisjoint(("prompt", "instruction", "input", "chosen", "rejected")):
        raise unknown_form(row, where)
    return found


def unknown_form(columns: Any, where: str) -> InputError:
    names = " ".join(", ".join(map(str, columns)).split())[:300]
    return InputError(f"{where} has the columns {names or '(none)'}: expected those of one of these: {FORMS}")


def preference(row: Any, where: str) -> Reading:
    """A row of any of the forms. Raises InputError naming the row and the field, and Unusable."""
    found = columns_of(row, where)
    prompt, last_answer = _prompt(row, found, where)
    values = {field: row.get(found.get(field)) for field in ("chosen", "rejected")}
    if values["chosen"] is None and last_answer:
        values["chosen"] = last_answer
    if list(values.values()) == [None, None]:
        raise unknown_form(row, where)
    (x, chosen), (other_x, rejected) = (
        _split(prompt, value, f"{where}: '{found.get(field, field)}'") for field, value in values.items()
    )
    if x != other_x:
        raise Unusable("the responses answer different prompts")
    return _in_context(x, [chosen, rejected], row, where)


def question(row: Any, where: str) -> Reading:
    """A row as a prompt to answer. Raises as `preference` does."""
    prompt, _ = _prompt(row, columns_of(row, where), where)
    if prompt is None:
        raise InputError(f"{where}: expected 'prompt' or 'instruction'")
    return _in_context(prompt, [], row, where)


def _prompt(row: Message, found: dict[str, str], where: str) -> tuple[str | Messages | None, Messages]:
    """The prompt that a row names, None where it is in the responses; and the answer where that stands in it."""
    if "prompt" in found:
        prompt: Any = _text_or_messages(row[found["prompt"]], f"{where}: '{found['prompt']}'")
        if found["prompt"] != "prompt" and isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
            return prompt[:-1], prompt[-1:]
        return prompt, []
    names = [found[what] for what in ("instruction", "input") if what in found]
    texts = [_text(row[name], f"{where}: '{name}'") for name in names if name != "input" or row[name] != ""]
    return ([{"role": "user", "content": "\n\n".join(texts)}] if texts else None), []


def _in_context(x: str | Messages, answers: list[Any], row: Message, where: str) -> Reading:
    """With the row's `system` and `history` before the prompt, and its `tools` and `chat_template_kwargs`."""
    options = {"tools": _json(row["tools"])} if row.get("tools") else {}
    more = _json(row.get("chat_template_kwargs") or {})
    if not isinstance(more, dict):
        kind = type(more).__name__
        raise InputError(f"{where}: 'chat_template_kwargs' is of type {kind}: expected names and their values")
    before = _before(row, where)
    if isinstance(x, str):
        if before or options or more:
            raise InputError(f"{where}: 'prompt' is a text, taken as it is, beside a system, history or tools: "
                             "write them into the text, or the prompt as messages")  # fmt: skip
        return Reading(x, answers, {})
    if before and x[0]["role"] == "system":
        if x[0] != before[0]:
            raise Unusable("'system' or 'history' stands beside a dialogue with its own system turn")
        x = x[1:]
    return Reading(before + x, answers, options | more)


def _before(row: Message, where: str) -> Messages:
    system, history = row.get("system") or "", row.get("history") or []
    turns = [("system", [system])] if not isinstance(system, str) or system.strip() else []
    if not (isinstance(history, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in history)):
        raise InputError(f"{where}: 'history': expected pairs of what the user and the assistant said")
    turns += [("history", turn) for turn in history]
    roles = {"system": ["system"], "history": ["user", "assistant"]}
    return [{"role": role, "content": _text(text, f"{where}: '{column}'")}
            for column, texts in turns for role, text in zip(roles[column], texts)]  # fmt: skip


def _split(prompt: str | Messages | None, value: Any, where: str) -> tuple[str | Messages, Any]:
    """What the row's prompt, if it has one, and its `chosen` or `rejected` together ask, and the answer."""
    value = _text_or_messages(value, where)
    if isinstance(value, list):
        dialogue = _joined(prompt, value)
    elif isinstance(prompt, str):
        return prompt, value
    else:
        dialogue = [*prompt, {"role": "assistant", "content": value}] if prompt else _human_assistant(value, where)
    if dialogue[-1]["role"] != "assistant":
        raise Unusable("a dialogue ends without an answer")
    if len(dialogue) < 2:
        raise InputError(f"{where}: expected a dialogue that ends with the assistant's turn")
    return dialogue[:-1], dialogue[-1]


def _joined(prompt: str | Messages | None, dialogue: Messages) -> Messages:
    """The dialogue, which goes on after the prompt or repeats it. Raises Unusable where it does neither."""
    first, *others = [message["role"] for message in dialogue]
    if not prompt:  # or nothing stands before its answer
        if others[-2:] == ["assistant", "assistant"]:
            raise Unusable("two turns of the assistant follow each other")
        return dialogue
    if isinstance(prompt, str):
        if first == "assistant" and not others:
            return [{"role": "user", "content": prompt}, *dialogue]
        asked = [squeezed(m["content"]) for m in dialogue if m["role"] == "user"]
        repeats = squeezed(prompt) in "".join(asked) or any(text in squeezed(prompt) for text in asked[-1:])
    else:
        if first in ("assistant", "tool") or (first == "user" and prompt[-1]["role"] in ("system", "assistant")):
            return prompt + dialogue
        repeats = prompt in (dialogue[: len(prompt)], dialogue[:-1][-len(prompt) :])
    if not repeats:
        raise Unusable("the prompt says something else than the dialogues beside it")
    return dialogue


def squeezed(text: str) -> str:
    """Without white space, in which a template may differ from what it is given."""
    return "".join(text.split())


def _json(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _text_or_messages(value: Any, where: str) -> str | Messages:
    if isinstance(value, str) and re.match(r'\s*\[\s*\{\s*"(role|content|from|value)"', value):
        value = _json(value)  # messages as a text, as a .csv holds them
    if isinstance(value, dict):
        value = [value]
    return _messages(value, where) if isinstance(value, list) else _text(value, where)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        kind = "missing or null" if value is None else f"of type {type(value).__name__}"
        raise InputError(f"{where} is {kind}: expected a text")
    if re.search("[\ud800-\udfff]", value):
        raise InputError(f"{where} holds half a surrogate pair, which no encoding has: expected Unicode text")
    if not value.strip():
        raise Unusable("a text is empty")
    return value


def _messages(values: list[Any], where: str) -> Messages:
    messages = [_message(value, f"{where}, message {j}") for j, value in enumerate(values)]
    messages = [message for message in messages if message != {"role": "system"}]  # whose content was None
    if not messages:
        raise InputError(f"{where} is empty: expected messages")
    return messages


def _message(value: Any, where: str) -> Message:
    """A message of `role` and `content`, or of `from` and `value`, with the other fields that it has."""
    fields = {name: field for name, field in value.items() if field is not None} if isinstance(value, dict) else {}
    role = fields.pop("role", None) or fields.pop("from", None)
    role = SPEAKERS.get(role, role) if isinstance(role, str) else None
    if role not in ROLES:
        raise InputError(f"{where}: expected a role ({', '.join(ROLES)}) and a content")
    content = fields.pop("content", None)
    content = fields.pop("value", None) if content is None else content
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if content is None and role == "system":
        return {"role": role}
    if not content and (role == "system" or fields.get("tool_calls")):  # calls may be all that a message says
        return {"role": role, "content": "", **fields}
    return {"role": role, "content": _text(content, f"{where}: 'content'"), **fields}


def _part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise InputError(f"{where}: 'content' has a part that is no text: images and sounds are not read")
    return text


def _human_assistant(text: str, where: str) -> Messages:
    """HH-RLHF's plain dialogue as messages, split at its turns."""
    before, *turns = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip("\n"))
    if before.strip() or not turns:
        raise InputError(f"{where}: expected 'prompt' or 'instruction' beside it, or a dialogue '\\n\\nHuman: …'")
    if turns[-2] == "Human":
        raise Unusable("a transcript ends without an answer")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": _text(c, where).strip()} for r, c in zip(turns[::2], turns[1::2])]


def as_text(x: str | Messages) -> str:
    """A prompt as people read it: a text or a lone message as it is, otherwise who says what."""
    if isinstance(x, str):
        return x
    return x[0]["content"] if len(x) == 1 else "\n\n".join(f"{m['role']}: {m['content']}" for m in x)


def texts_in(value: Any) -> list[str]:
    """All that messages or tools say, however deep."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for one in inner for text in texts_in(one)]
