"""Measures what rounding each matrix costs: the numbers that allocation weighs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from ..allocation.costs import CostTable
from ..formats import Scheme
from ..rounding import Rounder
from .progress import stage
from .run import Calibration
from .study import HALVES, LayerStudy

__all__ = ["rounding_costs"]

Options = Callable[[str], Sequence[Scheme]]
"""Matrix name -> the schemes whose costs are wanted."""

_PROJECTIONS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


def rounding_costs(
    calibration: Calibration, others: Mapping[str, nn.Linear], options: Options, rounder: Rounder
) -> CostTable:
    """Costs of rounding the experts' matrices and the Linears `others` by `rounder`, at each scheme of `options`.

    Gate and up are one fused matrix, so each of them gets half of its cost.
    """
    table = CostTable()
    layers, linears = calibration.samples(others)
    for layer in stage("costs", calibration.moe.layers):
        study = LayerStudy(layer, layers[layer.name])
        table.routed_tokens[layer.name] = study.samples.counts.tolist()
        table.tokens = study.samples.num_tokens
        _add_layer(table, study, options, rounder)
    for name in (name for name in others if name in linears):
        schemes = options(name)
        table.add(name, schemes, linears[name].costs(rounder, schemes))
    return table


def _add_layer(table: CostTable, study: LayerStudy, options: Options, rounder: Rounder) -> None:
    """Add the costs of one layer's experts, one group and scheme at a time."""
    container = study.layer.experts_name
    for group in study.groups(study.layer.live_experts):
        for half in HALVES:
            projections = _PROJECTIONS[half]
            offered = {index: options(f"{container}.{index}.{projections[0]}") for index in group.members}
            for scheme in dict.fromkeys(scheme for schemes in offered.values() for scheme in schemes):
                members = [index for index, schemes in offered.items() if scheme in schemes]
                grid = rounder(group.weights(half, members), group.moments_of(half, members), scheme)
                for index, cost in zip(members, group.rounding_costs(half, members, grid), strict=True):
                    for projection in projections:
                        table.add(f"{container}.{index}.{projection}", [scheme], [cost / len(projections)])
