"""Samples of every layer, from one forward and one backward pass: a block at a time, experts one after the other.

Going forward, the input of every block is kept. Going backward, the gradient of the loss is carried from block to
block; autograd looks into one block only, and not into its experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial

import torch
from torch import nn

from ..errors import MoeCollabError
from ..moe_model import MoELayer
from .experts import ExpertWeights
from .head import HeadGradients
from .progress import stage
from .routing import Routing
from .samples import DRAWS, LayerSamples, LinearRecorder, Sampler, sampled
from .stream import Masks, Stream

__all__ = ["FisherPass"]


class FisherPass:
    """One pass of `stream` there and back. Afterwards `layers` and `linears` hold what was asked for, by name.

    The gradients of `DRAWS` losses are carried back together, so that weights are read once for all.

    `kept` masks experts of some layers. Raises `MoeCollabError` naming the layer, and the calibration sequence, whose
    inputs or gradients are NaN or infinite.
    """

    def __init__(
        self,
        stream: Stream,
        layers: Collection[str],
        linears: Mapping[str, nn.Linear],
        kept: Masks | None = None,
        seed: int = 0,
    ) -> None:
        self._stream, self._wanted, self._kept, self._seed = stream, set(layers), kept or {}, seed
        self._modules, self._sampler = linears, Sampler(stream.scratch, stream.dtype)
        self._recorder = LinearRecorder(linears, stream.data, self._sampler)
        self.layers: dict[str, LayerSamples] = {}
        self.linears = self._recorder.finished
        if not bool(stream.data.valid.any()):
            raise MoeCollabError("calibration reached no token. Give oneshot() a non-empty dataset.")
        stream.scratch.check_room(self._room_needed(), f"calibration with {stream.data.num_tokens} tokens")
        with stream.running():
            inputs = self._forward()
            self._backward(inputs)

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

    def _forward(self) -> dict[str, torch.Tensor]:
        """Block name -> its input [tokens, H]; under "" the last block's output."""
        stream, names = self._stream, self._stream.decoder.names
        inputs = {names[0]: stream.embed(f"{names[0]}.input")}
        for name, following in stage("samples, forward", list(zip(names, [*names[1:], ""], strict=True))):
            hidden = inputs[name]
            inputs[following] = stream.room(f"{following}.input", hidden.shape[1])
            with stream.block(name, self._kept):
                output = None
                if layer := stream.layers.get(name):
                    routing = stream.route(name, hidden)
                    output = stream.combine(layer, routing)
                    routing.discard()
                stream.advance(name, hidden, output, inputs[following])
        return inputs

    def _backward(self, inputs: dict[str, torch.Tensor]) -> None:
        """Carry the gradient back from the logits, as far as anything is wanted."""
        stream = self._stream
        gradient = self._of_head(inputs.pop(""))
        self._recorder.keep()
        for position, name in enumerate(stage("samples, backward", stream.decoder.names[::-1])):
            if not self._wanted_below(name):
                break
            hidden = inputs.pop(name)
            into = self._room(f"gradient.{'even' if position % 2 else 'odd'}", hidden.shape[1])
            with stream.block(name, self._kept):
                if layer := stream.layers.get(name):
                    self._through_experts(name, layer, hidden, gradient, into)
                else:
                    for index in range(len(stream.data)):
                        self._through(name, index, hidden, [gradient], into)
            stream.scratch.discard(f"{name}.input")
            self._recorder.keep()
            gradient = into

    def _room(self, name: str, width: int) -> torch.Tensor:
        """Zeros [draws, tokens, width] in scratch, float32."""
        return self._stream.scratch.zeros(name, (DRAWS, self._stream.data.num_tokens, width), torch.float32)

    def _of_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """d loss / d (the last block's output), [draws, tokens, H]."""
        stream = self._stream
        head = stream.model.get_output_embeddings()
        name = next((name for name, module in self._modules.items() if module is head), None)
        gradient = self._room("gradient.even", hidden.shape[1])
        found = HeadGradients(stream, DRAWS, self._seed)
        for index in range(len(stream.data)):
            limit = 0 if name is None else self._recorder.limit(len(found.head.weight))
            seen = found.of(index, hidden, gradient, limit)
            if name is not None:
                self._recorder.add(name, *seen)
        return gradient

    def _wanted_below(self, name: str) -> bool:
        """Whether block `name`, or one before it, has anything that samples are wanted of."""
        names = self._stream.decoder.names
        return any(
            wanted.startswith(f"{block}.")
            for block in names[: names.index(name) + 1]
            for wanted in (*self._wanted, *self._modules)
        )

    def _through_experts(
        self, name: str, layer: MoELayer, hidden: torch.Tensor, gradient: torch.Tensor, into: torch.Tensor
    ) -> None:
        """The backward pass of a block with routed experts: behind them, through them, and before them."""
        stream = self._stream
        affine = self._is_affine(name, layer, hidden, gradient)
        output = None if affine else stream.combine(layer, stream.route(name, hidden))
        routing, behind = self._behind_experts(name, layer, hidden, gradient, output)
        if layer.name in self._wanted:
            self.layers[layer.name] = sampled(
                layer.name, routing, behind, stream.data.valid, layer.num_experts, self._sampler
            )
        if self._wanted_before(name):
            above, of_weights = self._experts_gradients(layer, routing, behind)
            for index in range(len(stream.data)):
                self._through(name, index, hidden, [gradient, above, of_weights], into, output)
        routing.discard()

    def _wanted_before(self, name: str) -> bool:
        """Whether samples are wanted of a Linear of block `name`, or of anything before it."""
        names = self._stream.decoder.names
        position = names.index(name)
        own = any(linear.startswith(f"{name}.") for linear in self._modules)
        return own or (position > 0 and self._wanted_below(names[position - 1]))

    def _behind_experts(
        self,
        name: str,
        layer: MoELayer,
        hidden: torch.Tensor,
        gradient: torch.Tensor,
        output: torch.Tensor | None,
    ) -> tuple[Routing, torch.Tensor]:
        """(what the experts get, d loss / d (their output) [draws, tokens, H]); `output` None stands for zeros."""
        stream = self._stream
        routing = Routing(name, stream.data, stream.scratch)
        behind = self._room("behind", hidden.shape[1])
        for index in range(len(stream.data)):
            span = stream.data.span(index)
            value = torch.zeros_like(behind[0, span]) if output is None else output[span]
            found = self._behind(name, layer, index, hidden, gradient, value, partial(routing.see, index))
            stream.check(index, f"{layer.name}: the gradients at the experts' outputs", found.transpose(0, 1))
            behind[:, span] = found.cpu()
        return routing, behind

    def _is_affine(self, name: str, layer: MoELayer, hidden: torch.Tensor, gradient: torch.Tensor) -> bool:
        """Whether the block only adds its experts' output, scaled, to the rest: then gradients do not depend on it."""
        stream = self._stream
        spans = (stream.data.span(index) for index in range(len(stream.data)))
        first = next((index for index, span in enumerate(spans) if bool(gradient[:, span].any())), 0)
        noise = torch.randn(hidden[stream.data.span(first)].shape, generator=torch.Generator().manual_seed(0))
        found = (
            self._behind(name, layer, first, hidden, gradient, value, lambda *_: None)
            for value in (torch.zeros_like(noise), noise)
        )
        return torch.equal(*found)

    def _behind(
        self,
        name: str,
        layer: MoELayer,
        index: int,
        hidden: torch.Tensor,
        gradient: torch.Tensor,
        output: torch.Tensor,
        see: Callable[..., None],
    ) -> torch.Tensor:
        """d loss / d `output` [draws, n, H]; `output` [n, H] is what the experts put out for micro-batch `index`."""
        stream = self._stream
        own = output.to(stream.device, torch.float32).requires_grad_()

        def replacement(*given: torch.Tensor) -> torch.Tensor:
            see(*given)
            return own

        with stream.experts_replaced(layer, replacement), torch.enable_grad():
            found = stream.call(name, index, stream.rows(hidden, index))
        back = (torch.autograd.grad(found, own, stream.rows(g, index), retain_graph=True)[0] for g in gradient)
        return torch.stack(list(back))

    @torch.no_grad()
    def _experts_gradients(
        self, layer: MoELayer, routing: Routing, behind: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """d loss / d (the experts' input) [draws, tokens, H], and by the router's weights [draws, tokens, k]."""
        stream = self._stream
        above = self._room("above", behind.shape[2])
        of_weights = torch.zeros(DRAWS, *routing.weights.shape)
        for expert in layer.live_experts:
            own = ExpertWeights.of(layer, expert, stream.device)
            for _, (tokens, slots) in routing.parts(expert):
                weights = routing.weights[tokens, slots].to(stream.device)
                hidden = routing.hidden[tokens].to(stream.device)
                for draw in range(DRAWS):
                    gradient = behind[draw, tokens].to(stream.device)
                    output, found = own.backward(hidden, gradient * weights[:, None])
                    above[draw].index_add_(0, tokens, found.cpu())
                    of_weights[draw, tokens, slots] = (output * gradient).sum(-1).cpu()
        return above, of_weights

    def _through(
        self,
        name: str,
        index: int,
        hidden: torch.Tensor,
        gradients: list[torch.Tensor],
        into: torch.Tensor,
        output: torch.Tensor | None = None,
    ) -> None:
        """The backward pass of block `name` for micro-batch `index`, the experts' own left out.

        `gradients` are those by the block's output and, if it has experts, by their inputs and the router's weights;
        `output` is what the experts put out, None for zeros.
        """
        stream, span = self._stream, self._stream.data.span(index)
        own = stream.rows(hidden, index).requires_grad_()
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        reached: list[torch.Tensor] = []

        def replacement(inputs: torch.Tensor, _indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            reached.extend((inputs, weights))
            return torch.zeros_like(inputs) if output is None else output[span].to(inputs)

        layer = stream.layers.get(name)
        handles = [
            module.register_forward_hook(partial(_see, seen, linear_name))
            for linear_name, module in self._modules.items()
            if linear_name.startswith(f"{name}.")
        ]
        try:
            with torch.enable_grad():
                if layer is None:
                    found = stream.call(name, index, own)
                else:
                    with stream.experts_replaced(layer, replacement):
                        found = stream.call(name, index, own)
        finally:
            for handle in handles:
                handle.remove()
        ends = [found.flatten(0, 1), *reached]
        sources = [own, *(result for _, result in seen.values())]
        of_linears: dict[str, list[torch.Tensor]] = {linear_name: [] for linear_name in seen}
        for draw in range(DRAWS):
            wanted = [
                (end, gradient[draw, span].to(stream.device, end.dtype))
                for end, gradient in zip(ends, gradients, strict=True)
                if end.requires_grad
            ]
            reached_ends, at_ends = zip(*wanted, strict=True)
            back = torch.autograd.grad(reached_ends, sources, at_ends, allow_unused=True, retain_graph=True)
            into[draw, span] = back[0].flatten(0, 1).cpu()
            for linear_name, of_output in zip(seen, back[1:], strict=True):
                if of_output is not None:
                    of_linears[linear_name].append(of_output)
        for linear_name, of_outputs in of_linears.items():
            if of_outputs:
                self._recorder.see(linear_name, index, seen[linear_name][0], torch.stack(of_outputs))


def _see(
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]], name: str, _module: nn.Module, args: tuple, output: torch.Tensor
) -> torch.Tensor:
    # A copy, because the modules that follow may change the output in place.
    result = output.clone()
    seen[name] = args[0].detach(), result
    return result
