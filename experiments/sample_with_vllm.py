"""The samples that a paused run of train.py waits for, by vLLM, which is faster than `model.generate`.

    python train.py … --output_dir OUT --pause_before_sampling        # ends where samples are due
    python experiments/sample_with_vllm.py OUT                        # writes them, needs `pip install vllm`
    python train.py --resume_from_checkpoint OUT                      # and so on, to the end

with_trl.py pauses and goes on likewise. The base of an adapter may be named from the folder that the run was started
in: start this there. Prompts and samples are token ids, so nothing is tokenised a second time. Sums between layers are
bfloat16 here, and with LoRA the sum of its product too, where train.py has float32: small steps are lost in sampling.
Not run by us: no GPU was at hand.
"""

import argparse
import json
import sys
from pathlib import Path


def waiting_request(out: Path) -> tuple[Path, Path]:
    """What the run asked for last, and the file that it waits for."""
    waiting = {}
    for asked in (out / "state").glob("prompts-*.json"):
        answer = asked.with_name(asked.name.replace("prompts", "samples") + "l")
        if not answer.exists():
            waiting[asked] = answer
    if not waiting:
        sys.exit(f"error: no run in {out} waits for samples")
    latest = max(waiting, key=lambda file: file.stat().st_mtime)
    return latest, waiting[latest]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="output_dir of the paused run")
    parser.add_argument("--tensor_parallel_size", type=int, default=1, help="GPUs that share the model (1)")
    flags = parser.parse_args(arguments)
    asked, answer = waiting_request(flags.out)
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        sys.exit("error: vLLM is not installed: pip install vllm, best in an environment of its own")
    request = json.loads(asked.read_text(encoding="utf-8"))
    prompts, n, ends = request["prompts"], request["samples_per_prompt"], request["eos_token_ids"]
    # No sampling settings but these, and the ends by their ids, not by a tokenizer.
    options: dict = {"generation_config": "vllm", "skip_tokenizer_init": True}
    options["tensor_parallel_size"] = flags.tensor_parallel_size
    options["max_model_len"] = max(map(len, prompts)) + request["max_new_tokens"]
    adapter = Path(request["policy"], "adapter_config.json")
    model, with_lora = request["policy"], {}
    if adapter.exists():  # a policy of --use_peft
        from vllm.lora.request import LoRARequest

        about = json.loads(adapter.read_text(encoding="utf-8"))
        model = about["base_model_name_or_path"]
        with_lora = {"lora_request": LoRARequest("policy", 1, request["policy"])}
        ranks = (16, 32, 64, 128, 256, 320, 512)  # that vLLM allows
        if about["r"] > ranks[-1]:
            sys.exit(f"error: vLLM takes LoRA up to rank {ranks[-1]}, not {about['r']}: merge the adapter first")
        options |= {"enable_lora": True, "max_lora_rank": min(rank for rank in ranks if rank >= about["r"])}
        if Path(model, "adapter_config.json").exists():
            sys.exit(f"error: {model}, π_ref, is itself an adapter, which vLLM cannot take for a base: merge it first")
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
            responses, reasons = [], []
            for one in output.outputs:
                y = list(one.token_ids)
                if one.finish_reason == "stop" and y[-1:] not in [[end] for end in ends]:
                    y.append(ends[0])  # where a version leaves the end of sequence out
                responses.append(y)
                # Some versions say "length" of an end that is the last token allowed.
                reasons.append("stop" if y[-1] in ends else "length")
            lines.write(json.dumps({"prompt": x, "responses": responses, "finish_reasons": reasons}) + "\n")
    beside.rename(answer)
    print(f"{answer}: {n} samples of each of {len(prompts)} prompts")


if __name__ == "__main__":
    main()
