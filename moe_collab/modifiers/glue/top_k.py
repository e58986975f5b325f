"""What other numbers of activated experts save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from loguru import logger
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ...allocation import format_bytes
from ...moe_model import MoEModel

__all__ = ["bytes_per_token", "report_top_k"]


def bytes_per_token(model: Any, moe: MoEModel, top_k: int) -> float:
    """Bytes of weights that decoding one token reads: no embeddings, only `top_k` routed experts a layer, all the rest.

    Decoding is bound by bandwidth, so the ratio of two such sums estimates a speed-up: for one request at a time, of
    weights as they are stored now, without the KV cache.
    """
    with disable_onloading():
        state = remove_tied_weights_from_state_dict(model.state_dict(), model)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}
    if not getattr(model.config, "tie_word_embeddings", False):
        embeddings = model.get_input_embeddings()
        sizes |= {f"{name}.weight": 0 for name, module in model.named_modules() if module is embeddings}
    total = float(sum(sizes.values()))
    for layer in moe.layers:
        experts = sum(size for name, size in sizes.items() if name.startswith(f"{layer.experts_name}."))
        total -= experts * (1 - min(1, top_k / len(layer.live_experts)))
    return total


def report_top_k(model: torch.nn.Module, moe: MoEModel, top_k: int, factors: Mapping[str, float]) -> None:
    """Log the new number of activated experts, and about how much faster a request should decode."""
    before, after = (bytes_per_token(model, moe, number) for number in (moe.top_k, top_k))
    logger.info(
        "ActivationSmoothModifier: {} -> {} experts activated per token, their outputs multiplied by {:.3f} to {:.3f}. "
        "A token reads {} of weights instead of {}: one request should decode about {:.2f} times as fast (an estimate "
        "by bandwidth, before quantization)",
        moe.top_k,
        top_k,
        min(factors.values()),
        max(factors.values()),
        format_bytes(round(after)),
        format_bytes(round(before)),
        before / after,
    )
