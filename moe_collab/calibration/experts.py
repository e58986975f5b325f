"""One expert as plain float32 tensors, and what it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import linear

from ..moe_model import MoELayer
from .at_hand import float32_copy

__all__ = ["ExpertWeights"]


@dataclass(frozen=True)
class ExpertWeights:
    """gate_up [2I, H] (gate's rows, then up's) and down [H, I] of one expert, in float32."""

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    activation: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def of(cls, layer: MoELayer, index: int, device: torch.device) -> ExpertWeights:
        """Expert `index` of a linearized layer, read from wherever it is offloaded to."""
        expert: Any = layer.expert(index)
        gate, up, down = expert.gate_proj, expert.up_proj, expert.down_proj
        biases = None if gate.bias is None else float32_copy(torch.cat([gate.bias, up.bias]), device)
        return cls(
            torch.cat([float32_copy(gate.weight, device), float32_copy(up.weight, device)]),
            float32_copy(down.weight, device),
            biases,
            None if down.bias is None else float32_copy(down.bias, device),
            expert._apply_gate,
        )

    def changed(self, gate: torch.Tensor | None, up: torch.Tensor | None, down: torch.Tensor | None) -> ExpertWeights:
        """The expert with other matrices gate_proj and up_proj [I, H] and down_proj [H, I]; None for its own."""
        own_gate, own_up = self.gate_up.chunk(2)
        gate_up = self.gate_up
        if gate is not None or up is not None:
            gate_up = torch.cat([own_gate if gate is None else gate, own_up if up is None else up])
        return replace(self, gate_up=gate_up, down=self.down if down is None else down)

    def inner(self, hidden: torch.Tensor, gate_up: torch.Tensor | None = None) -> torch.Tensor:
        """The input of down_proj [tokens, I] for `hidden` [tokens, H], with another gate_up [2I, H] if one is given."""
        return self.activation(linear(hidden, self.gate_up if gate_up is None else gate_up, self.gate_up_bias))

    def outer(self, inner: torch.Tensor) -> torch.Tensor:
        """The expert's output [tokens, H], not yet weighted by the router, for `inner` [tokens, I]."""
        return linear(inner, self.down, self.down_bias)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The expert's output [tokens, H], not yet weighted by the router."""
        return self.outer(self.inner(hidden))

    def gate_up_gradient(self, hidden: torch.Tensor, output_gradient: torch.Tensor) -> torch.Tensor:
        """d loss / d (gate_up output) [tokens, 2I], given d loss / d (expert's output) [tokens, H]."""
        return self._gradients(hidden, output_gradient)[1]

    def backward(self, hidden: torch.Tensor, output_gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(the expert's output, d loss / d hidden), both [tokens, H], given d loss / d output [tokens, H]."""
        inner, gradient = self._gradients(hidden, output_gradient)
        return self.outer(inner), gradient @ self.gate_up

    def _gradients(self, hidden: torch.Tensor, output_gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pre = linear(hidden, self.gate_up, self.gate_up_bias).requires_grad_()
        with torch.enable_grad():
            inner = self.activation(pre)
        return inner.detach(), torch.autograd.grad(inner, pre, output_gradient @ self.down)[0]
