"""`LayerStudy`: one layer's second moments for rounding, and what rounding or losing each of its experts costs.

Costs are in nats of KL per token, to second order in the error (see `samples`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from ..coverage import FEW_TOKENS
from ..formats import Scheme
from ..moe_model import MoELayer
from ..rounding import Grid, Rounder
from .experts import ExpertWeights
from .live import masked_router
from .moments import second_moments
from .samples import LayerSamples

__all__ = ["HALVES", "ExpertGrids", "LayerStudy"]

HALVES = ("gate_up", "down")
"""An expert's two halves, which get a scheme each: gate_proj and up_proj as one fused matrix, and down_proj."""

COST_TOKENS = 2048
"""Most routed tokens of an expert from which a cost is computed; they stand for all."""


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
    """[tokens, 2I]."""
    down_gradient: torch.Tensor
    """[tokens, H]."""


class LayerStudy:
    """Experts of one layer and the calibration tokens sent to them."""

    def __init__(self, layer: MoELayer, samples: LayerSamples) -> None:
        self.layer, self.samples = layer, samples
        self.experts = {index: ExpertWeights.of(layer, index) for index in layer.live_experts}
        self.counts = samples.counts(layer.num_experts)

    def traffic(self, expert: int, limit: int | None = None) -> _Traffic:
        """The tokens routed to `expert`, evenly thinned to at most `limit`."""
        tokens, weights = self.samples.routed(expert, limit)
        hidden = self.samples.hidden[tokens]
        gradient = self.samples.gradient[tokens] * weights[:, None]
        own = self.experts[expert]
        return _Traffic(hidden, own.inner(hidden), own.gate_up_gradient(hidden, gradient), gradient)

    def weights(self, half: str) -> torch.Tensor:
        """The matrices of a half, of all experts, [experts, rows, columns]; zeros for an expert that is gone."""
        gone = torch.zeros_like(getattr(next(iter(self.experts.values())), half))
        own = (self.experts.get(index) for index in range(self.layer.num_experts))
        return torch.stack([gone if expert is None else getattr(expert, half) for expert in own])

    def moments(self) -> dict[str, torch.Tensor]:
        """Half -> second moments of its inputs, [experts, row blocks, columns, columns], mean diagonal 1."""
        found: dict[str, dict[int, torch.Tensor]] = {half: {} for half in HALVES}
        for index in self.experts:
            seen = self.traffic(index)
            found["gate_up"][index] = second_moments(seen.hidden, seen.gate_up_gradient)
            found["down"][index] = second_moments(seen.inner, seen.down_gradient)
        return {half: self._stacked(moments) for half, moments in found.items()}

    def _stacked(self, by_expert: dict[int, torch.Tensor]) -> torch.Tensor:
        gone = torch.zeros_like(next(iter(by_expert.values())))
        return torch.stack([by_expert.get(index, gone) for index in range(self.layer.num_experts)])

    def rounding_costs(self, half: str, members: Sequence[int], grid: Grid) -> torch.Tensor:
        """KL per token of rounding `half` of each expert of `members` to `grid`: E[(g . (W_b - W) x)^2] / 2."""
        rounded = grid.values()
        costs = torch.zeros(len(members), dtype=torch.float64)
        for position, index in enumerate(members):
            error = rounded[position] - getattr(self.experts[index], half)
            if not self.counts[index]:
                # No token was routed here: a tiny cost still prefers the codes that round the weights best.
                costs[position] = 1e-12 * float(error.square().mean())
                continue
            seen = self.traffic(index, COST_TOKENS)
            inputs, gradient = (
                (seen.hidden, seen.gate_up_gradient) if half == "gate_up" else (seen.inner, seen.down_gradient)
            )
            change = (linear(inputs, error) * gradient).sum(-1)
            costs[position] = change.double().square().mean() * float(self.counts[index]) / self.samples.num_tokens / 2
        return costs

    @torch.no_grad()
    def drop_costs(self, dropped: Sequence[int] = ()) -> torch.Tensor:
        """KL per token of losing each expert, [experts], if the router then chooses among the rest.

        For an expert of `dropped` it is what bringing it back would save; for any other, what losing it besides them
        would add. Such costs do not add up, so they are estimated anew after each round of dropping.
        """
        everyone = range(self.layer.num_experts)
        kept = torch.tensor([index not in dropped for index in everyone])
        now = self._routing(kept)
        losses = self._losses(now, torch.arange(self.samples.num_tokens))
        costs = torch.zeros(len(everyone), dtype=torch.float64)
        for index in everyone:
            other = kept.clone()
            other[index] = not kept[index]
            if bool(other.any()):
                then = self._routing(other)
                # Dropping an expert may move even tokens that never chose it, because it counts in its group's score.
                moved = torch.where(~torch.isclose(now, then, rtol=1e-4, atol=1e-6).all(-1))[0]
                change = float((self._losses(then, moved) - losses[moved]).sum()) / self.samples.num_tokens
                costs[index] = change if kept[index] else -change
        return costs.clamp_min(0)

    def _routing(self, kept: torch.Tensor) -> torch.Tensor:
        """The router's weights when it chooses only among `kept`, [tokens, experts]; 0 for experts not chosen."""
        hidden = self.samples.hidden.to(self.layer.router.weight.dtype)  # type: ignore[arg-type]
        weights, indices = self.layer.routing(masked_router(self.layer, kept)(hidden))
        return torch.zeros(self.samples.num_tokens, len(kept)).scatter_(1, indices, weights.float())

    def _losses(self, routing: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """KL that `routing` [all tokens, experts] causes at each of `tokens`, float64 [len(tokens)].

        It is (g . d)^2 / 2, with d the change of the layer's output and g the gradient there (see `samples`).
        """
        before = torch.zeros_like(routing).scatter_(1, self.samples.indices, self.samples.weights)
        change = self._output(tokens, routing[tokens] - before[tokens])
        return (change * self.samples.gradient[tokens]).sum(-1).double().square() / 2

    def _output(self, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sum of the experts' outputs for `tokens`, weighted by `weights` [tokens, experts]: [tokens, H]."""
        hidden = self.samples.hidden[tokens]
        output = torch.zeros_like(hidden)
        for index, expert in self.experts.items():
            chosen = weights[:, index].nonzero().flatten()
            output.index_add_(0, chosen, expert(hidden[chosen]) * weights[chosen, index, None])
        return output

    @torch.no_grad()
    def refit_down(self, index: int, gate_up: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        """(a down_proj that makes up best for the expert's rounded gate and up, second moments of its new inputs).

        Least squares from the inputs that down_proj will get to the outputs that it had before, with tokens weighted as
        in the moments, and regularized towards the original down_proj by 3 % of the mean diagonal.
        """
        own, seen = self.experts[index], self.traffic(index)
        inner = own.inner(seen.hidden, gate_up.values()[0])
        weighing = seen.down_gradient.square().sum(-1, keepdim=True)
        matrix = (inner * weighing).T @ inner
        matrix += torch.diag(0.03 * matrix.diagonal().mean().clamp_min(1e-20).expand(len(matrix)))
        target = inner.T @ ((seen.inner - inner) * weighing)
        return own.down + own.down @ torch.linalg.solve(matrix, target).T, second_moments(inner, seen.down_gradient)

    def round_all(
        self,
        rounder: Rounder,
        moments: dict[str, torch.Tensor],
        schemes: Mapping[int, tuple[Scheme, Scheme]],
    ) -> dict[int, ExpertGrids]:
        """Expert -> its grids, given the schemes of its halves (gate_up, down); an expert that is gone has none.

        Experts of one scheme are rounded together. Before down_proj is rounded, it is refitted to make up for its
        expert's rounded gate and up, if enough tokens reached the expert.
        """
        found = {index: ExpertGrids(None, None) for index, pair in schemes.items() if pair[0].num_bits != 0}
        gate_up = self.weights("gate_up")
        for scheme, members in _alike(schemes, 0).items():
            grid = rounder(gate_up[members], moments["gate_up"][members], scheme)
            for position, index in enumerate(members):
                found[index].gate_up = grid.select(position)
        down, down_moments = self.weights("down"), moments["down"].clone()
        for index, grids in found.items():
            if grids.gate_up is not None and schemes[index][1].is_packed and self.counts[index] >= FEW_TOKENS:
                down[index], down_moments[index] = self.refit_down(index, grids.gate_up)
        for scheme, members in _alike(schemes, 1).items():
            grid = rounder(down[members], down_moments[members], scheme)
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
