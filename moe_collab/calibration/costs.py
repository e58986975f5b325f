"""What rounding each matrix costs, in nats of KL per token: the numbers that allocation weighs.

The cost of an error E [rows, columns] is sum_r k_r e_r M e_r^T, to second order (see `samples`): M is the second moment
of the inputs, mean diagonal 1, and k_r what an error in row r does to the loss. Error feedback leaves of it

    sum_r k_r sum_c D_c n_rc^2,

with M = L D L^T and n the errors of rounding to nearest (arXiv 2307.13304, theorem 1). So a matrix is factorized once,
and each scheme takes one search of scales. What descent gains, and clipping loses, beyond that is a factor for each
scheme, which is measured on a few matrices that are really rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from ..allocation.costs import CostTable
from ..formats import Scheme
from ..rounding import Rounder, left_over, nearest_loss
from .at_hand import compute_device, float32_copy
from .experts import ExpertWeights
from .moments import Sums, second_moment
from .progress import spread
from .results import key_of
from .run import Calibration
from .samples import LinearSamples, evenly
from .study import HALVES, LayerStudy, Traffic

__all__ = ["RoundingProblem", "expert_problems", "linear_problem", "rounding_costs"]

Options = Callable[[str], Sequence[Scheme]]
"""Matrix name -> the schemes whose costs are wanted."""

_PROJECTIONS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
_TOKENS = 2048
"""Most routed tokens of an expert from which its costs are computed; they stand for all."""
_ROWS = 256
"""Most rows of a matrix that its costs are computed from; they stand for all."""
_ROUNDED = 8
"""Experts, and Linears beside them, that are really rounded."""


@dataclass(frozen=True)
class RoundingProblem:
    """Rows that stand for a matrix, and what errors in them cost."""

    weights: torch.Tensor
    """[rows, columns]."""
    moment: torch.Tensor
    """[columns, columns]."""
    row_weights: torch.Tensor
    """[rows], k in the formula above, so that the sum is nats per token of the whole matrix."""

    @classmethod
    def of(cls, weights: torch.Tensor, moment: torch.Tensor, row_weights: torch.Tensor) -> RoundingProblem:
        """A sample of the rows of `weights`."""
        chosen = evenly(len(weights), _ROWS).to(weights.device)
        own = row_weights[chosen]
        return cls(weights[chosen], moment, own * (row_weights.sum() / own.sum().clamp_min(1e-30)))

    @cached_property
    def _left_over(self) -> torch.Tensor:
        return left_over(self.moment[None])

    def predicted(self, rounder: Rounder, scheme: Scheme) -> float:
        """The cost at `scheme` by the formula above, without the factor."""
        importance = self._left_over if rounder.feedback else self.moment.diagonal()[None]
        return float(nearest_loss(self.weights[None], importance, scheme)[0] @ self.row_weights)

    def measured(self, rounder: Rounder, scheme: Scheme) -> float:
        """The cost at `scheme` of these rows, really rounded."""
        error = rounder(self.weights[None], self.moment[None], scheme).values()[0] - self.weights
        return float(((error @ self.moment) * error).sum(-1) @ self.row_weights)


def rounding_costs(calibration: Calibration, others: Collection[str], options: Options, rounder: Rounder) -> CostTable:
    """Costs of rounding the experts' matrices and the Linears `others` by `rounder`, at each scheme of `options`.

    Gate and up are one fused matrix, so each of them gets half of its cost. A Linear that no calibration token reaches
    has no costs.
    """
    found = _Costs(calibration, others, options, rounder)
    layers = [layer.name for layer in calibration.moe.layers]
    found.spread("costs", [*layers, *others], found.predict)
    found.spread("costs of real rounding", found.drawn(), found.compare)
    return found.table()


class _Costs:
    """Costs by layer and Linear, and the factors of a few, kept in the results of `calibration`."""

    def __init__(self, calibration: Calibration, others: Collection[str], options: Options, rounder: Rounder) -> None:
        self._calibration, self._others, self._options, self._rounder = calibration, others, options, rounder
        self._layers, self._results = {layer.name: layer for layer in calibration.moe.layers}, calibration.results
        names = [*others, *(name for layer in calibration.moe.layers for name, *_ in layer.projections())]
        self._key = key_of(str(rounder), {name: list(map(str, options(name))) for name in names})

    def _place(self, do: Callable[[str], object], what: str) -> str:
        return f"{do.__name__}.{what.replace('/', '.')}.{self._key}"

    def spread(self, stage: str, items: Sequence[str], do: Callable[[str], object]) -> None:
        """Note what `do` finds of each item, once."""
        samples = partial(self._calibration.samples, self._others)
        results = self._results
        spread(
            stage,
            items,
            lambda what: results.noted(self._place(do, what)) is not None,
            samples,
            lambda what: results.note(self._place(do, what), do(what)),
        )

    def _problems(self, what: str) -> Iterator[tuple[str, list[str], RoundingProblem]]:
        """(kind, names of the matrices that it is about, problem) of a Linear, or of both halves of `layer/expert`."""
        of_layers, of_linears = self._calibration.samples(self._others)
        layer, _, index = what.rpartition("/")
        if layer:
            study = LayerStudy(self._layers[layer], of_layers[layer])
            expert = f"{study.layer.experts_name}.{index}"
            for half, problem in expert_problems(study, int(index)).items():
                yield half, [f"{expert}.{projection}" for projection in _PROJECTIONS[half]], problem
        elif what in of_linears:
            yield "other", [what], linear_problem(of_linears[what])

    def predict(self, what: str) -> dict[str, Any]:
        """Costs of the experts of a layer, or of a Linear, without the factors."""
        table, layer = CostTable(), self._layers.get(what)
        for expert in [what] if layer is None else [f"{what}/{index}" for index in layer.live_experts]:
            for _, names, problem in self._problems(expert):
                schemes = self._options(names[0])
                costs = [problem.predicted(self._rounder, scheme) / len(names) for scheme in schemes]
                for name in names:
                    table.add(name, schemes, costs)
        if layer is not None:
            samples = self._calibration.samples(self._others)[0][what]
            table.routed_tokens, table.tokens = {what: samples.counts.tolist()}, samples.num_tokens
        return table.model_dump()

    def drawn(self) -> list[str]:
        """Experts that calibration tokens reach, evenly drawn, and Linears."""
        counts = {
            name: CostTable.model_validate(self._noted(self.predict, name)).routed_tokens for name in self._layers
        }
        reached = [
            f"{name}/{index}"
            for name, layer in self._layers.items()
            for index in layer.live_experts
            if counts[name][name][index]
        ]
        others = sorted(self._others)
        return [items[i] for items in (reached, others) for i in evenly(len(items), _ROUNDED).tolist()]

    def compare(self, what: str) -> dict[str, dict[str, float]]:
        """Kind of matrix -> scheme -> the cost of real rounding as a multiple of the predicted one."""
        found: dict[str, dict[str, float]] = {}
        for kind, names, problem in self._problems(what):
            for scheme in self._options(names[0]):
                predicted = problem.predicted(self._rounder, scheme)
                measured = problem.measured(self._rounder, scheme)
                if predicted > 0 and measured > 0:  # else the weights are what the scheme can hold
                    found.setdefault(kind, {})[str(scheme)] = measured / predicted
        return found

    def _noted(self, do: Callable[[str], object], what: str) -> Any:
        return self._results.noted(self._place(do, what))

    def table(self) -> CostTable:
        """All costs, with the factors."""
        ratios: dict[tuple[str, str], list[float]] = {}
        for what in self.drawn():
            for kind, found in self._noted(self.compare, what).items():
                for scheme, ratio in found.items():
                    ratios.setdefault((kind, scheme), []).append(math.log(ratio))
        factors = {key: math.exp(sum(logs) / len(logs)) for key, logs in ratios.items()}
        table = CostTable()
        for what in (*self._layers, *self._others):
            table.join(CostTable.model_validate(self._noted(self.predict, what)))
        for name, costs in table.costs.items():
            kind = "other" if name in self._others else "down" if name.endswith("down_proj") else "gate_up"
            for scheme in costs:
                costs[scheme] *= factors.get((kind, scheme), 1.0)
        return table


def expert_problems(study: LayerStudy, index: int) -> dict[str, RoundingProblem]:
    """Half -> what rounding it costs, for one expert of a layer."""
    own = ExpertWeights.of(study.layer, index, study.device)
    seen, count = Traffic(study, index, own, _TOKENS), int(study.samples.counts[index])
    found = {}
    for half in HALVES:
        weights: torch.Tensor = getattr(own, half)
        # Where no token was routed, a tiny cost still prefers the codes that round the weights best.
        share = count / study.samples.num_tokens / 2
        row_weights = seen.sums[half].row_weights * share if count else weights.new_full((len(weights),), 1e-18)
        found[half] = RoundingProblem.of(weights, seen.moment(half), row_weights)
    return found


def linear_problem(samples: LinearSamples) -> RoundingProblem:
    device = compute_device()
    weight, inputs, gradient = (
        float32_copy(tensor, device) for tensor in (samples.module.weight, samples.inputs, samples.gradient)
    )
    sums = Sums()
    sums.see(inputs, gradient)
    return RoundingProblem.of(weight, second_moment(inputs, gradient), sums.row_weights / 2)
