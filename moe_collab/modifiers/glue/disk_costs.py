"""Costs for a model on disk, where no backward pass is possible: estimated from errors at the experts' outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from llmcompressor.modifiers import Modifier
from loguru import logger
from torch import nn

from ...allocation import CostTable, Planner
from ...calibration.measurements import packed_options
from ...distributed import is_distributed
from ...errors import MoeCollabError
from ...formats import Scheme
from ...moe_model import MoEModel
from .propagation import propagation
from .routing_tap import RoutingTap
from .schemes import rounded, weight_arguments
from .sensitivity import Sensitivity

__all__ = ["DiskCosts"]


class DiskCosts:
    """Watches which tokens reach every expert in `modifier`'s calibration pass, and computes costs layer by layer.

    Raises `MoeCollabError` if several processes share the calibration set.
    """

    def __init__(self, modifier: Modifier, model: Any, moe: MoEModel, planner: Planner) -> None:
        if is_distributed():
            raise MoeCollabError(
                "MixedBitAllocModifier: a model that is offloaded to disk is allocated in a single process, and "
                "torchrun started several. Load it without offloading, or write a `plan` in one process first."
            )
        logger.warning(
            "MixedBitAllocModifier: the model is offloaded to disk; costs come from errors at the experts' outputs, "
            "and the decision is not compared with uniform schemes."
        )
        self._model, self._moe, self._planner = model, moe, planner
        self._sensitivity = Sensitivity(_to_nearest, packed_options(planner))
        for layer in moe.layers:
            tap = RoutingTap(modifier, layer)
            self._sensitivity.watch(layer)
            modifier.register_hook(layer.experts, partial(self._sensitivity.see, layer, tap), "forward")

    def close(self, modules: Iterable[nn.Module]) -> None:
        """Turn the statistics of the layers whose router is among `modules` into costs, and free their memory."""
        done = {id(module) for module in modules}
        for layer in self._moe.layers:
            if id(layer.router) in done:
                self._sensitivity.close(layer)

    def table(self, data: Iterable[Mapping[str, Any]]) -> CostTable:
        """All costs, in nats of KL per token; the first batches of `data` show what errors do to the predictions."""
        found = propagation(self._model, self._moe, data)
        table = self._sensitivity.finished(found.per_squared_error)
        for name in self._planner.others():
            schemes = packed_options(self._planner)(name)
            weight = self._model.get_submodule(name).weight.detach()
            # An estimate: that it costs as much as the same relative error at the experts' outputs.
            errors = [found.per_relative_error * _relative_error(weight, scheme) for scheme in schemes]
            table.add(name, schemes, errors)
        return table


def _to_nearest(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    return rounded(weight, weight_arguments(*scheme))


def _relative_error(weight: torch.Tensor, scheme: Scheme) -> float:
    """||W - rounded W||^2 / ||W||^2."""
    error = (weight - _to_nearest(weight, scheme)).float().square().sum()
    return float(error / weight.float().square().sum().clamp_min(1e-30))
