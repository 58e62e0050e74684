"""Preference pairs from rows to token ids, and back to texts. Every row cut or dropped is counted.

What a row says is read by forms.py, rows come by files.py. Dialogues go through the tokenizer's chat template, as TRL's
do. A prompt's ids never depend on the response: where tokens merge across the border, the response is tokenised apart.
A response ends with exactly one end of sequence, unless cut.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, takewhile
from typing import Any, NamedTuple

import datasets
from tqdm import tqdm

from sera_min.machinery import forms
from sera_min.machinery.errors import InputError, Unusable, in_one_line
from sera_min.machinery.forms import Messages, Reading, as_text, squeezed, texts_in
from sera_min.machinery.rows import KNOWN, Rows, decoded
from sera_min.pairs import Ids, Pair

BATCH = 256  # rows that are tokenised together
# For tokenizers without a chat template: HH-RLHF's plain form, which a dialogue in that form survives unchanged.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ {'user': '\n\nHuman: ', 'assistant': '\n\nAssistant: ', 'system': ''}[m['role']] "
    "+ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
SPOKEN = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")  # are a part of an answer


class Given(NamedTuple):
    """A pair of the user's data, its prompt as people read it, and the number of its row (the first is 0)."""

    pair: Pair
    text: str
    row: int


@dataclass
class Encoder:
    """Token ids of what rows say. eos_ids: the tokens that end a response, the tokenizer's first."""

    tokenizer: Any
    eos_ids: Ids
    max_length: int
    max_prompt_length: int

    def __post_init__(self) -> None:
        set_template(self.tokenizer)
        self.forged = forgery_pattern(self.tokenizer, self.eos_ids)
        self.turn_end = turn_end(self.tokenizer, self.eos_ids)
        self.counts: Counter = Counter({"read": 0})
        self.all_needed = False  # a row that is Unusable is an InputError
        self.same_id: dict[int, int] = {}  # equal ids are one object: 8 bytes a token, where they come with 40

    def texts(self, reading: Reading, where: str) -> list[str]:
        """The prompt, and the prompt with each of its answers, as they are tokenised. Raises Unusable, InputError."""
        x, answers, options = reading
        eos = self.tokenizer.eos_token
        if isinstance(x, str):
            answers = [y.removesuffix(eos) for y in answers]
            said: list[Any] = answers  # the prompt may spell a BOS
        else:
            answers = [{**y, "content": y["content"].removesuffix(eos)} for y in answers]
            said = [*x, *answers, options]
        if any(self.forged.search(text) for text in texts_in(said)):
            raise Unusable("a text spells a special token")
        if not all(y["content"] or y.get("tool_calls") if isinstance(y, dict) else y for y in answers):
            raise Unusable("no token of the prompt or a response")
        return [x, *(x + y for y in answers)] if isinstance(x, str) else self.rendered(x, answers, options, where)

    def rendered(self, x: Messages, answers: Messages, options: dict[str, Any], where: str) -> list[str]:
        """The same of a dialogue. An answer goes on with the prompt's last turn where that is the assistant's too."""
        begun, opened, dialogues = x[-1]["role"] == "assistant", "add_generation_prompt", [[*x, y] for y in answers]
        if begun:
            opened = "continue_final_message"
            dialogues = [[*x[:-1], {**y, "content": x[-1]["content"] + y["content"]}] for y in answers]
        prompt, *wholes = (
            self.render(messages, where, {**options, **more})
            for messages, more in [(x, {opened: True}), *((dialogue, {}) for dialogue in dialogues)]
        )
        if not all(whole.startswith(prompt) for whole in wholes):
            shared = common_start([prompt, *wholes])  # as in TRL: what is opened only in a prompt is left out
            end = prompt[len(shared) :]
            parted = f"the chat template does not begin an answered dialogue with its own prompt's {end!r}"
            if begun or not shared.startswith(self.render(x, where, options)):
                raise InputError(f"{where}: {parted}")
            self.counts[f"prompts without their end, as {parted}"] += 1
            prompt = shared
        for y, whole in zip(answers, wholes):
            if squeezed(y["content"]) not in squeezed(whole[len(prompt) :]):
                raise InputError(f"{where}: the chat template leaves out or changes a part of the answer "
                                 f"{y['content'][:40]!r}: give the tokenizer another")  # fmt: skip
        self.check_written(x, answers, options, prompt, where)
        return [prompt, *wholes]

    def render(self, messages: Messages, where: str, options: dict[str, Any]) -> str:
        with in_one_line(f"{where}: the chat template does not take this dialogue"):
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def check_written(self, x: Messages, answers: Messages, options: dict, prompt: str, where: str) -> None:
        """What a dialogue says beside its answers is in what the template writes: otherwise dropped or counted."""

        def unwritten(before: Messages, messages: Messages) -> list[str]:  # fields without which all stays the same
            fields = sorted({field for message in messages for field in message} - {"role", "content"})
            without = [[{k: v for k, v in m.items() if k != field} for m in messages] for field in fields]
            texts = [self.render(before + some, where, options) for some in [messages, *without]] if fields else []
            return [field for field, text in zip(fields, texts[1:]) if text == texts[0]]

        lost = [unwritten(x, [y]) for y in answers]
        if spoken := [field for fields in lost for field in fields if field in SPOKEN]:
            raise Unusable(f"the chat template does not write an answer's '{spoken[0]}'")
        unused = {*unwritten([], x), *(field for fields in lost for field in fields)}
        without = {**options, "tools": None}
        if "tools" in options and self.render(x, where, options) == self.render(x, where, without):
            unused.add("tools")
        for field in unused:
            self.counts[f"dialogues whose '{field}' the chat template does not write"] += 1
        if not all(squeezed(message["content"]) in squeezed(prompt) for message in x):
            self.counts["prompts of which the chat template leaves out or changes a part"] += 1

    def ids(self, texts: list[str], ids: list[Ids], plain: bool) -> list[Ids]:
        """Of [prompt, wholes …] and the token ids of each: those of the prompt and of the responses, cut to the limits.

        plain: they went through no template, which would have written a BOS itself. Raises Unusable.
        """
        (prompt, *whole_ids), n = ids, len(ids[0])
        responses = []
        for whole, tokens in zip(texts[1:], whole_ids):  # where tokens merge across the border, it is tokenised apart
            y = tokens[n:] if tokens[:n] == prompt else continued(self.tokenizer, whole[len(texts[0]) :])
            end = next((j for j, token in enumerate(y) if token in self.eos_ids), None)
            default = self.eos_ids[:1] if plain else self.turn_end
            responses.append(y[: end + 1] if end is not None else y + default if y else [])
        added = added_before(self.tokenizer)
        if plain and prompt[: len(added)] != added:
            prompt = added + prompt
        first = next((some for some in (added, [self.tokenizer.bos_token_id]) if some == prompt[: len(some)] != []), [])
        rows = cut(prompt, responses, first, self.max_length, self.max_prompt_length)
        if not all(rows):
            raise Unusable("no token of the prompt or a response")
        if rows[1:] and rows[1] == rows[2]:
            raise Unusable("chosen equals rejected")
        self.counts["prompts cut"] += len(prompt) > self.max_prompt_length
        self.counts["responses cut"] += sum(kept != y for kept, y in zip(rows[1:], responses))
        return [[self.same_id.setdefault(i, i) for i in row] for row in rows]

    def read(self, rows: Rows, name: str, read: Callable[[Any, str], Reading]) -> list[tuple[int, Any, list[Ids]]]:
        """Of each row that is not dropped its number, the prompt as it is read, and token ids. Raises InputError."""
        there = set(rows.column_names) - KNOWN if isinstance(rows, datasets.Dataset) else set()
        used: set[str] = set()
        bar = tqdm(decoded(rows, name), f"reading {name}", len(rows), unit="row", leave=False, disable=not len(rows))
        each = enumerate(bar)
        result: list[tuple[int, Any, list[Ids]]] = []
        while batch := list(islice(each, BATCH)):
            kept = []
            for i, row in batch:
                self.counts["read"] += 1
                with self.dropping(where := f"{name}, row {i}"):
                    reading = read(row, where)
                    there.update(column for column, value in row.items() if value is not None)
                    used.update(forms.columns_of(row, where).values())
                    kept.append((i, reading.prompt, self.texts(reading, where)))
            all_texts = [text for _, _, texts in kept for text in texts]
            ids = iter(self.tokenised(all_texts, f"{name}, rows {batch[0][0]} to {batch[-1][0]}"))
            for i, x, texts in kept:
                with self.dropping(f"{name}, row {i}"):
                    result.append((i, x, self.ids(texts, list(islice(ids, len(texts))), plain=isinstance(x, str))))
        if there - used:
            tqdm.write(f"{name}: columns that are not read: {', '.join(sorted(map(str, there - used)))}")
        return result

    @contextmanager
    def dropping(self, where: str) -> Iterator[None]:
        try:
            yield
        except Unusable as why:
            if self.all_needed:
                raise InputError(f"{where} is no prompt to answer: {why}") from None
            self.counts[f"dropped: {why}"] += 1

    def tokenised(self, texts: list[str], where: str) -> list[Ids]:
        with in_one_line(f"{where}: the tokenizer fails"):
            return self.tokenizer(texts, add_special_tokens=False).input_ids if texts else []


def common_start(texts: list[str]) -> str:
    return "".join(letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, zip(*texts)))


def continued(tokenizer: Any, text: str) -> Ids:
    """Token ids of a text that goes on after a line break: SentencePiece puts a space before the first word of all."""
    before, ids = tokenizer(["\n", "\n" + text], add_special_tokens=False).input_ids
    return ids[len(before) :] if ids[: len(before)] == before else tokenizer(text, add_special_tokens=False).input_ids


def cut(prompt: Ids, responses: list[Ids], first: Ids, max_length: int, max_prompt_length: int) -> list[Ids]:
    """The prompt's last `max_prompt_length` tokens, with `first`, its BOS; of each response max_length − |prompt|."""
    if len(prompt) > max_prompt_length:
        prompt = first + prompt[len(prompt) - max_prompt_length + len(first) :]
    return [prompt, *(y[: max_length - len(prompt)] for y in responses)]


@lru_cache(1)
def added_before(tokenizer: Any) -> Ids:
    """What the tokenizer puts before every text by itself: a BOS, or nothing. TRL puts it before a prompt's text."""
    ids, [first] = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids[:1]
    return ids[: ids.index(first)]


def turn_end(tokenizer: Any, eos_ids: Ids) -> Ids:
    """What follows an answer that the template does not end: what begins the next turn, to the first end in it."""
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), "abc")]
    try:
        answered, asked = (tokenizer.apply_chat_template(turns[:n], tokenize=False) for n in (2, 3))
    except Exception:  # a template of one question
        return eos_ids[:1]
    after = tokenizer(asked[len(answered) :], add_special_tokens=False).input_ids if asked.startswith(answered) else []
    end = next((j for j, token in enumerate(after) if token in eos_ids), None)
    return eos_ids[:1] if end is None else after[: end + 1]


def forgery_pattern(tokenizer: Any, eos_ids: Ids) -> re.Pattern[str]:
    """What no text may spell: a special token of the tokenizer, or a turn of PLAIN_TEMPLATE where that is used.

    Turns that a template marks by plain text, as `[INST]`, are not recognised.
    """
    added = tokenizer.added_tokens_decoder.items()
    specials = [re.escape(str(token)) for i, token in added if token.special or i in eos_ids]
    turns = ["\n\n(?:Human|Assistant):"] if str(tokenizer.chat_template).endswith(PLAIN_TEMPLATE) else []
    return re.compile("|".join([*specials, *turns]) or "(?!)")


def set_template(tokenizer: Any) -> None:
    """A tokenizer without a chat template is given PLAIN_TEMPLATE, and keeps it where it is saved."""
    if tokenizer.chat_template is None:
        tokenizer.chat_template = "{{ bos_token }}" * len(added_before(tokenizer)) + PLAIN_TEMPLATE


def encode(rows: Rows, tokenizer: Any, *, name: str, eos_ids: Ids, **limits: int) -> tuple[list[Pair], Counter]:
    """Rows of any of the forms as pairs of token ids, and the count of rows read, kept, cut and dropped, with why.

    eos_ids: the tokens that end a response, the tokenizer's first. limits: max_length, max_prompt_length.
    A dialogue or response that spells a special token is dropped: it would forge a turn or an end.
    """
    given, counts = encode_given(rows, tokenizer, name=name, eos_ids=eos_ids, **limits)
    return [one.pair for one in given], counts


def encode_given(
    rows: Rows, tokenizer: Any, *, name: str, eos_ids: Ids, **limits: int
) -> tuple[list[Given], Counter]:
    """The same, with the row of each pair, and its prompt as people read it: a dialogue without a template's marks."""
    encoder = Encoder(tokenizer, eos_ids, **limits)
    given = [Given(Pair(*ids), as_text(x), i) for i, x, ids in encoder.read(rows, name, forms.preference)]
    return given, Counter({"read": encoder.counts.pop("read"), "kept": len(given), **encoder.counts})


def encode_prompts(
    rows: Rows, tokenizer: Any, *, name: str, eos_ids: Ids, **limits: int
) -> tuple[list[str], list[Ids], Counter]:
    """Prompts to answer, rows of any of the forms but for the answers: their texts, their token ids, and the counts.

    Raises InputError where a row is none.
    """
    encoder = Encoder(tokenizer, eos_ids, **limits)
    encoder.all_needed = True
    prompts = encoder.read(rows, name, forms.question)
    texts = [x if isinstance(x, str) else "\n\n".join(message["content"] for message in x) for _, x, _ in prompts]
    return texts, [ids for *_, [ids] in prompts], encoder.counts


def decode(tokenizer: Any, ids: Ids, ends: Ids, after: Ids | None = None) -> str:
    """A text without what its reader adds: of a prompt what the tokenizer puts before it, of a response the end.

    ends: what is taken off a response's end; for TRL only the tokenizer's EOS, the one that it adds.
    after: the prompt, where `ids` is a response. Alone it would lose the space that SentencePiece begins a word with.
    """
    if after is not None:
        return decode_responses(tokenizer, after, [ids], ends)[0]
    first = added_before(tokenizer)
    return text_of(tokenizer, ids[len(first) :] if ids[: len(first)] == first else ids)


def decode_responses(tokenizer: Any, prompt: Ids, responses: list[Ids], ends: Ids) -> list[str]:
    before = prompt[-8:]  # enough for what a tokenizer makes of neighbours: a space, the bytes of one character
    n = len(text_of(tokenizer, before))
    return [text_of(tokenizer, before + y[: len(y) - (y[-1] in ends)])[n:] for y in responses]


def text_of(tokenizer: Any, ids: Ids) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)  # the clean-up would write " ," as ","
