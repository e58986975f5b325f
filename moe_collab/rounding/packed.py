"""A rounded weight, packed as the checkpoint will store it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats import TERNARY, Scheme, pack, pack_ternary, unpack, unpack_ternary
from .grid import Grid

__all__ = ["PackedGrid"]


@dataclass(frozen=True)
class PackedGrid:
    """Codes of one weight [rows, columns] in packed words, its scales [rows, groups], and zero points, if any."""

    scheme: Scheme
    shape: tuple[int, int]
    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    """int8 [rows, groups]."""

    @classmethod
    def of(cls, grid: Grid, scale_dtype: torch.dtype) -> PackedGrid:
        """The only weight of `grid`, its scales as `scale_dtype`, on the CPU."""
        codes, scheme = grid.codes[0].to("cpu", torch.int8), grid.scheme
        words = pack_ternary(codes, grid.group) if scheme.num_bits == TERNARY else pack(codes, scheme.num_bits)
        zeros = None if scheme.symmetric else grid.zeros[0].to("cpu", torch.int8)
        rows, columns = codes.shape
        return cls(scheme, (rows, columns), words, grid.scales[0].to("cpu", scale_dtype), zeros)

    def codes(self, device: torch.device | None = None) -> torch.Tensor:
        """int8 [rows, columns]."""
        words = self.words.to(device) if device is not None else self.words
        if self.scheme.num_bits == TERNARY:
            return unpack_ternary(words, self.shape, self.shape[1] // self.scales.shape[1])
        return unpack(words, self.scheme.num_bits, self.shape)

    def grid(self, device: torch.device | None = None) -> Grid:
        """Codes, scales and zero points in float32, as a batch of one."""
        codes = self.codes(device)
        scales = self.scales.to(codes.device, torch.float32)[None]
        zeros = torch.zeros_like(scales) if self.zeros is None else self.zeros.to(codes.device, torch.float32)[None]
        return Grid(self.scheme, codes[None].float(), scales, zeros)

    def values(self, device: torch.device | None = None) -> torch.Tensor:
        """The weight [rows, columns], float32."""
        return self.grid(device).values()[0]
