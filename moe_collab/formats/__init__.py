"""Bit layouts of compressed-tensors checkpoints, in our own code, so that they do not depend on its pinned version."""

from .dequantization import dequantize
from .packing import pack, packed_width, unpack
from .scheme import DENSE, PRUNED, Scheme
from .ternary import TERNARY, TERNARY_PACKED, pack_ternary, ternary_width, unpack_ternary

__all__ = [
    "DENSE",
    "PRUNED",
    "TERNARY",
    "TERNARY_PACKED",
    "Scheme",
    "dequantize",
    "pack",
    "pack_ternary",
    "packed_width",
    "ternary_width",
    "unpack",
    "unpack_ternary",
]
