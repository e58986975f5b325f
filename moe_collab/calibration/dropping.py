"""What losing each expert of a layer costs, if the router then chooses among the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..moe_model import MoELayer
from .arrivals import Arrivals
from .at_hand import at_hand, compute_device, float32_copy
from .experts import ExpertWeights
from .results import Results
from .routing import choosing_among, route
from .samples import LayerSamples

__all__ = ["DropStudy"]

_ROWS = 4096
"""Tokens that an expert computes at a time."""


class DropStudy:
    """A layer's experts and a sample of its tokens.

    An expert's output f_e(x) matters only through its product with the gradient g at the layer's output: if routing
    changes the experts' weights by w_e, KL changes by (sum of w_e g . f_e(x))^2 / 2 per token (see `samples`). So for
    every token one number is kept for each expert that it might go to, in `results`, and each expert is computed once
    for a token, however many ways of dropping are tried.
    """

    def __init__(self, layer: MoELayer, samples: LayerSamples, results: Results) -> None:
        self._layer, self._samples, self._device, self._results = layer, samples, compute_device(), results
        rows = samples.layer_tokens
        shape = len(rows), layer.num_experts
        self._before = torch.zeros(shape).scatter_(1, samples.indices[rows].long(), samples.weights[rows])
        found = results.get(f"products.{layer.name}")
        if found is None:
            self._products, self._known = torch.zeros(len(samples.gradient), *shape), torch.zeros(shape).bool()
        else:
            self._products, self._known = found["products"].clone(), found["known"].clone()

    @torch.no_grad()
    def costs(self, dropped: Collection[int] = ()) -> torch.Tensor:
        """KL per token of losing each expert, [experts], float64.

        For an expert of `dropped` it is what bringing it back would save; for any other, what losing it besides them
        would add. Such costs do not add up, so they are estimated anew after each round of dropping.
        """
        experts = range(self._layer.num_experts)
        kept = torch.tensor([index not in dropped for index in experts])
        costs = torch.zeros(len(experts), dtype=torch.float64)
        with self._router_at_hand():
            now = self._routing(kept)
            self._compute((self._before != 0) | (now != 0) | self._reached(now, kept))
            losses = self._losses(now)
            for index, then, moved in self._changes(now, kept):
                change = float((self._losses(then[moved], moved) - losses[moved]).sum()) / len(now)
                costs[index] = change if kept[index] else -change
        return costs.clamp_min(0)

    def _changes(self, now: torch.Tensor, kept: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(expert, routing if it goes or comes back, which tokens that moves), for every expert."""
        for index in range(len(kept)):
            other = kept.clone()
            other[index] = not kept[index]
            if bool(other.any()):
                then = self._routing(other)
                # Dropping an expert may move even tokens that never chose it, because it counts in its group's score.
                yield index, then, torch.where(~torch.isclose(now, then, rtol=1e-4, atol=1e-6).all(-1))[0]

    def _reached(self, now: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Which experts [tokens, experts] a token may go to when one expert goes or comes back."""
        found = torch.zeros_like(self._known)
        for _, then, moved in self._changes(now, kept):
            found[moved] |= then[moved] != 0
        return found

    @contextmanager
    def _router_at_hand(self) -> Iterator[None]:
        layer = self._layer
        holders = [layer.router] if layer.bias_holder in (None, layer.router) else [layer.router, layer.bias_holder]
        self._logits = _KnownLogits()
        self._inputs = self._rows(self._samples.hidden)
        with at_hand(holders, self._device):
            yield
        del self._inputs, self._logits

    def _routing(self, kept: torch.Tensor) -> torch.Tensor:
        """The router's weights when it chooses only among `kept`, [tokens, experts]; 0 for experts not chosen."""
        with choosing_among(self._layer, kept), self._logits:
            weights, indices = route(self._layer, self._inputs)
        return torch.zeros(self._before.shape).scatter_(1, indices.cpu(), weights.float().cpu())

    def _rows(self, tensor: torch.Tensor, part: torch.Tensor | None = None) -> torch.Tensor:
        """The rows of `tensor` for the tokens numbered `part`, or for all."""
        rows = self._samples.layer_tokens
        return float32_copy(tensor[..., rows if part is None else rows[part], :], self._device)

    def _losses(self, routing: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """KL that `routing` causes at each of `tokens` (all if None), float64 [len(routing)]."""
        chosen = slice(None) if tokens is None else tokens
        change = ((routing - self._before[chosen]) * self._products[:, chosen]).sum(-1)
        return change.double().square().mean(0) / 2

    def _compute(self, wanted: torch.Tensor) -> None:
        """Have g . f_e(x) for all pairs of token and expert that `wanted` [tokens, experts] marks."""
        with Arrivals() as arrivals:
            for index in self._layer.live_experts:
                tokens = (wanted[:, index] & ~self._known[:, index]).nonzero().flatten()
                if not len(tokens):
                    continue
                own, products = ExpertWeights.of(self._layer, index, self._device), self._products[:, :, index]
                for part in tokens.split(_ROWS):
                    hidden, gradient = (self._rows(t, part) for t in (self._samples.hidden, self._samples.gradient))
                    arrivals.send((own(hidden) * gradient).sum(-1), partial(products.index_copy_, 1, part))
                self._known[tokens, index] = True
        self._results.put(f"products.{self._layer.name}", {"products": self._products, "known": self._known})


class _KnownLogits(TorchFunctionMode):
    """Computes the one matrix product of a router the first time, and afterwards remembers it."""

    def __init__(self) -> None:
        super().__init__()
        self._known: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.linear:
            return func(*args, **(kwargs or {}))
        if self._known is None:
            self._known = func(*args, **(kwargs or {}))
        return self._known
