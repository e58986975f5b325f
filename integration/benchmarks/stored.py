"""How the tensors of a model made on the spot are stored: as they are, or quantized as such models are published."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["QUANTIZATIONS", "stored_bytes", "stored_like_published"]

QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4"},
}
"""What config.json says of each."""
_BLOCK = 128
_LARGEST = 448.0
"""Of float8_e4m3fn."""
_MIDDLES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
"""Between the magnitudes of four-bit floating-point numbers, from where on the next is nearer."""


def stored_like_published(name: str, tensor: torch.Tensor, how: str | None) -> dict[str, torch.Tensor]:
    """What is stored for a tensor, by name: matrices of attention and experts as fp8, or stacks of experts as mxfp4."""
    if how == "fp8" and _is_fp8(name, tensor):
        return _fp8(name, tensor)
    return _mxfp4(name, tensor) if how == "mxfp4" and tensor.ndim == 3 else {name: tensor}


def stored_bytes(name: str, like: torch.Tensor, how: str | None) -> int:
    """How many bytes that takes, about."""
    if how == "fp8" and _is_fp8(name, like):
        return like.numel() + 4 * like.numel() // _BLOCK**2
    return like.numel() * 17 // 32 if how == "mxfp4" and like.ndim == 3 else like.nbytes


def _is_fp8(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and "_proj" in name


def _fp8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Blocks of 128 x 128, the last of which may be cut short."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % _BLOCK, 0, -rows % _BLOCK))
    blocks = padded.unflatten(0, (-1, _BLOCK)).unflatten(2, (-1, _BLOCK))
    scales = blocks.abs().amax((1, 3)).float().clamp(min=1e-12) / _LARGEST
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn).flatten(2).flatten(0, 1)
    return {name: codes[:rows, :columns].contiguous(), f"{name}_scale_inv": scales}


def _mxfp4(name: str, stack: torch.Tensor) -> dict[str, torch.Tensor]:
    """[experts, columns, rows] -> blocks of 32 columns, two codes a byte, and their exponents."""
    experts, columns, rows = stack.shape
    blocks = torch.empty(experts, rows, columns // 32, 16, dtype=torch.uint8)
    exponents = torch.empty(experts, rows, columns // 32, dtype=torch.uint8)
    for expert in range(experts):
        groups = stack[expert].T.float().unflatten(1, (-1, 32))
        powers = groups.abs().amax(-1).clamp(min=2.0**-100).log2().floor() - 2
        codes = torch.bucketize(groups.abs() / powers.exp2()[..., None], _MIDDLES) + 8 * (groups < 0)
        blocks[expert] = codes[..., 0::2] | codes[..., 1::2] << 4
        exponents[expert] = powers + 127
    return {f"{name}_blocks": blocks, f"{name}_scales": exponents}
