"""One forward pass in which every expert and Linear is looked at while it is at hand, without gradients of the loss.

What errors cost is then the squared error of outputs: of a layer's routed experts, weighted by the router, or of a
Linear. The gradient of that by an output has, up to a factor, random signs (Hutchinson's estimator), so these stand
where a backward pass would put the gradients of the predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import nn

from ..distributed import share, wait
from ..moe_model import MoELayer
from .experts import ExpertWeights
from .routing import Routing
from .samples import EXPERT_TOKENS, LayerSamples, LinearRecorder, LinearSamples, Sampler, chosen_pairs
from .stream import Stream
from .study import ExpertGroup, LayerStudy

__all__ = ["OutputPass"]

GroupVisitor = Callable[[ExpertGroup], None]
LinearVisitor = Callable[[str, LinearSamples], None]


class OutputPass:
    """One pass of `stream`, with hidden states in scratch as `name`.

    `of_group` is called with the `experts` of every layer (by its name), some at a time, and `of_linear` with every one
    of `linears` that tokens reach; each in one process of `torchrun`.
    """

    def __init__(
        self,
        stream: Stream,
        experts: Mapping[str, Collection[int]],
        linears: Mapping[str, nn.Linear],
        name: str,
        of_group: GroupVisitor,
        of_linear: LinearVisitor,
    ) -> None:
        self._stream, self._experts, self._linears, self._name = stream, experts, linears, name
        self._of_group, self._of_linear = of_group, of_linear
        self._sampler, self._index = Sampler(stream.scratch, stream.dtype), 0

    def run(self, later: int) -> None:
        """Go through the model. Room is checked first, for this and for `later` bytes."""
        stream = self._stream
        stream.data.check_any()
        stream.scratch.check_room(self._room_needed() + later, f"calibration with {stream.data.num_tokens} tokens")
        with stream.running():
            last = stream.forward(self._name, "rounding, forward", self._through)[len(stream.decoder.names)]
            self._through_head(last)
        stream.forget(self._name)
        wait()

    def _room_needed(self) -> int:
        """Most bytes that this pass takes: hidden states before and after a block, what its experts get and put out in
        float32, and samples of its Linears."""
        stream = self._stream
        width = stream.decoder.embedding.embedding_dim
        hidden = stream.data.num_tokens * width * (2 * stream.dtype.itemsize + 2 * 4)
        by_block = (self._recorder(self._inside(block)) for block in stream.decoder.names)
        return hidden + max(sum(map(found.most_bytes, found.modules.values())) for found in by_block)

    def _inside(self, block: str) -> dict[str, nn.Linear]:
        return {name: module for name, module in self._linears.items() if name.startswith(f"{block}.")}

    def _through(self, block: str, hidden: torch.Tensor, into: torch.Tensor) -> None:
        stream, layer = self._stream, self._stream.layers.get(block)
        with stream.block(block):
            output = None
            if layer is not None:
                routing = stream.route(block, hidden)
                groups = _Groups(
                    LayerStudy(layer, _samples(routing, layer, stream.data.valid)), self._experts[layer.name]
                )
                output = stream.combine(layer, routing, weights_of=partial(groups.weights_of, self._of_group))
                routing.discard()
            recorder = self._recorder(self._inside(block))
            with ExitStack() as stack:
                for linear, module in recorder.modules.items():
                    hook = module.register_forward_hook(partial(self._see, recorder, linear))
                    stack.callback(hook.remove)
                stream.advance(block, hidden, output, into, self._begin)
            self._visit(recorder)

    def _begin(self, index: int) -> None:
        self._index = index

    def _see(self, recorder: LinearRecorder, name: str, _module: nn.Module, args: tuple, _output: object) -> None:
        inputs = args[0].detach()
        recorder.see(name, self._index, inputs, inputs.new_ones(1, *inputs.shape[:-1], 1))

    def _through_head(self, hidden: torch.Tensor) -> None:
        stream = self._stream
        head = stream.model.get_output_embeddings()
        recorder = self._recorder({name: module for name, module in self._linears.items() if module is head})
        for name in recorder.modules:
            for index in stream.own:
                self._begin(index)
                self._see(recorder, name, head, (stream.finish(index, stream.rows(hidden, index)),), None)
        self._visit(recorder)

    def _recorder(self, own: Mapping[str, nn.Linear]) -> LinearRecorder:
        return LinearRecorder(own, self._stream.data, self._sampler, f"{self._name}.linear")

    def _visit(self, recorder: LinearRecorder) -> None:
        recorder.keep()
        for name in share(sorted(recorder.finished)):
            self._of_linear(name, recorder.finished[name])
        self._stream.scratch.discard_all(f"{self._name}.linear")


class _Groups:
    """Gathers experts of a layer as they come along until a group is complete that this process sees to."""

    def __init__(self, study: LayerStudy, experts: Collection[int]) -> None:
        self._study = study
        self._group_of = {index: group for group in share(study.divided(experts)) for index in group}
        self._present: dict[int, ExpertWeights] = {}

    def weights_of(self, visit: GroupVisitor, layer: MoELayer, expert: int, device: torch.device) -> ExpertWeights:
        """The weights of an expert; with the last one of its group, `visit` is called with that."""
        own, group = ExpertWeights.of(layer, expert, device), self._group_of.get(expert)
        if group is not None:
            self._present[expert] = own
            if expert == group[-1]:
                present, self._present = self._present, {}
                visit(ExpertGroup(self._study, present))
        return own


def _samples(routing: Routing, layer: MoELayer, valid: torch.Tensor) -> LayerSamples:
    """What the experts get, with signs that stand for gradients; of each expert's tokens a bounded, even sample.

    The signs are drawn once for all tokens: what counts is a sum over an expert's many channels.
    """
    tokens, width = routing.hidden.shape
    signs = torch.randint(2, (1, 1, width), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    in_sample, counts = chosen_pairs(routing.indices, layer.num_experts, EXPERT_TOKENS)
    return LayerSamples(
        hidden=routing.hidden,
        indices=routing.indices,
        weights=routing.weights,
        gradient=signs.expand(1, tokens, width),
        in_sample=in_sample,
        layer_tokens=torch.empty(0, dtype=torch.long),
        counts=counts,
        num_tokens=int(valid.sum()),
    )
