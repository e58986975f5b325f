"""Gradients carried back through one block: behind its experts, through them one after the other, and before them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from ..distributed import wait
from ..moe_model import MoELayer
from .arrivals import Arrivals
from .experts import ExpertWeights
from .routing import Routing, experts_replaced
from .samples import DRAWS, LinearRecorder
from .stream import Stream

__all__ = ["BlockGradients", "room_for_gradients"]


def room_for_gradients(stream: Stream, name: str, width: int) -> torch.Tensor:
    """Zeros [draws, tokens, width] in scratch, float32."""
    return stream.scratch.zeros(name, (DRAWS, stream.data.num_tokens, width), torch.float32)


class BlockGradients:
    """The backward pass of a block of `stream` that is at hand; `recorder` sees the Linears `modules` of it, by name.

    Everywhere `hidden` [tokens, H] is the block's input, `gradient` [draws, tokens, H] that of the losses by its
    output, and the gradients by its input are written to `into`, of the same shape.
    """

    def __init__(self, stream: Stream, modules: Mapping[str, nn.Linear], recorder: LinearRecorder) -> None:
        self._stream, self._modules, self._recorder = stream, modules, recorder

    def through(self, name: str, hidden: torch.Tensor, gradient: torch.Tensor, into: torch.Tensor) -> None:
        """The backward pass of block `name`, which has no routed experts."""
        for index in self._stream.own:
            self._through(name, index, hidden, [gradient], into)

    def behind_experts(
        self, name: str, hidden: torch.Tensor, gradient: torch.Tensor
    ) -> tuple[Routing, torch.Tensor, torch.Tensor | None]:
        """(what the experts get, d loss / d (their output) [draws, tokens, H], their output [tokens, H]).

        The output is None if the gradients do not depend on it.
        """
        stream, layer = self._stream, self._stream.layers[name]
        affine = self._is_affine(name, layer, hidden, gradient)
        output = None if affine else stream.combine(layer, stream.route(name, hidden))
        return *self._behind_experts(name, layer, hidden, gradient, output), output

    def before_experts(
        self,
        name: str,
        hidden: torch.Tensor,
        gradient: torch.Tensor,
        routing: Routing,
        behind: torch.Tensor,
        output: torch.Tensor | None,
        into: torch.Tensor,
    ) -> None:
        """The rest of the backward pass of block `name`, given what `behind_experts` has returned."""
        above, of_weights = self._experts_gradients(self._stream.layers[name], routing, behind)
        for index in self._stream.own:
            self._through(name, index, hidden, [gradient, above, of_weights], into, output)

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
        routing = stream.routing(name, hidden.shape[1])
        behind = room_for_gradients(stream, "behind", hidden.shape[1])
        for index in stream.own:
            span = stream.data.span(index)
            value = torch.zeros_like(behind[0, span]) if output is None else output[span]
            found = self._behind(name, layer, index, hidden, gradient, value, partial(routing.see, index))
            stream.check(index, f"{layer.name}: the gradients at the experts' outputs", found.transpose(0, 1))
            behind[:, span] = found.cpu()
        wait()
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

        with experts_replaced(layer, replacement), torch.enable_grad():
            found = stream.call(name, index, stream.rows(hidden, index))
        back = (torch.autograd.grad(found, own, stream.rows(g, index), retain_graph=True)[0] for g in gradient)
        return torch.stack(list(back))

    @torch.no_grad()
    def _experts_gradients(
        self, layer: MoELayer, routing: Routing, behind: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """d loss / d (the experts' input) [draws, tokens, H], and by the router's weights [draws, tokens, k]."""
        stream = self._stream
        above = room_for_gradients(stream, "above", behind.shape[2])
        of_weights = torch.zeros(DRAWS, *routing.weights.shape)
        with Arrivals() as arrivals:
            for expert in layer.live_experts:
                own = ExpertWeights.of(layer, expert, stream.device)
                for _, tokens, slots in routing.parts(expert):
                    weights = routing.weights[tokens, slots].to(stream.device)
                    hidden = routing.hidden[tokens].to(stream.device)
                    for draw in range(DRAWS):
                        gradient = behind[draw, tokens].to(stream.device)
                        output, found = own.backward(hidden, gradient * weights[:, None])
                        place = torch.tensor(draw), tokens, slots
                        arrivals.send(found, partial(above[draw].index_add_, 0, tokens))
                        arrivals.send((output * gradient).sum(-1), partial(of_weights.index_put_, place))
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
                    with experts_replaced(layer, replacement):
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
