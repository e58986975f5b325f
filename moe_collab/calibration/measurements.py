"""`LiveMeasurements`: the numbers that `allocation.decide` asks for, measured on a live model's calibration tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from loguru import logger

from ..allocation import Planner
from ..allocation.costs import CostTable
from ..allocation.items import DropCosts
from ..allocation.planner import Decision
from ..distributed import is_source_process
from ..formats import Scheme
from ..plan import description_digest
from .costs import rounding_costs
from .dropping import DropStudy
from .progress import spread
from .results import key_of
from .rounded_model import RoundedModel
from .run import Calibration
from .trial import Trial

__all__ = ["LiveMeasurements"]


class LiveMeasurements:
    """Measures costs and KL with the tokens of `calibration`, on the model that it is about.

    Costs are read from `costs_file` if it exists, and otherwise measured and written to it; `model_fingerprint` says in
    that file which model they belong to.
    """

    def __init__(
        self,
        calibration: Calibration,
        planner: Planner,
        rounded: RoundedModel,
        model_fingerprint: str,
        costs_file: str | None = None,
    ) -> None:
        self._calibration, self._planner, self._rounder = calibration, planner, rounded.rounder
        self._fingerprint, self._costs_file = model_fingerprint, costs_file
        self._trial = Trial(calibration, rounded)

    def costs(self) -> CostTable:
        """As `Measurements.costs`, read from the costs file if it exists."""
        file, planner = self._costs_file, self._planner
        key = description_digest(
            {
                "model": self._fingerprint,
                "options": {name: sorted(map(str, planner.table.options(name))) for name in planner.matrices},
                "rounder": str(self._rounder),
                "estimate": "closed form",  # files of earlier versions hold costs that were measured otherwise
            }
        )
        if file and Path(file).exists():
            logger.info("{}: reusing {}", planner.request.origin, file)
            return CostTable.load(file, key)
        table = rounding_costs(self._calibration, planner.others(), packed_options(planner), self._rounder)
        table.fingerprint = key
        if file and is_source_process():
            table.save(file)
        return table

    def drop_costs(self, dropped: Mapping[str, Collection[int]]) -> DropCosts:
        """As `Measurements.drop_costs`."""
        calibration = self._calibration
        results, layers = calibration.results, {layer.name: layer for layer in calibration.moe.layers}
        places = {name: f"drops.{name}.{key_of(sorted(dropped.get(name, ())))}" for name in layers}

        def measure(name: str) -> None:
            study = DropStudy(layers[name], calibration.samples()[0][name], results)
            results.note(places[name], study.costs(dropped.get(name, ())).tolist())

        spread(
            "costs of losing experts",
            list(layers),
            lambda name: results.noted(places[name]) is not None,
            calibration.samples,
            measure,
        )
        return {name: results.noted(place) for name, place in places.items()}

    def kl(self, decision: Decision) -> float:
        """As `Measurements.kl`."""
        return self._trial.kl(decision.schemes, decision.dropped)


def packed_options(planner: Planner) -> Callable[[str], list[Scheme]]:
    """A function from a matrix's name to the schemes on offer that round it; not rounding it has no cost to measure."""
    return lambda name: [s for s in planner.table.options(name) if s.is_packed] if name in planner.matrices else []
