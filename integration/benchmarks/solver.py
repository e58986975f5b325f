"""How fast the allocation's solver is, how close to its bound, and whether it equals scipy's MILP solver."""

from __future__ import annotations

import json
import time

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from moe_collab.allocation import ExpertChoice, solve, solve_physical
from moe_collab.routers import RouterLimits

__all__ = ["milp_cost", "milp_problem", "solver_rows"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

PROBLEMS = 200
LAYERS, EXPERTS, GROUPS = 58, 256, 8
WEIGHTS = 7168 * 2048
# Dropped, ternary, 2, 3, 4, 6 and 8 bits, in bits per weight with the scales of 128-weight groups.
TENSOR_BPW = np.array([0.0, 1.75, 2.125, 3.125, 4.125, 6.125, 8.125])
PAIR_BPW = np.array([1.75, 2.125, 3.125, 4.125, 5.125, 6.125, 8.125, 16.0])


def solver_rows() -> list[dict]:
    """DeepSeek-V3's tensors, its experts with pairs of schemes, the same with pruning, and 200 small problems."""
    rng = np.random.default_rng(0)
    tensors, experts = _tensors(rng), _experts(rng)
    rows = [_row(*tensors, share) for share in (0.1, 0.2, 0.4)] + [_row(*experts, share) for share in (0.1, 0.2, 0.4)]
    rows += [_pruned(form, *experts, share) for form in ("masked", "physical") for share in (0.08, 0.15)]
    return [*rows, _against_milp()]


def milp_problem(seed: int) -> tuple[Ints, Floats, int]:
    """Sizes and costs [items, options] of at most 100 items, and a budget, tight or loose.

    Sizes are unequal, costs neither convex nor always falling with size; an option may have size 0. Costs are large
    because scipy's solver stops at an absolute difference of 1e-6, sizes small because it lets a budget be exceeded
    by as much of them.
    """
    rng = np.random.default_rng(seed)
    items, options = int(rng.integers(1, 101)), int(rng.integers(2, 9))
    size = rng.integers(0, 20_000, (items, options))
    if seed % 2:
        bits = np.sort(rng.choice(np.array([0, 1.6, 2, 3, 4, 5, 6, 8, 16]), options, replace=False))
        size = (rng.integers(1, 2000, (items, 1)) * (8 * bits) / 8).astype(np.int64)
        cost = np.exp(rng.normal(0, 1.5, (items, 1))) * 4.0**-bits * np.exp(rng.normal(0, 0.5, size.shape))
    else:
        cost = rng.random(size.shape) * np.exp(rng.normal(0, 1, (items, 1)))
    cost[rng.random(size.shape) < 0.05] = np.inf
    cost[:, 0] = np.where(np.isinf(cost).all(axis=1), 1.0, cost[:, 0])
    cost *= 1e6 / cost[np.isfinite(cost)].max()
    least, most = np.where(np.isinf(cost), 1 << 40, size).min(axis=1).sum(), size.max(axis=1).sum()
    return size, cost, int(least + (max(most, least) - least) * rng.choice([0.0, 0.01, 0.05, 0.2, 0.5, 0.9, 1.0]))


def milp_cost(size: Ints, cost: Floats, budget: int) -> float:
    """The optimum by scipy's `milp` (HiGHS), evaluated on its rounded choice."""
    at = np.flatnonzero(np.isfinite(cost))
    item, s, c = at // cost.shape[1], size.ravel()[at], cost.ravel()[at]
    one_each = csr_array((np.ones(len(at)), (item, np.arange(len(at)))), shape=(len(size), len(at)))
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(s[None].astype(float), -np.inf, budget)]
    result = milp(
        c, constraints=constraints, integrality=np.ones(len(at)), bounds=Bounds(0, 1), options={"mip_rel_gap": 0.0}
    )
    chosen = result.x > 0.5
    if (
        result.status != 0
        or s[chosen].sum() > budget
        or not (np.bincount(item[chosen], minlength=len(size)) == 1).all()
    ):
        raise RuntimeError(f"milp found no optimum: {result.message}")
    return float(c[chosen].sum())


def _against_milp() -> dict:
    worst, ours, theirs = 0.0, [], []
    for seed in range(PROBLEMS):
        problem = milp_problem(seed)
        began = time.perf_counter()
        cost = solve(*problem).cost
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        reference = milp_cost(*problem)
        theirs.append(time.perf_counter() - began)
        worst = max(worst, abs(cost - reference) / max(abs(reference), 1e-300))
    return {
        "case": "solver_milp",
        "problems": PROBLEMS,
        "max_difference": worst,
        "seconds": round(sum(ours), 2),
        "slowest": round(max(ours), 3),
        "milp_seconds": round(sum(theirs), 2),
    }


def _row(size: Ints, cost: Floats, share: float) -> dict:
    budget = int(size.max(axis=1).sum() * share)
    began = time.perf_counter()
    solution = solve(size, cost, budget)
    seconds = time.perf_counter() - began
    row = {"case": "solver", "items": len(size), "options": size.shape[1], "seconds": round(seconds, 2)}
    return row | {"gap": solution.gap, "budget": budget, "size": solution.size}


def _pruned(form: str, size: Ints, cost: Floats, share: float) -> dict:
    budget = int(size.max(axis=1).sum() * share)
    layers = np.repeat(np.arange(LAYERS), EXPERTS)
    groups = np.tile(np.repeat(np.arange(GROUPS), EXPERTS // GROUPS), LAYERS)
    pruning = ExpertChoice(form, layers, groups, RouterLimits(EXPERTS, top_k=8, n_group=GROUPS, topk_group=4))
    began = time.perf_counter()
    if form == "physical":
        scan = solve_physical(size, cost, budget, pruning)
        solution, counts = scan.solution, len(scan.bounds)
    else:
        solution, counts = solve(size, cost, budget, pruning=pruning), 1
    seconds = time.perf_counter() - began
    row = {"case": "solver", "pruning": form, "items": len(size), "options": size.shape[1], "counts": counts}
    return row | {"seconds": round(seconds, 2), "gap": solution.gap, "budget": budget, "size": solution.size}


def _tensors(rng: np.random.Generator) -> tuple[Ints, Floats]:
    """58 x 256 x 3 tensors with 7 formats each, errors falling by about 4 a bit."""
    items = LAYERS * EXPERTS * 3
    size = np.tile((WEIGHTS * TENSOR_BPW / 8).astype(np.int64), (items, 1))
    importance = np.exp(rng.normal(0, 2, (items, 1)))
    return size, importance * 4.0**-TENSOR_BPW * np.exp(rng.normal(0, 0.3, size.shape))


def _experts(rng: np.random.Generator) -> tuple[Ints, Floats]:
    """58 x 256 experts: dropped, or one of 8 formats for gate and up and one for down."""
    items, formats = LAYERS * EXPERTS, len(PAIR_BPW)
    importance = np.exp(rng.normal(0, 1.5, (items, 1)))
    error = [importance * 4.0**-PAIR_BPW * np.exp(rng.normal(0, 0.3, (items, formats))) for _ in range(2)]
    pairs = (error[0][:, :, None] + error[1][:, None]).reshape(items, -1)
    bytes_of = ((2 * PAIR_BPW[:, None] + PAIR_BPW) * WEIGHTS / 8).astype(np.int64).ravel()
    size = np.tile(np.concatenate(([0], bytes_of)), (items, 1))
    return size, np.concatenate((importance * np.exp(rng.normal(-2, 1, (items, 1))), pairs), axis=1)


if __name__ == "__main__":
    print(json.dumps(solver_rows(), indent=1))
