"""A model's matrices rounded at the schemes chosen for them, kept packed; and what that does to its predictions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from loguru import logger

from ..architectures import PROJECTIONS
from ..errors import MoeCollabError
from ..formats import DENSE, Scheme
from ..moe_model import MoELayer
from ..rounding import Grid, PackedGrid, Rounder
from .experts import ExpertWeights
from .head import KL, Head
from .progress import stage
from .run import Calibration, kept_masks
from .stream import Masks
from .study import ExpertGrids, LayerStudy

__all__ = ["RoundedModel", "Trial"]


class RoundedModel:
    """Rounds modules of the model that `calibration` is about, by its samples, with `rounder`.

    Every expert is rounded by the tokens that the router sends to it, and its down_proj makes up for its rounded gate
    and up. What has been rounded is kept, packed, and not rounded again for the same schemes and routing.
    """

    def __init__(self, calibration: Calibration, rounder: Rounder) -> None:
        self._calibration, self.rounder = calibration, rounder
        self._found: dict[str, tuple[object, PackedGrid]] = {}

    def __getitem__(self, name: str) -> PackedGrid:
        """Module `name`, as it was rounded last."""
        return self._found[name][1]

    def replace(self, name: str, grid: Grid) -> None:
        """Let module `name` be rounded to `grid`, a batch of one, instead."""
        key, _ = self._found[name]
        self._found[name] = key, self._packed(name, grid)

    def round(self, schemes: Mapping[str, Scheme], kept: Masks | None = None) -> list[str]:
        """Round every module of `schemes` that is packed, while routers choose among `kept`.

        Returns the names of what is rounded: not of modules that calibration tokens do not reach, such as a vision
        tower's.
        """
        wanted = {name: _key(name, schemes, kept) for name, scheme in schemes.items() if scheme.is_packed}
        stale = {name for name, key in wanted.items() if name not in self._found or self._found[name][0] != key}
        if stale:
            for name, grid in self._rounded({name: schemes[name] for name in stale}, kept):
                self._found[name] = wanted[name], grid
        return [name for name in wanted if name in self._found]

    def _rounded(self, schemes: Mapping[str, Scheme], kept: Masks | None) -> Iterator[tuple[str, PackedGrid]]:
        layers = self._calibration.moe.layers
        experts = {name for layer in layers for name, *_ in layer.projections()}
        model: Any = self._calibration.model
        others = {name: model.get_submodule(name) for name in schemes if name not in experts}
        samples, linears = self._calibration.samples(others, kept)
        for name in others.keys() & linears.keys():
            yield name, self._packed(name, linears[name].rounded(self.rounder, schemes[name]))
        for layer in stage("rounding", layers):
            pairs = _pairs(layer, schemes)
            if not pairs:
                continue
            study = LayerStudy(layer, samples[layer.name])
            if unseen := [index for index in pairs if not study.samples.counts[index]]:
                logger.warning("{}: no calibration token was routed to experts {}", layer.name, unseen)
            for group in study.groups(pairs):
                for index, grids in group.round(self.rounder, pairs).items():
                    for name, grid in _split(f"{layer.experts_name}.{index}", grids):
                        if name in schemes:
                            yield name, self._packed(name, grid)

    def _packed(self, name: str, grid: Grid) -> PackedGrid:
        found, keep = PackedGrid.of(grid, self.rounder.scale_dtype), self._calibration.scratch.keep
        return replace(found, words=keep(f"{name}.words", found.words), scales=keep(f"{name}.scales", found.scales))

    def expert(self, names: Collection[str], layer: MoELayer, index: int, device: torch.device) -> ExpertWeights:
        """Expert `index` of `layer`, its matrices among `names` rounded."""
        own = ExpertWeights.of(layer, index, device)
        gate, up, down = (f"{layer.experts_name}.{index}.{projection}" for projection in PROJECTIONS)
        if gate in names:
            own = replace(own, gate_up=torch.cat([self.values(name, device) for name in (gate, up)]))
        return replace(own, down=self.values(down, device)) if down in names else own

    def values(self, name: str, device: torch.device) -> torch.Tensor:
        """The rounded weight of module `name`, float32, as precise as the model will hold it."""
        return self[name].values(device).to(self.rounder.scale_dtype).float()

    def dense(self, names: Collection[str], device: torch.device) -> dict[Any, dict[str, torch.Tensor]]:
        """Module -> its rounded weight, for those of `names` that are no experts' matrices."""
        experts = {name for layer in self._calibration.moe.layers for name, *_ in layer.projections()}
        model: Any = self._calibration.model
        rest = [name for name in names if name not in experts]
        return {model.get_submodule(name): {"weight": self.values(name, device)} for name in rest}


def _key(name: str, schemes: Mapping[str, Scheme], kept: Masks | None) -> object:
    """All that the rounding of a module depends on: its expert's schemes, and which experts routers may choose."""
    expert = name.rpartition(".")[0]
    parts = [schemes.get(f"{expert}.{projection}") for projection in PROJECTIONS]
    return schemes[name], parts, {layer: mask.tolist() for layer, mask in (kept or {}).items()}


def _pairs(layer: MoELayer, schemes: Mapping[str, Scheme]) -> dict[int, tuple[Scheme, Scheme]]:
    """Expert -> (scheme of gate and up, scheme of down), for experts of which at least one of these rounds."""
    pairs = {}
    for index in layer.live_experts:
        gate, up, down = (schemes.get(f"{layer.experts_name}.{index}.{p}", DENSE) for p in PROJECTIONS)
        if gate != up:
            raise MoeCollabError(
                f"{layer.experts_name}.{index}: gate_proj is to be {gate}, up_proj {up}; they are one fused matrix and "
                "need one scheme."
            )
        if gate.is_packed or down.is_packed:
            pairs[index] = gate, down
    return pairs


def _split(expert: str, grids: ExpertGrids) -> Iterator[tuple[str, Grid]]:
    if grids.gate_up is not None:
        gate, up = (grids.gate_up.reshaped(2).select(half) for half in (0, 1))
        yield from ((f"{expert}.gate_proj", gate), (f"{expert}.up_proj", up))
    if grids.down is not None:
        yield f"{expert}.down_proj", grids.down


class Trial:
    """Rounds a model on trial, as it would be rounded in earnest, and measures its KL on held-out tokens.

    Two streams of hidden states are compared at the end: those of the model as it is, which are kept, and those with
    rounded weights. The model is not touched.
    """

    def __init__(self, calibration: Calibration, rounded: RoundedModel) -> None:
        self._calibration, self._rounded = calibration, rounded
        self._base: torch.Tensor | None = None

    def kl(self, schemes: Mapping[str, Scheme], dropped: Mapping[str, Collection[int]]) -> float:
        """KL(model || model rounded at `schemes`, without the experts `dropped` of each layer), nats per token."""
        calibration = self._calibration
        kept = kept_masks(calibration.moe, dropped)
        names = set(self._rounded.round(schemes, kept))
        stream = calibration.stream(calibration.judge)
        with stream.running():
            if self._base is None:
                self._base = stream.last("base")
            model: Any = calibration.model
            head = Head.of(model, stream.device)
            other = head
            head_name = next((n for n in names if model.get_submodule(n) is model.get_output_embeddings()), None)
            if head_name is not None:
                other = head._replace(weight=self._rounded.values(head_name, stream.device))
            weights_of = partial(self._rounded.expert, names)
            last = stream.last("trial", kept, self._rounded.dense(names, stream.device), weights_of)
            return KL(stream, head, other).mean(self._base, last)
