"""`Stream`: a model's blocks over calibration tokens, one block at a time, its experts one after the other.

A block of a MoE model is too large to be in memory whole. So all micro-batches go through it as far as the experts,
whose inputs are kept; then each expert is read once and computes its tokens; then the micro-batches go through the
block again, which gets the experts' outputs from there. What is computed depends neither on where the weights are nor
on how much memory there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from ..architectures import logits_scaling
from ..decoder import Decoder
from ..distributed import share, wait
from ..errors import MoeCollabError
from ..moe_model import MoELayer, MoEModel
from .arrivals import Arrivals
from .at_hand import at_hand, compute_device, shadowed
from .experts import ExpertWeights
from .micro_batches import MicroBatches
from .progress import stage
from .routing import Part, Routing, choosing_among, experts_replaced
from .scratch import Scratch

__all__ = ["ExpertObserver", "Stream"]

Weights = Mapping[nn.Module, Mapping[str, torch.Tensor]]
"""Other values of modules' parameters, by name."""
Masks = Mapping[str, torch.Tensor]
"""MoE layer name -> experts that its router may choose [num_experts, bool], for layers where it may not choose all."""
WeightsOf = Callable[[MoELayer, int, torch.device], ExpertWeights]
"""What gives the weights of an expert of a layer, on a device."""


class ExpertObserver(Protocol):
    """Called with what one expert computes of one micro-batch."""

    def __call__(
        self, expert: int, part: Part, weights: torch.Tensor, inner: torch.Tensor, output: torch.Tensor
    ) -> None:
        """`weights` [n] of the router; `inner` [n, I] and `output` [n, H] of the expert, not yet weighted."""
        ...


class _Reached(Exception):
    """The experts have been called, so what the block would do after them need not be computed."""


class Stream:
    """The blocks of `model`, over the tokens of `data`, with room for intermediate results in `scratch`.

    Each process of `torchrun` sees to its `own` micro-batches of the data.
    """

    def __init__(self, model: Any, moe: MoEModel, data: MicroBatches, scratch: Scratch) -> None:
        self.model, self.moe, self.data, self.scratch = model, moe, data, scratch
        self.decoder, self.device = Decoder(model), compute_device()
        self.dtype: torch.dtype = model.dtype
        self.own = share(range(len(data)))
        self.layers: dict[str, MoELayer] = {}
        for layer in moe.layers:
            name = next(name for name in self.decoder.blocks if layer.name.startswith(f"{name}."))
            self.layers[name] = layer

    def batch(self, index: int) -> dict[str, torch.Tensor]:
        """Micro-batch `index` on the device where it is computed."""
        return {name: value.to(self.device) for name, value in self.data.batches[index].items()}

    def room(self, name: str, width: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Zeros [tokens, width] in scratch, of the model's type unless `dtype` is given."""
        return self.scratch.zeros(name, (self.data.num_tokens, width), dtype or self.dtype)

    def rows(self, tensor: torch.Tensor, index: int) -> torch.Tensor:
        """The rows of micro-batch `index` of `tensor` [tokens, width], in float32, as [rows, length, width]."""
        return tensor[self.data.span(index)].to(self.device, torch.float32).view(*self.data.shape(index), -1)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have what stands outside the blocks at hand within the block: final norm, rotary embeddings."""
        with at_hand(self.decoder.outside, self.device):
            yield

    @torch.no_grad()
    def embed(self, name: str) -> torch.Tensor:
        """The first block's input, [tokens, H], as `name` in scratch."""
        embedding = self.decoder.embedding
        found = self.room(name, embedding.embedding_dim)
        with shadowed({embedding: {"weight": embedding.weight.detach().to(self.device)}}):
            for index in self.own:
                hidden = self.decoder.embed(self.batch(index))
                found[self.data.span(index)] = hidden.flatten(0, 1).to("cpu", self.dtype)
        return found

    @contextmanager
    def block(
        self,
        name: str,
        kept: Masks | None = None,
        rounded: Weights | None = None,
    ) -> Iterator[None]:
        """Have block `name` at hand within the block, except for its routed experts.

        `kept` says what its router may choose, `rounded` gives modules of the block other weights.
        """
        layer = self.layers.get(name)
        experts = set() if layer is None else set(layer.experts.modules())
        dense = [module for module in self.decoder.blocks[name].modules() if module not in experts]
        with ExitStack() as stack:
            stack.enter_context(at_hand(dense, self.device))
            stack.enter_context(shadowed(rounded or {}))
            if layer is not None:
                stack.enter_context(choosing_among(layer, (kept or {}).get(layer.name)))
            yield

    def call(self, name: str, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """What block `name`, which is at hand, makes of `hidden` [rows, length, H] of micro-batch `index`."""
        call = self.decoder.calls(self.batch(index), hidden)[name]
        return call(self.decoder.blocks[name], hidden)

    @torch.no_grad()
    def route(self, name: str, hidden: torch.Tensor) -> Routing:
        """What the experts of block `name`, which is at hand, get if the block gets `hidden` [tokens, H].

        Raises `MoeCollabError` naming the layer and the calibration sequence if any of that is not finite.
        """
        layer = self.layers[name]
        routing = self.routing(name, hidden.shape[1])

        def reached(index: int, inputs: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            self.check(index, f"{layer.name}: the experts' inputs", inputs)
            self.check(index, f"{layer.name}: the router's weights", weights)
            routing.see(index, inputs, indices, weights)
            raise _Reached

        for index in self.own:
            with experts_replaced(layer, partial(reached, index)), suppress(_Reached):
                self.call(name, index, self.rows(hidden, index))
        wait()
        return routing

    def routing(self, name: str, width: int) -> Routing:
        """Of block `name`, to be filled in with what its experts see, `width` values a token."""
        return Routing(name, self.data, self.scratch, width, self.layers[name].top_k, self.own)

    @torch.no_grad()
    def combine(
        self,
        layer: MoELayer,
        routing: Routing,
        see: ExpertObserver | None = None,
        weights_of: WeightsOf = ExpertWeights.of,
    ) -> torch.Tensor:
        """The experts' weighted outputs, summed in the order of the experts, float32 [tokens, H].

        Each expert is read once. `see` is called with what it computes.
        """
        output = self.room("experts", routing.hidden.shape[1], torch.float32)
        with Arrivals() as arrivals:
            for expert in layer.live_experts:
                own = weights_of(layer, expert, self.device)
                for part in routing.parts(expert):
                    weights = routing.weights[part.tokens, part.slots].to(self.device)
                    inner = own.inner(routing.hidden[part.tokens].to(self.device))
                    found = own.outer(inner)
                    if see is not None:
                        see(expert, part, weights, inner, found)
                    arrivals.send(found * weights[:, None], partial(output.index_add_, 0, part.tokens))
        wait()
        return output

    @torch.no_grad()
    def advance(
        self,
        name: str,
        hidden: torch.Tensor,
        output: torch.Tensor | None,
        into: torch.Tensor,
        begin: Callable[[int], None] | None = None,
    ) -> None:
        """Write to `into` [tokens, H] what block `name`, which is at hand, makes of `hidden` [tokens, H].

        `output` [tokens, H] is what its experts put out, None for a block without routed experts. `begin` is called
        with the number of each micro-batch before that is computed.
        """
        layer = self.layers.get(name)
        for index in self.own:
            if begin is not None:
                begin(index)
            inputs = self.rows(hidden, index)
            if layer is None:
                found = self.call(name, index, inputs)
            else:
                assert output is not None
                own = output[self.data.span(index)].to(self.device)
                self.check(index, f"{layer.name}: the experts' outputs", own)
                with experts_replaced(layer, lambda *_, own=own: own):
                    found = self.call(name, index, inputs)
            self.check(index, f"{name}: its output", found.flatten(0, 1))
            into[self.data.span(index)] = found.flatten(0, 1).to("cpu", into.dtype)
        wait()

    def forward(
        self, name: str, what: str, through: Callable[[str, torch.Tensor, torch.Tensor], None], keep: bool = False
    ) -> dict[int, torch.Tensor]:
        """All blocks in order, as stage `what`: `through` gets a block's name, its input, and where its output goes.

        Returns position -> the input of the block there, [tokens, H], after the last the last block's output; without
        `keep` only that. They are in scratch, called `name` and their position. Blocks whose output an earlier process
        has finished are left out. Needs `running`.
        """
        blocks = self.decoder.names
        places = [f"{name}.{position}" for position in range(len(blocks) + 1)]
        found = self.found(name)
        if not found:
            found[0] = self.embed(places[0])
            self.scratch.finish(places[0])
        first = max(found)
        for position, block in enumerate(stage(what, blocks[first:]), start=first):
            following = self.room(places[position + 1], found[position].shape[1])
            through(block, found[position], following)
            self.scratch.finish(places[position + 1])
            found[position + 1] = following
            if not keep:
                self.scratch.discard(places[position])
                del found[position]
        return found

    def found(self, name: str) -> dict[int, torch.Tensor]:
        """Position -> what `forward` called `name` has finished and left there, in durable scratch."""
        positions = range(len(self.decoder.names) + 1)
        return {at: found for at in positions if (found := self.scratch.find(f"{name}.{at}")) is not None}

    def through(
        self,
        name: str,
        hidden: torch.Tensor,
        into: torch.Tensor,
        *,
        kept: Masks | None = None,
        rounded: Weights | None = None,
        weights_of: WeightsOf = ExpertWeights.of,
        factor: float = 1.0,
        see: ExpertObserver | None = None,
        look: Callable[[Routing, torch.Tensor], None] | None = None,
    ) -> None:
        """Write to `into` [tokens, H] what block `name` makes of `hidden` [tokens, H].

        `kept`, `rounded` and `weights_of` put other routers and weights in the place of the model's own, and `factor`
        multiplies the routed experts' outputs. `see` is called with what each expert computes, and `look` with the
        routing and the experts' outputs [tokens, H] while the block is at hand.
        """
        inside = set(self.decoder.blocks[name].modules())
        own = {module: weights for module, weights in (rounded or {}).items() if module in inside}
        with self.block(name, kept, own):
            output = None
            if layer := self.layers.get(name):
                routing = self.route(name, hidden)
                output = self.combine(layer, routing, see, weights_of)
                if factor != 1:
                    output *= factor
                if look is not None:
                    look(routing, output)
                routing.discard()
            self.advance(name, hidden, output, into)

    def last(
        self,
        name: str,
        kept: Masks | None = None,
        rounded: Weights | None = None,
        weights_of: WeightsOf = ExpertWeights.of,
        factors: Mapping[str, float] | None = None,
    ) -> torch.Tensor:
        """The last block's output [tokens, H]; as `through`, but `factors` are by MoE layer name. See `forward`."""

        def through(block: str, hidden: torch.Tensor, into: torch.Tensor) -> None:
            layer = self.layers.get(block)
            factor = 1.0 if layer is None else (factors or {}).get(layer.name, 1.0)
            self.through(block, hidden, into, kept=kept, rounded=rounded, weights_of=weights_of, factor=factor)

        return self.forward(name, "forward", through)[len(self.decoder.names)]

    def forget(self, name: str) -> None:
        """Give back the room of what `forward` or `last` called `name` left."""
        for position in range(len(self.decoder.names) + 1):
            self.scratch.discard(f"{name}.{position}")

    def finish(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """The input of lm_head [rows, length, H] for the last block's output `hidden`; needs `running`.

        If the model divides its logits by a constant, it is divided here instead.
        """
        return self.decoder.finish(self.batch(index), hidden) / logits_scaling(self.model.config)

    def check(self, index: int, what: str, tensor: torch.Tensor) -> None:
        """Raise `MoeCollabError` naming `what` and the calibration sequence if `tensor` [tokens, ...] is not finite."""
        bad = ~torch.isfinite(tensor.detach()).reshape(len(tensor), -1).all(-1)
        bad &= self.data.valid[self.data.span(index)].to(bad.device)
        if bool(bad.any()):
            token = self.data.span(index).start + int(bad.nonzero()[0])
            raise MoeCollabError(
                f"{what} on calibration sequence {self.data.row_of(token)} are NaN or infinite. Check the model and "
                "the data; nothing was changed."
            )
