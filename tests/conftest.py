"""Tiny models of every family, and tokenizers trained here: no network, nothing from a hub."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
FAMILIES = {
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {"head_dim": 8}, "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0}, "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0}, "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neox": {}, "opt": {"ffn_dim": 24, "word_embed_proj_dim": 12}, "phi": {},
}  # fmt: skip
TEXTS = [
    "Tell me about the fox and the forest.", "The fox is lovely, and the forest looks gentle.", "Human: Assistant: system",
    "user assistant prompt response chosen rejected", "What is 2 + 2? It's 4; naturally, four!", "émigré naïve ☃ 日本",
] * 3  # fmt: skip


def tiny_model(family: str = "llama", vocab_size: int = 61, **settings):
    config = AutoConfig.for_model(family, **{
        "vocab_size": vocab_size, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 128, "pad_token_id": 0,
        "eos_token_id": 1, "bos_token_id": 2, **FAMILIES[family], **settings,
    })  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # wide enough that a missing soft cap, scale, bias or position would show
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def bpe_tokenizer(template: str | None = None, adds_bos: bool = False, specials=("<pad>", "</s>", "<s>")):
    """A byte-level BPE tokenizer; `adds_bos`: puts <s> before every text by itself, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    extra = ["<|im_start|>", "<|im_end|>"] if template == CHATML else []
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*specials, *extra], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    eos = "<|im_end|>" if extra else "</s>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token=eos, bos_token="<s>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = template
    return fast


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A saved llama and tokenizer, as a user would have one."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = bpe_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder
