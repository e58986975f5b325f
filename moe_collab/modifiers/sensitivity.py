"""What rounding each expert tensor costs: the output error on the tokens the router sent to the expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..architectures import MoELayer
from ..errors import MoeCollabError
from .routing import RoutingTap

__all__ = ["Sensitivity"]


class Sensitivity:
    """Per expert tensor and bit-width: sum_t g_t^2 ||(W - W_b) x_t||^2 through the diagonal second moment of x.

    g_t is the router's weight for token t. One float64 vector per expert and input is all that is kept of
    the activations, and only until the layer is closed.
    """

    def __init__(self, rounder: Callable[[torch.Tensor, int], torch.Tensor], bits: Sequence[int]) -> None:
        self._round, self._bits = rounder, [b for b in bits if b != 16]
        self._inputs: dict[str, torch.Tensor] = {}
        self._hidden: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, torch.Tensor] = {}
        self.costs: dict[str, dict[int, float]] = {}
        """Module name -> bits -> error; 16 bits cost nothing."""
        self.routed_tokens: dict[str, list[int]] = {}

    def watch(self, layer: MoELayer) -> None:
        """Make room for one layer's second moments."""
        down = layer.expert(0).down_proj
        self._inputs[layer.name] = torch.zeros(layer.num_experts, down.out_features, dtype=torch.float64)
        self._hidden[layer.name] = torch.zeros(layer.num_experts, down.in_features, dtype=torch.float64)
        self._tokens[layer.name] = torch.zeros(layer.num_experts, dtype=torch.int64)

    def see_inputs(self, layer: MoELayer, tap: RoutingTap, _module: object, args: tuple, _out: object) -> None:
        """Hook of the experts container: add x^2 of the tokens routed to each expert."""
        hidden_states = args[0].reshape(-1, args[0].shape[-1])
        for expert in range(layer.num_experts):
            tokens, weights = tap.tokens_of(expert)
            self._inputs[layer.name][expert] += _second_moment(hidden_states[tokens], weights)
            self._tokens[layer.name][expert] += len(tokens)

    def see_hidden(
        self, layer: MoELayer, tap: RoutingTap, expert: int, _module: object, args: tuple, _out: object
    ) -> None:
        """Hook of an expert's `down_proj`: add the square of its input."""
        rows, weights = tap.routed(expert, args[0])
        self._hidden[layer.name][expert] += _second_moment(rows, weights)

    def close(self, layer: MoELayer) -> None:
        """Compute the costs of a layer whose tokens have all been seen; closing twice does nothing."""
        if layer.name not in self._inputs:
            return
        moments = {"down_proj": self._hidden.pop(layer.name)}
        moments["gate_proj"] = moments["up_proj"] = self._inputs.pop(layer.name)
        self.routed_tokens[layer.name] = self._tokens.pop(layer.name).tolist()
        for name, expert, projection, module in layer.projections():
            moment = moments[projection][expert]
            if not torch.isfinite(moment).all():
                raise MoeCollabError(
                    f"{name}: its calibration inputs are NaN or infinite. Check the model and the data."
                )
            self.costs[name] = self._costs(module.weight.detach(), moment)

    def _costs(self, weight: torch.Tensor, moment: torch.Tensor) -> dict[int, float]:
        if not moment.any():
            # No token was routed here: an even, tiny weight still prefers the bits that round the weights best.
            moment = torch.full_like(moment, 1e-12)
        costs = {16: 0.0}
        for bits in self._bits:
            error = (weight - self._round(weight, bits)).double().square().sum(0).cpu()
            costs[bits] = float(error @ moment)
        return costs


def _second_moment(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_t (g_t x_t)^2 per feature; rows [tokens, features], weights [tokens]."""
    return (rows.float() * weights.float()[:, None]).double().square().sum(0).cpu()
