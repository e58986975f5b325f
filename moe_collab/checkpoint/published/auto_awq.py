"""`quant_method: awq`: integers of 4 bits in the order that AutoAWQ's GEMM kernels want."""

from __future__ import annotations

from functools import partial

import torch

from ...errors import MoeCollabError
from ...formats import dequantize
from ..lazy import LazyTensor
from ..reader import Checkpoint
from .weight import FLOATS, Weight, checked_scales, config_dtype, present, refuse, stored

__all__ = ["awq_weights"]

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""In which four bits of a word each of eight consecutive codes lies."""


def awq_weights(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, Weight]:
    """The weights by name, each (code - zero point) * scale.

    Stored are, for [rows, columns], `qweight` int32 [columns, rows / 8], `qzeros` int32 [groups, rows / 8], absent
    where 8 stands for zero, and `scales` [groups, rows].
    """
    config = checkpoint.config["quantization_config"]
    version, bits = str(config.get("version") or "gemm").lower(), config.get("bits", 4)
    if version != "gemm" or bits != 4:
        raise MoeCollabError(
            f"{checkpoint.path}: AWQ of version {version} with {bits} bits cannot be read; gemm with 4 bits can."
        )
    dtype, weights = dtype or config_dtype(checkpoint), {}
    for name in (name for name in checkpoint.names() if name.endswith(".qweight")):
        module = name.removesuffix(".qweight")
        (columns, words), scales = (
            stored(checkpoint, name, torch.int32),
            stored(checkpoint, f"{module}.scales", *FLOATS),
        )
        if scales[1] != 8 * words or columns % scales[0]:
            refuse(checkpoint, name, f"holds {columns} x {8 * words} codes, and its scales are {list(scales)}")
        if f"{module}.qzeros" in checkpoint:
            stored(checkpoint, f"{module}.qzeros", torch.int32)
        like = torch.empty(8 * words, columns, dtype=dtype, device="meta")
        read = partial(_read, checkpoint, module, like.dtype)
        parts = present(checkpoint, (f"{module}.{own}" for own in ("qweight", "qzeros", "scales")))
        weights[f"{module}.weight"] = Weight(LazyTensor(like, read, stored_as=name), parts)
    return weights


def _read(checkpoint: Checkpoint, module: str, dtype: torch.dtype) -> torch.Tensor:
    scales, codes = checked_scales(checkpoint, f"{module}.scales"), _codes(checkpoint.tensor(f"{module}.qweight"))
    zeros = torch.full(scales.shape, 8, dtype=torch.int8)
    if f"{module}.qzeros" in checkpoint:
        zeros = _codes(checkpoint.tensor(f"{module}.qzeros"))
    if zeros.shape != scales.shape:
        refuse(checkpoint, f"{module}.qzeros", f"holds zero points {list(zeros.shape)} for scales {list(scales.shape)}")
    return dequantize(codes.T, scales.T, zeros.T, dtype=dtype).contiguous()


def _codes(words: torch.Tensor) -> torch.Tensor:
    """int32 [n, rows / 8] -> codes of 0 to 15, int8 [n, rows]."""
    shifts = torch.tensor(_PLACES, dtype=torch.int32) * 4
    return (words[..., None] >> shifts & 15).to(torch.int8).flatten(1)
