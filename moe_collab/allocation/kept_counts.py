"""The cheapest numbers of experts for the routing groups to keep under the constraints of masked pruning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .expert_choice import ExpertChoice

__all__ = ["cheapest_counts"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class _Option(NamedTuple):
    """One option of a routing group, for all layers at once: keep `kept` experts at `cost`, both [layers].

    `low`: the group is one of the low ones of `_coupled`, and adds `weight` experts to their sum.
    """

    kept: Ints
    cost: Floats
    weight: int
    low: bool


def cheapest_counts(prefix: Floats, pruning: ExpertChoice) -> tuple[Floats, Ints]:
    """(cost [layers], experts kept [layers, groups]) of the cheapest counts that `pruning` allows in each layer.

    `prefix[l, g, m]` is the cost of keeping the m best experts of group g in layer l, inf where that is impossible; a
    layer's cost is the sum over its groups, inf for a layer that cannot satisfy `pruning`.
    """
    allowed = prefix.copy()
    allowed[:, :, 1 : pruning.least_live] = np.inf
    counts = allowed.argmin(axis=2)
    cost = allowed.min(axis=2).sum(axis=1)
    broken = np.flatnonzero(~_satisfied(counts, pruning))
    if len(broken):
        cost[broken], counts[broken] = _coupled(allowed[broken], pruning)
    return cost, counts


def _satisfied(counts: Ints, pruning: ExpertChoice) -> NDArray[np.bool_]:
    """Whether `counts` [layers, groups] leave enough live groups, and enough experts in the smallest, [layers]."""
    live = np.sort(np.where(counts > 0, counts, np.iinfo(np.int64).max), axis=1)[:, : pruning.live_groups]
    enough = (counts > 0).sum(axis=1) >= pruning.live_groups
    return enough & (np.where(enough[:, None], live, 0).sum(axis=1) >= pruning.top_k)


def _coupled(prefix: Floats, pruning: ExpertChoice) -> tuple[Floats, Ints]:
    """As `cheapest_counts`, for layers in which the cheapest count of each group alone breaks the constraints.

    The smallest `live_groups` live groups of a layer are called low; together they must hold `top_k` experts. Every
    size that the largest of them can have is tried as a ceiling; all other groups then keep nothing, or that many or
    more.
    """
    best = np.full(len(prefix), np.inf)
    counts = np.zeros(prefix.shape[:2], dtype=np.int64)
    for ceiling in range(pruning.least_live, max(pruning.top_k, pruning.least_live) + 1):
        cost, found = _with_ceiling(prefix, pruning, ceiling)
        better = cost < best
        best[better], counts[better] = cost[better], found[better]
    return best, counts


def _with_ceiling(prefix: Floats, pruning: ExpertChoice, ceiling: int) -> tuple[Floats, Ints]:
    """(cost [layers], counts [layers, groups]) when low groups keep at most `ceiling` experts.

    Dynamic programming, one group after the other; a state is the number of low groups so far and their experts
    together, counted up to `top_k`.
    """
    layers, groups, _ = prefix.shape
    cost = np.full((layers, pruning.live_groups + 1, pruning.top_k + 1), np.inf)
    cost[:, 0, 0] = 0.0
    counts = np.zeros((*cost.shape, groups), dtype=np.int64)
    for group in range(groups):
        new_cost, new_counts = np.full_like(cost, np.inf), np.zeros_like(counts)
        for option in _options(prefix[:, group], pruning, ceiling):
            total, before = _add_low(cost, counts, option.weight) if option.low else (cost, counts)
            total = total + option.cost[:, None, None]
            take = total < new_cost
            new_cost[take] = total[take]
            new_counts[take] = before[take]
            new_counts[..., group] = np.where(take, option.kept[:, None, None], new_counts[..., group])
        cost, counts = new_cost, new_counts
    return cost[:, -1, -1], counts[:, -1, -1]


def _options(prefix: Floats, pruning: ExpertChoice, ceiling: int) -> Iterator[_Option]:
    """Options of one group: keep nothing, be low with up to `ceiling` experts, or keep at least that many."""
    layers, widths = prefix.shape
    enough = max(pruning.top_k, pruning.least_live)
    yield _Option(np.zeros(layers, dtype=np.int64), prefix[:, 0], 0, False)
    for count in range(pruning.least_live, min(ceiling, widths - 1) + 1):
        yield _Option(np.full(layers, count), prefix[:, count], min(count, pruning.top_k), True)
    if ceiling < widths:
        count = ceiling + prefix[:, ceiling:].argmin(axis=1)
        cost = prefix[np.arange(layers), count]
        yield _Option(count, cost, 0, False)
        # A low group that alone holds all the experts a token needs may be of any size.
        if ceiling == enough:
            yield _Option(count, cost, pruning.top_k, True)


def _add_low(cost: Floats, counts: Ints, weight: int) -> tuple[Floats, Ints]:
    """The states after one more low group of `weight` experts; sums beyond `top_k` count as `top_k`."""
    full = cost.shape[2] - 1
    new_cost, new_counts = np.full_like(cost, np.inf), np.zeros_like(counts)
    new_cost[:, 1:, weight:full] = cost[:, :-1, : full - weight]
    new_counts[:, 1:, weight:full] = counts[:, :-1, : full - weight]
    best = full - weight + cost[:, :-1, full - weight :].argmin(axis=2)[..., None]
    new_cost[:, 1:, full] = np.take_along_axis(cost[:, :-1], best, 2)[..., 0]
    new_counts[:, 1:, full] = np.take_along_axis(counts[:, :-1], best[..., None], 2)[:, :, 0]
    return new_cost, new_counts
