"""A model's matrices rounded at the schemes chosen for them, kept packed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from loguru import logger

from ..architectures import PROJECTIONS
from ..errors import MoeCollabError
from ..formats import DENSE, Scheme
from ..moe_model import MoELayer
from ..rounding import Grid, PackedGrid, Rounder
from .at_hand import compute_device, float32_copy
from .experts import ExpertWeights
from .head import Head
from .output_pass import OutputPass
from .progress import spread
from .results import key_of
from .run import Calibration
from .samples import LinearSamples
from .stream import Masks
from .study import ExpertGrids, ExpertGroup, LayerStudy

__all__ = ["RoundedModel"]


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
        """Round every module of `schemes` that is packed, for the predictions, while routers choose among `kept`.

        Returns the names of what is rounded: not of modules that calibration tokens do not reach, such as a vision
        tower's.
        """
        routing = key_of({layer: mask.tolist() for layer, mask in (kept or {}).items()})
        wanted = self._wanted(schemes, routing)
        samples = partial(self._calibration.samples, wanted.linears, kept)

        def do(name: str) -> None:
            of_layers, of_linears = samples()
            if name in wanted.layers:
                self._round_layer(LayerStudy(wanted.layers[name], of_layers[name]), wanted)
            else:
                found = [of_linears[name].rounded(self.rounder, schemes[name])] if name in of_linears else []
                self._keep_linear(name, found, wanted)

        return self._spread(wanted, samples, do)

    def round_in_one_pass(self, schemes: Mapping[str, Scheme]) -> list[str]:
        """As `round`, for the least squared error of outputs instead of predictions, which takes no gradients.

        Every expert and Linear is rounded while one forward pass of the model as it is has it at hand.
        """
        wanted, calibration = self._wanted(schemes, "outputs"), self._calibration

        def of_group(group: ExpertGroup) -> None:
            _warn_of_unseen(group.study, group.members)
            for index, grids in group.round(self.rounder, wanted.pairs[group.study.layer.name]).items():
                self._keep_expert(group.study.layer, index, grids, wanted)

        def of_linear(name: str, samples: LinearSamples) -> None:
            self._keep_linear(name, [samples.rounded(self.rounder, schemes[name])], wanted)

        if any(self._missing(name, wanted) for name in wanted.everything):
            modules = {name: calibration.model.get_submodule(name) for name in wanted.linears}
            name = f"outputs-{key_of({name: str(scheme) for name, scheme in wanted.packed.items()})}"
            stream = calibration.stream(calibration.learn)
            OutputPass(stream, wanted.pairs, modules, name, of_group, of_linear).run(calibration.later)
            for name in wanted.linears:
                if self._missing(name, wanted):
                    self._keep_linear(name, [], wanted)  # no token reaches it
        return self._rounded(wanted)

    def round_to_nearest(self, schemes: Mapping[str, Scheme]) -> list[str]:
        """As `round`, for the least squared error of the weights themselves, which takes no tokens."""
        wanted, device = self._wanted(schemes, "weights"), compute_device()

        def nearest(weight: torch.Tensor, scheme: Scheme) -> Grid | None:
            return self.rounder.nearest(weight[None], scheme) if scheme.is_packed else None

        def do(name: str) -> None:
            if name not in wanted.layers:
                weight = float32_copy(self._calibration.model.get_submodule(name).weight, device)
                self._keep_linear(name, [self.rounder.nearest(weight[None], schemes[name])], wanted)
                return
            layer = wanted.layers[name]
            for index in self._missing(name, wanted):
                own, (gate_up, down) = ExpertWeights.of(layer, index, device), wanted.pairs[name][index]
                grids = ExpertGrids(nearest(own.gate_up, gate_up), nearest(own.down, down))
                self._keep_expert(layer, index, grids, wanted)

        prepare = partial(self._calibration.scratch.check_room, self._calibration.later, "the rounded weights")
        return self._spread(wanted, prepare, do)

    def _wanted(self, schemes: Mapping[str, Scheme], *key: str) -> _Wanted:
        layers = {layer.name: layer for layer in self._calibration.moe.layers}
        packed = {name: scheme for name, scheme in schemes.items() if scheme.is_packed}
        return _Wanted(packed, layers, partial(key_of, *key, str(self.rounder)))

    def _spread(self, wanted: _Wanted, prepare: Callable[[], object], do: Callable[[str], None]) -> list[str]:
        """Have `do` done to every layer and Linear that is missing, in one process each; what is rounded then."""
        spread("rounding", wanted.everything, lambda name: not self._missing(name, wanted), prepare, do)
        return self._rounded(wanted)

    def _rounded(self, wanted: _Wanted) -> list[str]:
        for name in wanted.everything:
            self._missing(name, wanted)  # finds what other processes have rounded
        return [name for name in wanted.packed if name in self._found]

    def _missing(self, name: str, wanted: _Wanted) -> list[int]:
        """Experts of layer `name`, or 0 for a Linear, that are to be rounded and not found."""
        if name not in wanted.layers:
            return [] if self._is_found(name, [name], wanted.packed, wanted.key_of_linear(name)) else [0]
        found, layer = [], wanted.layers[name]
        for index in wanted.pairs[name]:
            names = wanted.matrices(layer, index)
            if not self._is_found(_expert(layer, index), names, wanted.packed, wanted.key_of_expert(layer, index)):
                found.append(index)
        return found

    def _round_layer(self, study: LayerStudy, wanted: _Wanted) -> None:
        """Round the missing experts of a layer.

        Those that an earlier process had begun with are rounded anew together: that way come the same last bits.
        """
        layer, results = study.layer, self._calibration.results
        pairs, place = wanted.pairs[layer.name], f"rounding.{layer.name}"
        missing = sorted(pairs.keys() & {*self._missing(layer.name, wanted), *(results.noted(place) or [])})
        results.note(place, missing)
        _warn_of_unseen(study, missing)
        for group in study.groups(missing):
            for index, grids in group.round(self.rounder, {i: pairs[i] for i in missing}).items():
                self._keep_expert(layer, index, grids, wanted)
        results.note(place, [])

    def _keep_expert(self, layer: MoELayer, index: int, grids: ExpertGrids, wanted: _Wanted) -> None:
        found = {name: grid for name, grid in _split(_expert(layer, index), grids) if name in wanted.packed}
        self._keep(_expert(layer, index), found, wanted.key_of_expert(layer, index))

    def _keep_linear(self, name: str, found: Sequence[Grid], wanted: _Wanted) -> None:
        """Keep the rounded Linear `name`; `found` is empty if no token reaches it."""
        self._keep(name, {name: found[0]} if found else {}, wanted.key_of_linear(name))

    def _keep(self, what: str, grids: Mapping[str, Grid], key: str) -> None:
        """Keep the rounded matrices of `what`, an expert or a Linear, packed."""
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


@dataclass(frozen=True)
class _Wanted:
    """What is to be rounded, and the keys under which it is kept."""

    packed: Mapping[str, Scheme]
    """Scheme of each module."""
    layers: Mapping[str, MoELayer]
    """All MoE layers by name."""
    key: Callable[..., str]
    """Of all that rounding depends on, given the schemes as text."""

    @cached_property
    def linears(self) -> list[str]:
        """Modules that are no experts' matrices."""
        experts = {name for layer in self.layers.values() for name, *_ in layer.projections()}
        return sorted(self.packed.keys() - experts)

    @property
    def everything(self) -> list[str]:
        """The names of Linears and layers."""
        return [*self.linears, *self.layers]

    @cached_property
    def pairs(self) -> dict[str, dict[int, tuple[Scheme, Scheme]]]:
        """By layer name: expert -> (scheme of gate and up, scheme of down), of experts of which one of these rounds."""
        return {name: _pairs(layer, self.packed) for name, layer in self.layers.items()}

    def matrices(self, layer: MoELayer, index: int) -> list[str]:
        """The names of an expert's matrices that are to be rounded."""
        names = (f"{_expert(layer, index)}.{projection}" for projection in PROJECTIONS)
        return [name for name in names if name in self.packed]

    def key_of_linear(self, name: str) -> str:
        """Its key."""
        return self.key(str(self.packed[name]))

    def key_of_expert(self, layer: MoELayer, index: int) -> str:
        """Its key."""
        return self.key(list(map(str, self.pairs[layer.name][index])))


def _expert(layer: MoELayer, index: int) -> str:
    return f"{layer.experts_name}.{index}"


def _warn_of_unseen(study: LayerStudy, experts: Collection[int]) -> None:
    if unseen := [index for index in experts if not study.samples.counts[index]]:
        logger.warning("{}: no calibration token was routed to experts {}", study.layer.name, unseen)


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
