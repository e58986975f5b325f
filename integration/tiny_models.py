"""Tiny random models of every family tested, with a byte-level tokenizer, made on the fly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_collab.checkpoint.load import stock_conversions

__all__ = ["TINY_FAMILIES", "build_tiny", "tiny_config"]

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
TINY_FAMILIES = tuple(_FAMILIES)


def tiny_config(family: str, **overrides: Any) -> Any:
    """The transformers config of a tiny `family` model."""
    return CONFIG_MAPPING[family](**{**_COMMON, **_FAMILIES[family], **overrides})


def build_tiny(family: str, path: str | Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a random model of `family` (bf16 safetensors and tokenizer) to `path` and return it."""
    path = Path(path)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides)).to(torch.bfloat16)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.normal_(0, 0.1)
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
