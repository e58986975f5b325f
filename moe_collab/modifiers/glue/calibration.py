"""The calibration of our modifiers on the run's tokens: in its `work` directory, in temporary files, or in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from llmcompressor.utils.helpers import eval_context
from safetensors import SafetensorError

from ...calibration import Calibration, Workspace
from ...calibration.scratch import NoRoom
from ...checkpoint.atomic import remedy_for
from ...errors import MoeCollabError
from ...moe_model import MoEModel, describe
from .compat import output_directory
from .data import calibration_batches, check_data
from .outline import model_fingerprint
from .recipe import is_on_disk
from .stock import announce_stock_modifiers, find_stock_modifiers
from .work import open_work, work_of

__all__ = ["calibrating", "calibration_of", "check_calibration", "workspace_of"]


def check_calibration(state: State, modifier: Modifier, needs_data: bool = True) -> None:
    """Check that there is data for a modifier of ours, and open the directory that the run works in, if it has one."""
    if needs_data or (state.data is not None and state.data.calib is not None):
        check_data(state, type(modifier).__name__)
    open_work(state)
    find_stock_modifiers(state)


def calibration_of(
    state: State, modifier: Modifier, moe: MoEModel | None = None, needs_data: bool = True
) -> Calibration:
    """What the calibration tokens tell about the run's model as it is now; to be closed when it is no longer needed.

    A modifier that makes one may have none other.
    """
    model: Any = state.model
    batches = calibration_batches(state) if needs_data else []
    return Calibration(model, moe or describe(model), batches, workspace_of(state, modifier))


def workspace_of(state: State, modifier: Modifier, part: str = "calibration") -> Workspace:
    """Where a modifier keeps what it makes in a part of its work: in `work`, in temporary files, or in memory.

    What is in `work` holds for the model as the modifier finds it. Raises `MoeCollabError` if it is another by now. The
    first one of a run also says what modifiers that are not ours will need.
    """
    announce_stock_modifiers(state)
    if (work := work_of(state)) is None:
        return Workspace(_scratch_folder() if is_on_disk(state.model) else None)
    workspace, present = Workspace(work.section(modifier) / part, durable=True), model_fingerprint(state.model)
    known = workspace.results.noted("model")
    if known is None:
        workspace.results.note("model", present)
    elif known != present:
        raise MoeCollabError(
            f"{work.folder}: before it was killed, {type(modifier).__name__} found another model: a file or a function "
            "that the recipe names has changed, or a stock modifier comes to another result each time. Delete the "
            "directory, or name another one."
        )
    return workspace


@contextmanager
def calibrating(state: State) -> Iterator[None]:
    """Have the model ready for passes over it. Memory or a disk that runs out, or a device that fails, is one error."""
    try:
        with eval_context(state.model):
            yield
    except NoRoom as error:
        raise MoeCollabError(f"{error}; then {_what_next(state)}") from error
    except (RuntimeError, MemoryError, OSError, SafetensorError) as error:
        if (problem := _problem(error)) is None:
            raise
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise MoeCollabError(f"{problem}; then {_what_next(state)} ({line})") from error


def _problem(error: Exception) -> str | None:
    """What ran out or failed, and what to do about it; None if it is something else."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "memory ran out. Calibrate with shorter sequences, or free some memory"
    if isinstance(error, torch.AcceleratorError):
        return "the accelerator failed. See to it"
    return remedy_for(error)


def _what_next(state: State) -> str:
    work = work_of(state)
    if work is None:
        return "start again; with `work` a run keeps what it has finished"
    return f"start the same run again: what was finished is kept in {work.folder}"


def _scratch_folder() -> Path:
    """Where files of a run go that are not kept: the disk that the result will be on, or the temporary folder."""
    directory = output_directory()
    if directory is None:
        return Path(tempfile.gettempdir())
    return next(parent for parent in Path(directory).resolve().parents if parent.exists())
