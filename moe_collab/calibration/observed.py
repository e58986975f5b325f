"""One forward pass that only looks: at what experts put out, at the largest inputs, at other numbers of experts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from operator import itemgetter

import torch

from ..distributed import everyones
from ..moe_model import MoELayer, MoEModel
from ..pruning.surgery import activating
from ..statistics import ExpertStatistics
from .arrivals import Arrivals
from .at_hand import compute_device
from .experts import ExpertWeights
from .head import KL, Head
from .results import key_of
from .routing import Part, Routing, route
from .run import Calibration
from .samples import evenly

__all__ = ["LayerPeaks", "OutputMatch", "expert_statistics", "kl_by_top_k", "matches_and_peaks"]

_MATCHED_TOKENS = 16384
"""Most tokens of a layer on which other numbers of activated experts are tried; evenly taken."""
_TOGETHER = 4096
"""Of these, how many an expert computes at a time."""


def expert_statistics(
    calibration: Calibration, layers: Collection[MoELayer], domains: torch.Tensor, num_domains: int
) -> dict[str, ExpertStatistics]:
    """What the experts of `layers` do with all tokens, by layer name; `domains` [tokens] is -1 for padding."""
    scaling = calibration.moe.routed_scaling_factor

    def look(layer: MoELayer, through: Callable[..., None]) -> dict[str, torch.Tensor]:
        # Sums of micro-batches are added in their order, whichever process has which.
        parts: dict[int, ExpertStatistics] = {}

        def add(expert: int, part: Part, columns: torch.Tensor) -> None:
            if part.batch not in parts:
                parts[part.batch] = ExpertStatistics(layer.num_experts, num_domains)
            weights, norms, peaks = columns.double()
            parts[part.batch].add(expert, weights, norms, peaks, domains[part.tokens].long())

        def see(expert: int, part: Part, weights: torch.Tensor, _inner: torch.Tensor, output: torch.Tensor) -> None:
            columns = weights / scaling, output.norm(dim=-1), output.abs().amax(-1)
            arrivals.send(torch.stack(columns), partial(add, expert, part))

        with Arrivals() as arrivals:
            through(see=see)
        statistics = ExpertStatistics(layer.num_experts, num_domains)
        statistics.see(domains[domains >= 0].long())
        for _, part in sorted(everyones(list(parts.items())), key=itemgetter(0)):
            statistics.join(part)
        return statistics.tensors()

    found = _observed(calibration, "statistics", layers, look)
    return {name: ExpertStatistics.of(tensors) for name, tensors in found.items()}


def _observed(
    calibration: Calibration,
    what: str,
    layers: Collection[MoELayer],
    look: Callable[[MoELayer, Callable[..., None]], dict[str, torch.Tensor]],
) -> dict[str, dict[str, torch.Tensor]]:
    """Layer name -> what `look` returns, for `layers`, in one forward pass of all tokens, kept as results.

    `look` gets the layer, and a function that it calls once for all tokens to go through the layer's block, with
    observers as `Stream.through` takes them.
    """
    stream, results = calibration.stream(calibration.everything), calibration.results
    names = {layer.name: f"{what}.{layer.name}" for layer in layers}

    def through(block: str, hidden: torch.Tensor, into: torch.Tensor) -> None:
        own, layer = partial(stream.through, block, hidden, into), stream.layers.get(block)
        if layer is not None and layer.name in names:
            results.put(names[layer.name], look(layer, own))
        else:
            own()

    if any(results.get(name) is None for name in names.values()):
        with stream.running():
            stream.forward(what, what, through)
        stream.forget(what)
    return {layer: results.kept(name) for layer, name in names.items()}


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

    @classmethod
    def of(cls, found: Mapping[str, torch.Tensor]) -> LayerPeaks:
        """From `inputs` and, for each expert, `inner.` and its number."""
        prefix = "inner."
        inner = {int(name.removeprefix(prefix)): peak for name, peak in found.items() if name.startswith(prefix)}
        return cls(found.get("inputs", torch.empty(0)), inner)


def matches_and_peaks(
    calibration: Calibration, candidates: Sequence[int]
) -> tuple[dict[int, dict[str, OutputMatch]], dict[str, LayerPeaks]]:
    """(other number of activated experts -> layer name -> match, layer name -> peaks)."""
    valid = calibration.everything.valid.nonzero().flatten()
    chosen = valid[evenly(len(valid), _MATCHED_TOKENS)]

    def look(layer: MoELayer, through: Callable[..., None]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {"matches": torch.zeros(len(candidates), 2, dtype=torch.float64)}
        inner: dict[int, torch.Tensor] = {}

        def see(expert: int, _part: Part, _weights: torch.Tensor, inputs: torch.Tensor, _output: torch.Tensor) -> None:
            largest = inputs.abs().amax(0)
            inner[expert] = torch.maximum(inner[expert], largest) if expert in inner else largest

        def compare(routing: Routing, output: torch.Tensor) -> None:
            if len(valid):
                largest = [routing.hidden[part].abs().amax(0) for part in valid.split(_TOGETHER)]
                found["inputs"] = torch.stack(largest).amax(0)
                others = _outputs_at(calibration.moe, layer, routing.hidden[chosen], candidates)
                sums = [(y * z).sum(dtype=torch.float64) for z in others for y in (output[chosen], z)]
                found["matches"] = torch.tensor(sums, dtype=torch.float64).view(-1, 2)

        through(see=see, look=compare)
        for expert, largest in list(inner.items()):
            inner[expert] = largest.cpu()
        for expert, largest in everyones(list(inner.items())):
            inner[expert] = torch.maximum(inner.get(expert, largest), largest)
        return found | {f"inner.{expert}": largest for expert, largest in inner.items()}

    tensors = _observed(calibration, f"peaks-{key_of(list(candidates))}", calibration.moe.layers, look)
    matches = {
        top_k: {name: OutputMatch(*found["matches"][at].tolist()) for name, found in tensors.items()}
        for at, top_k in enumerate(candidates)
    }
    return matches, {name: LayerPeaks.of(found) for name, found in tensors.items()}


@torch.no_grad()
def _outputs_at(moe: MoEModel, layer: MoELayer, hidden: torch.Tensor, candidates: Sequence[int]) -> list[torch.Tensor]:
    """The routed experts' output for `hidden` [n, H] at each number of activated experts; the block is at hand."""
    chosen: list[torch.Tensor] = []
    device = compute_device()
    for top_k in candidates:
        with activating(replace(moe, layers=(layer,)), top_k):
            weights, indices = route(layer, hidden.to(device))
        by_expert = torch.zeros(len(hidden), layer.num_experts)
        chosen.append(by_expert.scatter_(1, indices.cpu(), weights.float().cpu()))
    outputs = [torch.zeros_like(hidden) for _ in candidates]

    def add(expert: int, part: torch.Tensor, found: torch.Tensor) -> None:
        for output, weights in zip(outputs, chosen, strict=True):
            output[part] += weights[part, expert, None] * found

    with Arrivals() as arrivals:
        for expert in layer.live_experts if candidates else ():
            own = ExpertWeights.of(layer, expert, device)
            reached = torch.stack([weights[:, expert] != 0 for weights in chosen]).any(0)
            for part in reached.nonzero().flatten().split(_TOGETHER):
                arrivals.send(own(hidden[part].to(device)), partial(add, expert, part))
    return outputs


@torch.no_grad()
def kl_by_top_k(calibration: Calibration, factors: Mapping[int, Mapping[str, float]]) -> dict[int, float]:
    """KL(model || model with k experts per token) on held-out tokens, nats each, for every k of `factors`: k -> layer
    name -> what its routed experts' output is multiplied by."""
    stream, results = calibration.stream(calibration.judge), calibration.results

    @cache
    def base() -> torch.Tensor:
        return stream.last("base")

    found = {}
    for top_k, by_layer in factors.items():
        name = f"k{top_k}"
        if (known := results.noted(f"kl.{name}")) is None:
            head = Head.of(calibration.model, stream.device)
            with stream.running():
                before = base()
                with activating(calibration.moe, top_k):
                    known = KL(stream, head, head).mean(before, stream.last(name, factors=by_layer))
            results.note(f"kl.{name}", known)
            stream.forget(name)
        found[top_k] = known
    stream.forget("base")
    return found
