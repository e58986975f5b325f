"""Decide by measured costs, try the decisions on held-out tokens, take what is measured to be best."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from loguru import logger

from ..architectures import MoEModel
from ..calibration import Trial, held_out
from ..calibration.costs import CostTable, dropping_costs, rounding_costs
from ..errors import MoeCollabError
from ..formats import Scheme
from ..plan import fingerprint
from ..rounding import Rounder
from .distributed import is_source_process
from .planner import Decision, Planner

if TYPE_CHECKING:
    from .mixed_bit_alloc import MixedBitAllocModifier

__all__ = ["Found", "Search"]

Batches = Sequence[Mapping[str, torch.Tensor]]

_DROP_ROUNDS = 4
_REVERSALS = 8


@dataclass(frozen=True)
class Found:
    """A decision, the costs behind it, and what held-out tokens say of it and of the best uniform scheme."""

    decision: Decision
    table: CostTable
    kl: float | None = None
    uniform: str | None = None
    uniform_kl: float | None = None


class Search:
    """One model's search for what the fields of `recipe` ask for; the model stays as it is."""

    def __init__(
        self, model: Any, moe: MoEModel, planner: Planner, recipe: MixedBitAllocModifier, rounder: Rounder
    ) -> None:
        self._model, self._moe, self._planner, self._recipe, self._rounder = model, moe, planner, recipe, rounder

    def run(self, batches: list[dict[str, torch.Tensor]], model: str) -> Found:
        """Search by calibration `batches`; `model` is the model's fingerprint. Raises `MoeCollabError` for `max_kl`."""
        batches, heldout = held_out(_rows(batches[0]) if len(batches) == 1 else batches)
        table = self._table(batches, model)
        trial = Trial(self._model, self._moe, self._rounder, batches, heldout)
        recipe = self._recipe
        if recipe.budget is None and recipe.bpw is None and recipe.fit is None:
            return self._smallest(table, trial)
        decisions = [] if recipe.pruning == "none" else [self.with_fewer_experts(table, batches)]
        try:
            decisions.append(self._planner.decide(table))
        except MoeCollabError:
            if not decisions:
                raise  # with pruning, what only fits with fewer experts fits
        kl, decision = min(((trial.kl(d.schemes, d.dropped), d) for d in decisions), key=lambda pair: pair[0])
        found = self._against_uniform(Found(decision, table, kl), trial)
        if recipe.max_kl is not None and found.kl is not None and found.kl > recipe.max_kl:
            raise MoeCollabError(
                f"MixedBitAllocModifier.max_kl: within the budget KL on held-out tokens is {found.kl:.4f}, over the "
                f"limit of {recipe.max_kl}. Raise the budget, or give max_kl alone to learn what it takes."
            )
        return found

    def _against_uniform(self, found: Found, trial: Trial) -> Found:
        """The same, or the best uniform scheme that fits where that is measured to be better."""
        best = self._planner.uniform(found.table)
        if best is None:
            return found
        scheme, decision = best
        kl = trial.kl(decision.schemes, {})
        if found.kl is not None and found.kl <= kl:
            return Found(found.decision, found.table, found.kl, str(scheme), kl)
        logger.warning(
            "MixedBitAllocModifier: on held-out tokens the allocation has a KL of {:.4f}, {} for all experts one of "
            "{:.4f}: that is used instead",
            found.kl,
            scheme,
            kl,
        )
        return Found(decision, found.table, kl, str(scheme), kl)

    def _table(self, batches: Batches, model: str) -> CostTable:
        """The costs, from the recipe's file if it is there."""
        recipe = self._recipe
        schemes = sorted(map(str, recipe.schemes()))
        others = self._planner.measured_others()
        described = {"model": model, "schemes": schemes, "rounder": str(self._rounder), "others": sorted(others)}
        key = fingerprint(described)
        if recipe.costs and Path(recipe.costs).exists():
            logger.info("MixedBitAllocModifier: reusing {}", recipe.costs)
            return CostTable.load(recipe.costs, key)

        def packed(module: torch.nn.Linear) -> list[Scheme]:
            return [scheme for scheme in recipe.options("", module, True) if scheme.is_packed]

        table = rounding_costs(self._model, self._moe, others, batches, packed, self._rounder)
        table.fingerprint = key
        if recipe.costs and is_source_process():
            table.save(recipe.costs)
        return table

    def with_fewer_experts(self, table: CostTable, batches: Batches) -> Decision:
        """Costs of losing experts do not add up: they are measured anew besides those that go, until these stay."""
        dropped: Mapping[str, Collection[int]] = {}
        for _ in range(_DROP_ROUNDS):
            drops = dropping_costs(self._model, self._moe, batches, dropped)
            decision = self._planner.decide(table, drops)
            if decision.dropped == dropped:
                break
            dropped = decision.dropped
        return decision

    def _smallest(self, table: CostTable, trial: Trial) -> Found:
        """The smallest decision whose KL on held-out tokens keeps `max_kl`: where it is missed, bits are given back."""
        assert self._recipe.max_kl is not None
        allowed = limit = self._recipe.max_kl
        for _ in range(_REVERSALS):
            decision = self._planner.decide(table, limit=limit)
            if (kl := trial.kl(decision.schemes, {})) <= allowed:
                return Found(decision, table, kl)
            # Routing flips make the measured KL grow more slowly than the sum of costs.
            limit *= 0.9 * (allowed / kl) ** 1.5
        raise MoeCollabError(
            f"MixedBitAllocModifier.max_kl: {allowed} was still missed, at {kl:.4f}, after {_REVERSALS} attempts. "
            "Offer more bits, or raise it."
        )


def _rows(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Batches of one sequence each."""
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(batch["input_ids"]))]
