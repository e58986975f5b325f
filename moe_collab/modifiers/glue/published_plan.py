"""Checks of a plan that somebody else may have made: what it says must be what this model can be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ...architectures import PROJECTIONS
from ...errors import MoeCollabError
from ...formats import Scheme
from ...moe_model import MoELayer, MoEModel
from ...plan import CompressionPlan
from .recipe import starves_experts

__all__ = ["check_needs_of_followers", "check_plan", "packed_by"]


def packed_by(path: str, model: Any) -> dict[str, Scheme]:
    """Scheme of each module that the plan at `path` packs. Raises `MoeCollabError` if there is no plan for `model`."""
    if not Path(path).exists():
        raise MoeCollabError(
            f"MixedBitAllocModifier.plan: there is no {path} to apply. Name a file that is there, or a budget, so "
            "that a plan is made and written to it."
        )
    schemes = {name: scheme for name, scheme in CompressionPlan.load(path).parsed().items() if scheme.is_packed}
    if not schemes:
        raise MoeCollabError(f"MixedBitAllocModifier.plan: {path} leaves all weights as they are.")
    present = {name for name, _ in model.named_modules()}
    if missing := [name for name in schemes if name not in present]:
        raise MoeCollabError(
            f"MixedBitAllocModifier.plan: {path} is for another model: this one has no {missing[0]} "
            f"({len(missing)} such modules)."
        )
    return schemes


def check_needs_of_followers(followers: list[Any], has_data: bool) -> None:
    """Raise `MoeCollabError` if a stock quantizer that carries out a plan alone would lack data, or lose experts."""
    for quantizer in followers:
        if not getattr(quantizer, "requires_calibration_data", False):
            continue
        who = type(quantizer).__name__
        if not has_data:
            raise MoeCollabError(f"{who}: it needs calibration data. Give oneshot() a dataset.")
        if starves_experts():
            raise MoeCollabError(
                f"{who}: it zeroes experts that no token of your calibration data reaches, and a plan that was made "
                "with other data does not tell which. Leave moe_calibrate_all_experts at True, or use "
                "FisherGPTQModifier."
            )


def check_plan(path: str, plan: CompressionPlan, moe: MoEModel, model: nn.Module) -> None:
    """Raise `MoeCollabError` naming what the plan at `path` says that `model`, as it is now, cannot be."""
    for problem in (*_of_schemes(plan, moe, model), *_of_dropped(plan, moe)):
        raise MoeCollabError(f"MixedBitAllocModifier.plan: {path}: {problem}")


def _of_schemes(plan: CompressionPlan, moe: MoEModel, model: nn.Module) -> Iterator[str]:
    routers, schemes = {id(layer.router) for layer in moe.layers}, plan.parsed()
    modules = dict(model.named_modules())
    for name, scheme in schemes.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear) or id(module) in routers:
            yield f"{name} is to be {scheme}, but is no Linear of this model, or a router."
        elif scheme.is_packed and module.in_features % scheme.group_of(module.in_features):
            yield f"{name} is to be {scheme}, but has {module.in_features} columns."
    for layer in moe.layers:
        for index in layer.live_experts:
            gate, up = (schemes.get(f"{layer.experts_name}.{index}.{projection}") for projection in PROJECTIONS[:2])
            if gate != up:
                yield f"expert {index} of {layer.name}: gate_proj is to be {gate}, up_proj {up}; they need one scheme."


def _of_dropped(plan: CompressionPlan, moe: MoEModel) -> Iterator[str]:
    layers = {layer.name: layer for layer in moe.layers}
    dropped = {name: gone for name, gone in plan.dropped.items() if gone}
    for name, gone in dropped.items():
        if name not in layers:
            yield f"it drops experts of {name}, which is no MoE layer of this model."
        elif wrong := sorted(set(gone) - set(range(layers[name].num_experts))) or len(set(gone)) < len(gone):
            yield f"it drops experts {wrong if wrong is not True else gone} of {name}, which are not there, or twice."
    if dropped and plan.pruning == "none":
        yield "it drops experts, but its `pruning` is none."
    kept = {_kept(layer, dropped) for layer in moe.layers}
    if plan.pruning == "physical" and kept != {plan.num_experts}:
        yield f"its layers keep {sorted(kept)} experts, where all should keep {plan.num_experts}."
    if min(kept) < moe.top_k:
        yield f"a layer keeps {min(kept)} experts, but {moe.top_k} are activated for a token."


def _kept(layer: MoELayer, dropped: dict[str, list[int]]) -> int:
    return layer.num_experts - len(set(dropped.get(layer.name, ())))
