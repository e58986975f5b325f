"""Llama 4 multiplies the inputs of experts by the router's weights, not their outputs; here its experts are called as
those of all other families are."""

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
    """Have MoE blocks whose router weighs inputs call their experts with weighted tokens, indices and weights of one.

    llm-compressor gives every expert all tokens, multiplied by zero where the expert was not chosen, and no indices:
    neither statistics nor rounding can tell these tokens from routed ones. Models of other families are left alone.
    Raises `MoeCollabError` if a token goes to several experts.
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
