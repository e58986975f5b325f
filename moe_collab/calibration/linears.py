"""Linears outside the experts, such as attention's: what they saw, what errors there cost, how to round them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import MoeCollabError
from ..formats import Scheme
from ..rounding import Grid, Rounder
from .moments import second_moments
from .samples import backward, frozen

__all__ = ["LinearSamples", "capture_linears"]

_TOKENS = 8192
"""Most tokens that are kept for each Linear, evenly taken from all batches."""


@dataclass(frozen=True)
class LinearSamples:
    """Tokens that one Linear saw, and the gradients of the loss by its output."""

    weight: torch.Tensor
    """float32 [rows, columns]."""
    inputs: torch.Tensor
    """float32 [tokens, columns]."""
    gradient: torch.Tensor
    """float32 [tokens, rows]."""

    def rounded(self, rounder: Rounder, scheme: Scheme) -> Grid:
        """The weight rounded to `scheme`, as a grid that is a batch of one."""
        return rounder(self.weight[None], second_moments(self.inputs, self.gradient)[None], scheme)

    def costs(self, rounder: Rounder, schemes: Sequence[Scheme]) -> list[float]:
        """KL per token of rounding at each of `schemes`: E[(g . (W_b - W) x)^2] / 2 (see `samples`)."""
        moments = second_moments(self.inputs, self.gradient)[None]
        found = []
        for scheme in schemes:
            error = rounder(self.weight[None], moments, scheme).values()[0] - self.weight
            change = ((self.inputs @ error.T) * self.gradient).sum(-1)
            found.append(float(change.double().square().mean()) / 2)
        return found


def capture_linears(
    model: Any, linears: Mapping[str, nn.Linear], batches: Sequence[Mapping[str, torch.Tensor]], seed: int = 0
) -> dict[str, LinearSamples]:
    """Samples of `linears` by name, from one forward and backward pass. Raises `MoeCollabError` for NaN or infinity."""
    if not linears:
        return {}
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
    with frozen(model):
        for batch in batches:
            limit = max(1, _TOKENS // len(batches))
            seen: dict[str, list[torch.Tensor]] = {}
            head: dict[str, torch.Tensor] = {}
            # During calibration llm-compressor replaces the forward of lm_head, so `backward` hands over what it sees.
            handles = [
                module.register_forward_hook(partial(_see, seen, name))
                for name, module in linears.items()
                if module is not model.get_output_embeddings()
            ]
            try:
                valid = backward(model, batch, generator, head)
            finally:
                for handle in handles:
                    handle.remove()
            for name, module in linears.items():
                if module is model.get_output_embeddings():
                    parts[name].append(_thinned(head["inputs"], head["gradient"], limit))
                elif name in seen:
                    inputs, output = seen[name]
                    assert output.grad is not None
                    chosen = valid.flatten() if inputs.shape[:-1].numel() == valid.numel() else slice(None)
                    inputs, gradient = (t.reshape(-1, t.shape[-1])[chosen] for t in (inputs, output.grad))
                    parts[name].append(_thinned(inputs, gradient, limit))
    return {name: _joined(name, linears[name], parts[name]) for name in linears if parts[name]}


def _see(seen: dict[str, list[torch.Tensor]], name: str, _module: nn.Module, args: tuple, output: Any) -> torch.Tensor:
    # A copy, because the modules that follow may change the output in place.
    result = output.clone()
    result.retain_grad()
    seen[name] = [args[0].detach(), result]
    return result


def _thinned(inputs: torch.Tensor, gradient: torch.Tensor, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = torch.linspace(0, len(inputs) - 1, min(limit, len(inputs))).long()
    return inputs[chosen].float(), gradient[chosen].float()


def _joined(name: str, module: nn.Linear, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> LinearSamples:
    inputs, gradient = (torch.cat(column) for column in zip(*parts, strict=True))
    if not (torch.isfinite(inputs).all() and torch.isfinite(gradient).all()):
        raise MoeCollabError(
            f"{name}: its inputs or gradients on the calibration data are NaN or infinite. "
            "Check the model and the data; nothing was changed."
        )
    return LinearSamples(module.weight.detach().float(), inputs, gradient)
