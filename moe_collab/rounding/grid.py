"""Codes, scales and zero points of a batch of weights under one scheme."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats import Scheme

__all__ = ["Grid"]


@dataclass
class Grid:
    """weight = (codes - zeros) * scales: codes [batch, rows, columns]; scales and zeros [batch, rows, groups]."""

    scheme: Scheme
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[2] // self.scales.shape[2]

    def wide(self, per_group: torch.Tensor) -> torch.Tensor:
        """Values per group [batch, rows, groups], repeated for every column."""
        return per_group.repeat_interleave(self.group, dim=2)

    def values(self) -> torch.Tensor:
        """The weights [batch, rows, columns]."""
        return (self.codes - self.wide(self.zeros)) * self.wide(self.scales)

    def select(self, index: int) -> Grid:
        """The grid of one weight of the batch, as a batch of one."""
        part = slice(index, index + 1)
        return Grid(self.scheme, self.codes[part], self.scales[part], self.zeros[part])

    def reshaped(self, batch: int) -> Grid:
        """The same rows divided among `batch` weights instead."""
        codes, scales, zeros = (t.reshape(batch, -1, t.shape[2]) for t in (self.codes, self.scales, self.zeros))
        return Grid(self.scheme, codes, scales, zeros)


def nearest(weights: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, levels: tuple[int, int]) -> torch.Tensor:
    """The code nearest to each weight between the smallest and the largest of `levels`."""
    return ((weights / scales).round() + zeros).clamp(*levels)
