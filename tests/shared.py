"""What tests share: tiny models of every family, tokenizers trained here, rows of words, and a look at what is drawn.

No network, nothing from a hub. Fixtures are in conftest.py.
"""

import json
import random
import string
import sys

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sera_min.machinery import data

torch.set_num_threads(1)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (  # trims, keeps a system message inside the first turn, and has one BOS and one EOS a turn pair
    "{% set turns = messages %}{% set system = '' %}{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% endif %}"
    "{% for m in turns %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + ((system if loop.first else '') + m['content']) | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (  # no BOS; a line break after the end; its turns are marked by plain text
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GEMMA = (  # one BOS; trims; a turn ends with a token that is not the tokenizer's EOS, and a line break
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TURN_TOKENS = {CHATML: ["<|im_start|>", "<|im_end|>"], GEMMA: ["<start_of_turn>", "<end_of_turn>"]}
FAMILIES = {
    "llama": {}, "qwen3": {"head_dim": 8}, "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.3}, "granite": {"logits_scaling": 3.0}, "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neox": {}, "opt": {"ffn_dim": 24, "word_embed_proj_dim": 12}, "phi": {},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
}  # fmt: skip
TEXTS = [
    "Tell me about the fox and the forest.", "The fox is lovely, and the forest looks gentle.", "Human: Assistant: system",
    "user assistant prompt response chosen rejected", "What is 2 + 2? It's 4; naturally, four!", "émigré naïve ☃ 日本",
] * 3  # fmt: skip


def tiny_model(family: str = "llama", vocab_size: int = 61, **settings):
    config = AutoConfig.for_model(family, **{
        "vocab_size": vocab_size, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 128, "pad_token_id": 0,
        "eos_token_id": 1, "bos_token_id": 2, **FAMILIES.get(family, {}), **settings,
    })  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # wide enough that a missing soft cap, scale, bias or position would show
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def word_tokenizer(words):
    """A token a word: texts and token ids are one and the same."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def bpe_tokenizer(template: str | None = None, adds_bos: bool = False, specials=("<pad>", "</s>", "<s>"), adds_eos: bool = False):
    """A byte-level BPE tokenizer; `adds_bos`: puts <s> before every text by itself, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=[*specials, *TURN_TOKENS.get(template, [])],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    return trained(tokenizer, trainer, template, adds_bos, adds_eos)


def wordpiece_tokenizer(template: str | None = None, adds_bos: bool = False, adds_eos: bool = False):
    """As BERT's: lower case, split at spaces and punctuation, and no trace of which white space there was."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<pad>", "</s>", "<s>", "<unk>", *TURN_TOKENS.get(template, [])],
        initial_alphabet=list(string.printable),
    )
    every_letter = string.ascii_lowercase * 2  # inside a word too
    return trained(tokenizer, trainer, template, adds_bos, adds_eos, [*TEXTS, every_letter])


def unigram_tokenizer(template: str | None = None, adds_bos: bool = False, adds_eos: bool = False):
    """As SentencePiece's: a space is a character of the word after it, and one is put before a text's first word."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "</s>", "<s>", "<unk>", *TURN_TOKENS.get(template, [])],
        unk_token="<unk>",
        initial_alphabet=list(string.printable),
        show_progress=False,
    )
    return trained(tokenizer, trainer, template, adds_bos, adds_eos)


def trained(tokenizer, trainer, template, adds_bos, adds_eos, texts=TEXTS):
    tokenizer.train_from_iterator(texts, trainer)
    if adds_bos or adds_eos:
        single = "<s> " * adds_bos + "$A" + " </s>" * adds_eos
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("</s>", 1), ("<s>", 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", clean_up_tokenization_spaces=False,
        eos_token="<|im_end|>" if template == CHATML else "</s>",
    )  # fmt: skip
    fast.chat_template = template
    return fast


WORDS = "b c d e f g h k m p q s".split()


def some_rows(count, rng):
    """Random words; every third prompt is there twice."""
    words = lambda low, high: " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))  # noqa: E731
    prompts = [words(1, 4) for _ in range(count)]
    prompts[2::3] = prompts[1 : count - 1 : 3]
    return [{"prompt": x, "chosen": words(1, 6), "rejected": words(1, 6)} for x in prompts]


def words_world(here):
    """For runs beside naive_sera.py: a model with dropout in its config, a tokenizer of whole words, D, and rows held out."""
    tokenizer = word_tokenizer(WORDS)
    tokenizer.save_pretrained(here / "model")
    model = tiny_model("llama", vocab_size=len(tokenizer), attention_dropout=0.5, num_hidden_layers=1)
    model.save_pretrained(here / "model")
    rng = random.Random(3)
    rows = {"D": some_rows(13, rng), "held_out": some_rows(3, rng)}
    for name, some in rows.items():
        (here / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    return here, rows


def encode_pairs(rows, tokenizer, **settings):
    """Pairs of token ids alone, and the counts."""
    given, counts = data.encode(rows, tokenizer, **settings)
    return [one.pair for one in given], counts


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


class Drawn:
    """What a run draws, by watching torch; and the weights of every policy that it saves."""

    def __init__(self, monkeypatch):
        self.permutations, self.numbers, self.policies = [], [], []
        # Not what is tested here, and slow.
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        monkeypatch.setattr("sera_min.machinery.run.check_before_training", lambda *_, **__: None)
        randperm, rand, save = torch.randperm, torch.rand, PreTrainedModel.save_pretrained

        def watched_randperm(*args, **kwargs):
            self.permutations.append(randperm(*args, **kwargs))
            return self.permutations[-1]

        def watched_rand(*size, **kwargs):
            numbers = rand(*size, **kwargs)
            if numbers.ndim == 1:  # sampling draws (rows, 1)
                self.numbers.append(numbers)
            return numbers

        def watched_save(model, *args, **kwargs):
            if "state_dict" not in kwargs:  # a folder without weights, on trial
                self.policies.append({name: value.clone() for name, value in model.state_dict().items()})
            save(model, *args, **kwargs)

        monkeypatch.setattr(torch, "randperm", watched_randperm)
        monkeypatch.setattr(torch, "rand", watched_rand)
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", watched_save)
