"""Ternary weights, five trits a byte: 26 bytes per 128 weights.

Each group of a row starts a byte of its own, so that groups, rows and tensor-parallel cuts stay aligned. A byte is
sum_i (t_i + 1) 3^i over its five codes t in {-1, 0, 1}; places beyond the group's end count as t = -1 and add nothing.
"""

from __future__ import annotations

import torch

from ..errors import MoeCollabError

__all__ = ["TERNARY", "TERNARY_PACKED", "pack_ternary", "ternary_width", "unpack_ternary"]

TERNARY = 1
"""`num_bits` of ternary weights in descriptor tables."""

TERNARY_PACKED = "ternary-packed"
"""What config.json calls the format."""

_PER_BYTE = 5


def ternary_width(num_codes: int, group_size: int) -> int:
    """Bytes of one row of `num_codes` codes."""
    return num_codes // group_size * -(-group_size // _PER_BYTE)


def pack_ternary(codes: torch.Tensor, group_size: int) -> torch.Tensor:
    """Codes in {-1, 0, 1}, [rows, columns] -> uint8 [rows, bytes]. Raises `MoeCollabError` for other codes."""
    rows, columns = codes.shape
    if columns % group_size:
        raise MoeCollabError(f"group size {group_size} does not divide {columns} columns.")
    if codes.numel() and int(codes.abs().max()) > 1:
        raise MoeCollabError(f"ternary codes lie in -1, 0, 1; got {int(codes.min())} to {int(codes.max())}.")
    trits = (codes.to(torch.int32) + 1).reshape(rows, -1, group_size)
    trits = torch.nn.functional.pad(trits, (0, -group_size % _PER_BYTE)).reshape(rows, -1, _PER_BYTE)
    powers = 3 ** torch.arange(_PER_BYTE, dtype=torch.int32, device=codes.device)
    return (trits * powers).sum(-1).to(torch.uint8)


def unpack_ternary(packed: torch.Tensor, shape: tuple[int, int], group_size: int) -> torch.Tensor:
    """The inverse of `pack_ternary`: int8 codes of `shape`. Raises `MoeCollabError` if the bytes do not fit it."""
    rows, columns = shape
    if packed.ndim != 2 or packed.shape != (rows, ternary_width(columns, group_size)):
        raise MoeCollabError(
            f"packed tensor of shape {list(packed.shape)} cannot hold {rows} x {columns} trits in groups of "
            f"{group_size}: expected [{rows}, {ternary_width(columns, group_size)}]."
        )
    powers = 3 ** torch.arange(_PER_BYTE, dtype=torch.int32, device=packed.device)
    trits = (packed.to(torch.int32)[..., None] // powers % 3).reshape(rows, columns // group_size, -1)
    return (trits[..., :group_size].reshape(rows, columns) - 1).to(torch.int8)
