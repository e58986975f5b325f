"""From measured costs to a `CompressionPlan` whose checkpoint size is known to the byte."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from loguru import logger

from ..allocation import Item, Option, back_off, parse_bytes, smallest_bytes, solve
from ..allocation.budget import format_bytes
from ..architectures import MoEModel, describe
from ..checkpoint.sizes import TensorEntry, checkpoint_bytes, quantized_entries
from ..errors import MoeCollabError
from ..formats import TERNARY
from ..plan import CompressionPlan, fingerprint
from .fisher_costs import Measured
from .naming import checkpoint_entries, checkpoint_names, entry_of

if TYPE_CHECKING:
    from .mixed_bit_alloc import MixedBitAllocModifier

__all__ = ["Planner", "model_fingerprint"]


def _best(items: list[Item], budget: int) -> list[int]:
    """Index of each item's option in the cheapest allocation found within `budget` bytes."""
    if not items:  # `ignore` names everything
        return []
    shape = len(items), max(len(item.options) for item in items)
    sizes, costs = np.zeros(shape, np.int64), np.full(shape, np.inf)
    for row, item in enumerate(items):
        for column, option in enumerate(item.options):
            sizes[row, column], costs[row, column] = option.size, option.cost
    return solve(sizes, costs, budget).choice.tolist()


def model_fingerprint(model: torch.nn.Module) -> str:
    """Changes with the model's tensors (names, shapes) and with its routers' weights."""
    moe = describe(model)
    routers = hashlib.sha256()
    for layer in moe.layers:
        routers.update(layer.router.weight.detach().float().cpu().numpy().tobytes())
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return fingerprint({"shapes": shapes, "routers": routers.hexdigest(), "top_k": moe.top_k})


class Planner:
    """Searches the allocation for one model, one set of costs and the fields of one modifier."""

    def __init__(
        self,
        model: torch.nn.Module,
        moe: MoEModel,
        targets: list[tuple[str, torch.nn.Linear]],
        measured: Measured,
        factors: dict[str, float],
        recipe: MixedBitAllocModifier,
    ) -> None:
        self._model, self._moe, self._recipe = model, moe, recipe
        self._factors = {n: factors.get(layer.name, 0.0) for layer in moe.layers for n, *_ in layer.projections()}
        self._modules = dict(targets)
        self._measured = measured
        self._experts = {name for layer in moe.layers for name, *_ in layer.projections()} & set(self._modules)
        self._unquantized = checkpoint_entries(model)
        saved = checkpoint_names(model, list(self._modules))
        self._by_saved_name = {f"{saved[name]}.weight": name for name in self._modules}
        self._groups = self._grouped()
        self._items = [self._item(name, members) for name, members in self._groups.items()]

    def plan(self, model: str, recipe: str) -> CompressionPlan:
        """Allocate under the recipe's budget. Raises `MoeCollabError` with the bytes needed if it cannot be met."""
        budget = None
        if self._recipe.budget is not None:
            budget = parse_bytes(self._recipe.budget)
            choice = self._fit_file_size(budget)
        else:
            choice = self._fit_bpw(self._recipe.bpw or 0.0)
        bits = self._bits(choice)
        return CompressionPlan(
            model_fingerprint=model,
            recipe_fingerprint=recipe,
            num_experts=self._moe.num_experts,
            num_experts_per_tok=self._moe.top_k,
            group_size=self._recipe.group_size,
            symmetric=self._recipe.symmetric,
            budget_bytes=budget,
            budget_bpw=self._recipe.bpw,
            predicted_bytes=self._file_size(bits),
            expert_bpw=self._expert_bpw(bits),
            predicted_kl=sum(i.options[c].cost for i, c in zip(self._items, choice, strict=True)),
            num_bits=bits,
            routed_tokens=self._measured.routed_tokens,
        )

    def report(self, plan: CompressionPlan) -> None:
        """Say what was decided, and which experts the calibration data hardly reached."""
        counts = Counter(plan.num_bits[name] for name in self._experts)
        spread = ", ".join(f"{n} {'ternary' if b == TERNARY else f'at {b} bits'}" for b, n in sorted(counts.items()))
        logger.info(
            "MixedBitAllocModifier: expert tensors {}; {:.3f} bpw, checkpoint {}",
            spread,
            plan.expert_bpw,
            format_bytes(plan.predicted_bytes),
        )
        for layer, tokens in plan.routed_tokens.items():
            unseen = [expert for expert, count in enumerate(tokens) if count == 0]
            if unseen:
                logger.warning("{}: no calibration token was routed to experts {}", layer, unseen)

    def _grouped(self) -> dict[str, list[str]]:
        """Item name -> modules that get one bit-width; what `fixed` names stands alone."""
        groups: dict[str, list[str]] = {}
        granularity = self._recipe.granularity
        for layer in self._moe.layers:
            for name, expert, projection, _ in layer.projections():
                if name not in self._modules:
                    continue
                half = "down" if projection == "down_proj" else "gate_up"
                key = {"expert": f"{layer.name}.{expert}", "layer": layer.name}.get(
                    granularity, f"{layer.name}.{expert}.{half}"
                )
                fixed = self._recipe._fixed_bits(name)
                groups.setdefault(key if fixed is None else name, []).append(name)
        for name in self._modules.keys() - self._experts:
            groups[name] = [name]
        return groups

    def _item(self, name: str, members: list[str]) -> Item:
        fixed = self._recipe._fixed_bits(members[0])
        options = []
        for bits in [fixed] if fixed is not None else self._recipe.bits:
            size = sum(self._stored_bytes(m, bits) + self._header_bytes(m, bits) for m in members)
            cost = sum(self._kl(m, bits) for m in members)
            options.append(Option(bits, size, cost))
        return Item.of(name, options)

    def _kl(self, name: str, bits: int) -> float:
        """Predicted KL per token of rounding `name`; 0 for what no cost was measured of, such as attention."""
        return self._factors.get(name, 0.0) * self._measured.costs.get(name, {}).get(bits, 0.0)

    def _entries(self, name: str, bits: int) -> list[TensorEntry]:
        module = self._modules[name]
        if bits == 16:
            return [entry_of(f"{name}.weight", module.weight)]
        recipe = self._recipe
        size = recipe.group_size if recipe.group_size != -1 else module.in_features
        dtype = entry_of("", module.weight).dtype
        shape = tuple(module.weight.shape)
        entries = quantized_entries(name, shape, bits, size, recipe.symmetric, scale_dtype=dtype)
        return entries

    def _stored_bytes(self, name: str, bits: int) -> int:
        return sum(entry.nbytes for entry in self._entries(name, bits))

    def _header_bytes(self, name: str, bits: int) -> int:
        # About what a tensor takes in the file's JSON header: names, shape, two offsets of nine digits.
        return sum(len(entry.name) + 70 for entry in self._entries(name, bits))

    def _bits(self, choice: list[int]) -> dict[str, int]:
        chosen = {}
        for item, index, members in zip(self._items, choice, self._groups.values(), strict=True):
            chosen.update(dict.fromkeys(members, item.options[index].num_bits))
        return dict(sorted(chosen.items()))

    def _file_size(self, bits: dict[str, int]) -> int:
        """Exact size of the checkpoint; the names of its tensors are worked out once, for they never change."""
        entries: list[TensorEntry] = []
        for entry in self._unquantized:
            name = self._by_saved_name.get(entry.name)
            if name is None or bits[name] == 16:
                entries.append(entry)
            else:
                saved = entry.name.removesuffix(".weight")
                entries += [replace(e, name=saved + e.name.removeprefix(name)) for e in self._entries(name, bits[name])]
        return checkpoint_bytes(entries)

    def _fit_file_size(self, budget: int) -> list[int]:
        smallest = [0] * len(self._items)
        floor = self._file_size(self._bits(smallest))
        if floor > budget:
            raise MoeCollabError(
                f"MixedBitAllocModifier.budget: {format_bytes(budget)} is too small; with bits {self._recipe.bits} and "
                f"group_size {self._recipe.group_size} the checkpoint needs at least {format_bytes(floor)}. Raise the "
                "budget, offer fewer bits, or prune experts first."
            )
        best = smallest
        room = smallest_bytes(self._items) + budget - floor
        for _ in range(2):
            choice = _best(self._items, max(room, smallest_bytes(self._items)))
            # The header's digits depend on the choice, so the exact size is known only now.
            while (excess := self._file_size(self._bits(choice)) - budget) > 0:
                choice = back_off(self._items, choice, excess)
            if self._cost(choice) < self._cost(best):
                best = choice
            room -= excess
        return best

    def _fit_bpw(self, bpw: float) -> list[int]:
        sizes = [Item(i.name, tuple(self._without_header(i, m) for m in range(len(i.options)))) for i in self._items]
        of_experts = [i for i, members in zip(sizes, self._groups.values(), strict=True) if members[0] in self._experts]
        weights = sum(self._modules[name].weight.numel() for name in self._experts)
        needed = 8 * smallest_bytes(of_experts) / weights
        if needed > bpw:
            raise MoeCollabError(
                f"MixedBitAllocModifier.bpw: {bpw} is too small; bits {self._recipe.bits} with group_size "
                f"{self._recipe.group_size} need at least {needed:.4f} bits per weight, scales included."
            )
        rest = smallest_bytes(sizes) - smallest_bytes(of_experts)
        return _best(sizes, int(bpw * weights / 8) + rest)

    def _without_header(self, item: Item, index: int) -> Option:
        option = item.options[index]
        size = sum(self._stored_bytes(m, option.num_bits) for m in self._groups[item.name])
        return Option(option.num_bits, size, option.cost)

    def _cost(self, choice: list[int]) -> float:
        return sum(item.options[index].cost for item, index in zip(self._items, choice, strict=True))

    def _expert_bpw(self, bits: dict[str, int]) -> float:
        stored = sum(self._stored_bytes(name, bits[name]) for name in self._experts)
        return 8 * stored / sum(self._modules[name].weight.numel() for name in self._experts)
