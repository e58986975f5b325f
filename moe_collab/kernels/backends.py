"""Which implementation serves: the C++ kernels on x86, the torch reference anywhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from loguru import logger

from ..errors import MoeCollabError
from ..formats import TERNARY
from . import cpu, reference
from .arena import Arena, Layout
from .cpu.tuning import tune
from .cpu.widening import widen_ternary
from .plain import PLAIN

__all__ = ["Backend", "activation_bits", "backend"]


@dataclass(frozen=True)
class Backend:
    """A layout and the ops that read it, with the schemas of `reference`."""

    name: str
    layout: Layout
    fused_experts: Callable[..., torch.Tensor]
    linear: Callable[..., torch.Tensor]
    tune: Callable[[Arena], object] = lambda arena: None
    """Measure, once, what the kernels' speed depends on."""
    widen_ternary: Callable[[Arena, int], bool] = lambda arena, keep_free: False
    """As `cpu.widening.widen_ternary`, where a faster storage of ternary weights exists."""
    is_fast: bool = True


@cache
def backend() -> Backend:
    """The one `MOE_COLLAB_BACKEND` names: "cpu", "reference", or by default the fastest that runs here.

    Falls back to the reference with one warning that says why and what to do. Raises `MoeCollabError` for a backend
    that is asked for by name and does not run.
    """
    wanted = os.environ.get("MOE_COLLAB_BACKEND", "auto")
    if wanted not in ("auto", "cpu", "reference"):
        raise MoeCollabError(f"MOE_COLLAB_BACKEND: {wanted!r} is none of auto, cpu, reference.")
    if wanted != "reference":
        try:
            cpu.load()
        except MoeCollabError as error:
            if wanted == "cpu":
                raise
            logger.warning(f"moe_collab: serving with the torch reference, many times slower, because {error}")
        else:
            ops = torch.ops.moe_collab
            name = f"cpu ({cpu.configure()})"
            layout = cpu.TileLayout(ternary_bits=TERNARY)
            return Backend(name, layout, ops.fused_experts_cpu, ops.linear_cpu, tune, widen_ternary)
    return Backend("torch reference", PLAIN, reference.fused_experts, reference.linear, is_fast=False)


@cache
def activation_bits() -> int:
    """`MOE_COLLAB_ACTIVATION_BITS`: 16 by default; 8 is faster where arithmetic bounds (prefill), with 1 to 2 % error.

    Raises `MoeCollabError` for anything else.
    """
    wanted = os.environ.get("MOE_COLLAB_ACTIVATION_BITS", "16")
    if wanted not in ("8", "16"):
        raise MoeCollabError(f"MOE_COLLAB_ACTIVATION_BITS: {wanted!r} is neither 8 nor 16.")
    return int(wanted)
