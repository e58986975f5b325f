"""Performance-aware expert pruning: importance criteria and group-aware selection."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

import torch

from .architectures import MoEModel
from .errors import MoeCollabError
from .statistics import ExpertStatistics

__all__ = [
    "CRITERIA",
    "check_mask",
    "check_masks",
    "importance",
    "kept_experts",
    "scaled_top_k",
    "super_experts",
    "unmasked_experts",
    "wanted_num_experts",
    "whole_groups",
]


CRITERIA: dict[str, Callable[[ExpertStatistics], torch.Tensor]] = {
    "frequency": lambda seen: seen.frequency,
    "mean_weight": lambda seen: seen.mean_weight,
    "output_norm": lambda seen: seen.mean_norm,
    "reap": lambda seen: seen.mean_weighted_norm,
    "frequency_reap": lambda seen: seen.frequency * seen.mean_weighted_norm,
}
"""Scores of a layer's experts [experts]; the lowest go. With router weights g and outputs f: how often a token selects
the expert; mean g, mean ||f||, and mean g ||f|| over its tokens (REAP, arXiv 2510.13999); the sum of g ||f|| over all
tokens, per token. `importance` (I_e) needs its `alpha`, so it is not among them."""


def importance(statistics: ExpertStatistics, alpha: float) -> torch.Tensor:
    """I_e = alpha * f_e + (1 - alpha) * s_e, [num_experts] (arXiv 2509.25689, section 2)."""
    return alpha * statistics.frequency + (1 - alpha) * statistics.mean_weight


def super_experts(statistics: Mapping[str, ExpertStatistics]) -> dict[str, list[int]]:
    """Layer name -> experts whose outputs hold the model's outliers (arXiv 2507.23279, section 3.1).

    Largest absolute output above 99.5 % of all experts' and above a tenth of the model's largest.
    """
    peaks = {name: seen.largest.amax(0) for name, seen in statistics.items()}
    every = torch.cat(list(peaks.values()))
    bar = max(float(every.quantile(0.995)), float(every.max()) / 10)
    return {name: (peak >= bar).nonzero().flatten().tolist() for name, peak in peaks.items()}


def wanted_num_experts(moe: MoEModel, retention: float | None, num_experts: int | None) -> int:
    """Experts to keep per layer: ceil(retention * E) or `num_experts`. Raises `MoeCollabError` if there are fewer."""
    # The small term keeps 0.75 * 256 from becoming 193 through floating point.
    wanted = num_experts if num_experts is not None else math.ceil((retention or 1.0) * moe.num_experts - 1e-9)
    if wanted > moe.num_experts:
        raise MoeCollabError(f"ExpertPruningModifier.num_experts: cannot keep {wanted} of {moe.num_experts} experts.")
    return wanted


def whole_groups(moe: MoEModel, wanted: int) -> int:
    """`wanted` experts per layer rounded up to whole routing groups, for physical pruning.

    Raises `MoeCollabError` when the groups are unequal or the router could no longer choose `top_k` experts.
    """
    total, groups = moe.num_experts, moe.n_group
    if total % groups:
        raise MoeCollabError(f"config.json: {total} experts do not divide into n_group = {groups} equal groups.")
    kept = math.ceil(wanted / groups) * groups
    if moe.reachable(kept) < moe.top_k:
        raise MoeCollabError(
            f"ExpertPruningModifier: {kept} experts leave {moe.reachable(kept)} that a token can reach, "
            f"fewer than the {moe.top_k} activated per token. Keep more experts or lower num_experts_per_tok first."
        )
    fewest = moe.family.group_scores
    if groups > 1 and kept // groups < fewest:
        raise MoeCollabError(
            f"ExpertPruningModifier: {kept} experts are {kept // groups} per routing group, but a group's "
            f"score is the sum of its top {fewest}. Keep at least {fewest * groups} experts."
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


def unmasked_experts(moe: MoEModel, layer: str, scores: torch.Tensor, num_kept: int) -> list[int]:
    """Ascending indices of `num_kept` experts of one layer to keep when the rest are masked, free of its groups' sizes.

    Experts go one by one, the lowest of `scores` [num_experts] first, each if the router can do without it. Raises
    `MoeCollabError` if it cannot do with so few.
    """
    dropped: list[int] = []
    # Highest index first among equals, as in `kept_experts`.
    for index in reversed(scores.argsort(descending=True, stable=True).tolist()):
        if len(scores) - len(dropped) == num_kept:
            break
        try:
            check_mask(moe, layer, [*dropped, index])
        except MoeCollabError:
            continue
        dropped.append(index)
    if len(scores) - len(dropped) > num_kept:
        raise MoeCollabError(
            f"{layer}: masking can leave no fewer than {len(scores) - len(dropped)} experts, {num_kept} are asked for. "
            "Keep more experts."
        )
    return [index for index in range(len(scores)) if index not in dropped]


def scaled_top_k(top_k: int, num_experts: int, num_kept: int) -> int:
    """Activated experts in proportion to the experts kept, rounded half up, at least 1."""
    return max(1, (2 * top_k * num_kept + num_experts) // (2 * num_experts))


def check_mask(moe: MoEModel, layer: str, dropped: Collection[int]) -> None:
    """Raise `MoeCollabError` unless the router of `layer` never selects one of `dropped` once they are masked.

    A router with groups first takes the `topk_group` groups with the largest sum of two scores, then `top_k` experts of
    those: so a group must keep no expert or two, enough groups must live, and the smallest of them must have enough.
    """
    size = moe.num_experts // moe.n_group
    alive = [size - sum(index // size == group for index in set(dropped)) for group in range(moe.n_group)]
    if moe.topk_group == moe.n_group:
        alive = [sum(alive)]
    live = sorted(count for count in alive if count)
    chosen = min(moe.topk_group, len(alive))
    if len(alive) > 1 and 1 in live:
        raise MoeCollabError(
            f"{layer}: routing group {alive.index(1)} would keep 1 expert; groups keep none, or 2 or more."
        )
    if len(live) < chosen:
        raise MoeCollabError(
            f"{layer}: {len(live)} routing groups would keep experts; {chosen} are chosen for a token."
        )
    if sum(live[:chosen]) < moe.top_k:
        raise MoeCollabError(
            f"{layer}: a token could reach {sum(live[:chosen])} experts, but {moe.top_k} are activated. Mask fewer."
        )


def check_masks(moe: MoEModel) -> None:
    """Raise `MoeCollabError` if a router could select an expert that is gone."""
    for layer in moe.layers:
        if dropped := set(range(layer.num_experts)) - set(layer.live_experts):
            check_mask(moe, layer.name, dropped)
