"""The calibration of our modifiers: on the run's tokens, with scratch files for a model that is on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from llmcompressor.core import State

from ...calibration import Calibration
from ...moe_model import MoEModel, describe
from .compat import output_directory
from .data import calibration_batches
from .recipe import is_on_disk

__all__ = ["calibration_of"]


def calibration_of(state: State, moe: MoEModel | None = None) -> Calibration:
    """What the calibration tokens tell about the run's model as it is now; to be closed when it is no longer needed."""
    model: Any = state.model
    folder = scratch_folder() if is_on_disk(model) else None
    return Calibration(model, moe or describe(model), calibration_batches(state), folder)


def scratch_folder() -> Path:
    """Where files of a run go that are not kept: the disk that the result will be on, or the temporary folder."""
    directory = output_directory()
    if directory is None:
        return Path(tempfile.gettempdir())
    return next(parent for parent in Path(directory).resolve().parents if parent.exists())
