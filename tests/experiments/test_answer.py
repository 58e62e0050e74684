"""experiments/answer.py: a row of AlpacaEval's for every prompt, in order, and wrong input in one line."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from shared import CHATML, bpe_tokenizer, encode_pairs, unigram_tokenizer

from sera_min import playground
from sera_min.machinery import folder
from sera_min.machinery.data import response_text
from sera_min.machinery.errors import InputError
from sera_min.machinery.models import load

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import answer


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_every_prompt_has_its_greedy_answer(model_dir, tmp_path):
    """At a temperature near 0 the answers are those of `generate`, whichever prompts are beside them."""
    texts = ["Tell me about the fox", "What is 2 + 2?", "Hi"]
    rows = [{"prompt": text} for text in texts] + [{"instruction": "Say hi"}]  # the last is put into a template
    out = tmp_path / "answers.json"
    flags = ["--policy", str(model_dir), "--output", str(out), "--device", "cpu", "--temperature", "1e-6"]
    flags += ["--max_new_tokens", "6", "--max_prompt_length", "40"]
    answer.command_line([*flags, "--prompt_file", write(tmp_path / "p.jsonl", rows)])

    policy, tokenizer = load(model_dir, "cpu")
    expected = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        alone = policy.generate(ids, do_sample=False, max_new_tokens=6, eos_token_id=1, pad_token_id=0)
        output = response_text(tokenizer, ids[0].tolist(), alone[0, ids.shape[1] :].tolist(), [1])
        expected.append({"instruction": text, "output": output, "generator": str(model_dir)})
    answers = json.loads(out.read_text())
    assert answers[:3] == expected and answers[3]["instruction"] == "Say hi"


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--policy", "./none"], "none: no such folder"),
        (["--prompt_file", "none.jsonl"], "none.jsonl: no such file"),
        (["--temperature", "0"], "--temperature is 0.0: expected above 0"),
        (["--max_new_tokens", "500"], "--max_prompt_length \\+ --max_new_tokens"),
    ],
)
def test_what_cannot_be_is_one_line(model_dir, tmp_path, wrong, message):
    file = write(tmp_path / "p.jsonl", [{"prompt": "Hi"}])
    flags = ["--policy", str(model_dir), "--prompt_file", file, "--max_new_tokens", "6", "--max_prompt_length", "40"]
    with pytest.raises(SystemExit, match=message):
        answer.command_line([*flags, "--device", "cpu", *wrong])


def test_a_row_that_is_no_prompt_is_named(model_dir, tmp_path):
    file = write(tmp_path / "p.jsonl", [{"prompt": "Hi"}, {"instruction": 7}])
    with pytest.raises(SystemExit, match="p.jsonl, row 1"):
        answer.command_line(
            [
                "--policy",
                str(model_dir),
                "--prompt_file",
                file,
                "--device",
                "cpu",
                "--max_new_tokens",
                "6",
                "--max_prompt_length",
                "40",
            ]
        )


def test_prompts_to_answer():
    """As a pair's prompt is read, but alone: of a vocabulary that knows no word of ours, where no response has room."""
    limits = {"eos_ids": [1], "max_length": 17, "max_prompt_length": 16}
    rows = [{"prompt": "tell me about the fox and the owl"}, {"instruction": "tell me", "input": "about the owl"}]
    texts, ids, counts = answer.encode_prompts(rows, playground.make_tokenizer(), name="ask", **limits)
    assert counts.pop("dialogues as '\\n\\nHuman: … \\n\\nAssistant: …', as the tokenizer has no template") == 1
    assert counts == {"read": 2, "prompts cut": 0, "responses cut": 0}
    assert texts == [rows[0]["prompt"], "tell me\n\nabout the owl"] and len(ids[0]) == 8
    for tokenizer in (bpe_tokenizer(CHATML), bpe_tokenizer(adds_bos=True), unigram_tokenizer(adds_bos=True)):
        answered = [{**row, "chosen": "b", "rejected": "c"} for row in rows]
        pairs, _ = encode_pairs(answered, tokenizer, name="d", **{**limits, "max_length": 99})
        assert answer.encode_prompts(rows, tokenizer, name="ask", **limits)[1] == [x for x, _, _ in pairs]
    long = [{"prompt": "tell me " * 9}]  # loses its beginning, and that is counted
    _, [x], counts = answer.encode_prompts(long, playground.make_tokenizer(), name="ask", **limits)
    assert len(x) == 16 and counts["prompts cut"] == 1


def test_a_file_without_a_prompt(tmp_path, model_dir):
    file = write(tmp_path / "none.jsonl", [])
    with pytest.raises(SystemExit, match="none.jsonl: no prompt to answer"):
        answer.command_line(["--policy", str(model_dir), "--prompt_file", file, "--max_new_tokens", "8", "--max_prompt_length", "8"])


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match="--device is 'cuda': expected one of cpu$"):
        answer.command_line(["--policy", "p", "--prompt_file", "f", "--device", "cuda"])


def test_a_folder_is_no_place_for_answers(tmp_path):
    """It was replaced by the file, with all that it held."""
    (tmp_path / "kept").touch()
    with pytest.raises(SystemExit, match="is a folder: expected a file"):
        answer.command_line(["--policy", "p", "--prompt_file", "f", "--output", str(tmp_path)])
    with pytest.raises(OSError, match="cannot be written"):
        folder.write(tmp_path, "text")
    assert (tmp_path / "kept").exists()


@pytest.mark.parametrize("row, message", [
    ({"chosen": "b"}, "ask, row 1: expected 'prompt' or 'instruction'"),
    ([], "ask, row 1: of type list: expected fields"),
    ({"prompt": 5}, "ask, row 1: 'prompt': of type int: expected a text"),
    ({"prompt": " "}, "ask, row 1: expected 'prompt' or 'instruction'"),
])  # fmt: skip
def test_what_is_no_prompt_to_answer(row, message):
    with pytest.raises(InputError, match=re.escape(message)):
        limits = {"eos_ids": [1], "max_length": 30, "max_prompt_length": 20}
        answer.encode_prompts([{"prompt": "a"}, row], bpe_tokenizer(), name="ask", **limits)
