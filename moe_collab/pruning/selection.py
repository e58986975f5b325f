"""Which experts are kept, by their scores and by what the routers need."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch

from ..errors import MoeCollabError
from ..moe_model import MoEModel
from ..routers import RouterLimits

__all__ = [
    "check_mask",
    "check_masks",
    "kept_experts",
    "scaled_top_k",
    "unmasked_experts",
    "wanted_num_experts",
    "whole_groups",
]


def wanted_num_experts(limits: RouterLimits, retention: float | None, num_experts: int | None) -> int:
    """Experts to keep per layer: `num_experts`, or ceil(retention * E). Raises `MoeCollabError` if there are fewer."""
    # The small term keeps 0.75 * 256 from becoming 193 through floating point.
    wanted = num_experts if num_experts is not None else math.ceil((retention or 1.0) * limits.num_experts - 1e-9)
    if wanted > limits.num_experts:
        raise MoeCollabError(
            f"ExpertPruningModifier.num_experts: cannot keep {wanted} of {limits.num_experts} experts."
        )
    return wanted


def whole_groups(limits: RouterLimits, wanted: int) -> int:
    """`wanted` experts per layer, rounded up to a multiple of the number of routing groups, for physical pruning.

    Raises `MoeCollabError` when the groups are unequal or the router could no longer choose `top_k` experts.
    """
    total, groups = limits.num_experts, limits.n_group
    if total % groups:
        raise MoeCollabError(f"config.json: {total} experts do not divide into n_group = {groups} equal groups.")
    kept = math.ceil(wanted / groups) * groups
    if limits.reachable(kept) < limits.top_k:
        raise MoeCollabError(
            f"ExpertPruningModifier: {kept} experts leave {limits.reachable(kept)} that a token can reach, "
            f"fewer than the {limits.top_k} activated per token. Keep more experts or lower num_experts_per_tok first."
        )
    if kept // groups < limits.least_live:
        raise MoeCollabError(
            f"ExpertPruningModifier: {kept} experts are {kept // groups} per routing group, but a group's "
            f"score is the sum of its top {limits.least_live}. Keep at least {limits.least_live * groups} experts."
        )
    return kept


def kept_experts(scores: torch.Tensor, num_kept: int, n_group: int = 1) -> list[int]:
    """Ascending indices of the `num_kept` highest of `scores` [num_experts], equally many from each group.

    Ties go to the lower index, so that equal inputs always give equal plans.
    """
    per_group = num_kept // n_group
    order = scores.reshape(n_group, -1).argsort(dim=-1, descending=True, stable=True)
    offsets = torch.arange(n_group)[:, None] * (scores.numel() // n_group)
    return (order[:, :per_group] + offsets).flatten().sort().values.tolist()


def unmasked_experts(limits: RouterLimits, layer: str, scores: torch.Tensor, num_kept: int) -> list[int]:
    """Ascending indices of the `num_kept` experts of one layer to keep when the rest are masked.

    Routing groups may keep different numbers. Experts are dropped one by one, the lowest of `scores` [num_experts]
    first, but for those that the router cannot do without. Raises `MoeCollabError` if it cannot work with so few.
    """
    dropped: list[int] = []
    # Among equal scores the highest index goes first, as in `kept_experts`.
    for index in reversed(scores.argsort(descending=True, stable=True).tolist()):
        if len(scores) - len(dropped) == num_kept:
            break
        if limits.mask_violation(_kept_by_group(limits, [*dropped, index])) is None:
            dropped.append(index)
    if len(scores) - len(dropped) > num_kept:
        raise MoeCollabError(
            f"{layer}: masking can leave no fewer than {len(scores) - len(dropped)} experts, {num_kept} are asked for. "
            "Keep more experts."
        )
    return [index for index in range(len(scores)) if index not in dropped]


def scaled_top_k(top_k: int, num_experts: int, num_kept: int) -> int:
    """`top_k` in proportion to the experts kept: times `num_kept` / `num_experts`, rounded half up, at least 1."""
    return max(1, (2 * top_k * num_kept + num_experts) // (2 * num_experts))


def check_mask(limits: RouterLimits, layer: str, dropped: Collection[int]) -> None:
    """Raise `MoeCollabError` unless the router of `layer` never selects one of `dropped` once they are masked."""
    if wrong := limits.mask_violation(_kept_by_group(limits, dropped)):
        raise MoeCollabError(f"{layer}: {wrong}")


def check_masks(moe: MoEModel) -> None:
    """Raise `MoeCollabError` if a router could select an expert that is gone."""
    for layer in moe.layers:
        if dropped := set(range(layer.num_experts)) - set(layer.live_experts):
            check_mask(moe.limits, layer.name, dropped)


def _kept_by_group(limits: RouterLimits, dropped: Collection[int]) -> list[int]:
    """Experts that each routing group keeps, [n_group]."""
    size = limits.num_experts // limits.n_group
    return [size - sum(index // size == group for index in set(dropped)) for group in range(limits.n_group)]
