"""Samples of every layer, from one forward and one backward pass: a block at a time, experts one after the other.

Going forward, the input of every block is kept. Going backward, the gradient of the loss is carried from block to
block; autograd looks into one block only, and not into its experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property

import torch
from torch import nn

from ..moe_model import MoELayer
from .block_gradients import BlockGradients, room_for_gradients
from .head import HeadGradients
from .progress import stage
from .routing import Routing
from .samples import DRAWS, LayerSamples, LinearRecorder, Sampler, sampled
from .stream import Masks, Stream

__all__ = ["BlockObserver", "FisherPass"]

BlockObserver = Callable[[str, torch.Tensor, torch.Tensor], None]
"""Called with a block's name, its output [tokens, H] and the gradients of the losses by that [draws, tokens, H]."""


class FisherPass:
    """One pass of `stream` there and back. Afterwards `layers` and `linears` hold what was asked for, by name.

    The gradients of `DRAWS` losses are carried back together, so that weights are read once for all. Everything is kept
    in scratch as `name`; of what an earlier process has finished there, in durable scratch, nothing is done again.
    Room is checked first, for this and for `later` bytes.

    `kept` masks experts of some layers; `look` is called with the routing of every layer, on the way there, and `see`
    with every block, from the last to the first, on the way back. Raises `MoeCollabError` naming the layer, and the
    calibration sequence, whose inputs or gradients are NaN or infinite.
    """

    def __init__(
        self,
        stream: Stream,
        layers: Collection[str],
        linears: Mapping[str, nn.Linear],
        kept: Masks | None = None,
        seed: int = 0,
        look: Callable[[MoELayer, Routing], None] | None = None,
        see: BlockObserver | None = None,
        name: str = "samples",
        later: int = 0,
    ) -> None:
        self._stream, self._wanted, self._kept, self._seed = stream, set(layers), kept, seed
        self._look, self._see = look, see
        self._modules, self._sampler, self._name = linears, Sampler(stream.scratch, stream.dtype), name
        self._recorder = LinearRecorder(linears, stream.data, self._sampler, name)
        self._back = BlockGradients(stream, linears, self._recorder)
        self.layers: dict[str, LayerSamples] = {}
        self.linears = self._recorder.finished
        stream.data.check_any()
        stream.scratch.check_room(self._room_needed() + later, f"calibration with {stream.data.num_tokens} tokens")
        with stream.running():
            self._backward()

    def _room_needed(self) -> int:
        """Most bytes that this pass and its samples take."""
        stream, sampler = self._stream, self._sampler
        tokens, width = stream.data.num_tokens, stream.decoder.embedding.embedding_dim
        inputs = (len(stream.decoder.names) + 1) * tokens * stream.dtype.itemsize
        at_once = (2 + 4 * DRAWS) * tokens * 4  # what the experts see and put out; four gradients for each draw
        row = sampler.dtype.itemsize + DRAWS * sampler.gradient_dtype.itemsize
        limits = (layer.num_experts * sampler.expert_tokens + sampler.layer_tokens for layer in stream.moe.layers)
        layers = width * (inputs + at_once + sum(min(tokens, limit) * row for limit in limits))
        return layers + sum(map(self._recorder.most_bytes, self._modules.values()))

    def _backward(self) -> None:
        """Carry the gradient back from the logits, as far as anything is wanted."""
        stream, scratch, names = self._stream, self._stream.scratch, self._stream.decoder.names
        places, done = [f"{self._name}.gradient.{at}" for at in range(len(names) + 1)], f"{self._name}.done"
        if scratch.find(done) is not None:
            self._find_layers(names)
            return
        reached = next((at for at in range(self._lowest, len(places)) if scratch.find(places[at]) is not None), None)
        if reached is None:
            inputs, reached = stream.forward(self._name, "samples, forward", self._there, keep=True), len(names)
            gradient = self._of_head(inputs[reached], places[reached])
        else:
            inputs, gradient = stream.found(self._name), scratch.found(places[reached])
            self._find_layers(names[reached:])
        for at in stage("samples, backward", range(self._lowest, reached)[::-1]):
            if self._see is not None:
                self._see(names[at], inputs[at + 1], gradient)
            into = room_for_gradients(stream, places[at], gradient.shape[2])
            self._through_block(names[at], inputs[at], gradient, into)
            self._recorder.keep()
            scratch.finish(places[at])
            scratch.discard(places[at + 1])
            scratch.discard(f"{self._name}.{at + 1}")
            del inputs[at + 1]
            gradient = into
        scratch.keep(done, torch.empty(0))
        scratch.discard(places[self._lowest])
        stream.forget(self._name)

    def _there(self, name: str, hidden: torch.Tensor, into: torch.Tensor) -> None:
        layer, look = self._stream.layers.get(name), self._look
        see = None if look is None or layer is None else lambda routing, _output: look(layer, routing)
        self._stream.through(name, hidden, into, kept=self._kept, look=see)

    @cached_property
    def _lowest(self) -> int:
        """The position of the first block that anything is wanted of."""
        if self._see is not None:
            return 0
        names, wanted = self._stream.decoder.names, (*self._wanted, *self._modules)
        own = (at for at, name in enumerate(names) if any(one.startswith(f"{name}.") for one in wanted))
        return min(own, default=len(names))

    def _find_layers(self, blocks: Sequence[str]) -> None:
        """Take the samples that an earlier process has finished, of the layers in `blocks`."""
        for layer in (self._stream.layers[name] for name in blocks if name in self._stream.layers):
            found = LayerSamples.find(self._stream.scratch, f"{self._name}.{layer.name}")
            if found is not None:
                self.layers[layer.name] = found

    def _through_block(self, name: str, hidden: torch.Tensor, gradient: torch.Tensor, into: torch.Tensor) -> None:
        """The backward pass of a block, and the samples of its layer."""
        stream, back = self._stream, self._back
        with stream.block(name, self._kept):
            layer = stream.layers.get(name)
            if layer is None:
                back.through(name, hidden, gradient, into)
                return
            routing, behind, output = back.behind_experts(name, hidden, gradient)
            if layer.name in self._wanted:
                place, valid = f"{self._name}.{layer.name}", stream.data.valid
                self.layers[layer.name] = sampled(place, routing, behind, valid, layer.num_experts, self._sampler)
            if self._wanted_before(name):
                back.before_experts(name, hidden, gradient, routing, behind, output, into)
            routing.discard()

    def _of_head(self, hidden: torch.Tensor, place: str) -> torch.Tensor:
        """d loss / d (the last block's output), [draws, tokens, H], kept as `place`."""
        stream = self._stream
        head = stream.model.get_output_embeddings()
        name = next((name for name, module in self._modules.items() if module is head), None)
        gradient = room_for_gradients(stream, place, hidden.shape[1])
        found = HeadGradients(stream, DRAWS, self._seed)
        limit = 0 if name is None else self._recorder.limit(len(found.head.weight))
        for index in stream.own:
            seen = found.of(index, hidden, gradient, limit)
            if name is not None:
                self._recorder.add(name, index, *seen)
        self._recorder.keep()
        stream.scratch.finish(place)
        return gradient

    def _wanted_before(self, name: str) -> bool:
        """Whether samples are wanted of a Linear of block `name`, or of anything before it."""
        own = any(linear.startswith(f"{name}.") for linear in self._modules)
        return own or self._stream.decoder.names.index(name) > self._lowest
