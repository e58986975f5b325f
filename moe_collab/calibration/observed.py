"""One forward pass that only looks: at what experts put out, at the largest inputs, at other numbers of experts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from ..moe_model import MoELayer
from ..pruning.surgery import activating
from ..statistics import ExpertStatistics
from .experts import ExpertWeights
from .head import KL, Head
from .progress import stage
from .routing import Part, Routing, route
from .run import Calibration
from .samples import evenly
from .stream import ExpertObserver, Stream

__all__ = ["LayerPeaks", "OutputMatch", "expert_statistics", "kl_by_top_k", "matches_and_peaks"]

_MATCHED_TOKENS = 16384
"""Most tokens of a layer on which other numbers of activated experts are tried; evenly taken."""
_TOGETHER = 4096
"""Of these, how many an expert computes at a time."""


def expert_statistics(
    stream: Stream, layers: Collection[MoELayer], domains: torch.Tensor, num_domains: int
) -> dict[str, ExpertStatistics]:
    """What the experts of `layers` do with all tokens, by layer name; `domains` [tokens] is -1 for padding."""
    found = {layer.name: ExpertStatistics(layer.num_experts, num_domains) for layer in layers}

    def see(
        statistics: ExpertStatistics,
        expert: int,
        part: Part,
        weights: torch.Tensor,
        _inner: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        own = weights / stream.moe.routed_scaling_factor
        statistics.add(expert, own, output, domains[part.tokens].long())

    for statistics in found.values():
        statistics.see(domains[domains >= 0].long())
    _forward(stream, lambda layer: partial(see, found[layer.name]) if layer.name in found else None)
    return found


def _forward(
    stream: Stream,
    observer: Callable[[MoELayer], ExpertObserver | None],
    look: Callable[[MoELayer, Routing, torch.Tensor], None] | None = None,
) -> None:
    """All blocks in order. `observer` gives what is called with each expert's outputs of a layer, and `look` is called
    with the layer, its routing and its experts' output [tokens, H] while its block is at hand."""
    with stream.running():
        hidden = stream.embed("even")
        for position, name in enumerate(stage("statistics", stream.decoder.names)):
            following = stream.room("even" if position % 2 else "odd", hidden.shape[1])
            with stream.block(name):
                output = None
                if layer := stream.layers.get(name):
                    routing = stream.route(name, hidden)
                    output = stream.combine(layer, routing, observer(layer))
                    if look is not None:
                        look(layer, routing, output)
                    routing.discard()
                stream.advance(name, hidden, output, following)
            hidden = following


@dataclass
class OutputMatch:
    """Compares a layer's routed outputs y, at its own number of activated experts, with those at another number, z."""

    cross: float = 0.0
    """<y, z>, summed over tokens."""
    square: float = 0.0
    """<z, z>, summed over tokens."""

    @property
    def factor(self) -> float:
        """The number c for which |y - c z|^2 is smallest, <y, z> / <z, z>; 1 if nothing was seen.

        Experts partly cancel, so fewer of them, their weights renormalised, put out too much: c < 1. Where weights are
        not renormalised their sum shrinks too, and c is near 1; making up for the whole sum would raise KL.
        """
        return self.cross / self.square if self.square else 1.0


@dataclass
class LayerPeaks:
    """Largest magnitudes in a layer over all tokens; empty where nothing was seen."""

    inputs: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """Of each channel at the experts' input, [H]."""
    inner: dict[int, torch.Tensor] = field(default_factory=dict)
    """Expert -> of each channel at the input of its down_proj, over the tokens routed to it, [I]."""


def matches_and_peaks(
    stream: Stream, candidates: Sequence[int]
) -> tuple[dict[int, dict[str, OutputMatch]], dict[str, LayerPeaks]]:
    """(other number of activated experts -> layer name -> match, layer name -> peaks)."""
    matches: dict[int, dict[str, OutputMatch]] = {top_k: {} for top_k in candidates}
    peaks = {layer.name: LayerPeaks() for layer in stream.moe.layers}

    def see(
        found: LayerPeaks, expert: int, _part: Part, _weights: torch.Tensor, inner: torch.Tensor, _output: torch.Tensor
    ) -> None:
        largest = inner.abs().amax(0).cpu()
        before = found.inner.get(expert)
        found.inner[expert] = largest if before is None else torch.maximum(before, largest)

    def look(layer: MoELayer, routing: Routing, output: torch.Tensor) -> None:
        tokens = stream.data.valid.nonzero().flatten()
        if not len(tokens):
            return
        largest = [routing.hidden[part].abs().amax(0) for part in tokens.split(_TOGETHER)]
        peaks[layer.name].inputs = torch.stack(largest).amax(0)
        chosen = tokens[evenly(len(tokens), _MATCHED_TOKENS)]
        for top_k, other in _outputs_at(stream, layer, routing.hidden[chosen], candidates).items():
            own = output[chosen]
            cross, square = (float((a * other).sum(dtype=torch.float64)) for a in (own, other))
            matches[top_k][layer.name] = OutputMatch(cross, square)

    _forward(stream, lambda layer: partial(see, peaks[layer.name]), look)
    return matches, peaks


@torch.no_grad()
def _outputs_at(
    stream: Stream, layer: MoELayer, hidden: torch.Tensor, candidates: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Number of activated experts -> the routed experts' output for `hidden` [n, H]; the block is at hand."""
    chosen: dict[int, torch.Tensor] = {}
    for top_k in candidates:
        with activating(replace(stream.moe, layers=(layer,)), top_k):
            weights, indices = route(layer, hidden.to(stream.device))
        by_expert = torch.zeros(len(hidden), layer.num_experts)
        chosen[top_k] = by_expert.scatter_(1, indices.cpu(), weights.float().cpu())
    outputs = {top_k: torch.zeros_like(hidden) for top_k in candidates}
    for expert in layer.live_experts if candidates else ():
        own = ExpertWeights.of(layer, expert, stream.device)
        reached = torch.stack([weights[:, expert] != 0 for weights in chosen.values()]).any(0)
        for part in reached.nonzero().flatten().split(_TOGETHER):
            found = own(hidden[part].to(stream.device)).cpu()
            for top_k, weights in chosen.items():
                outputs[top_k][part] += weights[part, expert, None] * found
    return outputs


@torch.no_grad()
def kl_by_top_k(calibration: Calibration, factors: Mapping[int, Mapping[str, float]]) -> dict[int, float]:
    """KL(model || model with k experts per token) on held-out tokens, nats each, for every k of `factors`: k -> layer
    name -> what its routed experts' output is multiplied by."""
    stream = calibration.stream(calibration.judge)
    with stream.running():
        base, head = stream.last("base"), Head.of(calibration.model, stream.device)
        kl = {}
        for top_k, by_layer in factors.items():
            with activating(calibration.moe, top_k):
                kl[top_k] = KL(stream, head, head).mean(base, stream.last("trial", factors=by_layer))
    return kl
