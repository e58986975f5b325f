"""Carries out a plan on a live model: attaches schemes for the quantizers that follow, and drops experts."""

from __future__ import annotations

from typing import Any

from ...moe_model import MoEModel
from ...plan import CompressionPlan
from ...pruning import check_mask
from ...pruning.surgery import keep_experts, mask_experts
from .saving import expect_plan
from .schemes import attach_scheme, forget_empty_schemes
from .starved import keep_starved

__all__ = ["apply_plan"]


def apply_plan(model: Any, moe: MoEModel, plan: CompressionPlan) -> None:
    """Attach the plan's schemes to `model`, drop its experts, and have saving compare its size with the plan's."""
    forget_empty_schemes(model)
    for name, scheme in plan.parsed().items():
        if scheme.is_packed:
            attach_scheme(model.get_submodule(name), scheme)
    keep_starved(moe, plan.routed_tokens)
    limits = moe.limits  # as the routers are before the first layer loses experts
    for layer in moe.layers:
        if not (gone := plan.dropped.get(layer.name)):
            continue
        if plan.pruning == "masked":
            check_mask(limits, layer.name, gone)
            mask_experts(layer, gone)
        else:
            keep_experts(layer, [index for index in range(layer.num_experts) if index not in gone])
    expect_plan(model, plan)
