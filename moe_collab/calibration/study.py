"""`LayerStudy`: one layer's second moments for rounding, and what rounding each of its experts costs.

Costs are in nats of KL per token, to second order in the error (see `samples`). As many experts as take a fixed amount
of memory are at hand together; for large models that is one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.functional import linear

from ..coverage import FEW_TOKENS
from ..formats import Scheme
from ..moe_model import MoELayer
from ..rounding import Grid, Rounder
from .at_hand import compute_device, float32_copy
from .experts import ExpertWeights
from .moments import second_moment
from .samples import LayerSamples

__all__ = ["COST_TOKENS", "HALVES", "ExpertGrids", "ExpertGroup", "LayerStudy"]

HALVES = ("gate_up", "down")
"""An expert's two halves, which get a scheme each: gate_proj and up_proj as one fused matrix, and down_proj."""

COST_TOKENS = 2048
"""Most routed tokens of an expert from which a cost is computed; they stand for all."""

_GROUP_BYTES = 64 << 20
"""Of weights and second moments of the experts that are at hand together; never less than one expert."""


@dataclass
class ExpertGrids:
    """The grids of a rounded expert's halves; None for a half that is not rounded."""

    gate_up: Grid | None
    down: Grid | None


@dataclass(frozen=True)
class _Traffic:
    """The tokens routed to one expert: inputs of both its halves, and gradients of the loss by the halves' outputs."""

    hidden: torch.Tensor
    """Inputs of gate_up, [tokens, H]."""
    inner: torch.Tensor
    """Inputs of down, [tokens, I]."""
    gate_up_gradient: torch.Tensor
    """[draws, tokens, 2I]."""
    down_gradient: torch.Tensor
    """[draws, tokens, H]."""


class LayerStudy:
    """Experts of one layer and the sampled calibration tokens sent to them."""

    def __init__(self, layer: MoELayer, samples: LayerSamples) -> None:
        self.layer, self.samples, self.device = layer, samples, compute_device()

    def groups(self, experts: Collection[int]) -> Iterator[ExpertGroup]:
        """Of the layer's `experts` those that have weights, a group at a time."""
        members = [index for index in self.layer.live_experts if index in experts]
        if not members:
            return
        first = self.layer.expert(members[0]).down_proj
        hidden, inner = first.out_features, first.in_features
        size = 4 * (hidden**2 + inner**2 + 3 * hidden * inner)
        together = max(1, _GROUP_BYTES // size)
        for start in range(0, len(members), together):
            yield ExpertGroup(self, members[start : start + together])

    def traffic(self, expert: int, own: ExpertWeights, limit: int | None = None) -> _Traffic:
        """The sampled tokens of `expert`, evenly thinned to at most `limit`."""
        rows, weights = self.samples.routed(expert, limit)
        hidden = float32_copy(self.samples.hidden[rows], self.device)
        gradient = float32_copy(self.samples.gradient[:, rows], self.device) * weights.to(self.device)[:, None]
        of_gate_up = torch.stack([own.gate_up_gradient(hidden, one) for one in gradient])
        return _Traffic(hidden, own.inner(hidden), of_gate_up, gradient)


class ExpertGroup:
    """Experts of a layer that are in memory together."""

    def __init__(self, study: LayerStudy, members: list[int]) -> None:
        self.study, self.members = study, members
        self.experts = {index: ExpertWeights.of(study.layer, index, study.device) for index in members}
        self._few: dict[int, _Traffic] = {}

    def weights(self, half: str, members: Sequence[int] | None = None) -> torch.Tensor:
        """The matrices of a half, of `members` or of all experts of the group, [experts, rows, columns]."""
        return torch.stack([getattr(self.experts[index], half) for index in members or self.members])

    @cached_property
    def moments(self) -> dict[str, torch.Tensor]:
        """Half -> second moments of its inputs, [experts, columns, columns], mean diagonal 1."""
        found: dict[str, list[torch.Tensor]] = {half: [] for half in HALVES}
        for index, own in self.experts.items():
            seen = self.study.traffic(index, own)
            found["gate_up"].append(second_moment(seen.hidden, seen.gate_up_gradient))
            found["down"].append(second_moment(seen.inner, seen.down_gradient))
        return {half: torch.stack(moments) for half, moments in found.items()}

    def moments_of(self, half: str, members: Sequence[int]) -> torch.Tensor:
        """The second moments of `members` only."""
        return self.moments[half][[self.members.index(index) for index in members]]

    def rounding_costs(self, half: str, members: Sequence[int], grid: Grid) -> list[float]:
        """KL per token of rounding `half` of each expert of `members` to `grid`: E[(g . (W_b - W) x)^2] / 2."""
        samples, rounded, costs = self.study.samples, grid.values(), []
        for position, index in enumerate(members):
            error = rounded[position] - getattr(self.experts[index], half)
            if not samples.counts[index]:
                # No token was routed here: a tiny cost still prefers the codes that round the weights best.
                costs.append(1e-12 * float(error.square().mean()))
                continue
            if index not in self._few:
                self._few[index] = self.study.traffic(index, self.experts[index], COST_TOKENS)
            seen = self._few[index]
            inputs, gradient = (
                (seen.hidden, seen.gate_up_gradient) if half == "gate_up" else (seen.inner, seen.down_gradient)
            )
            change = (linear(inputs, error) * gradient).sum(-1)
            share = float(samples.counts[index]) / samples.num_tokens
            costs.append(float(change.double().square().mean()) * share / 2)
        return costs

    @torch.no_grad()
    def refit_down(self, index: int, gate_up: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        """(a down_proj that makes up best for the expert's rounded gate and up, second moments of its new inputs).

        Least squares from the inputs that down_proj will get to the outputs that it had before, with tokens weighted as
        in the moments, and regularized towards the original down_proj by 3 % of the mean diagonal.
        """
        own = self.experts[index]
        seen = self.study.traffic(index, own)
        inner = own.inner(seen.hidden, gate_up.values()[0])
        weighing = seen.down_gradient.square().sum(-1).mean(0)[:, None]
        matrix = (inner * weighing).T @ inner
        matrix += torch.diag(0.03 * matrix.diagonal().mean().clamp_min(1e-20).expand(len(matrix)))
        target = inner.T @ ((seen.inner - inner) * weighing)
        return own.down + own.down @ torch.linalg.solve(matrix, target).T, second_moment(inner, seen.down_gradient)

    def round(self, rounder: Rounder, schemes: Mapping[int, tuple[Scheme, Scheme]]) -> dict[int, ExpertGrids]:
        """Expert -> its grids, given the schemes (gate_up, down) of experts of the group.

        Experts of one scheme are rounded together. Before down_proj is rounded, it is refitted to make up for its
        expert's rounded gate and up, if enough tokens reached the expert.
        """
        found = {index: ExpertGrids(None, None) for index in self.members if index in schemes}
        pairs = {index: schemes[index] for index in found}
        for scheme, members in _alike(pairs, 0).items():
            grid = rounder(self.weights("gate_up", members), self.moments_of("gate_up", members), scheme)
            for position, index in enumerate(members):
                found[index].gate_up = grid.select(position)
        down, moments = self.weights("down"), self.moments["down"].clone()
        for place, index in enumerate(self.members):
            gate_up = found[index].gate_up if index in found else None
            reached = self.study.samples.counts[index] >= FEW_TOKENS
            if gate_up is not None and pairs[index][1].is_packed and reached:
                down[place], moments[place] = self.refit_down(index, gate_up)
        for scheme, members in _alike(pairs, 1).items():
            places = [self.members.index(index) for index in members]
            grid = rounder(down[places], moments[places], scheme)
            for position, index in enumerate(members):
                found[index].down = grid.select(position)
        return found


def _alike(schemes: Mapping[int, tuple[Scheme, Scheme]], half: int) -> dict[Scheme, list[int]]:
    """Scheme -> the experts whose half (0: gate_up, 1: down) is to be rounded to it."""
    members: dict[Scheme, list[int]] = {}
    for index, pair in schemes.items():
        if pair[half].is_packed:
            members.setdefault(pair[half], []).append(index)
    return members
