"""Costs by the paper's lights: squared error at the experts' output, weighted by the router, not by KL."""

from __future__ import annotations

import torch

from moe_collab.allocation import CostTable
from moe_collab.calibration.study import HALVES, ExpertGroup, LayerStudy
from moe_collab.rounding import Rounder

from .trained import TrainedModel

__all__ = ["output_error_table"]

_TOKENS = 2048
"""Most tokens of an expert that a cost is computed from."""


def output_error_table(model: TrainedModel) -> CostTable:
    """Of every option for every expert's matrix of `model`; kept in its folder."""
    file = model.folder / "errors.json"
    if file.exists():
        return CostTable.model_validate_json(file.read_text())
    rounder, table = Rounder(scale_dtype=model.live.dtype), CostTable()
    options = model.planner(budget="1TB").request.schemes()
    samples, _ = model.calibration.samples()
    for layer in model.moe.layers:
        for group in LayerStudy(layer, samples[layer.name]).groups(layer.live_experts):
            for half in HALVES:
                projections = ("gate_proj", "up_proj") if half == "gate_up" else ("down_proj",)
                weights = group.weights(half)
                columns = weights.shape[-1]
                schemes = [s for s in options if columns % s.group_of(columns) == 0]
                grids = [rounder(weights, group.moments[half], scheme).values() for scheme in schemes]
                for position, index in enumerate(group.members):
                    costs = [_output_error(group, index, half, grid[position]) / len(projections) for grid in grids]
                    for projection in projections:
                        table.add(f"{layer.experts_name}.{index}.{projection}", schemes, costs)
    table.save(file)
    return table


def _output_error(group: ExpertGroup, index: int, half: str, weight: torch.Tensor) -> float:
    """Mean over all tokens of g_t^2 ||f(x_t) - f_b(x_t)||^2 with one half of an expert rounded."""
    samples = group.study.samples
    rows, weights = samples.routed(index, _TOKENS)
    if not len(rows):
        return 0.0
    own, hidden = group.experts[index], samples.hidden[rows].float()
    if half == "gate_up":
        change = (own.inner(hidden, weight) - own.inner(hidden)) @ own.down.T
    else:
        change = own.inner(hidden) @ (weight - own.down).T
    mean = (change.square().sum(-1) * weights.square()).double().mean()
    return float(mean) * float(samples.counts[index]) / samples.num_tokens
