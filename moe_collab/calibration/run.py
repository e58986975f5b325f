"""`Calibration`: a run's calibration tokens, and what has been found out with them about the model as it is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..moe_model import MoEModel
from .fisher import FisherPass
from .micro_batches import MicroBatches, held_out
from .samples import LayerSamples, LinearSamples
from .scratch import Scratch
from .stream import Masks, Stream

__all__ = ["Calibration", "kept_masks"]


class Calibration:
    """What `batches` tell about `model`; every eighth of them is held out to judge by, the others are learnt from.

    Intermediate results are in files inside `folder`, or in memory if that is None. They hold for the model as it is:
    after its weights, experts or number of activated experts have changed, make another one.
    """

    def __init__(
        self,
        model: Any,
        moe: MoEModel,
        batches: Sequence[Mapping[str, torch.Tensor]],
        folder: str | Path | None = None,
    ) -> None:
        learn, judge = held_out(_rows(batches[0]) if len(batches) == 1 else batches)
        self.model, self.moe, self.scratch = model, moe, Scratch(folder)
        self.everything, self.learn, self.judge = MicroBatches(batches), MicroBatches(learn), MicroBatches(judge)
        self._pass: FisherPass | None = None
        self._key: object = None
        self._asked: set[str] = set()

    def stream(self, data: MicroBatches) -> Stream:
        """The model's blocks over `data`."""
        return Stream(self.model, self.moe, data, self.scratch)

    def samples(
        self, linears: Mapping[str, nn.Linear] | None = None, kept: Masks | None = None
    ) -> tuple[dict[str, LayerSamples], dict[str, LinearSamples]]:
        """Samples of all MoE layers and of `linears`, by name, while routers choose only experts that `kept` marks.

        Only the newest are kept, and used again if they will do.
        """
        key = {name: mask.tolist() for name, mask in (kept or {}).items()}
        wanted = set(linears or ())
        if self._pass is None or self._key != key or not wanted <= self._asked:
            self._pass = None
            layers = [layer.name for layer in self.moe.layers]
            self._pass = FisherPass(self.stream(self.learn), layers, linears or {}, kept)
            self._key, self._asked = key, wanted
        return self._pass.layers, self._pass.linears

    def close(self) -> None:
        """Delete all files."""
        self._pass = None
        self.scratch.close()


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
