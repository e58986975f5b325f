"""What the original model says, kept to learn from after the model has changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import kl_div

from .live import float32_weights, log_probabilities, mean_kl

__all__ = ["Batch", "Lesson", "divergence", "kl_of", "teach"]

Batch = Mapping[str, torch.Tensor]

_BYTES = 2 << 30


class Lesson(NamedTuple):
    """A batch, and the log-probabilities that the original model gives its tokens, float16."""

    batch: Batch
    target: torch.Tensor


@torch.no_grad()
def teach(model: Any, batches: Sequence[Batch]) -> list[Lesson]:
    """What `model` predicts, of as many batches as fit in 2 GiB; ask before its weights change."""
    lessons: list[Lesson] = []
    with float32_weights(model):
        for batch in batches:
            lessons.append(Lesson(batch, log_probabilities(model, batch).half()))
            if sum(lesson.target.nbytes for lesson in lessons) + lessons[-1].target.nbytes > _BYTES:
                break
    return lessons


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
