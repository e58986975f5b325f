"""Rounding weights to integer codes so that the model's predictions change least; plain tensors, no framework."""

from .grid import Grid
from .packed import PackedGrid
from .rounder import Rounder

__all__ = ["Grid", "PackedGrid", "Rounder"]
