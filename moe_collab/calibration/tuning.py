"""Scales and codes tuned end to end, so that the rounded model's predictions come closer to the original's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from ..decoder import replaced_forward
from ..rounding import Grid
from .at_hand import shadowed
from .live import float32_weights, frozen
from .loose_grids import LooseGrid, forward_with, learn_grids
from .results import Bookmark
from .teacher import Lessons, divergence, kl_of

__all__ = ["TUNING_COPIES", "Tuned", "tune_grids"]

TUNING_COPIES = 16
"""Numbers for each weight: itself, its code, its place with a gradient and two moments, and what lies between place and
weight on the way there and back and in a step of Adam. Measured on a model of 20 million weights: 15.6."""


class Tuned(NamedTuple):
    """Tuned grids, and the KL on held-out tokens, nats each, before and after."""

    grids: dict[str, Grid]
    before: float
    after: float


def tune_grids(
    model: Any, grids: Mapping[str, Grid], lessons: Lessons, steps: int, dtype: torch.dtype, bookmark: Bookmark
) -> Tuned:
    """Adam on a factor per scale and a place per weight, minimizing KL(lessons || model).

    `grids` (by module name) are the rounded weights; `model` has the original ones. What it takes is `fit.end_to_end`
    with `TUNING_COPIES`. It goes on from `bookmark`, where three numbers for each weight and scale are kept on the way.

    Scales are rounded to `dtype` before the unseen lessons judge the result; if KL has not fallen, `grids` are returned
    unchanged.
    """
    with float32_weights(model), frozen(model):
        before = _kl(model, grids, lessons)
        loose = {name: LooseGrid(grid, model.get_submodule(name).weight.detach()) for name, grid in grids.items()}
        with _in_place(model, loose):
            learn_grids(loose.values(), lessons.known, partial(divergence, model, lessons.head), steps, bookmark)
        tuned = {name: grid.stored(dtype) for name, grid in loose.items()}
        after = _kl(model, tuned, lessons)
    return Tuned(tuned, before, after) if after < before else Tuned(dict(grids), before, before)


@torch.no_grad()
def _kl(model: Any, grids: Mapping[str, Grid], lessons: Lessons) -> float:
    with _in_place(model, grids):
        return kl_of(model, lessons.head, lessons.unseen)


@contextmanager
def _in_place(model: Any, grids: Mapping[str, Grid | LooseGrid]) -> Iterator[None]:
    """Let the modules compute with the weights of `grids` within the block."""
    head = model.get_output_embeddings()
    with ExitStack() as stack:
        for name, grid in grids.items():
            module = model.get_submodule(name)
            if module is head:
                # `log_probabilities` applies its weight by hand, so it learns nothing and is set once.
                stack.enter_context(shadowed({module: {"weight": grid.values()[0].detach()}}))
            else:
                stack.enter_context(replaced_forward(module, partial(forward_with, module.bias, grid)))
        yield
