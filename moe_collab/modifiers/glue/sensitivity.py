"""What rounding each expert tensor costs: measured on the tokens the router sent to the expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...allocation import CostTable
from ...errors import MoeCollabError
from ...formats import Scheme
from ...moe_model import MoELayer
from .routing_tap import RoutingTap

__all__ = ["Sensitivity"]

MAX_TOKENS = 256
"""Routed tokens kept per expert; their error stands for that of all."""

_HALVES = (("gate_proj", "up_proj"), ("down_proj",))


@dataclass
class _Seen:
    """What one expert saw: the first tokens routed to it."""

    inputs: list[torch.Tensor] = field(default_factory=list)
    """Parts [tokens, H]."""
    weights: list[torch.Tensor] = field(default_factory=list)
    """The router's weights of these tokens, in parts [tokens]."""
    kept: int = 0
    """Tokens that are kept in the two lists."""
    total: int = 0
    """All tokens that were routed to the expert."""


class Sensitivity:
    """Measures, for each expert tensor and scheme, the mean over all tokens of g_t^2 ||f(x_t) - f_b(x_t)||^2.

    f is the expert, f_b the same with that tensor rounded, g_t the router's weight, 0 for tokens that are not routed to
    the expert. Gate and up are one fused matrix, so they are rounded together and get half of the cost each.
    """

    def __init__(
        self, rounder: Callable[[torch.Tensor, Scheme], torch.Tensor], options: Callable[[str], Sequence[Scheme]]
    ) -> None:
        """`rounder` returns a weight rounded to a scheme; `options` returns the schemes to try for a matrix's name."""
        self._round, self._options = rounder, options
        self._seen: dict[str, list[_Seen]] = {}
        self._layers: dict[str, MoELayer] = {}
        self._tokens: dict[str, int] = {}
        self._table = CostTable()

    def watch(self, layer: MoELayer) -> None:
        """Begin to count and keep tokens of `layer`."""
        self._layers[layer.name] = layer
        self._seen[layer.name] = [_Seen() for _ in range(layer.num_experts)]
        self._tokens[layer.name] = 0

    def see(self, layer: MoELayer, tap: RoutingTap, _module: object, args: tuple, _out: object) -> None:
        """Hook of the experts container: keep a sample of the tokens routed to each expert."""
        hidden_states = args[0].detach().reshape(-1, args[0].shape[-1])
        self._tokens[layer.name] += len(hidden_states)
        for expert, seen in enumerate(self._seen[layer.name]):
            tokens, weights = tap.tokens_of(expert)
            seen.total += len(tokens)
            chosen = tokens[: MAX_TOKENS - seen.kept]
            if len(chosen):
                seen.inputs.append(hidden_states[chosen])
                seen.weights.append(weights[: len(chosen)].detach())
                seen.kept += len(chosen)

    @torch.no_grad()
    def close(self, layer: MoELayer) -> None:
        """Compute the costs of a layer whose tokens have all been seen; closing twice does nothing."""
        if layer.name not in self._seen:
            return
        everything = self._seen.pop(layer.name)
        self._table.routed_tokens[layer.name] = [seen.total for seen in everything]
        self._table.tokens = self._tokens[layer.name]
        for index, seen in ((live, everything[live]) for live in layer.live_experts):
            for half in _HALVES:
                schemes = self._options(f"{layer.experts_name}.{index}.{half[0]}")
                costs = (self._measure if seen.total else self._unseen)(layer, index, half, schemes, seen)
                for projection in half:
                    name = f"{layer.experts_name}.{index}.{projection}"
                    self._table.add(name, schemes, [cost / len(half) for cost in costs])

    def finished(self, factors: Mapping[str, float]) -> CostTable:
        """All costs, in nats of KL per token: squared errors at each layer's output, times `factors` (layer -> KL)."""
        for layer in self._layers.values():
            self.close(layer)
            for name in (name for name, *_ in layer.projections() if name in self._table.costs):
                self._table.costs[name] = {s: c * factors[layer.name] for s, c in self._table.costs[name].items()}
        return self._table

    def _measure(
        self, layer: MoELayer, index: int, half: tuple[str, ...], schemes: Sequence[Scheme], seen: _Seen
    ) -> list[float]:
        expert = layer.expert(index)
        inputs, weights = torch.cat(seen.inputs), torch.cat(seen.weights).double()
        exact = _forward(expert, inputs, {}).double()
        if not torch.isfinite(exact).all():
            raise MoeCollabError(
                f"{layer.experts_name}.{index}: its output on the calibration tokens is NaN or infinite. "
                "Check the model and the data; nothing was changed."
            )
        per_token = seen.total / seen.kept / self._tokens[layer.name]
        costs = []
        for scheme in schemes:
            rounded = {p: self._round(getattr(expert, p).weight, scheme) for p in half}
            error = _forward(expert, inputs, rounded).double() - exact
            costs.append(float((error.square().sum(-1) * weights.square()).sum()) * per_token)
        return costs

    def _unseen(
        self, layer: MoELayer, index: int, half: tuple[str, ...], schemes: Sequence[Scheme], _seen: _Seen
    ) -> list[float]:
        """Costs if no token was routed to the expert: tiny ones, which prefer schemes that round the weights better."""
        weights = [getattr(layer.expert(index), p).weight for p in half]
        return [1e-12 * sum(float((w - self._round(w, s)).float().square().mean()) for w in weights) for s in schemes]


def _forward(expert: Any, inputs: torch.Tensor, replaced: dict[str, torch.Tensor]) -> torch.Tensor:
    """The expert's output with some weights replaced, hooks not run.

    Not torch.func.functional_call: it assigns parameters, which llm-compressor's offload cache takes for updates.
    """

    def apply(projection: str, x: torch.Tensor) -> torch.Tensor:
        linear = getattr(expert, projection)
        return torch.nn.functional.linear(x, replaced.get(projection, linear.weight), linear.bias)

    return apply("down_proj", expert._apply_gate(torch.cat([apply("gate_proj", inputs), apply("up_proj", inputs)], -1)))
