"""Decide by measured costs, try the decisions on held-out tokens, take what is measured to be best."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from loguru import logger

from ..errors import MoeCollabError
from ..plan import CompressionPlan
from .costs import CostTable
from .items import DropCosts
from .planner import Decision, Planner

__all__ = ["Decided", "Measurements", "compression_plan", "decide", "with_fewer_experts"]

_DROP_ROUNDS = 4
_REVERSALS = 8


class Measurements(Protocol):
    """What is asked of a model and its calibration tokens; `calibration.measurements` answers for live models."""

    def costs(self) -> CostTable:
        """What every scheme on offer costs for every matrix."""
        ...

    def drop_costs(self, dropped: Mapping[str, Collection[int]]) -> DropCosts:
        """What losing each expert costs besides those `dropped`, by layer; of these, what bringing it back saves."""
        ...

    def kl(self, decision: Decision) -> float:
        """KL(model || model as decided) on held-out tokens, nats per token."""
        ...


@dataclass(frozen=True)
class Decided:
    """A decision, the costs behind it, and what held-out tokens say of it and of the best uniform scheme."""

    decision: Decision
    table: CostTable
    kl: float | None = None
    uniform: str | None = None
    uniform_kl: float | None = None


def decide(planner: Planner, measured: Measurements) -> Decided:
    """The best decision for the planner's request. Raises `MoeCollabError` if its `max_kl` cannot be kept."""
    request, table = planner.request, measured.costs()
    if not request.has_budget:
        return _smallest(planner, measured, table)
    decisions = [] if request.pruning == "none" else [with_fewer_experts(planner, measured, table)]
    try:
        decisions.append(planner.cheapest(table))
    except MoeCollabError:
        if not decisions:
            raise  # What fits only with fewer experts has been decided above.
    kl, decision = min(((measured.kl(d), d) for d in decisions), key=lambda pair: pair[0])
    found = _against_uniform(planner, measured, Decided(decision, table, kl))
    if request.max_kl is not None and found.kl is not None and found.kl > request.max_kl:
        raise MoeCollabError(
            f"{request.key('max_kl')}: within the budget KL on held-out tokens is {found.kl:.4f}, over the "
            f"limit of {request.max_kl}. Raise the budget, or give max_kl alone to learn what it takes."
        )
    return found


def with_fewer_experts(planner: Planner, measured: Measurements, table: CostTable) -> Decision:
    """The cheapest decision in which experts may go.

    Costs of losing experts do not add up: they are measured anew besides those that go, until these stay the same.
    """
    dropped: Mapping[str, Collection[int]] = {}
    for _ in range(_DROP_ROUNDS):
        decision = planner.cheapest(table, measured.drop_costs(dropped))
        if decision.dropped == dropped:
            break
        dropped = decision.dropped
    return decision


def _against_uniform(planner: Planner, measured: Measurements, found: Decided) -> Decided:
    """The same, or the best uniform scheme that fits where that is measured to be better."""
    best = planner.uniform(found.table)
    if best is None:
        return found
    scheme, decision = best
    kl = measured.kl(decision)
    found = replace(found, uniform=str(scheme), uniform_kl=kl)
    if found.kl is not None and found.kl <= kl:
        return found
    logger.warning(
        "{}: on held-out tokens the allocation has a KL of {:.4f}, {} for all experts one of {:.4f}: that is used "
        "instead",
        planner.request.origin,
        found.kl,
        scheme,
        kl,
    )
    return replace(found, decision=decision, kl=kl)


def _smallest(planner: Planner, measured: Measurements, table: CostTable) -> Decided:
    """The smallest decision whose KL on held-out tokens keeps `max_kl`: where it is missed, bits are given back."""
    allowed = limit = planner.request.max_kl
    assert allowed is not None and limit is not None
    for _ in range(_REVERSALS):
        decision = planner.cheapest(table, limit=limit)
        if (kl := measured.kl(decision)) <= allowed:
            return Decided(decision, table, kl)
        # Routing flips make the measured KL grow more slowly than the sum of costs.
        limit *= 0.9 * (allowed / kl) ** 1.5
    raise MoeCollabError(
        f"{planner.request.key('max_kl')}: {allowed} was still missed, at {kl:.4f}, after {_REVERSALS} attempts. "
        "Offer more bits, or raise it."
    )


def compression_plan(
    planner: Planner, decided: Decided, model_fingerprint: str, recipe_fingerprint: str
) -> CompressionPlan:
    """What was decided, as the file that everything else executes; the fingerprints say what it was decided for."""
    request, decision, limits = planner.request, decided.decision, planner.outline.limits
    gone = max(map(len, decision.dropped.values()), default=0) if request.pruning == "physical" else 0
    return CompressionPlan(
        model_fingerprint=model_fingerprint,
        recipe_fingerprint=recipe_fingerprint,
        num_experts=limits.num_experts - gone,
        num_experts_per_tok=limits.top_k,
        pruning=request.pruning,
        dropped=decision.dropped,
        schemes={name: str(scheme) for name, scheme in decision.schemes.items()},
        budget_bytes=request.budget,
        budget_bpw=request.bpw,
        predicted_bytes=planner.file_bytes(decision),
        expert_bpw=planner.expert_bpw(decision.schemes),
        predicted_kl=decision.cost,
        bound_kl=min(decision.bound, decision.cost),
        heldout_kl=decided.kl,
        uniform=decided.uniform,
        uniform_kl=decided.uniform_kl,
        routed_tokens=decided.table.routed_tokens,
    )
