"""A model's matrices rounded at the schemes chosen for them, on copies; and what that does to its predictions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from loguru import logger
from torch import nn

from ..architectures import PROJECTIONS
from ..errors import MoeCollabError
from ..formats import DENSE, Scheme
from ..moe_model import MoELayer, MoEModel
from ..rounding import Grid, Rounder
from .linears import capture_linears
from .live import float32_weights, log_probabilities, masked_routers, mean_kl, replaced_weights
from .samples import capture_layers
from .study import ExpertGrids, LayerStudy

__all__ = ["Trial", "kept_masks", "round_model"]

Batches = Sequence[Mapping[str, torch.Tensor]]


def round_model(
    model: Any, moe: MoEModel, schemes: Mapping[str, Scheme], batches: Batches, rounder: Rounder
) -> dict[str, Grid]:
    """Module name -> grid (a batch of one), for every module of `schemes` that is packed; the model stays as it is.

    Every expert is rounded by the tokens that the router sends to it, and its down_proj makes up for its rounded gate
    and up.
    """
    experts = {name for layer in moe.layers for name, *_ in layer.projections()}
    others = {name: scheme for name, scheme in schemes.items() if scheme.is_packed and name not in experts}
    samples = capture_linears(model, {name: model.get_submodule(name) for name in others}, batches)
    found: dict[str, Grid] = {name: seen.rounded(rounder, others[name]) for name, seen in samples.items()}
    pairs = {layer.name: _pairs(layer, schemes) for layer in moe.layers}
    wanted = [layer for layer in moe.layers if pairs[layer.name]]
    for layer, seen in capture_layers(model, wanted, batches) if wanted else ():
        study = LayerStudy(layer, seen)
        if unseen := [index for index in pairs[layer.name] if not study.counts[index]]:
            logger.warning("{}: no calibration token was routed to experts {}", layer.name, unseen)
        for index, grids in study.round_all(rounder, study.moments(), pairs[layer.name]).items():
            found |= _split(f"{layer.experts_name}.{index}", grids)
    return found


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


def _split(expert: str, grids: ExpertGrids) -> dict[str, Grid]:
    found: dict[str, Grid] = {}
    if grids.gate_up is not None:
        gate, up = (grids.gate_up.reshaped(2).select(half) for half in (0, 1))
        found |= {f"{expert}.gate_proj": gate, f"{expert}.up_proj": up}
    if grids.down is not None:
        found[f"{expert}.down_proj"] = grids.down
    return found


def kept_masks(moe: MoEModel, dropped: Mapping[str, Collection[int]]) -> dict[str, torch.Tensor]:
    """Layer name -> which experts stay [num_experts, bool], for layers that lose any."""
    masks = {}
    for layer in moe.layers:
        if gone := dropped.get(layer.name):
            masks[layer.name] = torch.tensor([index not in gone for index in range(layer.num_experts)])
    return masks


class Trial:
    """Rounds a model on trial, as it would be rounded in earnest, and measures its KL on held-out tokens.

    A matrix whose rounding is the same in two trials is rounded once.
    """

    def __init__(self, model: Any, moe: MoEModel, rounder: Rounder, batches: Batches, heldout: Batches) -> None:
        self._model, self._moe, self._rounder = model, moe, rounder
        self._batches, self._heldout = batches, heldout
        self._rounded: dict[str, tuple[object, torch.Tensor]] = {}
        with float32_weights(model), torch.no_grad():
            self._base = [log_probabilities(model, batch).half() for batch in heldout]
        if not all(torch.isfinite(logp).all() for logp in self._base):
            raise MoeCollabError(
                "the model's predictions on the calibration data are NaN or infinite; nothing was changed."
            )

    def kl(self, schemes: Mapping[str, Scheme], dropped: Mapping[str, Collection[int]]) -> float:
        """KL(model || model rounded at `schemes`, without the experts `dropped` of each layer), nats per token."""
        masks = kept_masks(self._moe, dropped)
        state = {name: self._state(name, schemes, dropped) for name, scheme in schemes.items() if scheme.is_packed}
        stale = {name for name, key in state.items() if name not in self._rounded or self._rounded[name][0] != key}
        with float32_weights(self._model), masked_routers(self._moe, masks):
            wanted = {name: schemes[name] for name in stale}
            for name, grid in round_model(self._model, self._moe, wanted, self._batches, self._rounder).items():
                dtype = self._rounder.scale_dtype
                self._rounded[name] = state[name], grid.values()[0].to(dtype)
            weights = {self._weight(name): self._rounded[name][1] for name in state}
            with replaced_weights(weights):
                return mean_kl(self._model, self._heldout, self._base)

    def _state(self, name: str, schemes: Mapping[str, Scheme], dropped: Mapping[str, Collection[int]]) -> object:
        """All that the rounding of a module depends on: its expert's schemes, and which experts have been dropped."""
        expert = name.rpartition(".")[0]
        parts = [schemes.get(f"{expert}.{projection}") for projection in PROJECTIONS]
        gone = sorted((layer, tuple(sorted(members))) for layer, members in dropped.items() if members)
        return schemes[name], parts, gone

    def _weight(self, name: str) -> nn.Parameter:
        return self._model.get_submodule(name).weight
