"""What the readers of all kinds of quantized checkpoints share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

import torch

from ...errors import MoeCollabError
from ..lazy import LazyTensor
from ..reader import Checkpoint

__all__ = [
    "E2M1",
    "FLOATS",
    "Weight",
    "block_scaled",
    "checked_scales",
    "config_dtype",
    "float8_values",
    "from_exponents",
    "present",
    "refuse",
    "stored",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of the 16 codes of four-bit floating-point numbers (OCP Microscaling Formats 1.0, 5.3.3)."""
_E4M3_NAN = 0x7F
"""The number that stands for NaN, but for its sign."""
_BIAS = 127
"""Of the exponents that E8M0 scales are (OCP Microscaling Formats 1.0, 5.4.1); 255 stands for NaN."""


@dataclass(frozen=True)
class Weight:
    """A weight that a checkpoint stores quantized."""

    tensor: LazyTensor
    """The weight dequantized."""
    parts: tuple[str, ...]
    """The tensors of the checkpoint that belong to it."""


def config_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type that config.json says the unquantized weights had; bfloat16 if it does not."""
    nested, named = checkpoint.config.get("text_config"), None
    for config in (nested if isinstance(nested, dict) else {}, checkpoint.config):
        named = named or config.get("dtype") or config.get("torch_dtype")
    name = str(named or "bfloat16").removeprefix("torch.")
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else torch.bfloat16


def present(checkpoint: Checkpoint, names: Iterable[str]) -> tuple[str, ...]:
    """Those of `names` that the checkpoint has."""
    return tuple(name for name in names if name in checkpoint)


def stored(checkpoint: Checkpoint, name: str, *dtypes: torch.dtype, ndim: int = 2) -> torch.Size:
    """The shape of a tensor.

    Raises `MoeCollabError` unless it is of one of these types and has `ndim` dimensions, none of them 0.
    """
    like = checkpoint.stored_like(name)
    if like.dtype not in dtypes or like.ndim != ndim or not like.numel():
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        refuse(checkpoint, name, f"is {like.dtype} {list(like.shape)}, not {kinds} with {ndim} dimensions")
    return like.shape


def checked_scales(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """The scales in tensor `name`, float32. Raises `MoeCollabError` if one is not finite."""
    scales = checkpoint.tensor(name)
    values = from_exponents(scales) if scales.dtype == torch.uint8 else scales.float()
    if not torch.isfinite(values).all():
        refuse(checkpoint, name, "holds NaN or infinity, so the weight would be garbage. Copy or make it again")
    return values


def from_exponents(exponents: torch.Tensor) -> torch.Tensor:
    """E8M0 scales stored as bytes -> float32."""
    values = torch.ldexp(torch.ones((), device=exponents.device), exponents.int() - _BIAS)
    return values.masked_fill(exponents == 2 * _BIAS + 1, torch.nan)


def float8_values(codes: torch.Tensor) -> torch.Tensor:
    """Numbers of 8 bits -> float32; of e4m3, which torch converts one by one, in a fifth of the time."""
    if codes.dtype != torch.float8_e4m3fn:
        return codes.float()
    bits = codes.view(torch.int8).short()  # with the sign in all high bits
    sign = bits & -(1 << 15)
    bits &= _E4M3_NAN
    has_nan = bits.max() == _E4M3_NAN
    bits <<= 7  # the same exponent and fraction in a float16, whose bias of the exponent is larger by 8
    bits |= sign
    values = bits.view(torch.float16).float().mul_(2.0**8)
    return values.masked_fill_(codes.view(torch.int8) & _E4M3_NAN == _E4M3_NAN, torch.nan) if has_nan else values


def block_scaled(values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """`values` [..., rows, columns], which are changed in place, times the scale of each block of (rows, columns).

    `scales` [..., blocks of rows, blocks of columns]; the last block of either may be cut short.
    """
    by_column = scales.repeat_interleave(block[1], -1)[..., : values.shape[-1]]
    if block[0] == 1:
        return values.mul_(by_column)
    for index, rows in enumerate(values.split(block[0], -2)):
        rows *= by_column[..., index : index + 1, :]
    return values


def refuse(checkpoint: Checkpoint, name: str, problem: str) -> NoReturn:
    """Raise `MoeCollabError` with the file that holds tensor `name`, and what is wrong with it."""
    raise MoeCollabError(f"{checkpoint.file_of(name)}: {name} {problem}.")
