"""x86 CPU kernels (C++): weights in tiles of 16 rows, activations in integers. See `layout.h`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from ...errors import MoeCollabError
from ...formats import TERNARY, packed_width
from ..arena import Cut
from ..descriptors import TensorSpec
from .build import COMMAND, LIBRARY

__all__ = ["TileLayout", "configure", "load"]

_ROWS = 16
_UNIT = 32
_TERNARY_UNIT, _TERNARY_UNIT_BYTES = 64, 208


@cache
def load() -> None:
    """Register the ops `moe_collab::*_cpu`. Raises `MoeCollabError` saying how to build what is missing."""
    path = Path(__file__).parent / LIBRARY
    if not path.exists():
        raise MoeCollabError(f"the CPU kernels are not built; run: {COMMAND}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise MoeCollabError(f"the CPU kernels do not load ({error}); build them again: {COMMAND}") from error

    @torch.library.register_fake("moe_collab::fused_experts_cpu")
    def _(x, *arguments):  # type: ignore[no-untyped-def]
        return torch.empty_like(x)

    @torch.library.register_fake("moe_collab::linear_cpu")
    def _(x, codes, scales, zero_points, table, bias, activation_bits, num_rows):  # type: ignore[no-untyped-def]
        return x.new_empty(x.shape[0], num_rows)


def configure(name: str = "", num_bits: int = 0, prefetch: int = 0) -> str:
    """Choose the instruction set ("best", "avx512", "avxvnni", "avx2", "scalar"; "" keeps it) and, for weights of
    `num_bits`, how many bytes ahead to prefetch. Returns the instruction set in use.
    """
    load()
    return str(torch.ops.moe_collab.configure_cpu(name, num_bits, prefetch))


class TileLayout:
    """uint8 tiles, and scales (bfloat16 while exact) in the tiles' order.

    `ternary_bits`: what ternary weights are stored in, `TERNARY` (1.6 bits, smaller) or 2 (faster).
    """

    codes_dtype = torch.uint8
    scales_dtype = torch.bfloat16

    def __init__(self, ternary_bits: int = 2) -> None:
        load()
        self.ternary_bits = ternary_bits

    def stored_bits(self, spec: TensorSpec) -> int:
        """7 bits are stored in 8."""
        return {TERNARY: self.ternary_bits, 7: 8}.get(spec.num_bits, spec.num_bits)

    def num_codes(self, spec: TensorSpec) -> int:
        """Bytes; `Matrix::tile_bytes` of layout.h times the tiles."""
        bits, tiles = self.stored_bits(spec), -(-spec.rows // _ROWS)
        if bits in (0, 16):
            return tiles * _ROWS * spec.columns * bits // 8
        unit = _TERNARY_UNIT if bits == TERNARY else _UNIT
        columns = spec.num_groups * -(-spec.group_size // unit) * unit
        if bits == TERNARY:
            return tiles * -(-columns // unit * _TERNARY_UNIT_BYTES // 64) * 64
        return tiles * _ROWS * columns * bits // 8

    def num_scales(self, spec: TensorSpec) -> int:
        """Rows are padded to whole tiles."""
        return -(-spec.rows // _ROWS) * _ROWS * spec.num_groups

    def arrange(self, values: torch.Tensor) -> torch.Tensor:
        """[rows, groups] -> [tiles, groups, 16], rows beyond the last with zeros."""
        rows, groups = values.shape
        padded = torch.nn.functional.pad(values, (0, 0, 0, -rows % _ROWS))
        return padded.view(-1, _ROWS, groups).transpose(1, 2)

    def write_codes(
        self, codes: torch.Tensor, descriptor: torch.Tensor, spec: TensorSpec, packed: torch.Tensor, cut: Cut
    ) -> None:
        """Repack the cut, tile by tile."""
        padded = False
        if spec.is_packed and spec.num_bits != TERNARY:
            dense = packed_width(cut.shape[1], spec.num_bits)
            padded = packed.shape[-1] != dense
            if packed.shape[-1] not in (dense, packed_width(cut.shape[1], spec.num_bits, padded=True)):
                raise MoeCollabError(
                    f"packed tensor of shape {list(packed.shape)} cannot hold {cut.shape[0]} x {cut.shape[1]} codes of "
                    f"{spec.num_bits} bits."
                )
        torch.ops.moe_collab.repack_cpu(packed, spec.num_bits, padded, cut.row, cut.column, descriptor, codes)
