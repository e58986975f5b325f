"""Make decisions from measured costs, try them on held-out tokens, and take the one that proves best there."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from loguru import logger

from ..errors import MoeCollabError
from ..plan import CompressionPlan
from .costs import CostTable
from .items import DropCosts
from .planner import Decision, Planner

__all__ = ["Decided", "Measurements", "compression_plan", "decide", "with_fewer_experts"]

_DROP_ROUNDS = 4
"""How often the costs of losing experts are measured, each time with the last decision's experts gone."""
_REVERSALS = 8
"""Attempts to keep `max_kl`, each with a lower limit on the costs than the last."""
_BISECTIONS = 4
"""Further attempts between the limit that kept it and the last one that did not."""
_CLOSE = 1.1
"""Two limits whose ratio is no larger are not bisected: the sizes that they lead to differ by a percent."""


class Measurements(Protocol):
    """The numbers that `decide` asks for; `calibration.measurements` measures them on a live model."""

    def costs(self) -> CostTable:
        """The cost of every scheme on offer, for every matrix."""
        ...

    def drop_costs(self, dropped: Mapping[str, Collection[int]]) -> DropCosts:
        """A cost for each expert of each layer while the experts `dropped` (layer name -> indices) are gone.

        For an expert of `dropped` it is what bringing it back would save, for any other what losing it too would cost.
        """
        ...

    def kl(self, decision: Decision) -> float:
        """KL(model || model as decided) on held-out tokens, nats per token."""
        ...


@dataclass(frozen=True)
class Decided:
    """A decision, the costs behind it, and the KL that it and the best uniform scheme have on held-out tokens."""

    decision: Decision
    table: CostTable
    kl: float | None = None
    """Nats per token; None if it was not measured."""
    uniform: str | None = None
    """The best scheme for all routed experts alike; None if none fits the budget or none was tried."""
    uniform_kl: float | None = None
    """Nats per token."""


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
            raise  # With pruning the error does not matter: a decision with fewer experts has been made above.
    found = _best_of(planner, measured, table, decisions)
    if request.max_kl is not None and found.kl is not None and found.kl > request.max_kl:
        raise MoeCollabError(
            f"{request.key('max_kl')}: within the budget KL on held-out tokens is {found.kl:.4f}, over the "
            f"limit of {request.max_kl}. Raise the budget, or give max_kl alone to learn what it takes."
        )
    return found


def with_fewer_experts(planner: Planner, measured: Measurements, table: CostTable) -> Decision:
    """The cheapest decision in which experts may be dropped.

    The costs of losing experts do not add up. So they are measured again with the chosen experts gone, and the decision
    is made again, until it drops the same experts as before or `_DROP_ROUNDS` is reached.
    """
    dropped: Mapping[str, Collection[int]] = {}
    for _ in range(_DROP_ROUNDS):
        decision = planner.cheapest(table, measured.drop_costs(dropped))
        if decision.dropped == dropped:
            break
        dropped = decision.dropped
    return decision


def _best_of(planner: Planner, measured: Measurements, table: CostTable, decisions: list[Decision]) -> Decided:
    """What proves best on held-out tokens: one of `decisions`, or the best uniform scheme that fits.

    The uniform scheme is tried first and the decision that promises most last: then the model is already rounded as it
    will be, unless another turns out to be better.
    """
    uniform = planner.uniform(table)
    uniform_kl = None if uniform is None else measured.kl(uniform[1])
    tried = [(measured.kl(decision), decision) for decision in sorted(decisions, key=lambda d: d.cost, reverse=True)]
    kl, decision = min(reversed(tried), key=lambda pair: pair[0])
    if uniform is None or uniform_kl is None:
        return Decided(decision, table, kl)
    scheme, alike = uniform
    if uniform_kl < kl:
        logger.warning(
            "{}: on held-out tokens the allocation has a KL of {:.4f}, {} for all experts one of {:.4f}: that is used "
            "instead",
            planner.request.origin,
            kl,
            scheme,
            uniform_kl,
        )
        kl, decision = uniform_kl, alike
    return Decided(decision, table, kl, str(scheme), uniform_kl)


def _smallest(planner: Planner, measured: Measurements, table: CostTable) -> Decided:
    """The smallest decision whose KL on held-out tokens is at most `max_kl`.

    The sum of costs only predicts that KL. So a limit on the sum is lowered until the measured KL is small enough, and
    then raised again by bisection, up to where it is just small enough.
    """
    allowed = planner.request.max_kl
    assert allowed is not None
    found, kept, missed = _first_that_keeps(planner, measured, table, allowed)
    for _ in range(_BISECTIONS):
        if not kept < missed / _CLOSE:
            break
        limit = 1.5 * kept if math.isinf(missed) else math.sqrt(kept * missed)
        decision = planner.cheapest(table, limit=limit)
        if decision == found.decision:
            break
        kl = measured.kl(decision)
        if kl <= allowed:
            found, kept = Decided(decision, table, kl), limit
        else:
            missed = limit
    return found


def _first_that_keeps(
    planner: Planner, measured: Measurements, table: CostTable, allowed: float
) -> tuple[Decided, float, float]:
    """(a decision with a measured KL of at most `allowed`, the limit on its sum of costs, the last that failed)."""
    limit, missed = allowed, math.inf
    for _ in range(_REVERSALS):
        decision = planner.cheapest(table, limit=limit)
        if (kl := measured.kl(decision)) <= allowed:
            return Decided(decision, table, kl), limit, missed
        # Routing flips make the measured KL grow more slowly than the sum of costs.
        missed = limit
        limit *= 0.9 * (allowed / kl) ** 1.5
    raise MoeCollabError(
        f"{planner.request.key('max_kl')}: {allowed} was still missed, at {kl:.4f}, after {_REVERSALS} attempts. "
        "Offer more bits, or raise it."
    )


def compression_plan(
    planner: Planner, decided: Decided, model_fingerprint: str, recipe_fingerprint: str
) -> CompressionPlan:
    """The decision as the plan that all later steps carry out; the fingerprints tell the model and recipe it is for."""
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
