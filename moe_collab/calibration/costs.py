"""Measures what rounding each matrix costs: the numbers that allocation weighs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from ..allocation.costs import CostTable
from ..formats import Scheme
from ..rounding import Rounder
from .progress import spread
from .results import key_of
from .run import Calibration
from .samples import LinearSamples
from .study import HALVES, LayerStudy

__all__ = ["rounding_costs"]

Options = Callable[[str], Sequence[Scheme]]
"""Matrix name -> the schemes whose costs are wanted."""

_PROJECTIONS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


def rounding_costs(calibration: Calibration, others: Collection[str], options: Options, rounder: Rounder) -> CostTable:
    """Costs of rounding the experts' matrices and the Linears `others` by `rounder`, at each scheme of `options`.

    Gate and up are one fused matrix, so each of them gets half of its cost.
    """
    results, layers = calibration.results, {layer.name: layer for layer in calibration.moe.layers}
    places = {}
    for what in (*layers, *others):
        names = [name for name, *_ in layers[what].projections()] if what in layers else [what]
        key = key_of(str(rounder), {name: list(map(str, options(name))) for name in names})
        places[what] = f"costs.{what}.{key}"

    def measure(what: str) -> None:
        samples, linears = calibration.samples(others)
        if what in layers:
            table = _layer_costs(LayerStudy(layers[what], samples[what]), options, rounder)
        else:
            table = _linear_costs(what, linears, options, rounder)
        results.note(places[what], table.model_dump())

    spread(
        "costs",
        list(places),
        lambda what: results.noted(places[what]) is not None,
        lambda: calibration.samples(others),
        measure,
    )
    table = CostTable()
    for place in places.values():
        table.join(CostTable.model_validate(results.noted(place)))
    return table


def _linear_costs(name: str, linears: Mapping[str, LinearSamples], options: Options, rounder: Rounder) -> CostTable:
    """The costs of a Linear; none if no calibration token reaches it."""
    table = CostTable()
    if name in linears:
        table.add(name, options(name), linears[name].costs(rounder, options(name)))
    return table


def _layer_costs(study: LayerStudy, options: Options, rounder: Rounder) -> CostTable:
    """The costs of one layer's experts, measured one group and scheme at a time."""
    layer, samples, container = study.layer, study.samples, study.layer.experts_name
    table = CostTable(routed_tokens={layer.name: samples.counts.tolist()}, tokens=samples.num_tokens)
    for group in study.groups(layer.live_experts):
        for half in HALVES:
            projections = _PROJECTIONS[half]
            offered = {index: options(f"{container}.{index}.{projections[0]}") for index in group.members}
            for scheme in dict.fromkeys(scheme for schemes in offered.values() for scheme in schemes):
                members = [index for index, schemes in offered.items() if scheme in schemes]
                grid = rounder(group.weights(half, members), group.moments_of(half, members), scheme)
                for index, cost in zip(members, group.rounding_costs(half, members, grid), strict=True):
                    for projection in projections:
                        table.add(f"{container}.{index}.{projection}", [scheme], [cost / len(projections)])
    return table
