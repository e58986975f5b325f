"""`LiveMeasurements`: the numbers that `allocation.decide` asks for, measured on a live model's calibration tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from ..allocation import Planner
from ..allocation.costs import CostTable
from ..allocation.items import DropCosts
from ..allocation.planner import Decision
from ..distributed import is_source_process
from ..formats import Scheme
from ..moe_model import MoEModel
from ..plan import description_digest
from ..rounding import Rounder
from .costs import dropping_costs, rounding_costs
from .live import held_out
from .rounded_model import Trial

__all__ = ["LiveMeasurements"]

Batches = Sequence[Mapping[str, torch.Tensor]]


class LiveMeasurements:
    """Measures costs and KL on a live `model` with calibration `batches`, of which every eighth is held out for the KL.

    Costs are read from `costs_file` if it exists, and otherwise measured and written to it; `model_fingerprint` says in
    that file which model they belong to.
    """

    def __init__(
        self,
        model: Any,
        moe: MoEModel,
        planner: Planner,
        rounder: Rounder,
        batches: list[dict[str, torch.Tensor]],
        model_fingerprint: str,
        costs_file: str | None = None,
    ) -> None:
        self._model, self._moe, self._planner, self._rounder = model, moe, planner, rounder
        self._fingerprint, self._costs_file = model_fingerprint, costs_file
        self._batches, heldout = held_out(_rows(batches[0]) if len(batches) == 1 else batches)
        self._heldout: Batches = heldout
        self._trial: Trial | None = None

    def costs(self) -> CostTable:
        """As `Measurements.costs`, read from the costs file if it exists."""
        file, planner = self._costs_file, self._planner
        others = {name: self._model.get_submodule(name) for name in planner.others()}
        key = description_digest(
            {
                "model": self._fingerprint,
                "options": {name: sorted(map(str, planner.table.options(name))) for name in planner.matrices},
                "rounder": str(self._rounder),
            }
        )
        if file and Path(file).exists():
            logger.info("{}: reusing {}", planner.request.origin, file)
            return CostTable.load(file, key)
        table = rounding_costs(self._model, self._moe, others, self._batches, packed_options(planner), self._rounder)
        table.fingerprint = key
        if file and is_source_process():
            table.save(file)
        return table

    def drop_costs(self, dropped: Mapping[str, Collection[int]]) -> DropCosts:
        """As `Measurements.drop_costs`."""
        return dropping_costs(self._model, self._moe, self._batches, dropped)

    def kl(self, decision: Decision) -> float:
        """As `Measurements.kl`."""
        if self._trial is None:
            self._trial = Trial(self._model, self._moe, self._rounder, self._batches, self._heldout)
        return self._trial.kl(decision.schemes, decision.dropped)


def packed_options(planner: Planner) -> Callable[[str], list[Scheme]]:
    """A function from a matrix's name to the schemes on offer that round it; not rounding it has no cost to measure."""
    return lambda name: [s for s in planner.table.options(name) if s.is_packed] if name in planner.matrices else []


def _rows(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Batches of one sequence each."""
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(batch["input_ids"]))]
