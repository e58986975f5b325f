"""GPU kernels in Triton, for CUDA and ROCm. Layout: `layout.py`; kernels: `kernels.py`; launches: `ops.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from ...errors import MoeCollabError
from ..descriptors import TensorSpec
from . import configs
from .layout import FieldLayout

__all__ = ["FieldLayout", "batches", "check", "fused_experts", "linear"]


_UNITS = (128, 64, 32, 16)


def check() -> str:
    """What the kernels run on. Raises `MoeCollabError` where they do not."""
    try:
        from .ops import INTERPRETED
    except ImportError as error:
        raise MoeCollabError(f"Triton cannot be imported ({error}); install it with: pip install triton") from error
    if INTERPRETED:
        return "interpreted"
    if not torch.cuda.is_available():
        raise MoeCollabError("the Triton kernels need a CUDA or ROCm device, and torch finds none.")
    return torch.cuda.get_device_name()


def _constants(specs: Sequence[TensorSpec]) -> dict[str, int]:
    """`kinds`, `zeros` and `unit` of `product.product` for these weights."""
    packed = [spec for spec in specs if spec.is_packed]
    groups = {spec.group_size for spec in packed if spec.group_size != spec.columns}
    return {
        "kinds": configs.kinds_of(map(FieldLayout().stored_bits, specs)),
        "zeros": not all(spec.symmetric for spec in packed),
        "unit": next(unit for unit in _UNITS if all(group % unit == 0 for group in groups)),
    }


def batches(specs: Sequence[TensorSpec], top_k: int | None) -> list[int]:
    """Numbers of tokens: calls with so many together run every kernel that any call can need.

    `top_k` is that of experts; None: the weights are a linear layer's.
    """
    from .ops import SORT_ABOVE, device_names

    kernels = ("gate_up", "down") if top_k else ("linear",)
    found = configs.batches(device_names(), _constants(specs)["kinds"], kernels)
    return sorted(found | {SORT_ABOVE // top_k + 1} if top_k else found)


def fused_experts(specs: Sequence[TensorSpec]) -> Callable[..., torch.Tensor]:
    """`reference.fused_experts` for arenas in `FieldLayout` of `specs`: gate, up and down of each expert."""
    from .ops import fused_experts

    return partial(fused_experts, **_constants(specs), width=specs[0].rows)


def linear(specs: Sequence[TensorSpec]) -> Callable[..., torch.Tensor]:
    """`reference.linear` for arenas in `FieldLayout` of `specs`, its pieces."""
    from .ops import linear

    return partial(linear, **_constants(specs))
