"""Rows become token ids, read once and kept with the run; and token ids become texts again.

Dialogues go through the tokenizer's chat template, as TRL's do. A prompt's ids never depend on the
response: where a token would span the border, the response is tokenised by itself. A response ends
with exactly one end of sequence, unless it is cut. Every row cut or dropped is counted.
"""

import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from os.path import commonprefix
from random import Random
from typing import Any, NamedTuple

from tqdm import tqdm

from sera_min.bootstrap import up_to_end
from sera_min.machinery.config import Resolved
from sera_min.machinery.errors import InputError, Unusable, format_counts, naming
from sera_min.machinery.rows import KNOWN, Messages, Reading, displaced, preference, read_rows, squeezed, turn
from sera_min.pairs import Ids, Pair, Preferences

# For tokenizers without a chat template: HH-RLHF's plain form, in which its dialogues stay as they are.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ {'user': '\n\nHuman: ', 'assistant': '\n\nAssistant: ', 'system': ''}[m['role']] "
    "+ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
PARTS_OF_AN_ANSWER = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")

Data = dict[str, Any]  # "given" and "held_out": lists of Given; "prompts" to be answered, and their "texts"


class Given(NamedTuple):
    """A pair of the user's data, its prompt as people read it, and the number of its row, from 0."""

    pair: Pair
    text: str
    row: int


# What a run trains and evaluates on. A template may write today's date, so a resume does not read it again.


def read(config: Resolved, world: Any, tokenizer: Any, eos_ids: Ids) -> Data:
    """D and the evaluation pairs as token ids; what became of every row is printed. Raises InputError."""
    limits: Any = {"eos_ids": eos_ids, "max_length": config.max_length, "max_prompt_length": config.max_prompt_length}
    if config.in_playground:
        made = of_playground(config, world, tokenizer, limits)
    else:
        made = of_user(config, tokenizer, limits)
    n = len(made["given"])
    for name, share in {"keep": config.keep, "bootstrap": config.bootstrap}.items():
        if share > 0 and round(share * n) == 0:
            print(f"--{name} is {share:g}: of {n} pairs that is less than one, so none")
    if config.eval_fraction > 0 and not made["held_out"]:
        print(f"--eval_fraction is {config.eval_fraction:g}: less than one prompt, so accuracy is not known")
    return made


def of_playground(config: Resolved, world: Any, tokenizer: Any, limits: dict[str, Any]) -> Data:
    """D with flipped labels, evaluation pairs without, and the evaluation prompts twice: a mean of more answers."""
    part, noise = str(config.eval_split), config.label_noise
    made = world.preferences(config.max_train_pairs, "train", label_noise=noise, seed=config.seed)
    clean = world.preferences(512, part, label_noise=0, seed=config.seed)
    given, counts = encode(made, tokenizer, name="playground", **limits)
    held_out, _counts = encode(clean, tokenizer, name=f"playground {part}", **limits)
    print(f"data: {format_counts(counts)}; {len(held_out)} held out")
    texts = world.prompts(part) * 2
    return {"given": given, "held_out": held_out, "prompts": tokenizer(texts).input_ids, "texts": texts}


def of_user(config: Resolved, tokenizer: Any, limits: dict[str, Any]) -> Data:
    """The pairs to train on and those to evaluate on, without a common prompt, and up to 64 prompts to answer."""
    name, subset = str(config.dataset_name), config.dataset_config
    rows = read_rows(name, config.dataset_train_split, config.max_train_pairs, subset)
    given, counts = encode(rows, tokenizer, name=name, **limits)
    if config.eval_split is None:
        given, held_out = split_by_prompt(given, config.eval_fraction, config.seed)
        print(f"data: {format_counts(counts)}; {len(held_out)} of them held out")
    else:
        other = config.eval_dataset_name or name
        if other != name:
            subset = None  # the configuration is that of the other data set
        rows = read_rows(other, config.eval_split, config=subset)
        held_out, held_counts = encode(rows, tokenizer, name=other, **limits)
        known = {tuple(one.pair.prompt) for one in held_out}
        given = [one for one in given if tuple(one.pair.prompt) not in known]
        counts["dropped: the prompt is in the evaluation data"] = counts["kept"] - len(given)
        counts["kept"] = len(given)
        print(f"data: {format_counts(counts)}\nevaluation data: {format_counts(held_counts)}")
        if not held_out:
            raise InputError(f"{other}, split '{config.eval_split}': no pair is left to evaluate on")
    if not given:
        raise InputError(f"--dataset_name {name}: no pair is left to train on")
    to_answer = {tuple(one.pair.prompt): one.text for one in held_out or given}
    prompts = list(to_answer)[:64]
    texts = list(to_answer.values())[:64]
    return {"given": given, "held_out": held_out, "prompts": [list(x) for x in prompts], "texts": texts}


def split_by_prompt(given: list[Given], share: float, seed: int) -> tuple[list[Given], list[Given]]:
    """The pairs to train on and those held out: a random share of the prompts."""
    prompts = list(dict.fromkeys(tuple(one.pair.prompt) for one in given))
    held = set(Random(seed).sample(prompts, round(share * len(prompts))))
    train = [one for one in given if tuple(one.pair.prompt) not in held]
    return train, [one for one in given if tuple(one.pair.prompt) in held]


def preferences(given: list[Given]) -> Preferences:
    return Preferences([Pair(*one.pair) for one in given])


# From rows to token ids


def encode(rows: Any, tokenizer: Any, *, name: str, eos_ids: Ids, **limits: int) -> tuple[list[Given], Counter]:
    """Rows of any form as pairs of token ids, and how many were read, kept, cut, and dropped for which reason.

    eos_ids: the tokens that end a response, the tokenizer's first. limits: max_length, max_prompt_length.
    A row is dropped where a message or an answer spells a special token, which would forge a turn or an
    end. A prompt that is a text may spell one. Raises InputError.
    """
    encoder = Encoder(tokenizer, eos_ids, **limits)
    given: list[Given] = []
    for i, row in enumerate(tqdm(rows, f"reading {name}", unit="row", leave=False)):
        try:
            with naming(f"{name}, row {i}"):
                reading = preference(row)
                ids = encoder.ids(reading)
        except Unusable as reason:
            encoder.counts[f"dropped: {reason}"] += 1
        else:
            given.append(Given(Pair(*ids), as_text(reading.prompt), i))
    unread = set().union(*rows) - KNOWN
    unread = unread.union(*map(displaced, rows))
    if unread:
        print(f"{name}: columns that are not read: {', '.join(sorted(unread))}")
    return given, Counter({"read": len(rows), "kept": len(given), **encoder.counts})


class Encoder:
    """Token ids of what rows say, and the counts of what was cut."""

    def __init__(self, tokenizer: Any, eos_ids: Ids, max_length: int, max_prompt_length: int) -> None:
        set_template(tokenizer)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.counts: Counter = Counter({"prompts cut": 0, "responses cut": 0})
        self.first = added_before(tokenizer)
        self.eos = eos_ids[:1]
        added = tokenizer.added_tokens_decoder.items()
        special = {i: re.escape(str(token)) for i, token in added if token.special or i in eos_ids}
        ends = {i: special[i] for i in eos_ids if i in special}  # an ordinary token does not end a given response
        self.ends = list(ends)
        self.spelled_end = re.compile(f"(?:{any_of(ends.values())})\\s*$")
        forged = list(special.values())
        self.plain = str(tokenizer.chat_template).endswith(PLAIN_TEMPLATE)
        if self.plain:  # not others' plain text, as `[INST]`
            forged.append("\n\n(?:Human|Assistant):")
        self.forged = re.compile(any_of(forged))
        # What the chat template writes after an answer and before an end, seen from a sign that it does not write.
        self.closing = ""
        with suppress(InputError):
            dialogue = self.render([turn("user", "☃"), turn("assistant", "☃")], {})
            self.closing = self.spelled_end.sub("", dialogue.rpartition("☃")[2]).rstrip()

    def ids(self, reading: Reading) -> list[Ids]:
        """Of the prompt and the responses. Raises InputError and Unusable."""
        texts = self.texts(reading)
        with naming("the tokenizer fails"):
            "".join(texts).encode()  # fails on half a surrogate pair, with a message that names it
            prompt, *wholes = self.tokenizer(texts, add_special_tokens=False).input_ids
        responses = []
        for text, whole in zip(texts[1:], wholes):
            y = whole[len(prompt) :]
            if whole[: len(prompt)] != prompt:  # a token spans the border
                y = continued(self.tokenizer, text[len(texts[0]) :])
            y = up_to_end(y, self.ends)
            if set(self.ends).isdisjoint(y):
                y = y + self.eos
            responses.append(y)
        if isinstance(reading.prompt, str) and prompt[: len(self.first)] != self.first:
            prompt = self.first + prompt  # the chat template would have written it
        return self.cut(prompt, responses)

    def texts(self, reading: Reading) -> list[str]:
        """The prompt, and the prompt with each of its answers, as they are tokenised."""
        prompt, answers, options = reading
        if isinstance(prompt, str):  # and may spell a BOS, or be what a template has written
            bare = [self.spelled_end.sub("", y).rstrip().removesuffix(self.closing) for y in answers]
            self.refuse_special(bare)
            self.refuse_empty(bare)
            return [prompt, *[prompt + y for y in answers]]
        answers = [{**y, "content": self.spelled_end.sub("", y["content"])} for y in answers]
        self.refuse_special([prompt, answers, options])
        self.refuse_empty([y["content"] or y.get("tool_calls") for y in answers])
        return self.rendered(prompt, answers, options)

    def refuse_special(self, value: Any) -> None:
        """Raises Unusable where a text in lists and objects spells a special token."""
        if isinstance(value, dict):
            value = [*value, *value.values()]
        if isinstance(value, list):
            for one in value:
                self.refuse_special(one)
        if isinstance(value, str) and self.forged.search(value):
            raise Unusable("a text spells a special token")

    def refuse_empty(self, answers: list[Any]) -> None:
        if not all(answers):
            raise Unusable("no token of the prompt or a response")

    def rendered(self, x: Messages, answers: Messages, options: dict[str, Any]) -> list[str]:
        """The same texts of a dialogue. Raises InputError where the template changes an answer."""
        if self.plain:
            self.counts["dialogues as '\\n\\nHuman: … \\n\\nAssistant: …', as the tokenizer has no template"] += 1
        before, begun, opening = x, "", "add_generation_prompt"
        if x[-1]["role"] == "assistant":  # the answers go on with this turn
            before, begun, opening = x[:-1], x[-1]["content"], "continue_final_message"
        prompt = self.render(x, {**options, opening: True})
        wholes = []
        for y in answers:
            answer = {**y, "content": begun + y["content"]}
            wholes.append(self.render([*before, answer], options))
            for part in PARTS_OF_AN_ANSWER:
                without = dict(answer)
                if without.pop(part, None) and self.writes_alike([*before, without], wholes[-1], options):
                    raise Unusable(f"the chat template does not write an answer's '{part}'")
        if options and self.writes_alike(x, prompt, {opening: True}):
            self.counts["prompts without their tools, which the chat template does not write"] += 1
        shared = commonprefix([prompt, *wholes])  # noqa: RUF071 (by characters, as is meant)
        if shared != prompt:
            # The prompt's end may be "<think>", and the answers "<p>a" and "<p>b": their "<" is not the prompt's.
            for y, whole in zip(answers, wholes):
                begins = whole.rfind(y["content"].strip())
                if begins >= 0:
                    shared = shared[:begins]
            end = f"does not begin an answered dialogue with its own prompt's {prompt[len(shared) :]!r}"
            if not shared.startswith(self.render(x, options)):
                raise InputError(f"the chat template {end}")
            self.counts[f"prompts without their end, as the chat template {end}"] += 1  # as in TRL
        for y, whole in zip(answers, wholes):
            if squeezed(y["content"]) in squeezed(whole[len(shared) :]):
                continue
            # The prompt's end may be "<think>", and an answer "<think>so</think>a", which is written once.
            start = len(commonprefix([shared, self.render(x, options)]))  # noqa: RUF071
            if squeezed(y["content"]) not in squeezed(whole[start:]):
                part = f"a part of the answer {y['content'][:40]!r}"
                raise InputError(f"the chat template leaves out or changes {part}: give the tokenizer another")
        return [shared, *wholes]

    def writes_alike(self, turns: Messages, text: str, options: dict[str, Any]) -> bool:
        """Whether this dialogue is rendered as this text. It is not where the template does not take it."""
        with suppress(InputError):
            return self.render(turns, options) == text
        return False

    def render(self, turns: Messages, options: dict[str, Any]) -> str:
        with naming("the chat template does not take this dialogue"):
            return self.tokenizer.apply_chat_template(turns, tokenize=False, **options)

    def cut(self, prompt: Ids, responses: list[Ids]) -> list[Ids]:
        """The end of the prompt, after its BOS if it has one, and of each response what then fits."""
        kept = prompt
        excess = len(prompt) - self.max_prompt_length
        if excess > 0:
            first = self.first or [self.tokenizer.bos_token_id]
            if prompt[: len(first)] != first:
                first = []
            kept = first + prompt[excess + len(first) :]
        room = self.max_length - len(kept)
        short = [y[:room] for y in responses]
        if not kept or not all(short):
            raise Unusable("no token of the prompt or a response")
        if responses and short[0] == short[1]:
            raise Unusable("chosen equals rejected")
        self.counts["prompts cut"] += kept != prompt
        self.counts["responses cut"] += sum(len(y) > room for y in responses)
        return [kept, *short]


def any_of(patterns: Iterable[str]) -> str:
    """A regular expression for any of these; for none, one that matches nothing."""
    return "|".join(patterns) or "(?!)"


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
    own = tokenizer("a", add_special_tokens=False).input_ids or [tokenizer.eos_token_id]
    if own[0] not in ids:  # not all know an "a": proteins
        return ids
    return ids[: ids.index(own[0])]


def set_template(tokenizer: Any) -> None:
    """A tokenizer without a chat template is given PLAIN_TEMPLATE, and keeps it where it is saved."""
    if tokenizer.chat_template is None:
        tokenizer.chat_template = "".join(tokenizer.convert_ids_to_tokens(added_before(tokenizer))) + PLAIN_TEMPLATE


# From token ids to texts


def prompt_text(tokenizer: Any, ids: Ids) -> str:
    """Without what the tokenizer puts before it."""
    first = added_before(tokenizer)
    if ids[: len(first)] == first:
        ids = ids[len(first) :]
    return plain_text(tokenizer, ids)


def response_text(tokenizer: Any, prompt: Ids, ids: Ids, ends: Ids) -> str:
    """Without its end. Alone, without its prompt, it would lose the space that SentencePiece begins a word with.

    ends: what is taken off; for TRL only the tokenizer's EOS, which it adds itself.
    """
    if ids[-1] in ends:
        ids = ids[:-1]
    n = 8  # tokens of the prompt before it: enough for a space, and more where they begin inside a character
    while n < len(prompt) and "\ufffd" in plain_text(tokenizer, prompt[-n:]):
        n *= 2
    before = plain_text(tokenizer, prompt[-n:])
    return plain_text(tokenizer, prompt[-n:] + ids)[len(before) :]


def plain_text(tokenizer: Any, ids: Ids) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)  # the clean-up would write " ," as ","


def as_text(prompt: str | Messages) -> str:
    """A prompt as people read it: a text or a lone message as it is, otherwise who says what."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{one['role']}: {one['content']}" for one in prompt)
