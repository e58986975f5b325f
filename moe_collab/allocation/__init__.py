"""One option per item under a byte budget, and budgets as people write them."""

from .budget import parse_bytes
from .expert_choice import ExpertChoice, masked_violations
from .knapsack import PhysicalSolution, Solution, solve, solve_physical

__all__ = [
    "ExpertChoice",
    "PhysicalSolution",
    "Solution",
    "masked_violations",
    "parse_bytes",
    "solve",
    "solve_physical",
]
