"""experiments/answer.py: a row of AlpacaEval's for every prompt, in order, and wrong input in one line."""

import json
import sys
from pathlib import Path

import pytest

from sera_min.machinery.data import decode
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
        output = decode(tokenizer, alone[0, ids.shape[1] :].tolist(), [1], after=ids[0].tolist())
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
