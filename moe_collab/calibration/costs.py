"""Measures what rounding each matrix costs, and what losing each expert costs: the numbers that allocation weighs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..allocation.costs import CostTable
from ..formats import Scheme
from ..moe_model import MoEModel
from ..rounding import Rounder
from .linears import capture_linears
from .live import float32_weights
from .samples import capture_layers
from .study import HALVES, LayerStudy

__all__ = ["dropping_costs", "rounding_costs"]

Batches = Sequence[Mapping[str, torch.Tensor]]
Options = Callable[[str], Sequence[Scheme]]
"""Matrix name -> the schemes whose costs are wanted."""

_PROJECTIONS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


def rounding_costs(
    model: Any, moe: MoEModel, others: Mapping[str, nn.Linear], batches: Batches, options: Options, rounder: Rounder
) -> CostTable:
    """Costs of rounding the experts' matrices and the Linears `others` by `rounder`, at each scheme of `options`.

    Gate and up are one fused matrix, so each of them gets half of its cost.
    """
    table = CostTable()
    with float32_weights(model):
        for layer, samples in capture_layers(model, moe.layers, batches):
            study = LayerStudy(layer, samples)
            table.routed_tokens[layer.name] = study.counts.tolist()
            table.tokens = samples.num_tokens
            _add_layer(table, study, options, rounder)
        for name, seen in capture_linears(model, others, batches).items():
            schemes = options(name)
            table.add(name, schemes, seen.costs(rounder, schemes))
    return table


def _add_layer(table: CostTable, study: LayerStudy, options: Options, rounder: Rounder) -> None:
    """Add the costs of one layer's experts; one scheme at a time, because a layer's experts take much memory."""
    moments, container = study.moments(), study.layer.experts_name
    for half in HALVES:
        projections = _PROJECTIONS[half]
        offered = {index: options(f"{container}.{index}.{projections[0]}") for index in study.experts}
        for scheme in dict.fromkeys(scheme for schemes in offered.values() for scheme in schemes):
            members = [index for index, schemes in offered.items() if scheme in schemes]
            grid = rounder(study.weights(half)[members], moments[half][members], scheme)
            for index, cost in zip(members, study.rounding_costs(half, members, grid).tolist(), strict=True):
                for projection in projections:
                    table.add(f"{container}.{index}.{projection}", [scheme], [cost / len(projections)])


def dropping_costs(
    model: Any, moe: MoEModel, batches: Batches, dropped: Mapping[str, Collection[int]]
) -> dict[str, list[float]]:
    """Layer name -> cost of losing each expert while those of `dropped` are gone; for these, what bringing them back
    one at a time would save."""
    with float32_weights(model):
        return {
            layer.name: LayerStudy(layer, samples).drop_costs(sorted(dropped.get(layer.name, ()))).tolist()
            for layer, samples in capture_layers(model, moe.layers, batches)
        }
