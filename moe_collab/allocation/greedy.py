"""The paper's search: start at the lowest precision, buy the best measured gain per byte, back off.

arXiv 2509.25689, "mixed-precision quantization": every tensor starts at a base precision, each upgrade is
measured, and the memory budget goes to the tensors that gain most; when it is exceeded, the upgrades that
gain least are taken back.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import MoeCollabError
from .budget import format_bytes

__all__ = ["Item", "Option", "allocate", "back_off", "smallest_bytes"]


@dataclass(frozen=True)
class Option:
    """One precision an item can have: its bits, its size in bytes, and the error it causes."""

    num_bits: int
    size: int
    cost: float


@dataclass(frozen=True)
class Item:
    """Tensors that get one precision together, and their options in ascending size."""

    name: str
    options: tuple[Option, ...]

    @classmethod
    def of(cls, name: str, options: Sequence[Option]) -> Item:
        """Sort the options and drop those that are larger and no better than another."""
        frontier: list[Option] = []
        for option in sorted(options, key=lambda o: (o.size, o.cost)):
            if not frontier or option.cost < frontier[-1].cost:
                frontier.append(option)
        return cls(name, tuple(frontier))


def smallest_bytes(items: Sequence[Item]) -> int:
    """Size in bytes of the smallest allocation there is."""
    return sum(item.options[0].size for item in items)


def allocate(items: Sequence[Item], budget: int) -> list[int]:
    """Choose an option index per item so that the sizes sum to at most `budget` bytes.

    Raises `MoeCollabError` when even the smallest allocation is larger.
    """
    left = budget - smallest_bytes(items)
    if left < 0:
        raise MoeCollabError(f"the smallest allocation needs {format_bytes(-left)} more than the budget allows.")
    choice = [0] * len(items)
    heap: list[tuple[float, int, int, int]] = []

    def offer(index: int) -> None:
        start = choice[index]
        for target in range(start + 1, len(items[index].options)):
            heapq.heappush(heap, (-_gain_per_byte(items[index], start, target), index, start, target))

    for index in range(len(items)):
        offer(index)
    while heap:
        _, index, start, target = heapq.heappop(heap)
        price = items[index].options[target].size - items[index].options[start].size
        # An upgrade that does not fit now never will: what is left only shrinks.
        if choice[index] == start and price <= left:
            choice[index], left = target, left - price
            offer(index)
    return choice


def back_off(items: Sequence[Item], choice: Sequence[int], excess: int) -> list[int]:
    """Take back at least `excess` bytes of upgrades, those first that cost least error per byte.

    Raises `MoeCollabError` when no upgrade is left to take back.
    """
    choice = list(choice)
    heap: list[tuple[float, int, int]] = []

    def offer(index: int) -> None:
        if choice[index] > 0:
            loss = _gain_per_byte(items[index], choice[index] - 1, choice[index])
            heapq.heappush(heap, (loss, index, choice[index]))

    for index in range(len(items)):
        offer(index)
    while excess > 0:
        if not heap:
            raise MoeCollabError(f"the smallest allocation is {format_bytes(excess)} over the budget.")
        _, index, start = heapq.heappop(heap)
        options = items[index].options
        excess -= options[start].size - options[start - 1].size
        choice[index] = start - 1
        offer(index)
    return choice


def _gain_per_byte(item: Item, start: int, target: int) -> float:
    low, high = item.options[start], item.options[target]
    return (low.cost - high.cost) / (high.size - low.size)
