"""From matrices to the knapsack's items: which matrices are decided on together, and what each item's options are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from ..architectures import PROJECTIONS
from ..formats import PRUNED, Scheme
from ..outline import Matrix, ModelOutline
from .costs import CostTable
from .layout import CheckpointLayout
from .request import AllocationRequest

__all__ = ["Choices", "DropCosts", "ExpertPlace", "Item", "ItemTable", "group_items"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
DropCosts = Mapping[str, Sequence[float]]
"""MoE layer name -> cost of losing each of its experts."""


@dataclass(frozen=True)
class ExpertPlace:
    """Which routed expert of the model it is."""

    layer: int
    """Position of its layer among the MoE layers."""
    index: int
    """Its index within the layer."""


@dataclass(frozen=True)
class Item:
    """Matrices that are decided on together, as one item of the knapsack."""

    parts: tuple[tuple[str, ...], ...]
    """The names of the matrices, in parts; the matrices of a part share a scheme."""
    expert: ExpertPlace | None
    """The expert, if the item is all three matrices of one that may be dropped; else None."""


@dataclass(frozen=True)
class Choices:
    """An item's options, with their bytes and costs, [options] each.

    An option is one scheme for each part of the item, or `PRUNED` alone for dropping the expert.
    """

    schemes: list[tuple[Scheme, ...]]
    sizes: Ints
    costs: Floats


def group_items(outline: ModelOutline, matrices: Mapping[str, Matrix], request: AllocationRequest) -> Iterator[Item]:
    """The knapsack's items: all `matrices`, grouped as the request's granularity says.

    With pruning an item is a whole expert. Matrices that `fixed` names are a part of their own within their item; a
    matrix outside the routed experts is an item of its own.
    """
    by_layer: dict[int, dict[str, dict[str, list[str]]]] = {}
    experts = [(matrix.layer, matrix) for matrix in matrices.values() if matrix.layer is not None]
    for layer, matrix in sorted(experts, key=lambda e: (e[0], e[1].expert, PROJECTIONS.index(e[1].projection))):
        name = matrix.name
        half = "down" if matrix.projection == "down_proj" else "gate_up"
        part = half if request.granularity == "projection" else ""
        if request.fixed_bits(matrix) is not None:
            part = f"{half}, fixed"
        together = "" if request.granularity == "layer" else f"{matrix.expert}.{half}"
        item = str(matrix.expert) if request.pruning != "none" else together
        by_layer.setdefault(layer, {}).setdefault(item, {}).setdefault(part, []).append(name)
    for layer in range(len(outline.layers)):
        for item, parts in by_layer.get(layer, {}).items():
            whole = sum(map(len, parts.values())) == 3
            expert = ExpertPlace(layer, int(item)) if request.pruning != "none" and whole else None
            yield Item(tuple(map(tuple, parts.values())), expert)
    for name in sorted(name for name, matrix in matrices.items() if not matrix.is_expert):
        yield Item(((name,),), None)


class ItemTable:
    """The options of matrices and of items, with their bytes and costs."""

    def __init__(
        self,
        outline: ModelOutline,
        matrices: Mapping[str, Matrix],
        request: AllocationRequest,
        layout: CheckpointLayout,
    ) -> None:
        self._outline, self._matrices, self._request, self._layout = outline, matrices, request, layout
        self._known: dict[tuple, list[Scheme]] = {}

    def options(self, name: str) -> list[Scheme]:
        """Schemes that matrix `name` may get, smallest first."""
        matrix = self._matrices[name]
        # Experts are many and alike, so their options are worked out once.
        key = (matrix.shape, self._request.fixed_bits(matrix), "" if matrix.is_expert else name)
        if key not in self._known:
            options = self._request.options(matrix)
            self._known[key] = sorted(options, key=lambda scheme: self._layout.size(name, scheme, header=False))
        return self._known[key]

    def choices(self, item: Item, table: CostTable, drops: DropCosts | None, header: bool) -> Choices:
        """An item's options, without those that another option equals or beats in both size and cost.

        With `drops`, dropping is an option of whole experts; it costs nothing in layers that `drops` does not name.
        `header` says whether sizes include what the file's header takes for the tensors.
        """
        parts = [self._part(members, table, header) for members in item.parts]
        schemes = list(product(*(options for options, _, _ in parts)))
        sizes, costs = np.zeros(1, np.int64), np.zeros(1)
        for _, size, cost in parts:
            sizes, costs = np.add.outer(sizes, size).ravel(), np.add.outer(costs, cost).ravel()
        kept = _pareto(sizes, costs)
        schemes, sizes, costs = [schemes[i] for i in kept], sizes[kept], costs[kept]
        if drops is not None and item.expert is not None:
            loss = drops.get(self._outline.layers[item.expert.layer].name)
            schemes = [(PRUNED,), *schemes]
            sizes, costs = np.r_[0, sizes], np.r_[0.0 if loss is None else loss[item.expert.index], costs]
        return Choices(schemes, sizes, costs)

    def _part(self, members: Sequence[str], table: CostTable, header: bool) -> tuple[list[Scheme], Ints, Floats]:
        """(schemes, bytes, costs) of the matrices `members`, which share a scheme; one entry for each option."""
        options = self.options(members[0])
        sizes = [sum(self._layout.size(name, scheme, header) for name in members) for scheme in options]
        costs = [sum(table.cost(name, scheme) for name in members) for scheme in options]
        return options, np.array(sizes, np.int64), np.array(costs)


def _pareto(sizes: Ints, costs: Floats) -> list[int]:
    """Positions, by ascending size, of the options that are cheaper than every option that is as small or smaller."""
    order = np.lexsort((costs, sizes))
    best = np.r_[np.inf, np.minimum.accumulate(costs[order])[:-1]]
    return order[costs[order] < best].tolist()
