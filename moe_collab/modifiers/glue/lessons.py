"""What modifiers learn from: the original model's predictions if that fits in memory, else what its blocks put out."""

from __future__ import annotations

from typing import Any, Literal

from llmcompressor.core import State
from loguru import logger

from ...calibration import Workspace
from ...calibration.block_lessons import BlockLessons, Sample
from ...calibration.fit import end_to_end
from ...calibration.teacher import Lessons, teach
from ...distributed import agreed
from ...moe_model import describe
from .calibration import calibrating
from .data import calibration_batches

__all__ = ["goes_by_blocks", "lessons_of"]

Objective = Literal["auto", "predictions", "blocks"]


def goes_by_blocks(state: State, workspace: Workspace, who: str, copies: int, objective: Objective = "auto") -> bool:
    """Whether `who` learns block by block: if end to end does not fit in memory, or if `objective` asks for it.

    `copies` is how many numbers learning end to end needs for each weight. The log says what was found. It is noted in
    `workspace`, and not decided anew when other memory is free.
    """
    if (noted := workspace.results.noted("by blocks")) is not None:
        return noted
    fit = end_to_end(state.model, describe(state.model), calibration_batches(state), copies)
    blocks = agreed(not fit.enough if objective == "auto" else objective == "blocks")
    asked = "" if objective == "auto" else ", as asked for"
    logger.info("{}: learns {}{}; end to end {}", who, "block by block" if blocks else "end to end", asked, fit)
    workspace.results.note("by blocks", blocks)
    return blocks


def lessons_of(state: State, workspace: Workspace, blocks: bool) -> Lessons | BlockLessons:
    """Lessons of the run's model as it is now, kept in `workspace`."""
    model: Any = state.model
    batches = calibration_batches(state)
    with calibrating(state):
        return BlockLessons(model, describe(model), Sample.of(batches), workspace) if blocks else teach(model, batches)
