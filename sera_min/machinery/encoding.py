"""Preference pairs from rows to token ids, and back to texts. Every row cut or dropped is counted.

Dialogues go through the tokenizer's chat template, as TRL's do. A prompt's ids never depend on the
response: where a token would span the border, the response is tokenised by itself. A response ends
with exactly one end of sequence, unless it is cut.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import datasets
from tqdm import tqdm

from sera_min.machinery.errors import InputError, Unusable, in_one_line
from sera_min.machinery.rows import KNOWN, Messages, Reading, Rows, each_row, naming, preference, question, squeezed
from sera_min.pairs import Ids, Pair

BATCH = 256  # rows that are tokenised together
# For tokenizers without a chat template: HH-RLHF's plain form, in which its dialogues stay as they are.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ {'user': '\n\nHuman: ', 'assistant': '\n\nAssistant: ', 'system': ''}[m['role']] "
    "+ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
PARTS_OF_AN_ANSWER = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")

Prompt = str | Messages


class Given(NamedTuple):
    """A pair of the user's data, its prompt as people read it, and the number of its row, from 0."""

    pair: Pair
    text: str
    row: int


def encode(rows: Rows, tokenizer: Any, *, name: str, eos_ids: Ids, **limits: int) -> tuple[list[Pair], Counter]:
    """Rows of any form as pairs of token ids, and how many were read, kept, cut, and dropped for which reason.

    eos_ids: the tokens that end a response, the tokenizer's first. limits: max_length, max_prompt_length.
    A text that spells a special token is dropped: it would forge a turn or an end. Raises InputError.
    """
    given, counts = encode_given(rows, tokenizer, name=name, eos_ids=eos_ids, **limits)
    return [one.pair for one in given], counts


def encode_given(rows: Rows, tokenizer: Any, *, name: str, eos_ids: Ids, **limits: int) -> tuple[list[Given], Counter]:
    """The same, with each pair's prompt as people read it, and its row."""
    encoder = Encoder(tokenizer, eos_ids, **limits)
    given = []
    for i, prompt, ids in encoder.encode(rows, name, preference):
        given.append(Given(Pair(*ids), as_text(prompt), i))
    counts = Counter({"read": len(rows), "kept": len(given)})
    counts.update(encoder.counts)
    return given, counts


def encode_prompts(
    rows: Rows, tokenizer: Any, *, name: str, eos_ids: Ids, **limits: int
) -> tuple[list[str], list[Ids], Counter]:
    """Prompts to answer, rows of any form without answers: as people read them, as token ids, and the counts.

    Raises InputError where a row is no prompt.
    """
    encoder = Encoder(tokenizer, eos_ids, **limits)
    encoder.may_drop = False
    texts, prompts = [], []
    for _, prompt, ids in encoder.encode(rows, name, question):
        texts.append(as_text(prompt))
        prompts.append(ids[0])
    counts = Counter({"read": len(rows)})
    counts.update(encoder.counts)
    return texts, prompts, counts


class Encoder:
    """Token ids of what rows say, and the counts of what was cut and dropped."""

    def __init__(self, tokenizer: Any, eos_ids: Ids, max_length: int, max_prompt_length: int) -> None:
        set_template(tokenizer)
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.forged = forgery_pattern(tokenizer, eos_ids)
        self.turn_end = turn_end(tokenizer, eos_ids)
        self.counts: Counter = Counter({"prompts cut": 0, "responses cut": 0})
        self.may_drop = True

    def encode(self, rows: Rows, name: str, form: Callable[[Any, str], Reading]) -> list[tuple[int, Prompt, list[Ids]]]:
        """Of each usable row its number, its prompt, and the token ids of prompt and answers."""
        written = self.written_rows(rows, name, form)
        encoded = []
        for first in range(0, len(written), BATCH):
            batch = written[first : first + BATCH]
            place = f"{name}, rows {batch[0][0]} to {batch[-1][0]}"
            texts = list(chain.from_iterable(texts for _, _, texts in batch))
            with in_one_line(f"{place}: the tokenizer fails"):
                ids = iter(self.tokenizer(texts, add_special_tokens=False).input_ids)
            for i, prompt, texts in batch:
                ids_of_row = [next(ids) for _ in texts]
                with self.dropping(f"{name}, row {i}"):
                    is_text = isinstance(prompt, str)
                    encoded.append((i, prompt, self.ended_and_cut(texts, ids_of_row, is_text)))
        return encoded

    def written_rows(
        self, rows: Rows, name: str, form: Callable[[Any, str], Reading]
    ) -> list[tuple[int, Prompt, list[str]]]:
        """Of each usable row its number, its prompt, and the texts of prompt and of prompt with each answer."""
        unread = set()
        if isinstance(rows, datasets.Dataset):
            unread = set(rows.column_names) - KNOWN
        written = []
        bar = tqdm(each_row(rows, name), f"reading {name}", len(rows), unit="row", leave=False)
        for i, row in enumerate(bar):
            where = f"{name}, row {i}"
            with self.dropping(where):
                reading = form(row, where)
                unread |= reading.unread
                with naming(f"{where}: "):
                    texts = self.texts(reading)
                written.append((i, reading.prompt, texts))
        if unread:
            columns = ", ".join(sorted(map(str, unread)))
            tqdm.write(f"{name}: columns that are not read: {columns}")
        return written

    @contextmanager
    def dropping(self, where: str) -> Iterator[None]:
        try:
            yield
        except Unusable as reason:
            if not self.may_drop:
                raise InputError(f"{where} is no prompt to answer: {reason}") from None
            self.counts[f"dropped: {reason}"] += 1

    def texts(self, reading: Reading) -> list[str]:
        """The prompt, and the prompt with each of its answers, as they are tokenised."""
        prompt, answers, options, _ = reading
        eos = self.tokenizer.eos_token
        if isinstance(prompt, str):
            answers = [y.removesuffix(eos) for y in answers]
            self.check_spelling(answers)  # the prompt may spell a BOS
            return [prompt, *[prompt + y for y in answers]]
        answers = [{**y, "content": y["content"].removesuffix(eos)} for y in answers]
        self.check_spelling([prompt, answers, options])
        if not all(y["content"] or y.get("tool_calls") for y in answers):
            raise Unusable("no token of the prompt or a response")
        return self.rendered(prompt, answers, options)

    def check_spelling(self, value: Any) -> None:
        """No text in messages or tools, however deep, spells a special token. Raises Unusable."""
        if isinstance(value, str) and self.forged.search(value):
            raise Unusable("a text spells a special token")
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            for one in value:
                self.check_spelling(one)

    def rendered(self, x: Messages, answers: Messages, options: dict[str, Any]) -> list[str]:
        """The same texts of a dialogue. Raises InputError where the template changes an answer."""
        before, begun, opening = x, "", "add_generation_prompt"
        if x[-1]["role"] == "assistant":  # the answers go on with this turn
            before, begun, opening = x[:-1], x[-1]["content"], "continue_final_message"
        dialogues = [[*before, {**y, "content": begun + y["content"]}] for y in answers]
        asking = {**options, opening: True}
        prompt = self.render(x, asking)
        wholes = [self.render(dialogue, options) for dialogue in dialogues]
        shared = common_start([prompt, *wholes])
        if shared != prompt:
            end = f"does not begin an answered dialogue with its own prompt's {prompt[len(shared) :]!r}"
            if not shared.startswith(self.render(x, options)):
                raise InputError(f"the chat template {end}")
            self.counts[f"prompts without their end, as the chat template {end}"] += 1  # as in TRL
        for y, whole in zip(answers, wholes):
            if squeezed(y["content"]) not in squeezed(whole[len(shared) :]):
                part = f"a part of the answer {y['content'][:40]!r}"
                raise InputError(f"the chat template leaves out or changes {part}: give the tokenizer another")
        lost = self.unwritten(prompt, x, 0, asking)
        for dialogue, whole in zip(dialogues, wholes):
            lost += self.unwritten(whole, dialogue, -1, options)
        for field in dict.fromkeys(lost):
            self.counts[f"dialogues whose '{field}' the chat template does not write"] += 1
        if not all(squeezed(turn["content"]) in squeezed(shared) for turn in x):
            self.counts["prompts of which the chat template leaves out or changes a part"] += 1
        return [shared, *wholes]

    def unwritten(self, text: str, turns: Messages, first: int, options: dict[str, Any]) -> list[str]:
        """The fields of turns[first:] without which the template writes the same text.

        Raises Unusable where one of them is a part of an answer, turns[-1:].
        """
        lost = []
        for field in sorted(set(chain(*turns[first:])) - {"role", "content"}):
            without = [{**turn} for turn in turns]
            for turn in without[first:]:
                turn.pop(field, None)
            if self.render(without, options) == text:
                lost.append(field)
        for field in lost:
            if first == -1 and field in PARTS_OF_AN_ANSWER:
                raise Unusable(f"the chat template does not write an answer's '{field}'")
        if first == 0 and "tools" in options and self.render(turns, {**options, "tools": None}) == text:
            lost.append("tools")
        return lost

    def render(self, turns: Messages, options: dict[str, Any]) -> str:
        with in_one_line("the chat template does not take this dialogue"):
            return self.tokenizer.apply_chat_template(turns, tokenize=False, **options)

    def ended_and_cut(self, texts: list[str], ids: list[Ids], is_text: bool) -> list[Ids]:
        """Prompt and responses from the ids of the prompt and of the whole texts. Raises Unusable.

        is_text: no template was there, which would have written the BOS and the end.
        """
        prompt = ids[0]
        end = self.eos_ids[:1] if is_text else self.turn_end
        responses = []
        for text, whole in zip(texts[1:], ids[1:]):
            y = whole[len(prompt) :]
            if whole[: len(prompt)] != prompt:  # a token spans the border
                y = continued(self.tokenizer, text[len(texts[0]) :])
            if y:
                y = up_to_end(y, self.eos_ids) or y + end
            responses.append(y)
        first = added_before(self.tokenizer)
        if is_text and prompt[: len(first)] != first:
            prompt = first + prompt
        kept = self.cut(prompt, responses)
        if not all(kept):
            raise Unusable("no token of the prompt or a response")
        if responses and kept[1] == kept[2]:
            raise Unusable("chosen equals rejected")
        self.counts["prompts cut"] += kept[0] != prompt
        self.counts["responses cut"] += sum(short != y for short, y in zip(kept[1:], responses))
        return kept

    def cut(self, prompt: Ids, responses: list[Ids]) -> list[Ids]:
        """The end of the prompt, after its BOS if it has one, and of each response what then fits."""
        excess = len(prompt) - self.max_prompt_length
        if excess > 0:
            first = added_before(self.tokenizer) or [self.tokenizer.bos_token_id]
            if prompt[: len(first)] != first:
                first = []
            prompt = first + prompt[excess + len(first) :]
        room = self.max_length - len(prompt)
        return [prompt, *[y[:room] for y in responses]]


def common_start(texts: list[str]) -> str:
    start = texts[0]
    for text in texts[1:]:
        while not text.startswith(start):
            start = start[:-1]
    return start


def up_to_end(ids: Ids, eos_ids: Ids) -> Ids:
    """The ids up to the first end of sequence; none where there is no end."""
    for j, token in enumerate(ids):
        if token in eos_ids:
            return ids[: j + 1]
    return []


def continued(tokenizer: Any, text: str) -> Ids:
    """Token ids of a text that goes on after a line break: SentencePiece puts a space before the first word of all."""
    before, ids = tokenizer(["\n", "\n" + text], add_special_tokens=False).input_ids
    if ids[: len(before)] == before:
        return ids[len(before) :]
    return tokenizer(text, add_special_tokens=False).input_ids


@lru_cache(1)
def added_before(tokenizer: Any) -> Ids:
    """What the tokenizer puts before every text: a BOS, or nothing. TRL puts it before a prompt's text."""
    ids = tokenizer("a").input_ids
    first, *_ = tokenizer("a", add_special_tokens=False).input_ids
    return ids[: ids.index(first)]


def turn_end(tokenizer: Any, eos_ids: Ids) -> Ids:
    """What follows an answer that the template does not end: the beginning of the next turn, up to an end."""
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), "abc")]
    try:
        answered = tokenizer.apply_chat_template(turns[:2], tokenize=False)
        asked = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # a template of one question
        return eos_ids[:1]
    if not asked.startswith(answered):
        return eos_ids[:1]
    after = tokenizer(asked[len(answered) :], add_special_tokens=False).input_ids
    return up_to_end(after, eos_ids) or eos_ids[:1]


def forgery_pattern(tokenizer: Any, eos_ids: Ids) -> re.Pattern[str]:
    """What no text may spell: a special token, or a turn of PLAIN_TEMPLATE where that is used.

    Turns that a template marks by plain text, as `[INST]`, are not recognised.
    """
    patterns = []
    for i, token in tokenizer.added_tokens_decoder.items():
        if token.special or i in eos_ids:
            patterns.append(re.escape(str(token)))
    if str(tokenizer.chat_template).endswith(PLAIN_TEMPLATE):
        patterns.append("\n\n(?:Human|Assistant):")
    return re.compile("|".join(patterns) or "(?!)")  # which nothing matches


def set_template(tokenizer: Any) -> None:
    """A tokenizer without a chat template is given PLAIN_TEMPLATE, and keeps it where it is saved."""
    if tokenizer.chat_template is None:
        tokenizer.chat_template = "{{ bos_token }}" * len(added_before(tokenizer)) + PLAIN_TEMPLATE


def decode(tokenizer: Any, ids: Ids, ends: Ids, after: Ids | None = None) -> str:
    """The text of a prompt, without what the tokenizer puts before it; or of a response, without its end.

    ends: what is taken off a response's end; for TRL only the tokenizer's EOS, which it adds itself.
    after: the prompt, where `ids` is a response. Alone it would lose the space that SentencePiece begins a word with.
    """
    if after is not None:
        return decode_responses(tokenizer, after, [ids], ends)[0]
    first = added_before(tokenizer)
    if ids[: len(first)] == first:
        ids = ids[len(first) :]
    return plain_text(tokenizer, ids)


def decode_responses(tokenizer: Any, prompt: Ids, responses: list[Ids], ends: Ids) -> list[str]:
    before = prompt[-8:]  # enough for a space, or for the bytes of one character
    n = len(plain_text(tokenizer, before))
    texts = []
    for y in responses:
        if y[-1] in ends:
            y = y[:-1]
        texts.append(plain_text(tokenizer, before + y)[n:])
    return texts


def plain_text(tokenizer: Any, ids: Ids) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)  # the clean-up would write " ," as ","


def as_text(prompt: Prompt) -> str:
    """A prompt as people read it: a text or a lone message as it is, otherwise who says what."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
