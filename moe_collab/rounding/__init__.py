"""Rounding weights to integer codes so that the model's predictions change least; plain tensors, no framework."""

from .feedback import left_over
from .grid import Grid
from .packed import PackedGrid
from .rounder import Rounder
from .scales import nearest_loss

__all__ = ["Grid", "PackedGrid", "Rounder", "left_over", "nearest_loss"]
