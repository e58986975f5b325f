"""Costs by the paper's lights: squared error at the experts' output, weighted by the router, not by KL."""

from __future__ import annotations

import torch

from moe_collab.allocation import CostTable
from moe_collab.calibration import capture_layers, float32_weights
from moe_collab.calibration.study import COST_TOKENS, HALVES, LayerStudy
from moe_collab.rounding import Rounder

from .trained import TrainedModel

__all__ = ["output_error_table"]


def output_error_table(model: TrainedModel) -> CostTable:
    """Of every option for every expert's matrix of `model`; kept in its folder."""
    file = model.folder / "errors.json"
    if file.exists():
        return CostTable.model_validate_json(file.read_text())
    rounder, table = Rounder(scale_dtype=model.live.dtype), CostTable()
    options = model.planner(budget="1TB").request.schemes()
    with float32_weights(model.live):
        for layer, samples in capture_layers(model.live, model.moe.layers, model.batches):
            study = LayerStudy(layer, samples)
            moments = study.moments()
            for half in HALVES:
                projections = ("gate_proj", "up_proj") if half == "gate_up" else ("down_proj",)
                columns = study.weights(half).shape[-1]
                schemes = [s for s in options if columns % s.group_of(columns) == 0]
                grids = [rounder(study.weights(half), moments[half], scheme).values() for scheme in schemes]
                for index in study.experts:
                    costs = [_output_error(study, index, half, grid[index]) / len(projections) for grid in grids]
                    for projection in projections:
                        table.add(f"{layer.experts_name}.{index}.{projection}", schemes, costs)
    table.save(file)
    return table


def _output_error(study: LayerStudy, index: int, half: str, weight: torch.Tensor) -> float:
    """Mean over all tokens of g_t^2 ||f(x_t) - f_b(x_t)||^2 with one half of an expert rounded."""
    tokens_, weights = study.samples.routed(index, COST_TOKENS)
    if not len(tokens_):
        return 0.0
    own, hidden = study.experts[index], study.samples.hidden[tokens_]
    if half == "gate_up":
        change = (own.inner(hidden, weight) - own.inner(hidden)) @ own.down.T
    else:
        change = own.inner(hidden) @ (weight - own.down).T
    mean = (change.square().sum(-1) * weights.square()).double().mean()
    return float(mean) * float(study.counts[index]) / study.samples.num_tokens
