"""`quant_method: gptq`: integers of 2, 3, 4 or 8 bits, as AutoGPTQ and GPTQModel write them."""

from __future__ import annotations

from functools import partial

import torch

from ...errors import MoeCollabError
from ...formats import dequantize, unpack
from ..lazy import LazyTensor
from ..reader import Checkpoint
from .weight import FLOATS, Weight, checked_scales, config_dtype, present, refuse, stored

__all__ = ["gptq_weights"]

_FORMATS = ("gptq", "gptq_v2")


def gptq_weights(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, Weight]:
    """The weights by name, each (code - zero point) * scale.

    Stored are, for [rows, columns], `qweight` int32 [columns * bits / 32, rows], `qzeros` int32 [groups, rows * bits /
    32], `scales` [groups, rows] and `g_idx` int32 [columns], the group of each column. Codes and zero points lie back
    to back in the words. Format `gptq` stores zero points less one, modulo 2^bits; `gptq_v2` as they are.
    """
    config = checkpoint.config["quantization_config"]
    layout, bits = config.get("checkpoint_format") or "gptq", config.get("bits")
    if layout not in _FORMATS or type(bits) is not int or bits not in (2, 3, 4, 8):
        raise MoeCollabError(
            f"{checkpoint.path}: GPTQ in format {layout} with {bits} bits cannot be read; {' and '.join(_FORMATS)} "
            "with 2, 3, 4 or 8 bits can."
        )
    dtype, weights = dtype or config_dtype(checkpoint), {}
    for name in (name for name in checkpoint.names() if name.endswith(".qweight")):
        module = name.removesuffix(".qweight")
        words, _ = stored(checkpoint, name, torch.int32)
        shape = stored(checkpoint, f"{module}.scales", *FLOATS)[1], words * 32 // bits
        stored(checkpoint, f"{module}.qzeros", torch.int32)
        if f"{module}.g_idx" in checkpoint:
            stored(checkpoint, f"{module}.g_idx", torch.int32, torch.int64, ndim=1)
        like = torch.empty(shape, dtype=dtype, device="meta")
        read = partial(_read, checkpoint, module, bits, layout == "gptq", like)
        parts = present(checkpoint, (f"{module}.{own}" for own in ("qweight", "qzeros", "scales", "g_idx")))
        weights[f"{module}.weight"] = Weight(LazyTensor(like, read, stored_as=name), parts)
    return weights


def _read(checkpoint: Checkpoint, module: str, bits: int, less_one: bool, like: torch.Tensor) -> torch.Tensor:
    (rows, columns), scales = like.shape, checked_scales(checkpoint, f"{module}.scales")
    try:
        # Both come as signed numbers, less half of the levels, which the difference takes out again.
        codes = unpack(checkpoint.tensor(f"{module}.qweight"), bits, (columns, rows), packed_dim=0)
        zeros = unpack(checkpoint.tensor(f"{module}.qzeros"), bits, (len(scales), rows))
    except MoeCollabError as error:
        refuse(checkpoint, f"{module}.qweight", f"does not fit its scales: {error}")
    half = 1 << bits - 1
    zeros = (zeros.int() + half + less_one) % (2 * half) - half
    groups = None
    if f"{module}.g_idx" in checkpoint:
        groups = checkpoint.tensor(f"{module}.g_idx")
        if len(groups) != columns or not 0 <= int(groups.min()) <= int(groups.max()) < len(scales):
            refuse(checkpoint, f"{module}.g_idx", f"does not name one of {len(scales)} groups for each column")
    elif columns % len(scales):
        refuse(checkpoint, f"{module}.scales", f"has {len(scales)} groups, which {columns} columns cannot be cut into")
    return dequantize(codes.T, scales.T, zeros.T, groups, like.dtype).contiguous()
