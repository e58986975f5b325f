"""Bits under a byte budget: items, their options, and the search."""

from .budget import parse_bytes
from .expert_choice import ExpertChoice, masked_violations
from .greedy import Item, Option, allocate, back_off, smallest_bytes
from .knapsack import PhysicalSolution, Solution, solve, solve_physical

__all__ = [
    "ExpertChoice",
    "Item",
    "Option",
    "PhysicalSolution",
    "Solution",
    "allocate",
    "back_off",
    "masked_violations",
    "parse_bytes",
    "smallest_bytes",
    "solve",
    "solve_physical",
]
