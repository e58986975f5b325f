"""Bits under a byte budget: items, their options, and the search."""

from .budget import parse_bytes
from .greedy import Item, Option, allocate, back_off, smallest_bytes

__all__ = ["Item", "Option", "allocate", "back_off", "parse_bytes", "smallest_bytes"]
