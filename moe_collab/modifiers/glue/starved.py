"""Keeps the weights of experts that hardly any calibration token reaches, because stock quantizers set them to zero.

GPTQ multiplies by what it has seen of a module's inputs, which for such an expert is nothing. Rounded to nearest from
the weights kept here, the expert is as good as its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from loguru import logger
from torch import nn

from ...coverage import FEW_TOKENS
from ...moe_model import MoEModel
from .packed_weights import is_packed
from .recipe import starves_experts
from .schemes import is_rounded, is_sound, round_in_place, snap_to_grid

__all__ = ["counted_tokens", "keep_starved", "repair_starved", "rescaled"]

_ORIGINALS: WeakKeyDictionary[nn.Module, torch.Tensor] = WeakKeyDictionary()
"""Linear -> a copy of its weight from before any quantizer rounded it."""


def keep_starved(moe: MoEModel, routed_tokens: Mapping[str, Sequence[int]]) -> None:
    """Copy the weights of experts with fewer than `FEW_TOKENS` of `routed_tokens` (by layer, for each expert).

    Nothing is copied where every expert is shown every token (oneshot's `moe_calibrate_all_experts`).
    """
    for layer in moe.layers if starves_experts() else ():
        few = {index for index, tokens in enumerate(routed_tokens.get(layer.name, ())) if tokens < FEW_TOKENS}
        for _, index, _, module in layer.projections():
            if index in few:
                _ORIGINALS[module] = module.weight.detach().clone()


def rescaled(module: nn.Module, factor: torch.Tensor | float) -> None:
    """To be called when the weight of `module` has been multiplied by `factor`: does the same to a kept copy of it."""
    if module in _ORIGINALS:
        _ORIGINALS[module] = _ORIGINALS[module] * factor


def repair_starved(model: nn.Module, snap: bool) -> None:
    """Round to nearest, from the weights that were kept, what a quantizer left all zero or not finite.

    With `snap`, weights that a quantizer has left to compression to round are first put on the grid of their scales.
    What cannot be repaired is named in the log, and saving will refuse it.
    """
    repaired, lost = [], []
    for name, module in model.named_modules():
        if not is_rounded(module) or is_packed(module):
            continue
        assert isinstance(module, nn.Linear)
        if snap and not is_sound(module):
            snap_to_grid(module)
        if is_sound(module):
            continue
        if module in _ORIGINALS:
            round_in_place(module, _ORIGINALS[module])
            repaired.append(name)
        else:
            lost.append(name)
    for module in model.modules():
        _ORIGINALS.pop(module, None)
    if repaired:
        logger.warning(
            "{} expert tensors saw no calibration token and were rounded to nearest: {} ...", len(repaired), repaired[0]
        )
    if lost:
        logger.error(
            "{} tensors are all zero, not finite or unrounded after quantization, and their originals are gone: {} ... "
            "Calibrate with more tokens, or with oneshot(moe_calibrate_all_experts=True).",
            len(lost),
            lost[0],
        )


@contextmanager
def counted_tokens(moe: MoEModel, calls: int) -> Iterator[dict[str, list[int]]]:
    """Count, by layer, the tokens routed to each expert in the first `calls` calls of every MoE layer."""
    seen: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in moe.layers}
    counts: dict[str, list[int]] = {}

    def see(name: str, _module: Any, args: tuple, kwargs: dict) -> None:
        indices = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
        if len(seen[name]) < calls:
            seen[name].append(torch.bincount(indices.flatten(), minlength=moe.num_experts).cpu())

    with ExitStack() as stack:
        for layer in moe.layers:
            handle = layer.experts.register_forward_pre_hook(partial(see, layer.name), with_kwargs=True)
            stack.callback(handle.remove)
        yield counts
    nothing = torch.zeros(moe.num_experts, dtype=torch.long)
    counts.update({name: sum(parts, nothing).tolist() for name, parts in seen.items()})
