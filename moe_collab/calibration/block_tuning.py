"""Scales and codes tuned block by block, so that the rounded model's blocks put out what the original's do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch

from ..architectures import PROJECTIONS
from ..decoder import replaced_forward
from ..distributed import wait
from ..moe_model import MoELayer, MoEModel
from .arrivals import Arrivals
from .at_hand import float32_copy, shadowed
from .block_lessons import BlockLessons
from .experts import ExpertWeights
from .loose_grids import LooseGrid, forward_with, learn_grids
from .rounded_model import RoundedModel
from .routing import Routing, experts_replaced
from .stream import Stream

__all__ = ["tune_blocks"]


def tune_blocks(
    model: Any, moe: MoEModel, lessons: BlockLessons, rounded: RoundedModel, names: Collection[str], steps: int
) -> tuple[float, float]:
    """Adam on a factor per scale and a place per weight of the rounded modules `names`, one block after the other.

    What a block learns from is what the tuned blocks before it put out, so it makes up for their errors too; its loss
    is `BlockError` of its output. Its Linears outside the experts learn first, while what the experts put out stays as
    it is. Then the experts do, one after the other, at the inputs that they get by then; each makes up for what those
    before it left. On the fixture that is nearly as good as if all of a block learned together (KL .0574, .0571). A
    block is taken to add its experts' output to the rest, scaled per channel.

    In memory are the block without its experts and `TUNING_COPIES` numbers for each weight that learns, of one expert
    or of all else in the block. What grows with the number of tokens is in the lessons' scratch.

    Returns KL on held-out tokens before and after, nats each. `rounded` is left as it was if that has not fallen.
    """
    stream, start = Stream(model, moe, lessons.data, lessons.scratch), {name: rounded[name] for name in names}
    head, weights_of = rounded.head(names, stream.device), partial(rounded.expert, names)
    kl_of = partial(lessons.kl_of, model, moe, head, rounded.dense(names, stream.device), weights_of)
    before = lessons.results.number("rounded", kl_of)
    after = lessons.kl(stream, head, _BlockTuning(stream, lessons, rounded, set(names), steps).last())
    if after < before:
        return before, after
    for name, grid in start.items():
        rounded.restore(name, grid)
    return before, before


class _BlockTuning:
    """What `tune_blocks` does with each block."""

    def __init__(
        self, stream: Stream, lessons: BlockLessons, rounded: RoundedModel, names: set[str], steps: int
    ) -> None:
        self._stream, self._lessons, self._rounded, self._names, self._steps = stream, lessons, rounded, names, steps
        experts = {name for layer in stream.moe.layers for name, *_ in layer.projections()}
        self._dense = sorted(names - experts)
        self._weights_of = partial(rounded.expert, names)

    @torch.no_grad()
    def last(self) -> torch.Tensor:
        """Tune all blocks; what the last one puts out for the lessons' tokens, [tokens, H]."""
        stream = self._stream
        finished = stream.decoder.names[: max(stream.found("tuned"), default=0)]
        self._rounded.take_replaced([n for n in self._names if any(n.startswith(f"{block}.") for block in finished)])

        def through(block: str, hidden: torch.Tensor, into: torch.Tensor) -> None:
            with stream.block(block):
                self._through(block, hidden, into)

        with stream.running():
            return stream.forward("tuned", "tuning", through)[len(stream.decoder.names)]

    def _through(self, block: str, hidden: torch.Tensor, into: torch.Tensor) -> None:
        """Tune `block`, which gets `hidden`, and write what it puts out then to `into`, both [tokens, H]."""
        stream, layer = self._stream, self._stream.layers.get(block)
        dense = [name for name in self._dense if name.startswith(f"{block}.")]
        if dense:
            with shadowed(self._rounded.dense(dense, stream.device)):
                output = None if layer is None else self._combined(layer, stream.route(block, hidden))
            self._tune_dense(block, dense, hidden, output)
        with shadowed(self._rounded.dense(dense, stream.device)):
            output = None
            if layer is not None:
                routing = stream.route(block, hidden)
                output = self._combined(layer, routing)
                experts = {index: names for index in layer.live_experts if (names := self._matrices(layer, index))}
                if experts:
                    present = stream.room("present", hidden.shape[1], torch.float32)
                    stream.advance(block, hidden, output, present)
                    traffic = _Traffic(stream.own, routing, self._slope(block, hidden), present)
                    for index, names in experts.items():
                        self._tune_expert(block, traffic, index, names)
                    output = self._combined(layer, routing)
                routing.discard()
            stream.advance(block, hidden, output, into)

    def _combined(self, layer: MoELayer, routing: Routing) -> torch.Tensor:
        return self._stream.combine(layer, routing, weights_of=self._weights_of)

    def _matrices(self, layer: MoELayer, expert: int) -> list[str]:
        """The matrices of `expert` that learn."""
        names = (f"{layer.experts_name}.{expert}.{projection}" for projection in PROJECTIONS)
        return [name for name in names if name in self._names]

    def _loose(self, names: Sequence[str]) -> dict[str, LooseGrid]:
        model, device = self._stream.model, self._stream.device
        return {
            name: LooseGrid(self._rounded[name].grid(device), float32_copy(model.get_submodule(name).weight, device))
            for name in names
        }

    def _learn(self, loose: Mapping[str, LooseGrid], data: Sequence[int], loss: Callable[[int], torch.Tensor]) -> None:
        """Adam on `loose`, which are stored afterwards; `loss` is the mean over tokens of a micro-batch of `data`."""

        def of_rows(index: int) -> tuple[torch.Tensor, int]:
            rows, _ = self._stream.data.shape(index)
            return loss(index) * rows, rows

        learn_grids(loose.values(), data, of_rows, self._steps)
        for name, grid in loose.items():
            self._rounded.replace(name, grid.stored(self._rounded.rounder.scale_dtype))

    def _tune_dense(self, block: str, names: Sequence[str], hidden: torch.Tensor, output: torch.Tensor | None) -> None:
        """Tune the matrices `names`, no experts', of `block`, which gets `hidden`; `output` is the experts'."""
        stream, error = self._stream, self._lessons.error(block)
        loose = self._loose(names)

        def loss(index: int) -> torch.Tensor:
            span = stream.data.span(index)
            found = self._call(block, index, hidden, None if output is None else output[span].to(stream.device))
            return error.of(found, span).mean()

        with ExitStack() as stack:
            for name, grid in loose.items():
                module: Any = stream.model.get_submodule(name)
                bias = module.bias
                stack.enter_context(replaced_forward(module, partial(forward_with, bias, grid)))
            self._learn(loose, self._lessons.known, loss)

    def _call(self, block: str, index: int, hidden: torch.Tensor, output: torch.Tensor | None) -> torch.Tensor:
        """What `block` makes of `hidden` [tokens, H] of micro-batch `index` if its experts put out `output`, [n, H]."""
        stream, layer = self._stream, self._stream.layers.get(block)
        own = stream.rows(hidden, index)
        if layer is None or output is None:
            return stream.call(block, index, own).flatten(0, 1)
        with experts_replaced(layer, lambda *_: output):
            return stream.call(block, index, own).flatten(0, 1)

    def _slope(self, block: str, hidden: torch.Tensor) -> torch.Tensor:
        """What `block` multiplies its experts' output by, [H]."""
        none = torch.zeros_like(self._stream.rows(hidden, 0)).flatten(0, 1)
        without, with_ones = (self._call(block, 0, hidden, none + value) for value in (0.0, 1.0))
        return (with_ones - without).median(0).values

    def _tune_expert(self, block: str, traffic: _Traffic, expert: int, names: Sequence[str]) -> None:
        """Tune the matrices `names` of `expert`; what the block puts out then is kept in `traffic`."""
        layer, device = self._stream.layers[block], self._stream.device
        own, loose, error = ExpertWeights.of(layer, expert, device), self._loose(names), self._lessons.error(block)

        def loss(index: int) -> torch.Tensor:
            values = {name.rpartition(".")[2]: grid.values()[0] for name, grid in loose.items()}
            tokens, found = traffic.with_expert(index, expert, own.changed(*map(values.get, PROJECTIONS)))
            return error.of(found, tokens).sum() / self._stream.data.batches[index]["input_ids"].numel()

        reached = [index for index in self._lessons.known if len(traffic.routing.part(index, expert).tokens)]
        if reached:
            traffic.add(-1, expert, self._weights_of(layer, expert, device))
            self._learn(loose, reached, loss)
            traffic.add(1, expert, self._weights_of(layer, expert, device))


class _Traffic(NamedTuple):
    """What the experts of a block get, and what the block puts out."""

    own: Sequence[int]
    """The micro-batches that this process sees to."""
    routing: Routing
    slope: torch.Tensor
    """What the block multiplies the experts' output by, [H]."""
    output: torch.Tensor
    """What the block puts out at present, float32 [tokens, H]; while an expert learns, without it."""

    def with_expert(self, index: int, expert: int, own: ExpertWeights) -> tuple[torch.Tensor, torch.Tensor]:
        """(Tokens of micro-batch `index` that go to `expert`, the block's output there [n, H] with weights `own`)."""
        _, tokens, slots = self.routing.part(index, expert)
        device = self.slope.device
        weights = self.routing.weights[tokens, slots].to(device)
        found = own(self.routing.hidden[tokens].to(device)) * weights[:, None]
        return tokens, self.output[tokens].to(device) + found * self.slope

    def add(self, sign: int, expert: int, own: ExpertWeights) -> None:
        """Add to the output what `expert`, with the weights `own`, puts out, or take it away."""

        def put(tokens: torch.Tensor, found: torch.Tensor) -> None:
            self.output[tokens] += sign * (found - self.output[tokens])

        with Arrivals() as arrivals:
            for index in self.own:
                tokens, found = self.with_expert(index, expert, own)
                arrivals.send(found, partial(put, tokens))
        wait()
