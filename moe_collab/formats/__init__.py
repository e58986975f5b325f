"""Bit layouts of compressed-tensors checkpoints: our own code, so that no pinned version decides for us."""

from .packing import pack, packed_width, unpack
from .rounding import dequantize

__all__ = ["dequantize", "pack", "packed_width", "unpack"]
