"""Experts whose inputs the router weighs (Llama 4), called as the experts of all other families are."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from compressed_tensors.offload.module import unwrap_offload_forward
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D

from ...errors import MoeCollabError
from ...moe_model import MoEModel

__all__ = ["call_experts_alike"]


def call_experts_alike(moe: MoEModel) -> None:
    """Have MoE blocks of the family hand their experts the weighed tokens, the router's choice, and weights of one.

    llm-compressor hands every expert all tokens, those it was not chosen for weighed by zero, and no indices, which
    neither statistics nor rounding can tell from routed ones. Raises `MoeCollabError` if tokens go to several experts.
    """
    if not moe.family.weighs_inputs:
        return
    if moe.top_k != 1:
        raise MoeCollabError(
            f"config.json: {moe.top_k} experts are activated per token; where the router weighs what experts see, "
            "only 1 is supported."
        )
    for layer in moe.layers:
        for module, forward in ((layer.experts, LinearExperts2D.forward), (layer.block, _forward)):
            with unwrap_offload_forward(module):
                module.forward = MethodType(forward, module)


def _forward(block: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Llama4TextMoe.forward`."""
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    scores, logits = block.router(tokens)
    weights, indices = scores.max(dim=-1, keepdim=True)
    routed = block.experts(tokens * weights, indices, torch.ones_like(weights))
    return block.shared_expert(tokens) + routed, logits
