"""Which implementation of the kernels is used: Triton on GPUs, C++ on x86, or the torch reference anywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from loguru import logger

from ..errors import MoeCollabError
from ..formats import TERNARY
from . import cpu, reference, triton
from .arena import Arena, Layout
from .cpu.tuning import tune
from .cpu.widening import widen_ternary
from .descriptors import TensorSpec
from .plain import PLAIN

__all__ = ["Backend", "activation_bits", "backend"]


Op = Callable[..., torch.Tensor]
_NAMES = ("auto", "triton", "cpu", "reference")


@dataclass(frozen=True)
class Backend:
    """An implementation of the kernels: its layout of weights in memory, and its ops.

    `fused_experts` and `linear` return, for the specs that a layer's arena holds, an op with the same arguments as the
    one of that name in `reference`.
    """

    name: str
    layout: Layout
    fused_experts: Callable[[Sequence[TensorSpec]], Op]
    linear: Callable[[Sequence[TensorSpec]], Op]
    tune: Callable[[Arena], object] = lambda arena: None
    """Measures, once, the settings with which the kernels are fastest; does nothing for backends without any."""
    widen_ternary: Callable[[Arena, int], bool] = lambda arena, keep_free: False
    """As `cpu.widening.widen_ternary`, where a faster storage of ternary weights exists."""
    batches: Callable[[Sequence[TensorSpec], int | None], Sequence[int]] = lambda specs, top_k: ()
    """Numbers of tokens to call an op with once, so that no later call waits for a compiler; top_k None: linear."""
    is_fast: bool = True


@cache
def backend() -> Backend:
    """The backend that the variable `MOE_COLLAB_BACKEND` names: "triton", "cpu", "reference", or "auto".

    "auto", the default, is Triton if there is a GPU and otherwise the C++ kernels; if that does not run here, it falls
    back to the reference with one warning that says why and what to do. Raises `MoeCollabError` for a backend that is
    asked for by name and does not run.
    """
    wanted = os.environ.get("MOE_COLLAB_BACKEND", "auto")
    if wanted not in _NAMES:
        raise MoeCollabError(f"MOE_COLLAB_BACKEND: {wanted!r} is none of {', '.join(_NAMES)}.")
    if wanted == "auto":
        wanted = "triton" if torch.cuda.is_available() else "cpu"
        try:
            return _make(wanted)
        except MoeCollabError as error:
            logger.warning(f"moe_collab: serving with the torch reference, many times slower, because {error}")
            wanted = "reference"
    return _make(wanted)


def _make(name: str) -> Backend:
    """The backend called `name`. Raises `MoeCollabError` if it does not run here."""
    if name == "triton":
        return Backend(
            f"triton ({triton.check()})",
            triton.FieldLayout(),
            triton.fused_experts,
            triton.linear,
            batches=triton.batches,
        )
    if name == "cpu":
        layout = cpu.TileLayout(ternary_bits=TERNARY)
        ops = torch.ops.moe_collab
        experts, linear = _always(ops.fused_experts_cpu), _always(ops.linear_cpu)
        return Backend(f"cpu ({cpu.configure()})", layout, experts, linear, tune, widen_ternary)
    experts, linear = _always(reference.fused_experts), _always(reference.linear)
    return Backend("torch reference", PLAIN, experts, linear, is_fast=False)


def _always(op: Op) -> Callable[[Sequence[TensorSpec]], Op]:
    return lambda specs: op


@cache
def activation_bits() -> int:
    """`MOE_COLLAB_ACTIVATION_BITS`: 16 by default; 8 is faster where arithmetic is the limit (prefill), 1 to 2 % error.

    Raises `MoeCollabError` for anything else.
    """
    wanted = os.environ.get("MOE_COLLAB_ACTIVATION_BITS", "16")
    if wanted not in ("8", "16"):
        raise MoeCollabError(f"MOE_COLLAB_ACTIVATION_BITS: {wanted!r} is neither 8 nor 16.")
    return int(wanted)
