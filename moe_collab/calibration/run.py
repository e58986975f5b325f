"""`Calibration`: a run's calibration tokens, and what has been found out with them about the model as it is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from ..moe_model import MoEModel
from .fisher import FisherPass
from .micro_batches import MicroBatches, held_out
from .results import key_of
from .samples import LayerSamples, LinearSamples
from .stream import Masks, Stream
from .workspace import Workspace

__all__ = ["Calibration", "kept_masks"]


class Calibration:
    """What `batches` tell about `model`; every eighth of them is held out to judge by, the others are learnt from.

    What it makes is kept in `workspace`, by default in memory. If that is durable, a calibration that is made there
    again goes on where an earlier one was cut off. That has to be of the same model and tokens, and has to be asked for
    the same in the same order. All holds for the model as it is: after its weights, experts or number of activated
    experts have changed, make another calibration elsewhere.
    """

    def __init__(
        self,
        model: Any,
        moe: MoEModel,
        batches: Sequence[Mapping[str, torch.Tensor]],
        workspace: Workspace | None = None,
    ) -> None:
        self.model, self.moe, self._batches = model, moe, batches
        self._workspace = workspace or Workspace()
        self.scratch, self.results = self._workspace.scratch, self._workspace.results
        self.later = 0
        """Bytes that will be kept after the samples, such as rounded weights: room is checked for them too."""
        self._pass: FisherPass | None = None
        self._routing: str = ""
        self._linears: list[str] = []
        if begun := self.results.noted("samples"):
            self._routing, self._linears = begun

    @cached_property
    def everything(self) -> MicroBatches:
        """All tokens."""
        found = MicroBatches(self._batches)
        found.check_any()
        return found

    @cached_property
    def learn(self) -> MicroBatches:
        """Those to learn from."""
        return MicroBatches(self._divided[0])

    @cached_property
    def judge(self) -> MicroBatches:
        """Those that are held out."""
        return MicroBatches(self._divided[1])

    @property
    def _divided(self) -> tuple[Sequence[Mapping[str, torch.Tensor]], ...]:
        batches = self._batches
        return held_out(_rows(batches[0]) if len(batches) == 1 else batches)

    def stream(self, data: MicroBatches) -> Stream:
        """The model's blocks over `data`."""
        return Stream(self.model, self.moe, data, self.scratch)

    def samples(
        self, linears: Collection[str] = (), kept: Masks | None = None
    ) -> tuple[dict[str, LayerSamples], dict[str, LinearSamples]]:
        """Samples of all MoE layers and of `linears`, by name, while routers choose only experts that `kept` marks.

        Only the newest are kept, and used again if they will do.
        """
        routing = key_of({name: mask.tolist() for name, mask in (kept or {}).items()})
        if routing != self._routing or not set(linears) <= set(self._linears):
            self._pass = None
            self.scratch.discard_all(self._samples_name())
            self._routing, self._linears = routing, sorted(linears)
            self.results.note("samples", [self._routing, self._linears])
        if self._pass is None:
            modules = {name: self.model.get_submodule(name) for name in self._linears}
            layers = [layer.name for layer in self.moe.layers]
            self._pass = FisherPass(
                self.stream(self.learn), layers, modules, kept, name=self._samples_name(), later=self.later
            )
        return self._pass.layers, self._pass.linears

    def _samples_name(self) -> str:
        return f"samples-{key_of(self._routing, self._linears)}"

    def close(self) -> None:
        """Delete all files, but for results that are durable."""
        self._pass = None
        self._workspace.close()


def kept_masks(moe: MoEModel, dropped: Mapping[str, Collection[int]]) -> dict[str, torch.Tensor]:
    """Layer name -> which experts stay [num_experts, bool], for layers that lose any."""
    masks = {}
    for layer in moe.layers:
        if gone := dropped.get(layer.name):
            masks[layer.name] = torch.tensor([index not in gone for index in range(layer.num_experts)])
    return masks


def _rows(batch: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Batches of one sequence each."""
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(batch["input_ids"]))]
