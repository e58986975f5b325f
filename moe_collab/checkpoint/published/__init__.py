"""Quantized checkpoints as they are published, by this and other tools: a file for each way to store a weight.

Each reads headers only, and gives weights that are dequantized one at a time, when somebody reads them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...errors import MoeCollabError
from ..reader import Checkpoint
from .auto_awq import awq_weights
from .auto_gptq import gptq_weights
from .compressed import compressed_weights
from .fp8 import fp8_weights
from .mxfp4 import mxfp4_weights
from .weight import Weight

__all__ = ["Weight", "quantized_weights"]

_METHODS: dict[str, Callable[[Checkpoint, torch.dtype | None], dict[str, Weight]]] = {
    "compressed-tensors": compressed_weights,
    "fp8": fp8_weights,
    "mxfp4": mxfp4_weights,
    "gptq": gptq_weights,
    "awq": awq_weights,
}


def quantized_weights(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, Weight]:
    """The weights that are stored quantized, by the name that they have unquantized.

    They come in `dtype`, or else in that of config.json; those of compressed-tensors in the type of their scales,
    unless these are exponents. Raises `MoeCollabError` for a quantization that we cannot read.
    """
    method = checkpoint.quant_method
    if method is None:
        return {}
    if method not in _METHODS:
        raise MoeCollabError(
            f"{checkpoint.path}: quantized by {method}, which cannot be read here; unquantized checkpoints and those "
            f"of {', '.join(_METHODS)} can."
        )
    return _METHODS[method](checkpoint, dtype)
