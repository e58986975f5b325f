"""What rounding each matrix costs, and what losing each expert does: the numbers that allocation weighs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from ..architectures import MoEModel
from ..checkpoint.atomic import replace_text
from ..errors import MoeCollabError
from ..formats import Scheme
from ..rounding import Rounder
from .linears import capture_linears
from .live import float32_weights
from .samples import capture_layers
from .study import HALVES, LayerStudy

__all__ = ["CostTable", "dropping_costs", "rounding_costs"]

Batches = Sequence[Mapping[str, torch.Tensor]]
Options = Callable[[nn.Linear], Sequence[Scheme]]

_PROJECTIONS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


class CostTable(BaseModel):
    """Costs by module name and scheme, in nats of KL per token, and tokens routed to each layer's experts."""

    model_config = ConfigDict(extra="forbid")

    fingerprint: str = ""
    """Of the model and of all that decides how costs are measured, the data apart."""
    costs: dict[str, dict[str, float]] = Field(default_factory=dict)
    routed_tokens: dict[str, list[int]] = Field(default_factory=dict)
    tokens: int = 0
    """Calibration tokens."""

    def cost(self, name: str, scheme: Scheme) -> float:
        """Of rounding module `name` at `scheme`; 0 for what no cost was measured of."""
        return self.costs.get(name, {}).get(str(scheme), 0.0)

    def add(self, name: str, schemes: Sequence[Scheme], costs: Sequence[float]) -> None:
        """Set the costs of one module."""
        self.costs[name] = {str(scheme): float(cost) for scheme, cost in zip(schemes, costs, strict=True)}

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        replace_text(path, self.model_dump_json() + "\n")

    @classmethod
    def load(cls, path: str | Path, fingerprint: str) -> CostTable:
        """Read a table. Raises `MoeCollabError` when it is not valid or was measured for something else."""
        try:
            table = cls.model_validate_json(Path(path).read_text())
        except (ValidationError, UnicodeDecodeError) as error:
            raise MoeCollabError(f"{path}: not a valid table of costs; delete it to measure anew.\n{error}") from error
        if table.fingerprint != fingerprint:
            raise MoeCollabError(
                f"{path}: these costs were measured for another model or other options ({table.fingerprint}, this one "
                f"is {fingerprint}). Delete the file to measure anew, or name another one."
            )
        return table


def rounding_costs(
    model: Any, moe: MoEModel, others: Mapping[str, nn.Linear], batches: Batches, options: Options, rounder: Rounder
) -> CostTable:
    """Costs of rounding each expert's halves and `others`, by `rounder`, at each of `options` for the matrix.

    Gate and up are one fused matrix: they share its cost equally.
    """
    table = CostTable()
    with float32_weights(model):
        for layer, samples in capture_layers(model, moe.layers, batches):
            study = LayerStudy(layer, samples)
            moments = study.moments()
            table.routed_tokens[layer.name] = study.counts.tolist()
            table.tokens = samples.num_tokens
            for half in HALVES:
                projections = _PROJECTIONS[half]
                schemes = options(getattr(layer.expert(layer.live_experts[0]), projections[0]))
                # One scheme at a time: a layer's experts are large.
                each = [study.rounding_cost(half, rounder(study.weights(half), moments[half], s)) for s in schemes]
                costs = torch.stack(each, 1) / len(projections)
                for index in study.experts:
                    for projection in projections:
                        table.add(f"{layer.experts_name}.{index}.{projection}", schemes, costs[index].tolist())
        for name, seen in capture_linears(model, others, batches).items():
            schemes = options(others[name])
            table.add(name, schemes, seen.costs(rounder, schemes))
    return table


def dropping_costs(
    model: Any, moe: MoEModel, batches: Batches, dropped: Mapping[str, Collection[int]]
) -> dict[str, list[float]]:
    """Layer name -> cost of losing each expert besides those `dropped`; of these, what bringing one back would save."""
    with float32_weights(model):
        return {
            layer.name: LayerStudy(layer, samples).drop_costs(sorted(dropped.get(layer.name, ()))).tolist()
            for layer, samples in capture_layers(model, moe.layers, batches)
        }
