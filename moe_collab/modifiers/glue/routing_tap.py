"""Which tokens a router sent to which expert, seen from inside an expert's own hooks."""

from __future__ import annotations

from functools import partial

import torch
from llmcompressor.modeling.moe.context import get_calibrate_all_experts_flag
from llmcompressor.modifiers import Modifier

from ...moe_model import MoELayer
from ...statistics import routed_weights

__all__ = ["RoutingTap"]


class RoutingTap:
    """Remembers the routing of the current batch of one layer; register before the experts' own hooks."""

    def __init__(self, modifier: Modifier, layer: MoELayer) -> None:
        self.layer = layer
        self._indices: torch.Tensor | None = None
        self._weights: torch.Tensor | None = None
        modifier.register_hook(layer.experts, partial(self._remember), "forward_pre", with_kwargs=True)

    def _remember(self, _module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        named = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
        self._indices, self._weights = named["top_k_index"], named["top_k_weights"]

    def tokens_of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(token ids, router weights) of the current batch's tokens that go to `expert`."""
        assert self._indices is not None and self._weights is not None
        return routed_weights(self._indices, self._weights, expert)

    def routed(self, expert: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `rows` [n, features] inside `expert`, those the router sent there, with router weights [n].

        With `moe_calibrate_all_experts` every token runs through every expert, so the others are left out.
        """
        tokens, weights = self.tokens_of(expert)
        rows = rows.reshape(-1, rows.shape[-1])
        return (rows[tokens] if get_calibrate_all_experts_flag() else rows), weights
