"""Costs of rounding expert tensors by the rounding that will be used, in KL of the model's predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from llmcompressor.utils.helpers import eval_context

from ..architectures import MoEModel
from ..calibration import capture_layers, float32_weights
from ..calibration.study import HALVES, LayerStudy
from ..formats import Scheme
from ..rounding import Rounder

__all__ = ["Measured", "fisher_costs"]

_PROJECTIONS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


@dataclass(frozen=True)
class Measured:
    """What allocation has to know of a model: costs by module name and bits, tokens routed to each layer's experts."""

    costs: dict[str, dict[int, float]] = field(default_factory=dict)
    routed_tokens: dict[str, list[int]] = field(default_factory=dict)


def fisher_costs(
    model: Any, moe: MoEModel, batches: Sequence[Mapping[str, torch.Tensor]], schemes: Mapping[int, Scheme]
) -> Measured:
    """Costs in nats of KL per token of each expert's halves, rounded by the `Rounder` at each of `schemes` by bits.

    Gate and up share theirs equally.
    """
    measured, rounder = Measured(), Rounder(scale_dtype=model.dtype)
    with eval_context(model), float32_weights(model):
        for layer, samples in capture_layers(model, moe.layers, batches):
            study = LayerStudy(layer, samples)
            moments = study.moments()
            measured.routed_tokens[layer.name] = study.counts.tolist()
            for half in HALVES:
                grids = {scheme: rounder(study.weights(half), moments[half], scheme) for scheme in schemes.values()}
                table = study.rounding_costs(half, grids).tolist()
                for index in study.experts:
                    for projection in _PROJECTIONS[half]:
                        shares = (cost / len(_PROJECTIONS[half]) for cost in table[index])
                        by_bits = dict(zip(schemes, shares, strict=True))
                        measured.costs[f"{layer.experts_name}.{index}.{projection}"] = by_bits
    return measured
