"""From integer codes back to weights."""

from __future__ import annotations

import torch

__all__ = ["dequantize"]


def dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    g_idx: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """(codes - zero_point) * scale, [rows, columns], computed in float32 and rounded once to `dtype`.

    `codes` [rows, columns]; `scale` and `zero_point` [rows, groups]; `g_idx` [columns] names each column's group,
    without it groups are runs of columns / groups. `dtype` None is the scale's.
    """
    columns = codes.shape[1]
    if g_idx is None:
        g_idx = torch.arange(columns, device=codes.device) // (columns // scale.shape[1])
    group = g_idx.long()
    values = codes.float()
    if zero_point is not None:
        values = values - zero_point.float()[:, group]
    return (values * scale.float()[:, group]).to(dtype or scale.dtype)
