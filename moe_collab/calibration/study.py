"""One layer at hand: second moments for rounding, and what each rounding or loss of an expert does to the predictions.

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
"""What shares a scheme: an expert's gate_proj and up_proj, one fused matrix; its down_proj."""

COST_TOKENS = 2048
"""Routed tokens per expert that stand for all in a cost."""


@dataclass
class ExpertGrids:
    """A rounded expert; None where it stays as it was."""

    gate_up: Grid | None
    down: Grid | None


@dataclass(frozen=True)
class _Traffic:
    """The tokens routed to one expert, with the gradients of the loss by the outputs of both halves."""

    hidden: torch.Tensor
    inner: torch.Tensor
    gate_up_gradient: torch.Tensor
    down_gradient: torch.Tensor


class LayerStudy:
    """Experts of one layer and the calibration tokens sent to them."""

    def __init__(self, layer: MoELayer, samples: LayerSamples) -> None:
        self.layer, self.samples = layer, samples
        self.experts = {index: ExpertWeights.of(layer, index) for index in layer.live_experts}
        self.counts = samples.counts(layer.num_experts)

    def traffic(self, expert: int, limit: int | None = None) -> _Traffic:
        """What `expert` saw, thinned to at most `limit` tokens."""
        tokens, weights = self.samples.routed(expert, limit)
        hidden = self.samples.hidden[tokens]
        gradient = self.samples.gradient[tokens] * weights[:, None]
        own = self.experts[expert]
        return _Traffic(hidden, own.inner(hidden), own.gate_up_gradient(hidden, gradient), gradient)

    def weights(self, half: str) -> torch.Tensor:
        """The matrices of all experts, [experts, rows, columns]; zeros where one is gone."""
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
        """KL per token of losing each expert, [experts], the router choosing among the rest.

        For an expert of `dropped` it is what bringing it back would save; for another, what losing it besides them
        would add: such costs do not add up, so they are estimated anew after each round of dropping.
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
                # Dropping an expert may move tokens that never chose it: it counts in its group's score.
                moved = torch.where(~torch.isclose(now, then, rtol=1e-4, atol=1e-6).all(-1))[0]
                change = float((self._losses(then, moved) - losses[moved]).sum()) / self.samples.num_tokens
                costs[index] = change if kept[index] else -change
        return costs.clamp_min(0)

    def _routing(self, kept: torch.Tensor) -> torch.Tensor:
        """The router's weights with only `kept` to choose from, [tokens, experts], 0 where not chosen."""
        hidden = self.samples.hidden.to(self.layer.router.weight.dtype)  # type: ignore[arg-type]
        weights, indices = self.layer.routing(masked_router(self.layer, kept)(hidden))
        return torch.zeros(self.samples.num_tokens, len(kept)).scatter_(1, indices, weights.float())

    def _losses(self, routing: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """(g . change)^2 / 2 of each of `tokens` under `routing` [tokens, experts], float64 [len(tokens)]."""
        before = torch.zeros_like(routing).scatter_(1, self.samples.indices, self.samples.weights)
        change = self._output(tokens, routing[tokens] - before[tokens])
        return (change * self.samples.gradient[tokens]).sum(-1).double().square() / 2

    def _output(self, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sum of the experts' outputs by `weights` [tokens, experts]."""
        hidden = self.samples.hidden[tokens]
        output = torch.zeros_like(hidden)
        for index, expert in self.experts.items():
            chosen = weights[:, index].nonzero().flatten()
            output.index_add_(0, chosen, expert(hidden[chosen]) * weights[chosen, index, None])
        return output

    @torch.no_grad()
    def refit_down(self, index: int, gate_up: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        """(down_proj, its second moments) that make up best for the expert's rounded gate and up.

        Least squares from what down_proj will see to what it should have put out, weighted like the moments; drawn to
        the original by 3 % of the mean diagonal.
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
        """Expert -> its grids, for (gate_up, down) schemes per expert; an expert that is gone has none.

        Experts of one scheme are rounded together. down_proj makes up for its expert's rounded gate and up.
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
    members: dict[Scheme, list[int]] = {}
    for index, pair in schemes.items():
        if pair[half].is_packed:
            members.setdefault(pair[half], []).append(index)
    return members
