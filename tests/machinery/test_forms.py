"""Data as it lies around: what a row of each published form says, and what a template, a file or a tokenizer does to it."""

import csv
import gzip
import json
from functools import partial
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import Table, parquet
from shared import CHATML, bpe_tokenizer, encode_pairs, unigram_tokenizer
from tokenizers import Tokenizer, models, processors

from sera_min.machinery.data import added_before, encode, prompt_text, response_text
from sera_min.machinery.errors import InputError, Unusable
from sera_min.machinery.models import load
from sera_min.machinery.rows import preference, read_rows


def S(text):
    return {"role": "system", "content": text}


def U(text):
    return {"role": "user", "content": text}


def A(text, **more):
    return {"role": "assistant", "content": text, **more}


def T(text):
    return {"role": "tool", "content": text}


def V(who, text):
    return {"from": who, "value": text}


def encoded(rows, tokenizer=None, ends=None, **limits):
    tokenizer = tokenizer or bpe_tokenizer(CHATML)
    limits = {"max_length": 400, "max_prompt_length": 300, **limits}
    return encode_pairs(rows, tokenizer, name="d.json", eos_ids=ends or [tokenizer.eos_token_id], **limits)


STONE, RIVER = A("stone"), A("river")
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]
SAME = {"chosen": "stone", "rejected": "river"}
PUBLISHED = {
    "LLaMA-Factory, ShareGPT": ([S("be kind"), U("red?")], {"conversations": [V("system", "be kind"), V("human", "red?")],
                                                           "chosen": V("gpt", "stone"), "rejected": V("gpt", "river")}),
    "the same with its system as a column": ([S("be kind"), U("red?")], {"conversations": [V("human", "red?")], "system": "be kind",
                                                                        "chosen": V("gpt", "stone"), "rejected": V("gpt", "river")}),
    "LLaMA-Factory, Alpaca": ([S("be kind"), U("and now?\n\nred")], {
        "instruction": "and now?", "input": "red", "system": "be kind", **SAME}),
    "Orca": ([S("be kind"), U("red?")], {"system": "be kind", "question": "red?", **SAME}),
    "Orca without a system prompt": ([U("red?")], {"system": "", "question": "red?", **SAME}),
    "ms-swift": ([S("be kind"), U("red?")], {"messages": [S("be kind"), U("red?"), STONE], "rejected_response": "river"}),
    "ms-swift, messages": ([U("red?")], {"messages": [U("red?"), STONE], "rejected_messages": [U("red?"), RIVER]}),
    "torchtune": ([U("red?")], {"chosen_conversations": [V("human", "red?"), V("gpt", "stone")],
                                "rejected_conversations": [U("red?"), RIVER]}),
    "axolotl": ([U("red?")], {"messages": [U("red?")], "chosen": STONE, "rejected": RIVER}),
    "axolotl, Argilla": ([U("red?")], {"instruction": "red?", "chosen_response": "stone", "rejected_response": "river"}),
    "Orca as messages": ([S("s"), U("red?")], {"prompt": "red?", "chosen": [S("s"), U("red?"), STONE], "rejected": [S("s"), U("red?"), RIVER]}),
    "messages that repeat the chosen dialogue": ([U("red?")], {"messages": [U("red?"), STONE], "chosen": [U("red?"), STONE],
                                                               "rejected": [U("red?"), RIVER]}),
    "one message in place of a list": ([U("red?")], {"prompt": [U("red?")], "chosen": STONE, "rejected": RIVER}),
    "messages as JSON": ([U("red?")], {"chosen": json.dumps([U("red?"), STONE]), "rejected": json.dumps([U("red?"), RIVER])}),
    "parts of text": ([U("red?")], {"prompt": [{"role": "user", "content": [{"type": "text", "text": "re"}, {"type": "text", "text": "d?"}]}],
                                    "chosen": [STONE], "rejected": [RIVER]}),
    "a system prompt of None": ([U("red?")], {"chosen": [S(None), U("red?"), STONE], "rejected": [S(None), U("red?"), RIVER]}),
    "a developer": ([{"role": "developer", "content": "x"}, U("red?")], {"prompt": [{"role": "developer", "content": "x"}, U("red?")], **SAME}),
    "a tool": ([U("red?"), A("", tool_calls=CALL), T("grey")], {"prompt": [U("red?"), A(None, tool_calls=CALL), T("grey")], **SAME}),
    "fields of None, as parquet files have them": ([U("red?")], {"prompt": [{**U("red?"), "name": None, "tool_calls": None}], **SAME}),
    "a dialogue that goes on": ([U("who?"), A("me"), U("red?")], {"prompt": [U("who?"), A("me")], "chosen": [U("red?"), STONE],
                                                                 "rejected": [U("red?"), RIVER]}),
}  # fmt: skip


@pytest.mark.parametrize("form", PUBLISHED)
def test_what_a_row_says(form):
    x, row = PUBLISHED[form]
    assert preference(row)[:2] == (x, [STONE, RIVER])


@pytest.mark.parametrize("name", [name for name, (x, _) in PUBLISHED.items() if not any("tool_calls" in m for m in x)])
def test_it_is_what_is_trained_on(name):
    tokenizer, (x, row) = bpe_tokenizer(CHATML), PUBLISHED[name]
    [pair], counts = encoded([row], tokenizer)
    said = [tokenizer.decode(ids) for ids in pair]
    assert said == [tokenizer.apply_chat_template(x, tokenize=False, add_generation_prompt=True), "stone<|im_end|>", "river<|im_end|>"]
    assert counts == {"read": 1, "kept": 1, "prompts cut": 0, "responses cut": 0}


@pytest.mark.parametrize("row, why", [
    ({"prompt": "blue river?", "chosen": [U("red?"), STONE], "rejected": [U("red?"), RIVER]}, "the prompt says something else"),
    ({"prompt": [U("blue?")], "chosen": [U("red?"), STONE], "rejected": [U("red?"), RIVER]}, "the prompt says something else"),
    ({"chosen": [U("red?"), STONE, U("thanks")], "rejected": [U("red?"), RIVER, U("thanks")]}, "a dialogue ends without an answer"),
    ({"chosen": [U("red?"), A("it"), STONE], "rejected": [U("red?"), A("it"), RIVER]}, "two turns of the assistant"),
    ({"prompt": [U("red?")], "chosen": [A("it"), STONE], "rejected": [A("it"), RIVER]}, "two turns of the assistant"),
    ({"prompt": [S("kind"), U("red?")], "chosen": [U("red?"), STONE], "rejected": [U("red?"), RIVER]}, "the prompt says something else"),
    ({"prompt": [U("who?"), A("me"), U("red?")], "chosen": [U("red?"), STONE], "rejected": "river"}, "the prompt says something else"),
    ({"prompt": [S("rude"), U("red?")], "chosen": [S("kind"), U("red?"), STONE], "rejected": "river"}, "the prompt says something else"),
    ({"prompt": "red?", "chosen": [STONE], "rejected": "river"}, "one response is a text, the other a message"),
    ({"system": "be rude", "chosen": [S("be kind"), U("red?"), STONE], "rejected": [S("be kind"), U("red?"), RIVER]}, "'system' stands beside"),
])  # fmt: skip
def test_what_contradicts_itself_is_dropped_and_counted(row, why):
    with pytest.raises(Unusable, match=why):
        preference(row)
    pairs, counts = encoded([row])
    assert not pairs and [n for what, n in counts.items() if what.startswith(f"dropped: {why}")] == [1]


@pytest.mark.parametrize("row, message", [
    ({"text": "a", "label": 1}, r"row 0: 'chosen': missing or null \(columns: 'text', 'label'\): expected a form of docs/data.md"),
    ({"prompt": "a", "completion": "b"}, r"row 0: 'chosen': missing or null \(columns: 'prompt', 'completion'\)"),
    ({"input": {"messages": [U("a")]}, "preferred_output": [STONE]}, r"\(columns: 'input', 'preferred_output'\)"),
    ({"prompt": "a", "system": "be kind", **SAME}, "row 0: 'prompt' is a text, taken as it is, beside a system or tools: .* as messages"),
    ({"prompt": str([U("a")]), **SAME}, "row 0: 'prompt': messages as Python writes them"),
    ({"prompt": str([{"id": 1, **U("a")}]), **SAME}, "row 0: 'prompt': messages as Python writes them"),
    ({"prompt": "[{'content': 'a', 'role': 'user'}\n {'content': 'b', 'role': 'assistant'}]", **SAME}, "as Python writes them"),  # of numpy
    ({"prompt": "a", "chosen": json.dumps([U("a"), A("b" * 99)])[:60], "rejected": "c"}, "'chosen': messages .* not to their end"),
    ({"prompt": json.dumps([U("a"), {"role": "assistant"}]), **SAME}, "'prompt': message 1: 'content': missing or null"),
    ({"prompt": [U("a")], "tools": str([{"type": "function"}]), **SAME}, "'tools': expected a list of objects, also as JSON"),
    ({"prompt": [U("a")], "chosen": A("", tool_calls="f()"), "rejected": "c"}, "message 0: 'tool_calls': expected a list of objects"),
    ({"prompt": [{"role": "user", "content": [{"type": "image", "text": ""}, {"type": "text", "text": "a"}]}], **SAME}, "images and sounds"),
    ({"prompt": "a", "chosen": "b\ud83d", "rejected": "c"}, "row 0: .* surrogates not allowed"),
    ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], **SAME}, "row 0: 'prompt': message 0: .* images and sounds are not read"),
    ({"conversations": [V("robot", "a")], **SAME}, r"row 0: 'conversations': message 0: expected a role \(system, developer, user"),
])  # fmt: skip
def test_what_is_not_read_is_refused_in_one_line(row, message):
    with pytest.raises(InputError, match=message) as error:
        encoded([row])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prompt, said", [
    ([U("who?"), A("me")], [U("who?"), A("me"), U("red?")]), ([S("kind")], [S("kind"), U("red?")]),  # the dialogue repeats it
    ([S("kind")], [U("red?")]), ([U("who?"), A("me")], [U("red?")]),  # and here it goes on
    ([U("tell"), A("one"), U("more"), A("two")], [U("more")]),
])  # fmt: skip
def test_a_prompt_before_whole_dialogues_is_said_once(prompt, said):
    whole = said if said[0] == prompt[0] else prompt + said
    row = {"prompt": prompt, "chosen": [*said, STONE], "rejected": [*said, RIVER]}
    assert preference(row)[:2] == (whole, [STONE, RIVER])


@pytest.mark.parametrize("row, unread", [
    ({"prompt": "Translate:", "input": "hello"}, "input"), ({"instruction": "Answer.", "question": "2+2?"}, "question"),
    ({"prompt": "red?", "messages": [S("be kind"), U("red?")], "instruction": ""}, "messages"),
    ({"conversations": [U("red?")], "messages": [U("blue?")]}, "messages"), ({"instruction": "Answer.", "input": "2+2?"}, None),
])  # fmt: skip
def test_a_question_that_another_column_displaces_is_named(row, unread, capsys):
    assert len(encoded([{**row, **SAME}])[0]) == 1
    expected = f"d.json: columns that are not read: {unread}\n" if unread else ""
    assert capsys.readouterr().out == expected


def test_columns_that_are_not_read_are_named_once(tmp_path, capsys):
    row = {"prompt": "a", "history": [["a", "b"]], "score": 3, **SAME}
    for rows in ([row, row], Dataset.from_list([row, row])):
        assert len(encoded(rows, bpe_tokenizer())[0]) == 2
        assert capsys.readouterr().out.count("d.json: columns that are not read: history, score\n") == 1


@pytest.mark.parametrize("answer", ["[]", '[{"value": 3, "unit": "kg"}]', '[{"from": "Oslo", "to": "Rome"}]', '{"content": "pages"}'])
def test_an_answer_in_json_is_a_text(answer):
    assert preference({"prompt": "As JSON: ", "chosen": answer, "rejected": "no"}).answers == [answer, "no"]


@pytest.mark.parametrize("more", [{"id": 1}, {"tool_calls": None}])
def test_messages_in_json_are_messages_whatever_their_first_field(more):
    chosen, rejected = (json.dumps({**more, **answer}) for answer in (STONE, RIVER))
    x, answers, *_ = preference({"prompt": json.dumps([U("red?")]), "chosen": chosen, "rejected": rejected})
    assert x == [U("red?")] and [y["content"] for y in answers] == ["stone", "river"]


@pytest.mark.parametrize("nothing", [[], {}, "", " ", None])
def test_an_empty_field_says_nothing(nothing):
    """As logs and parquet files have it: no call, no thought, no tools, no input."""
    more = {"tool_calls": nothing, "reasoning_content": nothing}
    row = {"instruction": "red?", "input": nothing, "system": nothing, "tools": nothing,
           "chosen": A("stone", **more), "rejected": A("river", **more)}  # fmt: skip
    assert preference(row)[:3] == ([U("red?")], [STONE, RIVER], {})
    assert encoded([row]) == encoded([{"prompt": [U("red?")], **SAME}])


# What a template makes of a row

R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}{% else %} Assistant: {{ m.content.split('</think>')[-1] }}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %} Assistant:{{ opening or '' }}{% endif %}"
)
FIELDS = (
    "{% if tools %}<tools>{{ tools[0].name }}</tools>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(template):
    tokenizer = bpe_tokenizer(CHATML)
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_that_leaves_out_a_part_of_the_answer_is_refused():
    row = {"prompt": [U("red?")], "chosen": "<think>\nstones\n</think>\n\nblue", "rejected": "green"}
    with pytest.raises(InputError, match="row 0: the chat template leaves out or changes a part of the answer '<think>"):
        encoded([row], with_template(R1))
    assert len(encoded([row], with_template(CHATML))[0]) == 1
    asked = {"prompt": [U("red?"), A("<think>no</think>green"), U("sure?")], **SAME}  # of a turn before it may
    assert len(encoded([asked], with_template(R1))[0]) == 1


def test_a_thought_that_only_a_prompt_opens_is_left_out_as_in_trl():
    tokenizer = with_template(R1.replace("opening or ''", "'<think>\\n'"))
    [(x, w, _)], counts = encoded([{"prompt": [U("red?")], "chosen": "blue", "rejected": "green"}], tokenizer)
    assert tokenizer.decode(x) == "User: red? Assistant:" and tokenizer.decode(w) == " blue<|im_end|>"
    assert [n for what, n in counts.items() if "'<think>\\n'" in what] == [1]


def test_a_thought_that_the_prompt_opens_and_the_answer_spells_out():
    """Qwen3.5's form: the prompt ends with an opened thought, as an answered dialogue's own text does."""
    think = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer = with_template(think + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}")
    row = {"prompt": [U("red?")], "chosen": "<think>\nr1\n</think>\nstone", "rejected": "<think>\nr2\n</think>\nriver"}
    [(x, w, l)], counts = encoded([row], tokenizer)
    assert tokenizer.decode(x).endswith("<|im_start|>assistant\n<think>\n") and counts["kept"] == 1
    assert [tokenizer.decode(y) for y in (w, l)] == ["r1\n</think>\nstone<|im_end|>", "r2\n</think>\nriver<|im_end|>"]


def test_answers_that_begin_as_an_opened_thought_does():
    """Both begin with "<", as "<think>" does, which the prompt alone ends with: it is their own."""
    tokenizer = with_template(R1.replace("opening or ''", "'<think>\\n'"))
    [(x, w, l)], _ = encoded([{"prompt": [U("red?")], "chosen": "<div>a</div>", "rejected": "<p>b</p>"}], tokenizer)
    assert [tokenizer.decode(ids) for ids in (x, w, l)] == ["User: red? Assistant:", " <div>a</div><|im_end|>", " <p>b</p><|im_end|>"]


def test_a_call_without_which_the_template_refuses_the_answer_is_written():
    """Mistral's form: an answer of nothing is an error there."""
    refusing = FIELDS.replace("{{ m.content }}", "{{ m.content }}{% if not m.content and not m.tool_calls %}{{ 1 // 0 }}{% endif %}")
    row = {"prompt": [U("red?")], "chosen": A(None, tool_calls=CALL), "rejected": "green"}
    assert encoded([row], with_template(refusing)) == encoded([row], with_template(FIELDS))
    assert encoded([row], with_template(refusing))[1]["kept"] == 1


def test_what_a_message_says_beside_its_content():
    """Trained on where the template writes it; otherwise the pair is dropped, if it is part of an answer."""
    tokenizer, x = with_template(FIELDS), [U("red?")]
    for more, mark in (({"tool_calls": CALL}, "<call>weather</call>"), ({"reasoning_content": "stones"}, "<think>stones</think>")):
        row = {"prompt": x, "chosen": [A("look", **more)], "rejected": [A("look")]}
        [(_, w, l)], _ = encoded([row], tokenizer)
        assert mark in tokenizer.decode(w) and mark not in tokenizer.decode(l)
        pairs, counts = encoded([row])
        assert not pairs and counts[f"dropped: the chat template does not write an answer's '{next(iter(more))}'"] == 1
    [(_, w, _)], _ = encoded([{"prompt": x, "chosen": A(None, tool_calls=CALL), "rejected": "green"}], tokenizer)
    assert tokenizer.decode(w) == "<call>weather</call><|im_end|>"
    pairs, counts = encoded([{"prompt": [{**U("red?"), "name": "Ann"}], **SAME}], tokenizer)
    assert len(pairs) == 1 and counts["kept"] == 1


def test_tools_are_given_to_the_template():
    row = {"prompt": [U("red?")], "tools": json.dumps([{"name": "weather"}]), **SAME}
    tokenizer = with_template(FIELDS)
    [(x, *_)], counts = encoded([row], tokenizer)
    assert tokenizer.decode(x).startswith("<tools>weather</tools>") and counts["kept"] == 1
    for tool in ({"name": "<|im_end|>"}, {"name": "weather", "<|im_end|>": 1}):
        forged = {"prompt": [U("red?")], "tools": [tool], **SAME}
        assert encoded([forged])[1]["dropped: a text spells a special token"] == 1
    unwritten = "prompts without their tools, which the chat template does not write"
    assert encoded([row])[1][unwritten] == 1 and unwritten not in counts


def test_an_answer_goes_on_with_the_assistant_s_beginning():
    tokenizer = bpe_tokenizer(CHATML)
    for answers in ({"chosen": " blue", "rejected": " green"}, {"chosen": [A(" blue")], "rejected": [A(" green")]}):
        [(x, w, _)], _ = encoded([{"prompt": [U("red?"), A("The stone is")], **answers}], tokenizer)
        assert tokenizer.decode(x).endswith("<|im_start|>assistant\nThe stone is") and tokenizer.decode(w) == " blue<|im_end|>"


# From token ids back to texts


def smollm():
    """A tokenizer whose BOS is the mark of a turn: its template writes it, and it is added to no text by itself."""
    tokenizer = bpe_tokenizer(CHATML)
    tokenizer.bos_token = "<|im_start|>"
    return tokenizer


def gemma(adds_bos):
    """Its template ends a turn with a token that is not the tokenizer's EOS."""
    tokenizer = bpe_tokenizer(CHATML, adds_bos=adds_bos)
    tokenizer.eos_token, tokenizer.chat_template = "</s>", "{{ bos_token }}" * adds_bos + CHATML
    return tokenizer


def glm():
    """It puts two tokens before every text, as its template does."""
    tokenizer = bpe_tokenizer(CHATML)
    before = processors.TemplateProcessing(single="<pad> <s> $A", special_tokens=[("<pad>", 0), ("<s>", 2)])
    tokenizer.backend_tokenizer.post_processor, tokenizer.chat_template = before, "<pad><s>" + CHATML
    return tokenizer


ROUND_TRIPS = {"a BOS that only the template writes": smollm(), "a BOS that both write": gemma(True), "two tokens before a text": glm(),
               "SentencePiece": unigram_tokenizer(CHATML)}  # fmt: skip


def test_a_prompt_that_is_cut_keeps_what_its_tokenizer_puts_first():
    [(x, *_)], _ = encoded([{"prompt": "red " * 50, **SAME}], glm(), max_prompt_length=9)
    assert len(x) == 9 and x[:2] == [0, 2] and x.count(2) == 1


@pytest.mark.parametrize("kind", ROUND_TRIPS)
def test_trl_reads_the_ids_that_were_trained_on(kind):
    """ids -> texts -> TRL's own preparation -> the same ids; where a turn ends by another token, TRL adds its EOS."""
    trl = pytest.importorskip("trl")
    tokenizer = ROUND_TRIPS[kind]
    ends = list(dict.fromkeys([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]))
    pairs, _ = encoded([row for x, row in PUBLISHED.values() if not any("tool_calls" in m for m in x)], tokenizer, ends)
    rows = []
    for x, *answers in pairs:  # as pairs.jsonl has them
        chosen, rejected = (response_text(tokenizer, x, y, ends[:1]) for y in answers)
        rows.append({"prompt": prompt_text(tokenizer, x), "chosen": chosen, "rejected": rejected})
    prepare = partial(trl.DPOTrainer._prepare_dataset, SimpleNamespace(_tokenizer=tokenizer))
    theirs = prepare(Dataset.from_list(rows), tokenizer, trl.DPOConfig(max_length=None, bf16=False, use_cpu=True), "train")
    added = [] if tokenizer.eos_token == "<|im_end|>" else [tokenizer.eos_token_id]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    assert [[row[name] for name in names] for row in theirs] == [[x, w + added, l + added] for x, w, l in pairs]


def test_people_see_a_conversation():
    rows = [{"prompt": [S("be kind"), U("red?")], **SAME}, {"prompt": [U("blue?")], **SAME}]
    tokenizer = smollm()
    limits = {"eos_ids": [tokenizer.eos_token_id], "max_length": 400, "max_prompt_length": 300}
    given, _ = encode(rows, tokenizer, name="d", **limits)
    assert [one.text for one in given] == ["system: be kind\n\nuser: red?", "blue?"]
    assert [one.row for one in given] == [0, 1]
    for one in given:
        assert response_text(tokenizer, one.pair.prompt, one.pair.rejected, limits["eos_ids"]) == "river"


# Files


@pytest.mark.parametrize("name", ["d.csv", "d.csv.gz", "d.json.gz", "d.jsonl.gz"])
def test_files_of_other_kinds(name, tmp_path):
    rows = [{"prompt": "a, \"b\"\nNA", "chosen": "4", "rejected": "None"}, {"prompt": "é", "chosen": "b", "rejected": "c" * 200_000}]
    if "csv" in name:
        cells = [",".join('"' + text.replace('"', '""') + '"' for text in row.values()) for row in [dict(zip(rows[0], rows[0])), *rows]]
        text = "\n".join(cells)
    else:
        text = json.dumps(rows) if "jsonl" not in name else "\n".join(map(json.dumps, rows))
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read_rows(str(tmp_path / name), "train") == rows


@pytest.mark.parametrize("name, text", [
    ("train.jsonl", '{"prompt": "when?", "chosen": "2024-05-01", "rejected": "2024-05-02"}\n' * 2), ("train.csv", "prompt,chosen,rejected\nNA,4,5\n"),
])  # fmt: skip
def test_a_folder_is_read_as_its_files(name, text, tmp_path):
    """Not by `datasets`, which takes some texts for dates, numbers or nothing."""
    (tmp_path / name).write_text(text)
    assert read_rows(str(tmp_path), "train") == read_rows(str(tmp_path / name), "train")


def test_messages_in_a_csv(tmp_path):
    cells = [json.dumps([U("red?"), answer]).replace('"', '""') for answer in (STONE, RIVER)]
    (tmp_path / "d.csv").write_text('chosen,rejected\n"{}","{}"\n'.format(*cells))
    [pair], _ = encoded(read_rows(str(tmp_path / "d.csv"), "train"))
    assert pair == encoded([{"chosen": [U("red?"), STONE], "rejected": [U("red?"), RIVER]}])[0][0]


def test_hh_rlhf_as_github_has_it(tmp_path):
    row = {"chosen": "\n\nHuman: red?\n\nAssistant: stone", "rejected": "\n\nHuman: red?\n\nAssistant: river"}
    for split in ("train", "test"):
        with gzip.open(tmp_path / f"{split}.jsonl.gz", "wt") as file:
            file.write(json.dumps(row) + "\n")
    for rows in (read_rows(str(tmp_path / "train.jsonl.gz"), "train"), read_rows(str(tmp_path), "test")):
        assert [preference(row)[:2] for row in rows] == [([U("red?")], [STONE, RIVER])]


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path, capsys):
    """`datasets` takes the files of the commonest kind, and of them those that are named after a split."""
    for name in ("train-1.jsonl", "train-2.jsonl", "extra.jsonl", "train-3.csv"):
        (tmp_path / name).write_text(json.dumps({"prompt": "a", **SAME}) + "\n")
    assert len(read_rows(str(tmp_path), "train")) == 2
    assert capsys.readouterr().out == f"{tmp_path}: files that are not read: extra.jsonl, train-3.csv\n"


def test_a_file_is_what_its_last_ending_says_and_nan_is_null(tmp_path):
    (tmp_path / "d.csv.jsonl").write_text('{"prompt": "a", "input": NaN}\n')
    assert read_rows(str(tmp_path / "d.csv.jsonl"), "train") == [{"prompt": "a", "input": None}]


def test_a_folder_of_save_to_disk(tmp_path):
    rows = Dataset.from_list([{"prompt": "a", **SAME}] * 3)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "two")
    assert len(read_rows(str(tmp_path / "one"), "train", 2)) == 2 and len(read_rows(str(tmp_path / "two"), "test")) == 1
    with pytest.raises(InputError, match="split 'other' cannot be read"):
        read_rows(str(tmp_path / "two"), "other")


@pytest.mark.parametrize("name", ["d.json", "d.jsonl.gz", "d.parquet"])
def test_a_git_lfs_pointer_is_named(name, tmp_path):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(InputError, match="it is a Git-LFS pointer"):
        read_rows(str(tmp_path / name), "train")


def test_a_configuration_of_a_data_set(monkeypatch):
    asked = []
    rows = Dataset.from_list([{"prompt": "a", **SAME}])
    monkeypatch.setattr("datasets.load_dataset", lambda *name, **more: asked.append((*name, more["split"])) or rows)
    for split in ("train", "test"):
        assert len(read_rows("some/data", split, config="clean")) == 1
    assert asked == [("some/data", "clean", "train"), ("some/data", "clean", "test")]


# Errors of others, size


def test_what_a_tokenizer_raises_is_one_line():
    class Broken(type(bpe_tokenizer())):
        def __call__(self, texts, **more):
            if isinstance(texts, list) and len(texts) > 2:
                raise KeyError("a\nb")
            return super().__call__(texts, **more)

    tokenizer = bpe_tokenizer(CHATML)
    tokenizer.__class__ = Broken
    with pytest.raises(InputError, match=r"^d.json, row 0: the tokenizer fails: 'a\\nb'$"):
        encoded([{"prompt": "a", **SAME}] * 2, tokenizer)


def test_a_response_is_decoded_after_its_prompt_whatever_their_border():
    """Of a longer prompt the last eight tokens are enough; they may begin inside a character, which 🦊 has four of."""
    for make, first in ((bpe_tokenizer, ""), (unigram_tokenizer, " ")):  # the second begins every text with a space
        tokenizer = make()
        for x, y in (("the fox", " is"), ("日本", "☃ naïve"), ("a\n", "\nb"), ("🦊🦊a", " is"), ("🦊🦊a", "☃")):
            ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (x, y)]
            assert response_text(tokenizer, ids[0], ids[1] + [1], [1]) == first + y.lstrip(" " if first else "")


def test_messages_that_are_an_answer_alone_are_no_prompt():
    answer = {"role": "assistant", "content": "Yes."}
    asked = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "No."}]
    assert preference({"messages": answer, "chosen": asked, "rejected": asked}).prompt == asked[:1]
    with pytest.raises(Unusable, match="without an answer"):
        preference({"messages": answer, "chosen": asked[:1], "rejected": asked})


@pytest.mark.parametrize("text, message", [
    ("prompt,chosen,rejected\na,b,c\na, or b,c,d\n", "row 1, near line 3: expected a cell for each"),
    ("prompt,chosen,rejected,chosen\na,b,c,d\n", "row 0, .* prompt, chosen, rejected, chosen"),
    ('prompt,chosen,rejected\n"say "hi" now",b,c\n', "row 0, near line 2: "),
])  # fmt: skip
def test_a_csv_of_another_shape_is_refused(text, message, tmp_path):
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_rows(str(tmp_path / "d.csv"), "train")


def test_what_a_run_wrote_is_read_to_the_same_ids():
    """Also where a turn ends with another token than the tokenizer's EOS, and with a line break after an end."""
    tokenizer = gemma(False)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    pairs, _ = encoded([{"prompt": [U("red?")], **SAME}], tokenizer, ends)
    for after in ("", "\n"):
        chosen, rejected = (response_text(tokenizer, pairs[0].prompt, y, ends[:1]) + after for y in pairs[0][1:])
        row = {"prompt": prompt_text(tokenizer, pairs[0].prompt), "chosen": chosen, "rejected": rejected}
        assert encoded([row], tokenizer, ends)[0] == pairs


@pytest.mark.parametrize("nothing", [{}, [[]], [None], [{"function": None}], "[]", " [{}] ", '[{"function": {"name": null}}]'], ids=str)
def test_what_says_nothing_all_the_way_down_is_absent(nothing):
    """As parquet and CSV files write a call that is none. What is empty inside a call stays: it may be its argument."""
    row = {"prompt": None, "messages": nothing, "instruction": "red?", "tools": nothing,
           "chosen": A("stone", tool_calls=nothing, name=None), "rejected": A("river", reasoning_content=nothing)}  # fmt: skip
    assert preference(row)[:3] == ([U("red?")], [STONE, RIVER], {})
    call = [{"function": {"name": "now", "arguments": {}}, "id": None}]
    calls = preference({"prompt": [U("red?")], "chosen": A("", tool_calls=call), "rejected": "river"}).answers[0]["tool_calls"]
    assert calls == [{"function": {"name": "now", "arguments": {}}}]


@pytest.mark.parametrize("question, expected", [
    ({"instruction": "", "input": "red?"}, "red?"), ({"instruction": None, "input": "red?"}, "red?"), ({"input": "red?"}, "red?"),
    ({"prompt": "", "question": "red?"}, "red?"), ({"prompt": [], "messages": "[]", "instruction": "red?", "input": " "}, "red?"),
])  # fmt: skip
def test_an_empty_column_leaves_the_question_to_another(question, expected):
    assert preference({**question, **SAME}).prompt == [U(expected)]


def test_an_empty_prompt_leaves_it_to_the_dialogues():
    for chosen, rejected in (([U("red?"), STONE], [U("red?"), RIVER]), ("\n\nHuman: red?\n\nAssistant: stone", "\n\nHuman: red?\n\nAssistant: river")):
        assert preference({"prompt": "", "chosen": chosen, "rejected": rejected})[:2] == ([U("red?")], [STONE, RIVER])


def test_a_system_message_of_null_in_json_is_none():
    chosen, rejected = (json.dumps([S(None), U("red?"), answer]) for answer in (STONE, RIVER))
    assert preference({"chosen": chosen, "rejected": rejected})[:2] == ([U("red?")], [STONE, RIVER])


NESTED = (  # with the fields of an object in one order, which parquet files do not keep
    "{% for t in tools or [] %}{{ t | tojson(sort_keys=True) }}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m | tojson(sort_keys=True) }}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NESTING = with_template(NESTED)
nothing = st.sampled_from([None, "", " ", []])
words = st.sampled_from(["red", "[]", "2024-05-01", "NA", "a, \"b\"\nc", "1"])
arguments = st.fixed_dictionaries({}, optional={"city": words | nothing.filter(lambda one: one != []), "days": st.lists(words, max_size=2) | st.none()})
call = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": words, "arguments": arguments})}, optional={"id": words | st.none()})
fields = {"tool_calls": st.lists(call, max_size=2) | st.none(), "reasoning_content": words | st.sampled_from([None, "", " "])}
said = st.builds(lambda role, content, more: {"role": role, "content": content, **more}, st.sampled_from(["user", "system"]), words,
                 st.fixed_dictionaries({}, optional=fields))  # fmt: skip
answers = st.builds(lambda content, more: [A(content, **more)], words, st.fixed_dictionaries({}, optional=fields))
tool = st.fixed_dictionaries({"name": words}, optional={"parameters": arguments | st.none()})
any_rows = st.lists(
    st.fixed_dictionaries(
        {"prompt": st.lists(said, min_size=1, max_size=2), "chosen": answers, "rejected": answers},
        optional={"tools": st.lists(tool, max_size=2) | st.none(), "system": st.sampled_from([None, "", "be kind"])},
    ),
    min_size=1, max_size=3,
)  # fmt: skip


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(any_rows)
def test_a_row_is_the_same_in_every_kind_of_file(tmp_path_factory, rows):
    """Empty, null and nested fields, through JSON, CSV, parquet and a folder: the same ids, and the same is dropped."""
    here = tmp_path_factory.mktemp("kinds")
    columns = dict.fromkeys(name for row in rows for name in row)
    (here / "d.json").write_text(json.dumps(rows))
    (here / "[a] folder").mkdir()
    (here / "[a] folder" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with open(here / "d.csv", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(columns)
        for row in rows:
            cells = [row.get(name) for name in columns]
            lines.writerow([cell if isinstance(cell, str) or cell is None else json.dumps(cell) for cell in cells])
    try:
        parquet.write_table(Table.from_pylist([{name: row.get(name) for name in columns} for row in rows]), here / "d.parquet")
    except NotImplementedError:  # an object without fields, which parquet files do not hold
        (here / "d.parquet").unlink(missing_ok=True)
    read = []
    for name in ("d.json", "d.csv", "[a] folder", "d.parquet"):
        if (here / name).exists():
            pairs, counts = encoded(read_rows(str(here / name), "train"), NESTING, max_length=4000, max_prompt_length=3000)
            read.append((pairs, counts))
    assert all(one == read[0] for one in read)


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.parquet", "folder", "saved"])
def test_a_path_means_itself_whatever_its_letters(name, tmp_path, monkeypatch):
    """Also where `datasets` would take it for a pattern, and in the home, which a shell does not write into --flag=~/d."""
    monkeypatch.setenv("HOME", str(tmp_path))
    place = tmp_path / "a*[b] c"
    place.mkdir()
    row = {"prompt": "when?", "chosen": "2024-05-01", "rejected": "b"}
    table = Dataset.from_list([row])
    if name == "saved":
        table.save_to_disk(place / name)
    elif name == "folder":
        (place / name).mkdir()
        (place / name / "train[0].jsonl").write_text(json.dumps(row))
    else:
        {"d.jsonl": table.to_json, "d.csv": partial(table.to_csv, index=False), "d.parquet": table.to_parquet}[name](place / name)
    for path in (str(place / name), f"~/a*[b] c/{name}"):
        assert read_rows(path, "train") == [row]


def test_a_csv_row_with_a_cell_too_few_is_refused_and_a_blank_line_is_none(tmp_path):
    (tmp_path / "d.csv").write_text("prompt,chosen,rejected,system\na,b,c,\n\na,b,c\n")
    with pytest.raises(InputError, match="row 1, near line 4: expected a cell for each"):
        read_rows(str(tmp_path / "d.csv"), "train")


def test_a_mistyped_path_is_no_name_on_the_hub(tmp_path, monkeypatch):
    """Which would be asked for again and again: "models/typo" where there is a folder "models"."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("models/typo", "no-folder/"):
        with pytest.raises(InputError, match=f"{name}: no such file"):
            read_rows(name, "train")
        with pytest.raises(InputError, match=f"{name}: no such folder"):
            load(name, "cpu")


def test_a_tokenizer_that_knows_no_a():
    """As of proteins; and it puts an end behind every text, which is not in front of it."""
    words = {letter: i for i, letter in enumerate(["<pad>", "</s>", "<s>", *"MKLAVG"])}
    tokenizer = bpe_tokenizer()
    tokenizer = type(tokenizer)(tokenizer_object=Tokenizer(models.BPE(vocab=words, merges=[])), pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    for single, first in (("$A", []), ("<s> $A", [2]), ("<s> $A </s>", [2]), ("<pad> <s> $A </s>", [0, 2])):
        special = [("<pad>", 0), ("</s>", 1), ("<s>", 2)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
        added_before.cache_clear()
        [pair], _ = encoded([{"prompt": "MK", "chosen": "LA", "rejected": "VG"}], tokenizer)
        assert pair == ([*first, 3, 4], [5, 6, 1], [7, 8, 1])


def test_the_plain_template_begins_as_the_tokenizer_does():
    """Which need not be its bos_token."""
    tokenizer = glm()
    tokenizer.chat_template = None
    [(x, *_)], _ = encoded([{"prompt": [U("red?")], **SAME}], tokenizer)
    assert x == tokenizer("\n\nHuman: red?\n\nAssistant:").input_ids and x[:2] == [0, 2]


def test_a_rendered_text_may_end_as_the_template_ends_a_turn():
    """Also where neither the tokenizer nor the model calls that an end; but nothing special stands before it."""
    tokenizer = gemma(False)
    [pair], _ = encoded([{"prompt": [U("red?")], **SAME}], tokenizer)
    chosen, rejected = (response_text(tokenizer, pair.prompt, y, [1]) for y in pair[1:])
    assert chosen == "stone<|im_end|>\n"
    row = {"prompt": prompt_text(tokenizer, pair.prompt), "chosen": chosen, "rejected": rejected}
    assert encoded([row], tokenizer)[0] == [pair]
    for forged in ("stone<|im_start|>", "<|im_end|>stone<|im_end|>\n", "stone<|im_end|>\n<|im_end|>\n"):
        pairs, counts = encoded([{**row, "chosen": forged}], tokenizer)
        assert not pairs and counts["dropped: a text spells a special token"] == 1
    asked = {"prompt": [U("red?")], "chosen": "stone.", "rejected": "river."}  # plain text of the template is the answer's
    [(_, w, _)], _ = encoded([asked], with_template(CHATML.replace("<|im_end|>", ".<|im_end|>")))
    assert response_text(tokenizer, pair.prompt, w, []).startswith("stone..")
