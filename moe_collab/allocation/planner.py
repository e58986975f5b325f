"""`Planner`: from measured costs to the cheapest decision whose checkpoint, sized to the byte, fits a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..errors import MoeCollabError
from ..formats import PRUNED, Scheme
from ..outline import Matrix, ModelOutline
from .budget import format_bytes
from .costs import CostTable
from .expert_choice import ExpertChoice
from .items import Choices, DropCosts, ItemTable, group_items
from .knapsack import Solution, solve
from .layout import CheckpointLayout
from .request import AllocationRequest

__all__ = ["Decision", "Planner"]

_TRIES = 6
"""Attempts to fill the budget of a file, whose header's size is known only once the schemes are chosen."""
_HALVINGS = 24
"""Steps of the search for the smallest decision; each halves the range of bytes."""


@dataclass(frozen=True)
class Decision:
    """How every matrix that stays is stored, and which experts are dropped.

    Names and indices are those of the model before any expert is dropped.
    """

    schemes: dict[str, Scheme]
    """Matrix name -> scheme."""
    dropped: dict[str, list[int]] = field(default_factory=dict)
    """MoE layer name -> indices of the experts that are dropped."""
    cost: float = 0.0
    """Sum of the costs of all schemes and dropped experts, nats of KL per token."""
    bound: float = 0.0
    """Lower bound: no decision within the budget has a smaller sum of costs."""


Within = Callable[[int], tuple[Decision, Solution]]
"""From a number of bytes to the cheapest decision whose items take no more, and the solver's solution behind it."""


class Planner:
    """Finds the cheapest decisions for one model and one request.

    Raises `MoeCollabError` if the request names something that the model does not have, or if the model's routers lack
    what the requested pruning needs.
    """

    def __init__(self, outline: ModelOutline, request: AllocationRequest) -> None:
        self.outline, self.request = outline, request
        self.matrices: dict[str, Matrix] = request.targets(outline)
        self.experts = outline.experts & self.matrices.keys()
        self.layout = CheckpointLayout(outline, self.matrices)
        self.table = ItemTable(outline, self.matrices, request, self.layout)
        self._items = list(group_items(outline, self.matrices, request))
        self._check_pruning()
        self._check_fused()

    def _check_pruning(self) -> None:
        bare = [layer.name for layer in self.outline.layers if not layer.has_selection_bias]
        if self.request.pruning == "masked" and bare:
            raise MoeCollabError(
                f"{self.request.key('pruning')}: the router of {bare[0]} has no selection bias to mask experts by. "
                "Use pruning: physical."
            )

    def _check_fused(self) -> None:
        for name, matrix in self.matrices.items():
            if matrix.projection != "gate_proj":
                continue
            up = self.matrices.get(f"{name.removesuffix('gate_proj')}up_proj")
            bits = self.request.fixed_bits(matrix), None if up is None else self.request.fixed_bits(up)
            if up is not None and bits[0] != bits[1]:
                raise MoeCollabError(
                    f"{self.request.key('fixed')}: of {name} it says {bits[0]}, of {up.name} {bits[1]}; they are one "
                    "fused matrix and need the same bits. Let the regex find both."
                )

    def cheapest(
        self,
        costs: CostTable,
        drops: DropCosts | None = None,
        limit: float | None = None,
        solver: Callable[..., Solution] = solve,
    ) -> Decision:
        """The cheapest decision within the request's budget, or with `limit` the smallest one that costs at most that.

        `drops` are the costs of losing each expert; without them no expert is dropped. `solver` takes the arguments of
        `solve`. Raises `MoeCollabError` if the budget or the limit cannot be kept; it says what size or cost can be.
        """
        header = self.request.bpw is None
        choices = [self.table.choices(item, costs, drops, header) for item in self._items]
        if not choices:  # `ignore` names everything
            return Decision({})
        sizes, prices = _padded([c.sizes for c in choices], 0), _padded([c.costs for c in choices], np.inf)
        pruning = self._coupling() if drops is not None else None

        def within(room: int) -> tuple[Decision, Solution]:
            solution = solver(sizes, prices, room, pruning=pruning)
            return self._decision(choices, solution), solution

        largest = int(sizes.max(axis=1).sum())
        smallest = solve(sizes, np.where(np.isfinite(prices), sizes, np.inf), largest, pruning=pruning)
        if limit is not None:
            return self._smallest(within, smallest.size, largest, limit)
        if self.request.budget is None:
            return self._within_bpw(within, smallest.size)
        return self._within_file(within, self._decision(choices, smallest), smallest.size, self.request.budget)

    def uniform(self, costs: CostTable) -> tuple[Scheme, Decision] | None:
        """The best uniform alternative: (scheme of all routed experts, decision), or None if none fits the budget.

        Experts that `fixed` names keep to its bits. These and all matrices outside the routed experts get either their
        smallest option each, or their largest.
        """
        best = None
        alike = {name for name in self.experts if self.request.fixed_bits(self.matrices[name]) is None}
        rest = {name: self.table.options(name) for name in sorted(self.matrices.keys() - alike)}
        for scheme in self.request.schemes():
            if any(scheme not in self.table.options(name) for name in alike):
                continue
            for others in ((options[0] for options in rest.values()), (options[-1] for options in rest.values())):
                schemes = dict.fromkeys(alike, scheme) | dict(zip(rest, others, strict=True))
                cost = sum(costs.cost(name, chosen) for name, chosen in schemes.items())
                if self._fits(schemes) and (best is None or cost < best[1].cost):
                    best = scheme, Decision(schemes, {}, cost)
        return best

    def others(self) -> list[str]:
        """Names of the matrices outside the routed experts that have at least one quantized scheme on offer."""
        rest = sorted(self.matrices.keys() - self.experts)
        return [name for name in rest if any(scheme.is_packed for scheme in self.table.options(name))]

    def expert_bpw(self, schemes: Mapping[str, Scheme]) -> float:
        """Stored bits of the routed experts, per weight that they had before any of them was dropped."""
        stored = sum(self.layout.size(name, schemes[name], header=False) for name in self.experts & schemes.keys())
        return 8 * stored / max(1, self._expert_weights())

    def file_bytes(self, decision: Decision) -> int:
        """Bytes of the checkpoint that `decision` leads to, exactly."""
        return self.layout.file_bytes(decision.schemes, decision.dropped, self.request.pruning == "physical")

    def _expert_weights(self) -> int:
        return sum(self.matrices[name].numel for name in self.experts)

    def _fits(self, schemes: Mapping[str, Scheme]) -> bool:
        if self.request.budget is not None:
            return self.layout.file_bytes(schemes) <= self.request.budget
        return self.request.bpw is None or self.expert_bpw(schemes) <= self.request.bpw

    def _coupling(self) -> ExpertChoice:
        limits, experts = self.outline.limits, [item.expert for item in self._items]
        per_group = limits.num_experts // limits.n_group
        return ExpertChoice(
            form="physical" if self.request.pruning == "physical" else "masked",
            layers=np.array([-1 if e is None else e.layer for e in experts]),
            groups=np.array([0 if e is None else e.index // per_group for e in experts]),
            limits=limits,
        )

    def _decision(self, choices: list[Choices], solution: Solution) -> Decision:
        schemes: dict[str, Scheme] = {}
        dropped: dict[str, list[int]] = {}
        for item, choice, index in zip(self._items, choices, solution.choice.tolist(), strict=True):
            chosen = choice.schemes[index]
            if chosen == (PRUNED,) and item.expert is not None:
                dropped.setdefault(self.outline.layers[item.expert.layer].name, []).append(item.expert.index)
                continue
            for members, scheme in zip(item.parts, chosen, strict=True):
                schemes |= dict.fromkeys(members, scheme)
        gone = {layer: sorted(experts) for layer, experts in dropped.items()}
        return Decision(dict(sorted(schemes.items())), gone, solution.cost, solution.bound)

    def _within_bpw(self, within: Within, smallest: int) -> Decision:
        weights = self._expert_weights()
        others = self.matrices.keys() - self.experts
        rest = sum(self.layout.size(name, self.table.options(name)[0], header=False) for name in others)
        room = int((self.request.bpw or 16.0) * weights / 8) + rest
        if smallest > room:
            needed = 8 * (smallest - rest) / max(weights, 1)
            raise MoeCollabError(
                f"{self.request.key('bpw')}: {self.request.bpw} is too small; {self._offered()} need at least "
                f"{needed:.4f} bits per weight, scales included."
            )
        return within(room)[0]

    def _within_file(self, within: Within, smallest: Decision, size: int, budget: int) -> Decision:
        floor = self.file_bytes(smallest)
        if floor > budget:
            raise MoeCollabError(
                f"{self.request.key('budget')}: {format_bytes(budget)} is too small; with {self._offered()} the "
                f"checkpoint needs at least {format_bytes(floor)}. Raise the budget, offer fewer bits, or prune."
            )
        best: Decision | None = None
        room = max(size, size + budget - floor)
        for _ in range(_TRIES):
            found, solution = within(max(room, size))
            # The header's digits and the routers' rows depend on the choice, so the exact size is known only now.
            excess = self.file_bytes(found) - budget
            if excess <= 0 and (best is None or found.cost < best.cost):
                best = found
            if excess == 0 or room - excess < size:
                break
            room = min(room, solution.size) - excess if excess > 0 else room - excess
        return best or smallest

    def _smallest(self, within: Within, low: int, high: int, limit: float) -> Decision:
        """The smallest decision that costs at most `limit`, by halving the bytes between `low` and `high`."""
        best = within(high)[0]
        if best.cost > limit:
            raise MoeCollabError(
                f"{self.request.key('max_kl')}: the best of the bits offered is predicted at {best.cost:.2e}, over the "
                f"limit of {limit:.2e}. Offer more bits, such as 16, or raise max_kl."
            )
        for _ in range(_HALVINGS):
            middle = (low + high) // 2
            found = within(middle)[0]
            if found.cost <= limit:
                best, high = found, middle
            else:
                low = middle
        return best

    def _offered(self) -> str:
        sizes = self.request.group_sizes
        return f"bits {list(self.request.bits)} and group_size {sizes[0] if len(sizes) == 1 else list(sizes)}"


def _padded(rows: list[NDArray], value: float) -> NDArray:
    """Rows of different lengths as one table [rows, longest], the rest filled with `value`."""
    table = np.full((len(rows), max(map(len, rows))), value, dtype=rows[0].dtype)
    for position, row in enumerate(rows):
        table[position, : len(row)] = row
    return table
