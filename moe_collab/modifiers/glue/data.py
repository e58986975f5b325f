"""The calibration data of a run, as our modifiers read them."""

from __future__ import annotations

import torch
from compressed_tensors.offload import get_execution_device
from llmcompressor.core import State

from ...calibration import inputs_of
from ...distributed import everyones
from ...errors import MoeCollabError

__all__ = ["calibration_batches", "check_data"]


def check_data(state: State, who: str) -> None:
    """Raise `MoeCollabError` if oneshot() was given no calibration data."""
    if state.data is None or state.data.calib is None:
        raise MoeCollabError(f"{who}: it needs calibration data. Give oneshot() a dataset.")


def calibration_batches(state: State) -> list[dict[str, torch.Tensor]]:
    """What the model is called with for each calibration batch, of all processes."""
    device = get_execution_device(state.model.get_input_embeddings())
    batches = everyones([inputs_of(batch, torch.device("cpu")) for batch in state.data.calib])
    return [inputs_of(batch, device) for batch in batches]
