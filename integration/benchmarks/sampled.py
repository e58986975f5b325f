"""Costs and rounding of a few experts, after statistics and samples of all: for models whose experts would take days.

The product's own functions run on the whole model; then its layers are shown to them with the chosen experts only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.offload import set_onload_device
from llmcompressor.utils.helpers import eval_context

from moe_collab.calibration import Calibration, RoundedModel, Workspace, inputs_of
from moe_collab.calibration.at_hand import compute_device
from moe_collab.calibration.costs import rounding_costs
from moe_collab.calibration.observed import expert_statistics
from moe_collab.formats import Scheme
from moe_collab.modifiers.glue.weighed_inputs import call_experts_alike
from moe_collab.moe_model import MoELayer, MoEModel, describe
from moe_collab.rounding import Rounder

from .peak import DiskReads, Stage, announce

__all__ = ["SCHEME", "extrapolated", "measure_sampled"]

SCHEME = Scheme(2, 128)
"""At which the chosen experts' costs are measured, and to which they are rounded; others take as long."""
_PREDICTED = ("predicted_seconds", "predicted_cpu_seconds", "predicted_read_bytes")
"""What is summed over the stages."""


@dataclass(frozen=True)
class _SomeExperts(MoELayer):
    """A layer of which costs and rounding see a few experts only."""

    chosen: tuple[int, ...] = ()

    @property
    def live_experts(self) -> list[int]:
        """Those."""
        return list(self.chosen)


def measure_sampled(
    model: Any, batches: Iterable[Mapping[str, Any]], count: int, folder: Path, reads: DiskReads
) -> dict[str, Any]:
    """Statistics and samples of all experts of `model`, then costs and rounding of `count` drawn experts.

    Each of these four is announced as a stage. Returns the numbers of experts and, by stage, of how many of them it was
    and what it read; the bytes of the samples of `batches`, and of the checkpoint if all experts were rounded.
    """
    set_onload_device(model, compute_device())
    moe = describe(model)
    call_experts_alike(moe)
    few, names = _drawn(moe, count)
    calibration = Calibration(
        model, moe, [inputs_of(batch, torch.device("cpu")) for batch in batches], Workspace(folder)
    )
    total = sum(len(layer.live_experts) for layer in moe.layers)
    stages: dict[str, dict[str, int]] = {}

    @contextmanager
    def stage(name: str, experts: int) -> Iterator[None]:
        announce(name)
        before = reads.asked
        yield
        stages[name] = {"experts": experts, "read_bytes": reads.asked - before}

    with eval_context(model):
        with stage("statistics", total):
            expert_statistics(calibration, moe.layers, calibration.everything.valid.long() - 1, 1)
        with stage("samples", total):
            calibration.samples()
        sample_bytes = _bytes_in(folder)
        calibration.moe = few
        rounded = RoundedModel(calibration, Rounder(scale_dtype=model.dtype))
        with stage("costs", count):
            rounding_costs(calibration, (), lambda _: [SCHEME], rounded.rounder)
        with stage("rounding", count):
            rounded.round(dict.fromkeys(names, SCHEME))
    packed = [rounded[name] for name in names]
    packed_bytes = sum(grid.words.nbytes + grid.scales.nbytes for grid in packed)
    expert_bytes = sum(rows * columns for rows, columns in (grid.shape for grid in packed)) * model.dtype.itemsize
    calibration.close()
    return {
        "experts": total,
        "stages": stages,
        "sample_bytes": sample_bytes,
        "saved_bytes": (expert_bytes - packed_bytes) * total // count,
    }


def _drawn(moe: MoEModel, count: int) -> tuple[MoEModel, list[str]]:
    """(the model with `count` experts, drawn evenly from all its layers, and no others; names of their matrices)."""
    every = [(position, index) for position, layer in enumerate(moe.layers) for index in layer.live_experts]
    picks = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:count].sort().values.tolist()
    chosen = [every[pick] for pick in picks]
    layers = tuple(
        _SomeExperts(**vars(layer), chosen=tuple(index for where, index in chosen if where == position))
        for position, layer in enumerate(moe.layers)
    )
    return replace(moe, layers=layers), [name for layer in layers for name, *_ in layer.projections()]


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def extrapolated(found: dict[str, Any], stages: Mapping[str, Stage], model_bytes: int) -> dict[str, Any]:
    """What `measure_sampled` found, with what its `stages` took, for one expert and for all of the model.

    Times are given as they passed and as processor time.
    """
    total, by_stage = found["experts"], {}
    for name, own in found["stages"].items():
        taken, share = stages[name], total / own["experts"]
        by_stage[name] = {
            "experts": own["experts"],
            "seconds_per_expert": taken.seconds / own["experts"],
            "cpu_seconds_per_expert": taken.cpu / own["experts"],
            "predicted_seconds": taken.seconds * share,
            "predicted_cpu_seconds": taken.cpu * share,
            "predicted_read_bytes": round(own["read_bytes"] * share),
        }
    return {
        "experts": total,
        "scheme": str(SCHEME),
        "stages": by_stage,
        **{what: sum(stage[what] for stage in by_stage.values()) for what in _PREDICTED},
        "predicted_checkpoint_bytes": model_bytes - found["saved_bytes"],
        "sample_bytes": found["sample_bytes"],
    }
