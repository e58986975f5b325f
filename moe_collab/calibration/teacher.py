"""What the original model says, kept to learn from after the model has changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import kl_div

from ..errors import MoeCollabError
from .live import float32_weights, held_out, log_probabilities, mean_kl

__all__ = ["Batch", "Lesson", "Lessons", "divergence", "kl_of", "predictions", "teach"]

Batch = Mapping[str, torch.Tensor]

_BYTES = 2 << 30
_VARIANTS = 4
_REDRAWN = 0.3
"""Share of a variant's tokens that the model drew."""


class Lesson(NamedTuple):
    """A batch, and the log-probabilities that the original model gives its tokens, float16."""

    batch: Batch
    target: torch.Tensor


class Lessons(NamedTuple):
    """What to learn from, and what to judge by."""

    known: list[Lesson]
    unseen: list[Lesson]


def teach(model: Any, batches: Sequence[Batch]) -> Lessons:
    """What `model` predicts; ask before its weights change. Of `batches` every eighth is held out to judge by.

    Besides each of the others, variants of it are learned from, in which some tokens are drawn from the model's own
    predictions: calibration text is scarce, and small tensors learn it by heart. 2 GiB of lessons are kept, whole
    rounds of variants coming last. Raises `MoeCollabError` if there is only one batch.
    """
    if len(batches) < 2:
        raise MoeCollabError("tuning needs two batches of calibration data, one of them to judge the other.")
    known, unseen = held_out(batches)
    lessons = Lessons(predictions(model, known), predictions(model, unseen))
    generator, originals = torch.Generator().manual_seed(0), list(lessons.known)
    for _ in range(_VARIANTS):
        kept = sum(lesson.target.nbytes for lesson in (*lessons.known, *lessons.unseen))
        if kept + sum(lesson.target.nbytes for lesson in originals) > _BYTES:
            break
        lessons.known.extend(predictions(model, [_redrawn(lesson, generator) for lesson in originals]))
    return lessons


@torch.no_grad()
def predictions(model: Any, batches: Sequence[Batch]) -> list[Lesson]:
    """What `model` predicts, of as many batches as fit in 2 GiB."""
    lessons: list[Lesson] = []
    with float32_weights(model):
        for batch in batches:
            lessons.append(Lesson(batch, log_probabilities(model, batch).half()))
            if sum(lesson.target.nbytes for lesson in lessons) + lessons[-1].target.nbytes > _BYTES:
                break
    return lessons


def _redrawn(lesson: Lesson, generator: torch.Generator) -> Batch:
    """The batch with some tokens drawn from the predictions at their places; padding stays."""
    ids = lesson.batch["input_ids"]
    drawn = torch.multinomial(lesson.target.float().exp().flatten(0, 1).cpu(), 1, generator=generator)
    chosen = torch.rand(ids[:, 1:].shape, generator=generator) < _REDRAWN
    if "attention_mask" in lesson.batch:
        chosen &= lesson.batch["attention_mask"][:, 1:].bool().cpu()
    drawn, chosen = drawn.view(chosen.shape).to(ids), chosen.to(ids.device)
    return {**lesson.batch, "input_ids": torch.cat([ids[:, :1], torch.where(chosen, drawn, ids[:, 1:])], 1)}


def divergence(model: Any, lesson: Lesson) -> tuple[torch.Tensor, int]:
    """(KL(lesson || model) in nats per token times rows, rows); gradients flow."""
    found, chosen = log_probabilities(model, lesson.batch), _predicted(lesson.batch)
    loss = kl_div(found[chosen], lesson.target.float()[chosen], reduction="batchmean", log_target=True)
    return loss * len(found), len(found)


def kl_of(model: Any, lessons: Sequence[Lesson]) -> float:
    """KL(lessons || model) in nats per token."""
    return mean_kl(model, [lesson.batch for lesson in lessons], [lesson.target for lesson in lessons])


def _predicted(batch: Batch) -> Any:
    return batch["attention_mask"][:, 1:].bool() if "attention_mask" in batch else slice(None)
