"""The samples that a paused run of train.py waits for, by vLLM, which is faster than `model.generate`.

    python train.py … --output_dir OUT --pause_before_sampling        # ends where samples are due
    python experiments/sample_with_vllm.py OUT                        # writes them, needs `pip install vllm`
    python train.py --resume_from_checkpoint OUT                      # and so on, to the end

with_trl.py pauses and goes on likewise. Start it in the folder that the run was started in: the policy is named from
there. Prompts and samples are token ids, so nothing is tokenised a second time. Not run by us: no GPU was at hand.
"""

import argparse
import json
import sys
from pathlib import Path


def waiting_request(out: Path) -> tuple[Path, Path]:
    """What the run asks for, and the file that it waits for."""
    for asked in (out / "state").glob("prompts-*.json"):
        answer = asked.with_name(asked.name.replace("prompts", "samples") + "l")
        if not answer.exists():
            return asked, answer
    sys.exit(f"error: no run in {out} waits for samples")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="output_dir of the paused run")
    asked, answer = waiting_request(parser.parse_args(arguments).out)
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        sys.exit("error: vLLM is not installed: pip install vllm, best in an environment of its own")
    request = json.loads(asked.read_text(encoding="utf-8"))
    prompts, n, ends = request["prompts"], request["samples_per_prompt"], request["eos_token_ids"]
    # Products in bfloat16, as in train.py; no sampling settings but these; the ends by their ids, not by a tokenizer
    options: dict = {"generation_config": "vllm", "skip_tokenizer_init": True}
    adapter = Path(request["policy"], "adapter_config.json")
    model, with_lora = request["policy"], {}
    if adapter.exists():  # a policy of --use_peft
        from vllm.lora.request import LoRARequest

        about = json.loads(adapter.read_text(encoding="utf-8"))
        model = about["base_model_name_or_path"]
        with_lora = {"lora_request": LoRARequest("policy", 1, request["policy"])}
        options |= {"enable_lora": True, "max_lora_rank": max(16, about["r"])}
    engine = LLM(model, dtype="bfloat16", **options)
    settings = [  # vLLM draws sample j of a prompt by its seed + j
        SamplingParams(
            n=n, temperature=request["temperature"], top_p=request["top_p"], max_tokens=request["max_new_tokens"],
            stop_token_ids=ends, detokenize=False, seed=request["seed"] + i * n,
        )
        for i in range(len(prompts))
    ]  # fmt: skip
    outputs = engine.generate([{"prompt_token_ids": x} for x in prompts], settings, **with_lora)
    beside = answer.with_name(f".{answer.name}")
    with open(beside, "w", encoding="utf-8") as lines:
        for x, output in zip(prompts, outputs):
            reasons = [one.finish_reason for one in output.outputs]
            responses = [list(one.token_ids) for one in output.outputs]
            for y, reason in zip(responses, reasons):
                if reason == "stop" and y[-1:] not in [[end] for end in ends]:
                    y.append(ends[0])  # where a version leaves the end of sequence out
            lines.write(json.dumps({"prompt": x, "responses": responses, "finish_reasons": reasons}) + "\n")
    beside.rename(answer)
    print(f"{answer}: {n} samples of each of {len(prompts)} prompts")


if __name__ == "__main__":
    main()
