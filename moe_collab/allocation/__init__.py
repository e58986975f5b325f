"""Decides, from names, shapes and costs, how every matrix is stored and which experts are dropped, within a budget."""

from .budget import format_bytes, parse_bytes
from .costs import CostTable
from .decide import Decided, Measurements, compression_plan, decide
from .expert_choice import ExpertChoice, masked_violations
from .knapsack import PhysicalSolution, Solution, solve, solve_physical
from .planner import Decision, Planner
from .request import AllocationRequest

__all__ = [
    "AllocationRequest",
    "CostTable",
    "Decided",
    "Decision",
    "ExpertChoice",
    "Measurements",
    "PhysicalSolution",
    "Planner",
    "Solution",
    "compression_plan",
    "decide",
    "format_bytes",
    "masked_violations",
    "parse_bytes",
    "solve",
    "solve_physical",
]
