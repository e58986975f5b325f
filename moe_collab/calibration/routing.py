"""What a layer's router chose for calibration tokens, and routers that choose among fewer experts on trial."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..architectures import MASKED_BIAS
from ..decoder import replaced_forward
from ..moe_model import MoELayer
from .at_hand import shadowed
from .micro_batches import MicroBatches
from .scratch import Scratch

__all__ = ["Part", "Routing", "choosing_among", "experts_replaced", "route"]


class Part(NamedTuple):
    """The tokens of one micro-batch that go to one expert."""

    batch: int
    """The number of the micro-batch."""
    tokens: torch.Tensor
    """Their numbers, ascending, [n]."""
    slots: torch.Tensor
    """In which of the router's choices the expert stands, [n]."""


class Routing:
    """What the experts of one layer see: their input, the experts chosen, and the router's weights, for all tokens.

    Filled micro-batch by micro-batch, `width` values and `top_k` choices for each token. Padding tokens go to no
    expert. Each process of `torchrun` fills in and goes through its `own` micro-batches.
    """

    def __init__(
        self, name: str, data: MicroBatches, scratch: Scratch, width: int, top_k: int, own: Sequence[int]
    ) -> None:
        self._name, self._data, self._scratch, self._own = name, data, scratch, own
        self._parts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        total = data.num_tokens
        self.hidden = scratch.zeros(f"{name}.hidden", (total, width), torch.float32)
        self.indices = scratch.zeros(f"{name}.indices", (total, top_k), torch.int16)
        self.weights = scratch.zeros(f"{name}.weights", (total, top_k), torch.float32)

    def see(self, index: int, hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> None:
        """Take down what the experts get for micro-batch `index`: [tokens, H] and twice [tokens, k]."""
        span = self._data.span(index)
        valid = self._data.valid[span]
        self.hidden[span] = hidden.detach().cpu()
        self.indices[span] = torch.where(valid[:, None], indices.detach().cpu(), -1).short()
        self.weights[span] = weights.detach().float().cpu()

    def part(self, index: int, expert: int) -> Part:
        """The tokens of micro-batch `index` that go to `expert`."""
        if index not in self._parts:
            chosen = self.indices[self._data.span(index)].flatten().long()
            self._parts[index] = chosen.argsort(stable=True), torch.bincount(chosen + 1).cumsum(0)
        order, ends = self._parts[index]
        if expert + 1 >= len(ends):
            return Part(index, order[:0], order[:0])
        pairs = order[int(ends[expert]) : int(ends[expert + 1])]
        top_k = self.indices.shape[1]
        return Part(index, self._data.span(index).start + pairs // top_k, pairs % top_k)

    def parts(self, expert: int) -> Iterator[Part]:
        """The tokens that go to `expert`, for every own micro-batch that has any."""
        for index in self._own:
            part = self.part(index, expert)
            if len(part.tokens):
                yield part

    def discard(self) -> None:
        """Give back the room that it takes."""
        for what in ("hidden", "indices", "weights"):
            self._scratch.discard(f"{self._name}.{what}")
        self.hidden = self.indices = self.weights = torch.empty(0)


def route(layer: MoELayer, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, indices), [tokens, k] each, that the layer's router gives for `hidden` [tokens, H].

    The router's tensors have to be at hand, and it must be one that returns what it chose.
    """
    holder = layer.bias_holder
    beside = () if holder is None or holder is layer.router else (holder.e_score_correction_bias,)
    return layer.routing(layer.router(hidden, *beside))


@contextmanager
def experts_replaced(layer: MoELayer, replacement: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Let `replacement` compute the experts' output within the block, from [tokens, H] and twice [tokens, k]."""

    def forward(*args: Any, **named: Any) -> torch.Tensor:
        given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | named
        hidden = given["hidden_states"]
        flat = hidden.reshape(-1, hidden.shape[-1])
        return replacement(flat, given["top_k_index"], given["top_k_weights"]).reshape(hidden.shape)

    with replaced_forward(layer.experts, forward):
        yield


@contextmanager
def choosing_among(layer: MoELayer, kept: torch.Tensor | None) -> Iterator[None]:
    """Let the layer's router choose only experts that `kept` [num_experts, bool] marks; None for all.

    The other experts get a selection bias with which they are never chosen, or, in routers without one, a logit of
    minus infinity, as if the router had no rows for them.
    """
    holder: Any = layer.bias_holder
    if kept is None or bool(kept.all()):
        yield
    elif holder is None:
        stock = type(layer.router).forward
        with replaced_forward(layer.router, partial(_without, stock, layer.router, ~kept)):
            yield
    else:
        bias = holder.e_score_correction_bias.detach()
        masked = torch.where(kept.to(bias.device), bias, MASKED_BIAS).to(bias.dtype)
        with shadowed({holder: {"e_score_correction_bias": masked}}):
            yield


def _without(forward: Callable, router: nn.Module, gone: torch.Tensor, *args: Any) -> Any:
    with _LogitsWithout(gone):
        return forward(router, *args)


class _LogitsWithout(TorchFunctionMode):
    """Sets the logits of the experts `gone` to minus infinity while a router's forward runs.

    The logits [..., experts] are the result of the one matrix product that a router computes.
    """

    def __init__(self, gone: torch.Tensor) -> None:
        super().__init__()
        self._gone = gone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not nn.functional.linear:
            return result
        return result.masked_fill(self._gone.to(result.device), -torch.inf)
