"""Tiny random models of every family tested, with a byte-level tokenizer, made on the fly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_collab.checkpoint.load import stock_conversions

__all__ = ["TINY_FAMILIES", "build_tiny", "model_class", "tiny_config"]

_COMMON: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 257,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 8,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "decoder_sparse_step": 1,
    },
    "qwen3_next": {
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    },
    "qwen3_vl_moe": {
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 8,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
    },
    "olmoe": {"intermediate_size": 128, "num_key_value_heads": 2, "num_experts": 8},
    "phimoe": {
        "intermediate_size": 128,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "sliding_window": None,
        "attention_bias": True,
        "lm_head_bias": True,
    },
    "granitemoe": {
        "intermediate_size": 128,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "minimax_m2": {
        "intermediate_size": 128,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rotary_dim": 32,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "num_local_experts": 8,
    },
    "gpt_oss": {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 8},
    "llama4": {
        "intermediate_size": 128,
        "intermediate_size_mlp": 256,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
    },
    "glm4_moe": {
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "n_shared_experts": 1,
        "n_routed_experts": 8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
    },
    "deepseek_v2": {
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "topk_method": "group_limited_greedy",
        "first_k_dense_replace": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": 64,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    },
    "mixtral": {"intermediate_size": 128, "num_key_value_heads": 2, "num_local_experts": 8, "sliding_window": None},
    # vLLM's CPU attention for MLA wants kv_lora_rank 512 with qk_rope_head_dim 64.
    "deepseek_v3": {
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": 64,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "routed_scaling_factor": 2.5,
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
    },
}
# As DeepSeek-V3 but for one routing group; checkpoints of Kimi-K2 load once their model_type says so.
_FAMILIES["kimi_k2"] = _FAMILIES["deepseek_v3"] | {"n_group": 1, "topk_group": 1}
_MODEL_TYPES = {"kimi_k2": "deepseek_v3"}
_VISION: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe": {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 128,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    },
    "llama4": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "vision_output_dim": 64,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
    },
}
TINY_FAMILIES = tuple(_FAMILIES)


def tiny_config(family: str, **overrides: Any) -> Any:
    """The transformers config of a tiny `family` model; `overrides` of the language model's part."""
    text = {**_COMMON, **_FAMILIES[family], **overrides}
    if family in _VISION:
        text = {"text_config": text, "vision_config": _VISION[family], "tie_word_embeddings": False}
    return CONFIG_MAPPING[_MODEL_TYPES.get(family, family)](**text)


def model_class(family: str) -> Any:
    """The class that loads it, for `load_context(...)` too."""
    return AutoModelForImageTextToText if family in _VISION else AutoModelForCausalLM


def build_tiny(family: str, path: str | Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a random model of `family` (bf16 safetensors and tokenizer) to `path` and return it."""
    path = Path(path)
    torch.manual_seed(seed)
    model = model_class(family).from_config(tiny_config(family, **overrides)).to(torch.bfloat16)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("bias", "sinks")):  # zero at birth
                tensor.normal_(0, 0.1)
    with stock_conversions():
        model.save_pretrained(path)
    _byte_tokenizer().save_pretrained(path)
    return path


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | {"<eos>": 256, "<pad>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<eos>", eos_token="<eos>", pad_token="<pad>")
