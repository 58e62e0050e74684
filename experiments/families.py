"""Which architectures work: every family of the installed transformers, made small, is scored, trained and sampled.

    python experiments/families.py                   all of them, to experiments/results/families.md: some minutes
    python experiments/families.py llama mamba …     some of them, to the screen

A family is *right* where `load` and `check_before_training` accept it, and log π(y|x), its gradient and greedy samples
are those of the model as its authors wrote it, one row at a time. It is *refused* where these two refuse it, with their
message. Anything else is *wrong*, and the exit status is 1.
"""

import contextlib
import io
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "experiments/results/families.md"
sys.path.insert(0, str(ROOT))
from sera_min.bootstrap import sample_responses
from sera_min.logprobs import sequence_logprobs
from sera_min.machinery.errors import InputError, one_line
from sera_min.machinery.models import check_before_training, load
from sera_min.pairs import Pair

VOCABULARY, END, PAD = 97, 2, 0
EMBEDDED = 128  # some tokenizers add tokens of their own
NEW_TOKENS = 40  # more than bootstrap.STRIDE
LARGEST = 3_000_000  # parameters of a small model
PAIR = Pair([1, 20, 30, 40, 50, 21, 31, 41], [60, 61, 62, 63, END], [70, 71, END])
# The value of a setting, in every family that has one of this name
SMALL: dict[str, Any] = {name: value for value, names in {
    EMBEDDED: """vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size max_position_embeddings
        n_positions n_ctx max_seq_len context_length max_target_positions model_max_length
        index_topk""",
    32: """hidden_size d_model n_embd emb_dim embedding_size lru_width attention_hidden_size input_embedding_size
        output_embedding_size word_embed_proj_dim embedding_dim dim_head""",
    64: """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner feed_forward_size
        intermediate_size_mlp ffn_hidden_size mamba_d_ssm dense_intermediate_size""",
    16: """moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size
        q_lora_rank kv_lora_rank moe_shared_expert_intermediate_size
        shared_experts_intermediate_size router_hidden_size""",
    8: """head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim
        linear_head_dim mamba_d_head mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size block_size
        sliding_window sliding_window_size attention_window_size window_size attention_chunk_size mamba_n_heads
        mamba_num_heads mamba_head_dim num_heads_per_layer hidden_size_per_layer_input query_pre_attn_scalar
        block_multiple_of local_attention swa_head_dim index_head_dim d_head n_mamba_heads
        num_random_feats attention_head_size""",
    4: """num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads
        num_encoder_attention_heads num_decoder_attention_heads num_experts n_routed_experts num_local_experts
        moe_num_experts num_hidden_layers linear_num_value_heads linear_num_heads rotary_dim laurel_rank
        swa_num_attention_heads""",
    2: """num_key_value_heads num_kv_heads num_query_groups linear_num_key_heads decoder_layers encoder_layers n_layer
        n_layers num_layers num_blocks num_encoder_layers num_decoder_layers num_experts_per_tok moe_topk moe_k
        n_group altup_num_inputs time_step_rank mamba_dt_rank num_experts_per_token index_n_heads
        swa_num_key_value_heads n_groups""",
    1: """first_k_dense_replace n_shared_experts num_shared_experts topk_group num_dense_layers mamba_n_groups
        mamba_ngroups num_mem_blocks moe_num_shared_experts num_expert_group""",
}.items() for name in names.split()}  # fmt: skip
# What else a family needs, to be made, to be small, or to be what it is
MORE: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2, "partial_rotary_factor": 1.0, "num_key_value_heads": 4},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2, "num_key_value_heads": 4},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 1, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "logits_scaling": 3.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "mamba2": {"num_heads": 8, "head_dim": 8}, "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "xmod": {"default_language": "en_XX"}, "zaya": {"num_experts_per_tok": 1},
    "roc_bert": {"shape_vocab_size": 128, "pronunciation_vocab_size": 128},
    "zamba2": {"layers_block_type": ["mamba", "mamba", "hybrid"], "num_hidden_layers": 3, "hybrid_layer_ids": [2],
        "attention_head_dim": 16, "attention_hidden_size": 64},
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * 2},  # as the published model begins
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")}},
    "gemma3n_text": {"num_kv_shared_layers": 0}, "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "hybrid", "mamba"], "attention_head_dim": 16,
        "attention_hidden_size": 64},
    **{family: {"num_key_value_heads": 4} for family in """dots3_note_text deepseek_v2 deepseek_v3 deepseek_v32
        sarvam_mla axk1 axk2 glm4_moe_lite glm_moe_dsa longcat_flash minicpm3 youtu""".split()},
}  # fmt: skip


def settings_of(config_class: Any, more: dict[str, Any]) -> dict[str, Any]:
    """Small values of those settings that the class has, parts within included."""
    try:
        default = config_class()
    except Exception:  # there is none
        return more
    settings = {name: value for name, value in SMALL.items() if name in vars(default)}
    for name in config_class.sub_configs or {}:
        part = type(getattr(default, name, None))
        if issubclass(part, PretrainedConfig):
            settings[name] = {"model_type": part.model_type, **settings_of(part, MORE.get(part.model_type, {}))}
    return {**settings, "bos_token_id": 1, "eos_token_id": END, "pad_token_id": PAD, **more}


def small_model(family: str) -> Any:
    """A model of the family with random weights, wide enough that a mistake shows. Raises whatever its code raises."""
    config_class = CONFIG_MAPPING[family]
    config = config_class(**settings_of(config_class, MORE.get(family, {})))
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))  # of the padding's embedding too, which begins as 0
    return model


def save_small(family: str, folder: str) -> None:
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    small_model(family).save_pretrained(folder)


def wrong(policy: Any) -> str:
    """What differs from the model as its authors wrote it, one row at a time; "" where nothing does."""
    prompts, responses = [[5, 6, 7, 8, 9, 10, 11], [40]], [[12, 13, END], [14, 15, 16, 17, 18, 19]]
    weights = torch.tensor([1.0, -2.0])
    policy.train()
    sums = sequence_logprobs(policy, prompts, responses)[0]  # (2,)
    gradients = gradients_of(policy, (sums * weights).sum())
    policy.eval()
    exact = torch.stack([prefix_by_prefix(policy, x, y) for x, y in zip(prompts, responses)])  # (2,)
    if not torch.allclose(sums, exact, rtol=1e-4, atol=1e-4):
        return f"log π(y|x) is {sums.tolist()}, not {exact.tolist()}"
    other = gradients_of(policy, (exact * weights).sum())
    error = (gradients - other).norm() / other.norm()
    if not error < 1e-3:
        return f"its gradient is off by {error:.2g} of its length"
    return wrong_samples(policy)


def gradients_of(policy: Any, value: torch.Tensor) -> torch.Tensor:
    """The gradient of every weight in one vector."""
    policy.zero_grad()
    value.backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()]
    policy.zero_grad()
    return torch.cat([part.flatten() for part in parts])


def prefix_by_prefix(policy: Any, x: list[int], y: list[int]) -> torch.Tensor:
    """log π(y|x), every token from a forward pass of its own over what is before it."""
    passes = [policy(input_ids=torch.tensor([x + y[:i]]), use_cache=False).logits[0, -1] for i in range(len(y))]
    return torch.stack([logits.log_softmax(-1)[token] for logits, token in zip(passes, y)]).sum()


def wrong_samples(policy: Any) -> str:
    """Two greedy samples of each of four prompts side by side, against `generate` of a prompt alone."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (12, 5, 9, 1)]
    settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "eos_token_id": END, "pad_token_id": PAD}
    samples = sample_responses(policy, prompts, 2, temperature=1e-6, top_p=1.0, seed=0, **settings)
    for x, row in zip(prompts, samples):
        mask = torch.ones(1, len(x), dtype=torch.int64)
        alone = policy.generate(input_ids=torch.tensor([x]), attention_mask=mask, do_sample=False, **settings)
        if [y for y, _ in row] != [alone[0, len(x) :].tolist()] * 2:
            return f"greedy samples of a prompt of {len(x)} tokens are not `generate`'s"
    return ""


def verdict(family: str) -> tuple[str, str]:
    """right, refused, wrong or "not made", and why."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_small(family, folder)  # as a user has it
        except Exception as error:
            return "not made", one_line(error)
        try:
            policy, _ = load(folder, "cpu")
            check_before_training(policy, PAIR, [END])
        except InputError as error:
            return "refused", str(error).replace(f"{folder}: ", "")
    try:
        why = wrong(policy)
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {one_line(error)}"
    return ("wrong" if why else "right"), why


def table(rows: list[tuple[str, str, str]], seconds: float) -> str:
    """Markdown: how many are what, then a line a family, those that are not right first."""
    counts = ", ".join(f"{n} {what}" for what, n in Counter(what for _, what, _ in rows).most_common())
    lines = [f"| {family} | {what} | {why.replace('|', '/')} |" for family, what, why in rows]
    return "\n".join([
        f"transformers {transformers.__version__}, torch {torch.__version__}, {len(rows)} families: {counts}. "
        f"`python experiments/families.py`, {seconds:.0f} seconds on one CPU core. *not made*: no small model of it "
        "could be made here.", "", "| family | result | why |", "|---|---|---|",
        *sorted(lines, key=lambda line: "| right |" in line),
    ])  # fmt: skip


def main(families: list[str]) -> int:
    """The exit status: 1 where a family is wrong."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    began, rows = time.monotonic(), []
    for family in tqdm(families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), unit="family"):
        with contextlib.redirect_stdout(io.StringIO()):  # what the check prints
            rows.append((family, *verdict(family)))
    text = table(rows, time.monotonic() - began) + "\n"
    print(text)
    if not families:
        RESULT.write_text(text, encoding="utf-8")
    return int(any(what == "wrong" for _, what, _ in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
