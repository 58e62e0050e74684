"""A small world whose true reward is known, so that every claim can be checked: data, SFT policy, judge. Runs offline.

    prompt      tell me about the fox and the forest
    response    the fox is lovely . the forest looks gentle . the owl seems rude .

A response has one to five sentences. Each is on the prompt's topic (one of its two nouns) or off it, and kind or
unkind. The true reward is the mean of the sentences' scores, whatever their number: +1 on topic and kind, −1 off topic
and unkind, or broken, else 0.
The SFT policy is a real `transformers` model, made from a config and trained here to write like the world's people,
who are on topic five times in eight and kind as often: a mean true reward of 0.25, of which it learns most.

From sera_min 0.1.0, Apache-2.0; SeRA, arXiv:2410.09362.
"""

import itertools
import random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sera_min.logprobs import sequence_logprobs

NOUNS = (
    "fox owl bear wolf deer hare mole newt frog toad swan duck goose crow hawk dove lynx seal otter moose bison horse "
    "forest desert meadow valley river lake marsh garden field cave hill canyon island beach village tower park barn"
).split()
KIND = "lovely gentle clever brave graceful charming".split()
UNKIND = "ugly stupid boring nasty rude useless".split()
VERBS = "is looks seems".split()

SHARE_ON_TOPIC = SHARE_KIND = 0.625  # mean true reward: (2·0.625 − 1 + 2·0.625 − 1) / 2 = 0.25
LEARNING_RATE = 3e-4  # of this world's small model
LORA_LEARNING_RATE = 1e-3  # the best of three (experiments/lora_study.py)
DEFAULTS = {  # of flags, in this world; 32 new tokens are five sentences of five words, the end, and room to ramble
    "max_train_pairs": 2000, "max_length": 64, "max_prompt_length": 16, "max_new_tokens": 32,
    "learning_rate": LEARNING_RATE,
}  # fmt: skip


def write_response(prompt: str, rng: random.Random) -> str:
    """What a person of this world answers."""
    topic = prompt.split()[4::3]  # its two nouns
    sentences = []
    for _ in range(rng.randint(1, 5)):
        nouns = [word for word in NOUNS if word not in topic]
        if rng.random() < SHARE_ON_TOPIC:
            nouns = topic
        noun = rng.choice(nouns)
        tones = UNKIND
        if rng.random() < SHARE_KIND:
            tones = KIND
        tone = rng.choice(tones)
        sentences.append(f"the {noun} {rng.choice(VERBS)} {tone} .")
    return " ".join(sentences)


def sentence_scores(prompt: str, response: str) -> list[int | None]:
    """+1, 0 or −1 for every sentence of the response; None for a broken one, as an empty response is."""
    topic = prompt.split()[4::3]
    scores: list[int | None] = []
    for sentence in response.strip().removesuffix(".").split("."):
        match sentence.split():
            case ["the", noun, verb, tone] if noun in NOUNS and verb in VERBS and tone in KIND + UNKIND:
                scores.append((noun in topic) - (tone in UNKIND))
            case _:
                scores.append(None)
    return scores


def true_reward(prompt: str, response: str) -> float:
    """The judge: the mean score of the response's sentences, in [−1, 1]; a broken one scores −1."""
    scores = [-1 if score is None else score for score in sentence_scores(prompt, response)]
    return sum(scores) / len(scores)


def precision(pairs: list[dict[str, str]]) -> float:
    """Share of rows of prompt, chosen, rejected whose chosen response has the larger true reward; a tie is ½."""
    right = 0.0
    for row in pairs:
        chosen = true_reward(row["prompt"], row["chosen"])
        rejected = true_reward(row["prompt"], row["rejected"])
        right += (chosen > rejected) + 0.5 * (chosen == rejected)
    return right / len(pairs)


def is_flipped(row: dict[str, str]) -> bool:
    """Whether a row's chosen response has the smaller true reward."""
    return precision([row]) == 0


def broken(response: str) -> bool:
    """Not a list of whole sentences of this world."""
    return any(score is None for score in sentence_scores("", response))


def judge(asked: list[str], answers: list[str], sft_answers: list[str]) -> dict[str, float]:
    """True reward, words and broken share of the answers; how often they beat the SFT policy's, ties ½."""
    n = len(asked)
    rewards = [true_reward(x, y) for x, y in zip(asked, answers)]
    of_sft = [true_reward(x, y) for x, y in zip(asked, sft_answers)]
    won = sum((a > b) + 0.5 * (a == b) for a, b in zip(rewards, of_sft))
    return {
        "gold/reward": sum(rewards) / n,
        "gold/win_rate": won / n,
        "gold/length": sum(len(y.split()) for y in answers) / n,
        "gold/broken": sum(broken(y) for y in answers) / n,
    }


def prompts(part: str) -> list[str]:
    """512 prompts for "test", 256 for "validation", 792 for "train".

    Both orders of two nouns are in the same part, so no test prompt has its mirror in training.
    """
    couples = list(itertools.combinations(NOUNS, 2))  # 780
    random.Random(0).shuffle(couples)
    parts = {"test": couples[:256], "validation": couples[256:384], "train": couples[384:]}
    in_both_orders = parts[part] + [(b, a) for a, b in parts[part]]
    return [f"tell me about the {a} and the {b}" for a, b in in_both_orders]


def preferences(n: int, part: str, *, label_noise: float, seed: int, length_bias: float = 0.0) -> list[dict[str, str]]:
    """n rows of prompt, chosen, rejected. No two responses of a row have one true reward.

    length_bias: the share of pairs whose longer response is preferred, whatever it says. label_noise: the share then
    flipped.
    """
    rng = random.Random(f"{seed} {part}")
    pool = prompts(part)
    rows: list[dict[str, str]] = []
    while len(rows) < n:
        x = rng.choice(pool)
        good, bad = sorted((write_response(x, rng) for _ in "ab"), key=lambda y: -true_reward(x, y))
        if true_reward(x, good) == true_reward(x, bad):
            continue
        if rng.random() < length_bias and len(good.split()) < len(bad.split()):
            good, bad = bad, good
        if rng.random() < label_noise:
            good, bad = bad, good
        rows.append({"prompt": x, "chosen": good, "rejected": bad})
    return rows


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *"tell me about the and .".split(), *VERBS, *KIND, *UNKIND, *NOUNS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_sft_policy(seed: int, device: str, steps: int = 1400, batch: int = 64):
    """A llama of 2 layers, 64 wide, and its tokenizer, trained on fresh responses of the world's people."""
    tokenizer = make_tokenizer()
    rng = random.Random(f"{seed} sft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Untied and with a wide initialisation, or it does not learn to copy the prompt's words in so few steps.
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64, initializer_range=0.1, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        model: Any = LlamaForCausalLM(config)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    pool = prompts("train")
    for step in tqdm(range(steps), desc="SFT", unit="step"):
        optimizer.param_groups[0]["lr"] = 5e-3 * min((step + 1) / 50, 1 - step / steps)
        x = rng.choices(pool, k=batch)
        y = [write_response(p, rng) + " <eos>" for p in x]
        sums, counts = sequence_logprobs(model, tokenizer(x).input_ids, tokenizer(y).input_ids)
        (-sums.sum() / counts.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer
