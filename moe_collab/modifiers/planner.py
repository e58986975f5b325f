"""From measured costs to decisions whose checkpoint size is known to the byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..allocation import ExpertChoice, Solution, solve
from ..allocation.budget import format_bytes
from ..architectures import MoEModel, describe
from ..calibration.costs import CostTable
from ..errors import MoeCollabError
from ..formats import PRUNED, Scheme
from ..plan import fingerprint
from .layout import CheckpointLayout

if TYPE_CHECKING:
    from .mixed_bit_alloc import MixedBitAllocModifier

__all__ = ["Decision", "Planner", "model_fingerprint"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
DropCosts = Mapping[str, Sequence[float]]

_TRIES = 6
"""Rounds of fitting items to a file whose header depends on what is chosen."""
_HALVINGS = 24


def model_fingerprint(model: torch.nn.Module) -> str:
    """Changes with the model's tensors (names, shapes) and with its routers' weights."""
    moe = describe(model)
    routers = hashlib.sha256()
    for layer in moe.layers:
        routers.update(layer.router.weight.detach().float().cpu().numpy().tobytes())
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return fingerprint({"shapes": shapes, "routers": routers.hexdigest(), "top_k": moe.top_k})


@dataclass(frozen=True)
class Decision:
    """Schemes by module name (of what stays) and experts that go, by layer; names and indices are those before."""

    schemes: dict[str, Scheme]
    dropped: dict[str, list[int]] = field(default_factory=dict)
    cost: float = 0.0
    """Sum of costs, the recipe's `speed` included."""
    bound: float = 0.0
    """No decision within the budget has a smaller sum."""


class _Expert(NamedTuple):
    layer: int
    """Position among the MoE layers."""
    index: int


@dataclass(frozen=True)
class _Item:
    """Matrices decided on together: in each part they share a scheme; `expert` if all of one and it may go."""

    parts: tuple[tuple[str, ...], ...]
    expert: _Expert | None


@dataclass(frozen=True)
class _Choices:
    """An item's options: a scheme for each part, or `PRUNED` alone."""

    schemes: list[tuple[Scheme, ...]]
    sizes: Ints
    costs: Floats


class Planner:
    """Searches allocations of one model for the fields of one `MixedBitAllocModifier`."""

    def __init__(
        self,
        model: torch.nn.Module,
        moe: MoEModel,
        modules: Mapping[str, torch.nn.Linear],
        recipe: MixedBitAllocModifier,
        budget: int | None,
    ) -> None:
        self._moe, self._modules, self._budget = moe, modules, budget
        self.recipe = recipe
        self.layout = CheckpointLayout(model, moe, modules)
        self.experts = {name for layer in moe.layers for name, *_ in layer.projections()} & set(modules)
        self._known_options: dict[tuple, list[Scheme]] = {}
        self._items = list(self._grouped())

    def _grouped(self) -> Iterator[_Item]:
        """Items by the recipe's granularity; what `fixed` names is a part of its own, what is no expert an item."""
        recipe, seen = self.recipe, set()
        for position, layer in enumerate(self._moe.layers):
            by_item: dict[str, dict[str, list[str]]] = {}
            for name, expert, projection, _ in layer.projections():
                if name not in self._modules:
                    continue
                seen.add(name)
                half = "down" if projection == "down_proj" else "gate_up"
                part = half if recipe.granularity == "projection" else ""
                if recipe.fixed_bits(name) is not None:
                    part = name
                together = {"expert": str(expert), "layer": ""}.get(recipe.granularity, f"{expert}.{half}")
                item = str(expert) if recipe.pruning != "none" else together
                by_item.setdefault(item, {}).setdefault(part, []).append(name)
            for item, parts in by_item.items():
                whole = sum(map(len, parts.values())) == 3
                expert = _Expert(position, int(item)) if recipe.pruning != "none" and whole else None
                yield _Item(tuple(map(tuple, parts.values())), expert)
        for name in sorted(self._modules.keys() - seen):
            yield _Item(((name,),), None)

    def decide(
        self,
        table: CostTable,
        drops: DropCosts | None = None,
        limit: float | None = None,
        solver: Callable[..., Solution] = solve,
    ) -> Decision:
        """The cheapest decision within the recipe's budget; with `limit` instead the smallest that costs no more.

        `drops` are costs of losing each expert by layer; without them none goes. Raises `MoeCollabError` with the bytes
        needed if the budget, or the limit, cannot be met. `solver` is called as `solve` is.
        """
        header = self.recipe.bpw is None
        choices = [self._choices(item, table, drops, header) for item in self._items]
        if not choices:  # `ignore` names everything
            return Decision({})
        sizes, costs = _padded([c.sizes for c in choices], 0), _padded([c.costs for c in choices], np.inf)
        pruning = self._coupling() if drops is not None else None

        def within(room: int) -> tuple[Decision, Solution]:
            solution = solver(sizes, costs, room, pruning=pruning)
            return self._decision(choices, solution), solution

        size_as_cost = np.where(np.isfinite(costs), sizes, np.inf)
        smallest = solve(sizes, size_as_cost, int(sizes.max(axis=1).sum()), pruning=pruning)
        if limit is not None:
            return _smallest(within, smallest.size, int(sizes.max(axis=1).sum()), limit)
        if self._budget is None:
            return self._within_bpw(within, smallest.size)
        return self._within_file(within, self._decision(choices, smallest), smallest.size)

    def uniform(self, table: CostTable) -> tuple[Scheme, Decision] | None:
        """The cheapest decision within the budget that stores all routed experts alike but for `fixed`, if any fits."""
        best = None
        alike = {name for name in self.experts if self.recipe.fixed_bits(name) is None}
        rest = {name: self._options(name) for name in self._modules.keys() - alike}
        for scheme in self.recipe.schemes():
            if any(scheme not in self._options(name) for name in alike):
                continue
            for others in ((options[0] for options in rest.values()), (options[-1] for options in rest.values())):
                schemes = dict.fromkeys(alike, scheme) | dict(zip(rest, others, strict=True))
                cost = sum(table.cost(name, chosen) for name, chosen in schemes.items())
                if self._fits(schemes) and (best is None or cost < best[1].cost):
                    best = scheme, Decision(schemes, {}, cost)
        return best

    def measured_others(self) -> dict[str, torch.nn.Linear]:
        """Matrices outside the routed experts that have a choice."""
        names = sorted(self._modules.keys() - self.experts)
        return {name: self._modules[name] for name in names if self.recipe.fixed_bits(name) is None}

    def expert_bpw(self, schemes: Mapping[str, Scheme]) -> float:
        """Stored bits per weight of the routed experts that there were."""
        stored = sum(self.layout.size(name, schemes[name], header=False) for name in self.experts & schemes.keys())
        return 8 * stored / max(1, sum(self._modules[name].weight.numel() for name in self.experts))

    def file_bytes(self, decision: Decision) -> int:
        """Size of the checkpoint."""
        return self.layout.file_bytes(decision.schemes, decision.dropped, self.recipe.pruning == "physical")

    def _fits(self, schemes: Mapping[str, Scheme]) -> bool:
        if self._budget is not None:
            return self.layout.file_bytes(schemes) <= self._budget
        return self.recipe.bpw is None or self.expert_bpw(schemes) <= self.recipe.bpw

    def _options(self, name: str) -> list[Scheme]:
        """Schemes that module `name` may get, smallest first."""
        module, is_expert = self._modules[name], name in self.experts
        # Experts are many and alike.
        key = (tuple(module.weight.shape), self.recipe.fixed_bits(name), "" if is_expert else name)
        if key not in self._known_options:
            options = self.recipe.options(name, module, is_expert)
            self._known_options[key] = sorted(options, key=lambda scheme: self.layout.size(name, scheme, header=False))
        return self._known_options[key]

    def _choices(self, item: _Item, table: CostTable, drops: DropCosts | None, header: bool) -> _Choices:
        parts = [self._part(members, table, header) for members in item.parts]
        schemes = list(product(*(options for options, _, _ in parts)))
        sizes, costs = np.zeros(1, np.int64), np.zeros(1)
        for _, size, cost in parts:
            sizes, costs = np.add.outer(sizes, size).ravel(), np.add.outer(costs, cost).ravel()
        kept = _pareto(sizes, costs)
        schemes, sizes, costs = [schemes[i] for i in kept], sizes[kept], costs[kept]
        if drops is not None and item.expert is not None:
            loss = drops.get(self._moe.layers[item.expert.layer].name)
            schemes = [(PRUNED,), *schemes]
            sizes, costs = np.r_[0, sizes], np.r_[0.0 if loss is None else loss[item.expert.index], costs]
        return _Choices(schemes, sizes, costs)

    def _part(self, members: Sequence[str], table: CostTable, header: bool) -> tuple[list[Scheme], Ints, Floats]:
        """(options, sizes, costs) of matrices that share a scheme."""
        options = self._options(members[0])
        sizes = [sum(self.layout.size(name, scheme, header) for name in members) for scheme in options]
        costs = [sum(table.cost(name, scheme) for name in members) for scheme in options]
        if self.recipe.speed:
            slow = 1e-9 * self.recipe.speed * self._activated(members, table)
            costs = [cost + slow * size for cost, size in zip(costs, sizes, strict=True)]
        return options, np.array(sizes, np.int64), np.array(costs)

    def _activated(self, members: Sequence[str], table: CostTable) -> float:
        """Share of tokens that read these matrices."""
        layer = next((layer for layer in self._moe.layers if members[0].startswith(f"{layer.experts_name}.")), None)
        if layer is None or members[0] not in self.experts or not table.tokens:
            return 1.0
        indices = {int(name.removeprefix(f"{layer.experts_name}.").split(".")[0]) for name in members}
        return sum(table.routed_tokens[layer.name][index] for index in indices) / table.tokens / len(indices)

    def _coupling(self) -> ExpertChoice:
        moe, per_group = self._moe, self._moe.num_experts // self._moe.n_group
        experts = [item.expert for item in self._items]
        return ExpertChoice(
            form="physical" if self.recipe.pruning == "physical" else "masked",
            layers=np.array([-1 if e is None else e.layer for e in experts]),
            groups=np.array([0 if e is None else e.index // per_group for e in experts]),
            top_k=moe.top_k,
            n_group=moe.n_group,
            topk_group=moe.topk_group,
        )

    def _decision(self, choices: list[_Choices], solution: Solution) -> Decision:
        schemes: dict[str, Scheme] = {}
        dropped: dict[str, list[int]] = {}
        for item, choice, index in zip(self._items, choices, solution.choice.tolist(), strict=True):
            chosen = choice.schemes[index]
            if chosen == (PRUNED,) and item.expert is not None:
                dropped.setdefault(self._moe.layers[item.expert.layer].name, []).append(item.expert.index)
                continue
            for members, scheme in zip(item.parts, chosen, strict=True):
                schemes |= dict.fromkeys(members, scheme)
        return Decision(
            dict(sorted(schemes.items())),
            {layer: sorted(gone) for layer, gone in dropped.items()},
            solution.cost,
            solution.bound,
        )

    def _within_bpw(self, within: Callable, smallest: int) -> Decision:
        weights = sum(self._modules[name].weight.numel() for name in self.experts)
        others = self._modules.keys() - self.experts
        rest = sum(self.layout.size(name, self._options(name)[0], header=False) for name in others)
        room = int((self.recipe.bpw or 16.0) * weights / 8) + rest
        if smallest > room:
            needed = 8 * (smallest - rest) / max(weights, 1)
            raise MoeCollabError(
                f"MixedBitAllocModifier.bpw: {self.recipe.bpw} is too small; {self._offered()} need at least "
                f"{needed:.4f} bits per weight, scales included."
            )
        return within(room)[0]

    def _within_file(self, within: Callable, smallest: Decision, size: int) -> Decision:
        assert self._budget is not None
        floor = self.file_bytes(smallest)
        if floor > self._budget:
            raise MoeCollabError(
                f"MixedBitAllocModifier.budget: {format_bytes(self._budget)} is too small; with {self._offered()} the "
                f"checkpoint needs at least {format_bytes(floor)}. Raise the budget, offer fewer bits, or prune."
            )
        best: Decision | None = None
        room = max(size, size + self._budget - floor)
        for _ in range(_TRIES):
            found, solution = within(max(room, size))
            # The header's digits and the routers' rows depend on the choice, so the exact size is known only now.
            excess = self.file_bytes(found) - self._budget
            if excess <= 0 and (best is None or found.cost < best.cost):
                best = found
            if excess == 0 or room - excess < size:
                break
            room = min(room, solution.size) - excess if excess > 0 else room - excess
        return best or smallest

    def _offered(self) -> str:
        recipe = self.recipe
        return f"bits {recipe.bits} and group_size {recipe.group_size}"


def _smallest(within: Callable, low: int, high: int, limit: float) -> Decision:
    """The smallest decision that costs at most `limit`, by halving the bytes between `low` and `high`."""
    best = within(high)[0]
    if best.cost > limit:
        raise MoeCollabError(
            f"MixedBitAllocModifier.max_kl: the best of the bits offered is predicted at {best.cost:.2e}, over the "
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


def _pareto(sizes: Ints, costs: Floats) -> list[int]:
    """Positions, by ascending size, of what no other is both as small and as cheap as."""
    order = np.lexsort((costs, sizes))
    best = np.r_[np.inf, np.minimum.accumulate(costs[order])[:-1]]
    return order[costs[order] < best].tolist()


def _padded(rows: list[NDArray], value: float) -> NDArray:
    table = np.full((len(rows), max(map(len, rows))), value, dtype=rows[0].dtype)
    for position, row in enumerate(rows):
        table[position, : len(row)] = row
    return table
