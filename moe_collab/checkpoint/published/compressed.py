"""`quant_method: compressed-tensors`: what llm-compressor writes, and we do."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

import torch

from ...errors import MoeCollabError
from ...formats import TERNARY_PACKED
from ..lazy import LazyTensor
from ..reader import SUFFIXES, Checkpoint
from .mxfp4 import mxfp4_values
from .weight import Weight, block_scaled, checked_scales, config_dtype, float8_values, present, refuse, stored

__all__ = ["compressed_weights"]

_MXFP4 = "mxfp4-pack-quantized"
_IN_PLACE = ("int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized")
"""Formats whose codes are stored as `weight`, in integers or floating-point numbers of 8 bits."""
_BESIDE = (*SUFFIXES, "input_scale", "input_zero_point", "output_scale", "output_zero_point")
_OF_CACHE = ("k_scale", "v_scale", "q_scale")
"""What an attention module stores for a quantized KV cache, which nothing here quantizes."""


def compressed_weights(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, Weight]:
    """The weights by name, in `dtype`, or else the type of their scales, or that of config.json for exponents."""
    weights = {}
    for module in checkpoint.quantized_modules():
        group = checkpoint.scheme(module)
        layout = None if group is None else _layout(checkpoint, group)
        if layout == _MXFP4:
            tensor = _mxfp4(checkpoint, module, dtype)
        elif layout in (None, "pack-quantized", TERNARY_PACKED):
            tensor = _packed(checkpoint, module, dtype)
        else:
            raise MoeCollabError(
                f"{checkpoint.file_of(f'{module}.weight_packed')}: {module}: format {layout} is not one we can read. "
                f"We read pack-quantized, {TERNARY_PACKED}, {_MXFP4}, {', '.join(_IN_PLACE)}."
            )
        weights[f"{module}.weight"] = Weight(tensor, _parts(checkpoint, module))
    for name in (name for name in checkpoint.names() if name.endswith(".weight_scale")):
        module = name.removesuffix(".weight_scale")
        if f"{module}.weight" in checkpoint and f"{module}.weight" not in weights:
            weights[f"{module}.weight"] = Weight(_in_place(checkpoint, module, dtype), _parts(checkpoint, module))
    return weights


def _layout(checkpoint: Checkpoint, group: Mapping[str, Any]) -> str | None:
    return group.get("format") or checkpoint.config["quantization_config"].get("format")


def _parts(checkpoint: Checkpoint, module: str) -> tuple[str, ...]:
    owner = module.rpartition(".")[0]
    names = [f"{module}.weight", *(f"{module}.{own}" for own in _BESIDE), *(f"{owner}.{own}" for own in _OF_CACHE)]
    return present(checkpoint, names)


def _packed(checkpoint: Checkpoint, module: str, dtype: torch.dtype | None) -> LazyTensor:
    rows, columns = checkpoint.packed_shape(module)
    dtype = dtype or checkpoint.stored_like(f"{module}.weight_scale").dtype
    like = torch.empty(rows, columns, dtype=dtype, device="meta")
    read = lambda: checkpoint.quantized(module).dequantized(dtype).contiguous()  # noqa: E731
    return LazyTensor(like, read, stored_as=f"{module}.weight_packed")


def _mxfp4(checkpoint: Checkpoint, module: str, dtype: torch.dtype | None) -> LazyTensor:
    packed, name = f"{module}.weight_packed", f"{module}.weight_scale"
    (rows, width), scales = stored(checkpoint, packed, torch.uint8), stored(checkpoint, name, torch.uint8)
    if scales != (rows, width // 16) or width % 16:
        refuse(checkpoint, name, f"is {list(scales)}, not a byte for 32 of {rows} x {2 * width}")
    like = torch.empty(rows, 2 * width, dtype=dtype or config_dtype(checkpoint), device="meta")

    def read() -> torch.Tensor:
        return mxfp4_values(checkpoint.tensor(packed), checked_scales(checkpoint, name)).to(like.dtype)

    return LazyTensor(like, read, stored_as=packed)


def _in_place(checkpoint: Checkpoint, module: str, dtype: torch.dtype | None) -> LazyTensor:
    """A weight whose codes are stored as `weight`: by tensor, by channel, by group, or by block."""
    name, scale = f"{module}.weight", f"{module}.weight_scale"
    group = checkpoint.scheme(module)
    layout = None if group is None or group.get("weights") is None else _layout(checkpoint, group)
    if group is None or layout not in _IN_PLACE:
        refuse(checkpoint, name, f"has scales beside it and is in format {layout}, which cannot be read")
    rows, columns = stored(checkpoint, name, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
    scales = checkpoint.stored_like(scale)
    block = _block(group["weights"], rows, columns)
    expected = ceil(rows / block[0]), ceil(columns / block[1])
    flat = scales.ndim == 1 and 1 in expected and scales.numel() == max(expected)
    if tuple(scales.shape) != expected and not flat:
        refuse(checkpoint, scale, f"is {list(scales.shape)}, its scheme in config.json needs {list(expected)}")
    own = scales.dtype if scales.is_floating_point() and scales.dtype.itemsize > 1 else config_dtype(checkpoint)
    like = torch.empty(rows, columns, dtype=dtype or own, device="meta")
    if f"{module}.weight_g_idx" in checkpoint:
        refuse(checkpoint, name, "has columns in another order than its groups, which cannot be read in this format")
    zero = f"{module}.weight_zero_point"

    def read() -> torch.Tensor:
        values = float8_values(checkpoint.tensor(name))
        if values.sum().isnan():
            refuse(checkpoint, name, "holds NaN, so the model would answer with garbage. Quantize it again")
        if zero in checkpoint:
            zeros = checkpoint.tensor(zero).float().reshape(expected)
            values -= block_scaled(torch.ones_like(values), zeros, block)
        return block_scaled(values, checked_scales(checkpoint, scale).reshape(expected), block).to(like.dtype)

    return LazyTensor(like, read, stored_as=name)


def _block(weights: Mapping[str, Any], rows: int, columns: int) -> tuple[int, int]:
    """(rows, columns) that share a scale."""
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy == "block":
        return int(weights["block_structure"][0]), int(weights["block_structure"][1])
    if strategy == "tensor":
        return rows, columns
    return 1, int(size) if size and size > 0 else columns
