"""A model's matrices rounded at the schemes chosen for them, kept packed; and what that does to its predictions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from .progress import spread
from .results import key_of
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
        self._found: dict[str, tuple[str, PackedGrid]] = {}

    def __getitem__(self, name: str) -> PackedGrid:
        """Module `name`, as it was rounded last."""
        return self._found[name][1]

    def replace(self, name: str, grid: Grid) -> None:
        """Let module `name` be rounded to `grid`, a batch of one, instead, which is kept beside what it was."""
        found = PackedGrid.of(grid, self.rounder.scale_dtype)
        self._calibration.results.put(f"replaced.{name}", _tensors(name, found))
        self.restore(name, found)

    def restore(self, name: str, found: PackedGrid) -> None:
        """Let module `name` be rounded to `found`, which it was before."""
        self._found[name] = "", found

    def take_replaced(self, names: Collection[str]) -> None:
        """Let modules be rounded to what `replace` was called with for them, if it was, by an earlier process too."""
        for name in names:
            if (kept := self._calibration.results.get(f"replaced.{name}")) is not None:
                before = self[name]
                self.restore(name, _packed(kept, name, before.scheme, before.shape))

    def round(self, schemes: Mapping[str, Scheme], kept: Masks | None = None) -> list[str]:
        """Round every module of `schemes` that is packed, while routers choose among `kept`.

        Returns the names of what is rounded: not of modules that calibration tokens do not reach, such as a vision
        tower's.
        """
        layers = {layer.name: layer for layer in self._calibration.moe.layers}
        experts = {name for layer in layers.values() for name, *_ in layer.projections()}
        packed = {name: scheme for name, scheme in schemes.items() if scheme.is_packed}
        routing = key_of({layer: mask.tolist() for layer, mask in (kept or {}).items()})
        key, others = partial(key_of, routing, str(self.rounder)), sorted(packed.keys() - experts)
        samples = partial(self._calibration.samples, others, kept)

        def missing(name: str) -> list[int]:
            """Experts of layer `name`, or 0 for a Linear, that are not found."""
            if name in layers:
                return self._missing(layers[name], packed, key)
            return [] if self._is_found(name, [name], packed, key(str(packed[name]))) else [0]

        def do(name: str) -> None:
            of_layers, of_linears = samples()
            if name in layers:
                self._round_layer(LayerStudy(layers[name], of_layers[name]), missing(name), packed, key)
            else:
                grids = {}
                if name in of_linears:
                    grids[name] = of_linears[name].rounded(self.rounder, packed[name])
                self._keep(name, grids, key(str(packed[name])))

        spread("rounding", [*others, *layers], lambda name: not missing(name), samples, do)
        for name in (*others, *layers):
            missing(name)  # finds what other processes have rounded
        return [name for name in packed if name in self._found]

    def _missing(self, layer: MoELayer, schemes: Mapping[str, Scheme], key: Callable[..., str]) -> list[int]:
        """The experts of a layer that are to be rounded and not found. `key` tells all that rounding depends on."""
        found = []
        for index, pair in _pairs(layer, schemes).items():
            expert = f"{layer.experts_name}.{index}"
            names = [name for name in (f"{expert}.{projection}" for projection in PROJECTIONS) if name in schemes]
            if not self._is_found(expert, names, schemes, key(list(map(str, pair)))):
                found.append(index)
        return found

    def _round_layer(
        self, study: LayerStudy, missing: list[int], schemes: Mapping[str, Scheme], key: Callable[..., str]
    ) -> None:
        """Round the experts `missing` of a layer.

        Those that an earlier process had begun with are rounded anew together: that way come the same last bits.
        """
        layer, results = study.layer, self._calibration.results
        pairs, place = _pairs(layer, schemes), f"rounding.{layer.name}"
        missing = sorted(pairs.keys() & {*missing, *(results.noted(place) or [])})
        results.note(place, missing)
        if unseen := [index for index in missing if not study.samples.counts[index]]:
            logger.warning("{}: no calibration token was routed to experts {}", layer.name, unseen)
        for group in study.groups(missing):
            for index, grids in group.round(self.rounder, {i: pairs[i] for i in missing}).items():
                expert = f"{layer.experts_name}.{index}"
                found = {name: grid for name, grid in _split(expert, grids) if name in schemes}
                self._keep(expert, found, key(list(map(str, pairs[index]))))
        results.note(place, [])

    def _keep(self, what: str, grids: Mapping[str, Grid], key: str) -> None:
        """Keep the rounded matrices of `what`, an expert or a Linear, packed; none of a Linear that is not reached."""
        tensors = {"key": _digits(key)}
        for name, grid in grids.items():
            tensors |= _tensors(name, PackedGrid.of(grid, self.rounder.scale_dtype))
        kept = self._calibration.results.put(f"rounded.{what}", tensors)
        for name, grid in grids.items():
            rows, columns = grid.codes.shape[1:]
            self._found[name] = key, _packed(kept, name, grid.scheme, (rows, columns))

    def _is_found(self, what: str, names: Sequence[str], schemes: Mapping[str, Scheme], key: str) -> bool:
        """Whether the matrices `names` of `what` are rounded with that key, here or by an earlier process."""
        if all(name in self._found and self._found[name][0] == key for name in names):
            return True
        kept = self._calibration.results.get(f"rounded.{what}")
        if kept is None or not torch.equal(kept["key"], _digits(key)):
            return False
        for name in (name for name in names if f"{name}.words" in kept):
            module = self._calibration.model.get_submodule(name)
            shape = module.out_features, module.in_features
            self._found[name] = key, _packed(kept, name, schemes[name], shape)
        return True

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

    def head(self, names: Collection[str], device: torch.device) -> Head:
        """The model's lm_head, rounded if it is among `names`."""
        model: Any = self._calibration.model
        head, own = Head.of(model, device), model.get_output_embeddings()
        name = next((name for name in names if model.get_submodule(name) is own), None)
        return head if name is None else head._replace(weight=self.values(name, device))


def _digits(key: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(key)), dtype=torch.uint8)


def _tensors(name: str, found: PackedGrid) -> dict[str, torch.Tensor]:
    """What `RoundedModel` keeps of matrix `name`."""
    parts = {"words": found.words, "scales": found.scales, "zeros": found.zeros}
    return {f"{name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}


def _packed(kept: Mapping[str, torch.Tensor], name: str, scheme: Scheme, shape: tuple[int, int]) -> PackedGrid:
    """Matrix `name` of what `RoundedModel` has kept."""
    return PackedGrid(scheme, shape, kept[f"{name}.words"], kept[f"{name}.scales"], kept.get(f"{name}.zeros"))


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
        packed = {name: str(scheme) for name, scheme in schemes.items() if scheme.is_packed}
        gone = {layer: sorted(experts) for layer, experts in dropped.items() if experts}
        name = f"trial-{key_of(packed, gone, str(self._rounded.rounder))}"
        results = self._calibration.results
        if (found := results.noted(name)) is None:
            results.note(name, found := self._measured(name, schemes, dropped))
            self._calibration.stream(self._calibration.judge).forget(name)
        return found

    def _measured(self, name: str, schemes: Mapping[str, Scheme], dropped: Mapping[str, Collection[int]]) -> float:
        calibration = self._calibration
        kept = kept_masks(calibration.moe, dropped)
        names = set(self._rounded.round(schemes, kept))
        stream = calibration.stream(calibration.judge)
        with stream.running():
            if self._base is None:
                self._base = stream.last("base")
            head, other = Head.of(calibration.model, stream.device), self._rounded.head(names, stream.device)
            weights_of = partial(self._rounded.expert, names)
            last = stream.last(name, kept, self._rounded.dense(names, stream.device), weights_of)
            return KL(stream, head, other).mean(self._base, last)
