"""`LayerStudy`: what rounding the experts of one layer rests on, and their rounding.

As many experts as take a fixed amount of memory are at hand together; for large models on a CPU that is one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..coverage import FEW_TOKENS
from ..formats import Scheme
from ..moe_model import MoELayer
from ..rounding import Grid, Rounder
from .at_hand import compute_device, float32_copy
from .experts import ExpertWeights
from .moments import Sums, moment_of, token_weights
from .samples import EXPERT_TOKENS, LayerSamples

__all__ = ["HALVES", "ExpertGrids", "ExpertGroup", "LayerStudy", "Traffic"]

HALVES = ("gate_up", "down")
"""An expert's two halves, which get a scheme each: gate_proj and up_proj as one fused matrix, and down_proj."""

_GROUP_BYTES, _ACCELERATOR_BYTES = 64 << 20, 1 << 30
"""Of weights, inputs and second moments of the experts that are at hand together; never less than one expert. Columns
are gone through one after the other, so an accelerator takes as long for one expert as for many.
"""
_TOKENS = 1024
"""Of an expert that are looked at together, so that memory does not grow with their number."""


@dataclass
class ExpertGrids:
    """The grids of a rounded expert's halves; None for a half that is not rounded."""

    gate_up: Grid | None
    down: Grid | None


class LayerStudy:
    """Experts of one layer and the sampled calibration tokens sent to them."""

    def __init__(self, layer: MoELayer, samples: LayerSamples) -> None:
        self.layer, self.samples, self.device = layer, samples, compute_device()

    def groups(self, experts: Collection[int]) -> Iterator[ExpertGroup]:
        """Of the layer's `experts` those that have weights, a group at a time."""
        for group in self.divided(experts):
            yield ExpertGroup(self, {index: ExpertWeights.of(self.layer, index, self.device) for index in group})

    def divided(self, experts: Collection[int]) -> list[list[int]]:
        """Of the layer's `experts` those that have weights, in order, in groups that fit in memory."""
        members = [index for index in self.layer.live_experts if index in experts]
        if not members:
            return []
        first = self.layer.expert(members[0]).down_proj
        hidden, inner = first.out_features, first.in_features
        tokens = min(EXPERT_TOKENS, int(self.samples.counts.max()))
        size = 4 * (hidden**2 + inner**2 + 3 * hidden * inner + tokens * inner)
        most = _GROUP_BYTES if self.device.type == "cpu" else _ACCELERATOR_BYTES
        together = max(1, most // size)
        return [members[start : start + together] for start in range(0, len(members), together)]


class Traffic:
    """The sampled tokens routed to one expert, evenly thinned to at most `limit`, and what errors there cost."""

    def __init__(self, study: LayerStudy, index: int, own: ExpertWeights, limit: int | None = None) -> None:
        self._study, self._own = study, own
        self._rows, weights = study.samples.routed(index, limit)
        self.sums = {half: Sums() for half in HALVES}
        inner = []
        for part, hidden in zip(self._parts(), self.hidden(), strict=True):
            rows, by_router = self._rows[part], weights[part].to(study.device)
            gradient = float32_copy(study.samples.gradient[:, rows], study.device) * by_router[:, None]
            of_gate_up = torch.stack([own.gate_up_gradient(hidden, one) for one in gradient])
            inner.append(own.inner(hidden))
            self.sums["gate_up"].see(hidden, of_gate_up)
            self.sums["down"].see(inner[-1], gradient)
        self.inner = torch.cat(inner)
        """Inputs of down, [tokens, I]."""

    def _parts(self) -> list[slice]:
        return [slice(start, start + _TOKENS) for start in range(0, max(1, len(self._rows)), _TOKENS)]

    def hidden(self) -> Iterator[torch.Tensor]:
        """Inputs of gate_up, [tokens, H], some at a time."""
        for part in self._parts():
            yield float32_copy(self._study.samples.hidden[self._rows[part]], self._study.device)

    def moment(self, half: str) -> torch.Tensor:
        """The second moment of the inputs of a half, [columns, columns], mean diagonal 1."""
        columns = getattr(self._own, half).shape[1]
        parts = self.hidden() if half == "gate_up" else [self.inner]
        return moment_of(parts, self.sums[half].token_weights(columns), columns)


class ExpertGroup:
    """Experts of a layer that are in memory together."""

    def __init__(self, study: LayerStudy, experts: dict[int, ExpertWeights]) -> None:
        self.study, self.experts, self.members = study, experts, list(experts)
        self.traffic = {index: Traffic(study, index, own) for index, own in self.experts.items()}

    def weights(self, half: str, members: Sequence[int] | None = None) -> torch.Tensor:
        """The matrices of a half, of `members` or of all experts of the group, [experts, rows, columns]."""
        return torch.stack([getattr(self.experts[index], half) for index in members or self.members])

    @cached_property
    def moments(self) -> dict[str, torch.Tensor]:
        """Half -> second moments of its inputs, [experts, columns, columns], mean diagonal 1."""
        return {half: torch.stack([seen.moment(half) for seen in self.traffic.values()]) for half in HALVES}

    def moments_of(self, half: str, members: Sequence[int]) -> torch.Tensor:
        """The second moments of `members` only."""
        return self.moments[half][[self.members.index(index) for index in members]]

    @torch.no_grad()
    def refit_down(self, index: int, gate_up: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        """(a down_proj that makes up best for the expert's rounded gate and up, second moments of its new inputs).

        Least squares from the inputs that down_proj will get to the outputs that it had before, with tokens weighted as
        in the moments, and regularized towards the original down_proj by 3 % of the mean diagonal.
        """
        own, seen, rounded = self.experts[index], self.traffic[index], gate_up.values()[0]
        inner = torch.cat([own.inner(hidden, rounded) for hidden in seen.hidden()])
        weighing = seen.sums["down"].squares
        matrix = inner.T @ (inner * weighing[:, None])
        matrix.diagonal().add_(0.03 * matrix.diagonal().mean().clamp_min(1e-20))
        target = inner.T @ ((seen.inner - inner) * weighing[:, None])
        weights = token_weights(weighing, inner.square().mean(-1), inner.shape[1])
        down = own.down + own.down @ torch.linalg.solve(matrix, target).T
        return down, moment_of([inner], weights, inner.shape[1])

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
