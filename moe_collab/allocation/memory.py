"""What serving takes besides the weights, and so how many bytes of weights fit a machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import MoeCollabError
from .budget import format_bytes

__all__ = ["RUNTIME_BYTES", "ServingBytes", "cache_bytes_per_token", "serving_bytes", "weights_budget"]

RUNTIME_BYTES = 7 << 28
"""Python, torch and vLLM themselves: 1.75 GiB.

Measured with vLLM 0.32 on x86: 1.40 GiB, the proportional set size of all processes of an `LLM` less its weights and
cache (equal at 1 and 3 GiB of cache). The rest is an estimate for the tokenizer and the HTTP server. A GPU keeps
less of it on the device but adds its context and graphs there.
"""

# vLLM's usual `max_num_batched_tokens`: one step computes at most so many tokens, of all requests together.
_CHUNK = 2048
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class ServingBytes:
    """Bytes that serving takes besides the weights."""

    cache: int
    """KV cache of all requests at full context."""
    workspace: int
    """Activations of one step, and logits."""
    runtime: int

    @property
    def total(self) -> int:
        """All of it, bytes."""
        return self.cache + self.workspace + self.runtime


def serving_bytes(config: Mapping[str, Any], context: int, concurrency: int) -> ServingBytes:
    """What `concurrency` requests of `context` tokens each take besides the weights of `config` (config.json).

    Raises `MoeCollabError` for a missing key of the config and for numbers below 1.
    """
    for key, value in (("context", context), ("concurrency", concurrency)):
        if value < 1:
            raise MoeCollabError(f"{key}: {value} must be at least 1.")
    return ServingBytes(
        cache=cache_bytes_per_token(config) * context * concurrency,
        workspace=_workspace(config, context, concurrency),
        runtime=RUNTIME_BYTES,
    )


def weights_budget(fit_bytes: int, config: Mapping[str, Any], context: int, concurrency: int) -> int:
    """Bytes left for the weights on a machine with `fit_bytes`. Raises `MoeCollabError` when there are none."""
    taken = serving_bytes(config, context, concurrency)
    if taken.total >= fit_bytes:
        raise MoeCollabError(
            f"fit: {format_bytes(fit_bytes)} leaves nothing for weights: {concurrency} requests of {context} tokens "
            f"take {format_bytes(taken.cache)} of KV cache, {format_bytes(taken.workspace)} of activations and "
            f"{format_bytes(taken.runtime)} for the runtime. Lower context or concurrency."
        )
    return fit_bytes - taken.total


def cache_bytes_per_token(config: Mapping[str, Any]) -> int:
    """KV cache of one token in all layers, in the model's dtype.

    Multi-head latent attention keeps one compressed vector and the rotary part of the key (DeepSeek-V2,
    arXiv 2405.04434, section 2.1); all else keeps keys and values of each KV head. Layers with a sliding window or
    linear attention count in full: an upper bound.
    """
    config = _text(config)
    if config.get("kv_lora_rank"):
        width = _read(config, "kv_lora_rank") + _read(config, "qk_rope_head_dim")
    else:
        width = 2 * _kv_heads(config) * _head_dim(config)
    return _read(config, "num_hidden_layers") * width * _dtype_bytes(config)


def _workspace(config: Mapping[str, Any], context: int, concurrency: int) -> int:
    """Bytes of one step of T tokens: the chunk that prefill is cut into, or one token per request if those are more.

    Per token: 4 hidden states (residual, normed, attention's and MoE's output) and queries, keys and values in the
    model's dtype; per activated expert gate, up, their product and the expert's output in float32. Then logits of
    one token per request, in float32.
    """
    config = _text(config)
    tokens = min(context * concurrency, max(_CHUNK, concurrency))
    hidden = _read(config, "hidden_size")
    attention = (_read(config, "num_attention_heads") + 2 * _kv_heads(config)) * _attention_width(config)
    expert = int(config.get("moe_intermediate_size") or _read(config, "intermediate_size"))
    experts = _read(config, "num_experts_per_tok") * (3 * expert + hidden)
    per_token = _dtype_bytes(config) * (4 * hidden + attention) + 4 * experts
    return tokens * per_token + concurrency * _read(config, "vocab_size") * 4


def _attention_width(config: Mapping[str, Any]) -> int:
    if config.get("kv_lora_rank"):
        return _read(config, "qk_nope_head_dim") + _read(config, "qk_rope_head_dim")
    return _head_dim(config)


def _kv_heads(config: Mapping[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or _read(config, "num_attention_heads"))


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or _read(config, "hidden_size") // _read(config, "num_attention_heads"))


def _dtype_bytes(config: Mapping[str, Any]) -> int:
    return _DTYPE_BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 2)


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part; multimodal configs nest it."""
    return config.get("text_config") or config


def _read(config: Mapping[str, Any], key: str) -> int:
    if config.get(key) is None:
        raise MoeCollabError(f"config.json: {key} is missing; the memory to serve the model cannot be worked out.")
    return int(config[key])
