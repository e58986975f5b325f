"""What the original model predicts, kept so that the model can learn from it after it has been changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import kl_div, linear

from ..architectures import logits_scaling
from ..decoder import decoder_of
from ..errors import MoeCollabError
from .live import float32_weights, log_probabilities, mean_kl, predict, predicted
from .micro_batches import held_out

__all__ = [
    "LESSON_BYTES",
    "Batch",
    "Head",
    "Lesson",
    "Lessons",
    "divergence",
    "kl_of",
    "teach",
]

Batch = Mapping[str, torch.Tensor]

LESSON_BYTES = 2 << 30
"""About how many bytes of memory a list of lessons may take."""
_TOGETHER = 1 << 15
"""Tokens of the texts that are written at one time; the keys and values of all of them are in memory."""
_TEXTS = 6
"""Most texts that are written for each sequence of the calibration set."""
_PROMPT = 8
"""A text begins with the first eighth of a calibration sequence."""


class Head(NamedTuple):
    """The original lm_head."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Next-token log-probabilities, float32 [..., vocabulary], for `inputs` [..., H]."""
        return linear(inputs, self.weight, self.bias).float().log_softmax(-1)


class Lesson(NamedTuple):
    """A batch, and the original model's inputs of lm_head at all positions but the last, [rows, length - 1, H]."""

    batch: Batch
    inputs: torch.Tensor


class Lessons(NamedTuple):
    """What the original model predicts for the calibration tokens and for held-out ones."""

    known: list[Lesson]
    """To learn from."""
    unseen: list[Lesson]
    """Held out, to judge by."""
    head: Head
    """Turns the inputs of lessons into predictions."""


def teach(model: Any, batches: Sequence[Batch]) -> Lessons:
    """Record what `model` predicts, before its weights change. Of `batches` every eighth is held out to judge by.

    Calibration text is scarce, so that a model soon knows it by heart. Therefore the other batches are joined by texts
    that `model` itself writes, each a continuation of the beginning of a sequence, as many as fit in 2 GiB of lessons.
    Raises `MoeCollabError` for a single batch.
    """
    if len(batches) < 2:
        raise MoeCollabError("tuning needs two batches of calibration data, one of them to judge the other.")
    known, unseen = held_out(batches)
    lessons = Lessons(_recited(model, known), _recited(model, unseen), _head_of(model))
    size = sum(lesson.inputs.nbytes for lesson in lessons.known)
    lessons.known.extend(_recited(model, _texts(model, known, LESSON_BYTES // max(size, 1) - 1)))
    return lessons


def _texts(model: Any, batches: Sequence[Batch], most: int = 1 << 30) -> list[Batch]:
    """Texts that `model` writes: each continues the beginning of a sequence of `batches` to that sequence's length.

    Every sequence is continued `most` times, but at most `_TEXTS` times.
    """
    generator, head = torch.Generator().manual_seed(0), _head_of(model)
    return [text for _ in range(min(most, _TEXTS)) for text in _written(model, head, batches, generator)]


@torch.no_grad()
def _recited(model: Any, batches: Sequence[Batch]) -> list[Lesson]:
    """What `model` predicts for each of `batches`, up to about 2 GiB of lessons; the batches beyond are left out."""
    lessons: list[Lesson] = []
    with float32_weights(model):
        for batch in batches:
            lessons.append(Lesson(batch, predict(model, batch)[0]))
            if sum(lesson.inputs.nbytes for lesson in lessons) > LESSON_BYTES:
                break
    return lessons


@torch.no_grad()
def _head_of(model: Any) -> Head:
    """A copy of the model's lm_head, in float32 where `float32_weights` has room for it."""
    with float32_weights(model):
        head = model.get_output_embeddings()
        return Head(head.weight.clone(), None if head.bias is None else head.bias.clone())


def _written(model: Any, head: Head, batches: Sequence[Batch], generator: torch.Generator) -> list[Batch]:
    """One text, without padding, for each sequence; none for a sequence whose tokens do not fill the prompt."""
    prompts: dict[int, list[torch.Tensor]] = defaultdict(list)
    for batch in batches:
        ids = batch["input_ids"]
        length = max(1, ids.shape[1] // _PROMPT)
        for row, valid in zip(ids, batch.get("attention_mask", torch.ones_like(ids)).bool(), strict=True):
            if int(valid.sum()) >= length:
                prompts[ids.shape[1]].append(row[valid][:length])
    written, rows = [], len(batches[0]["input_ids"])
    for length, starts in prompts.items():
        for together in torch.stack(starts).split(max(1, _TOGETHER // length)):
            written += _continued(model, head, together, length, generator).split(rows)
    return [{"input_ids": text} for text in written]


@torch.no_grad()
def _continued(model: Any, head: Head, ids: torch.Tensor, length: int, generator: torch.Generator) -> torch.Tensor:
    """`ids` [rows, start], continued to [rows, length] by tokens drawn from the model's predictions."""
    fresh, cache = ids, None
    with float32_weights(model):
        while ids.shape[1] < length:
            output = decoder_of(model)(input_ids=fresh, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            chances = head(output.last_hidden_state[:, -1] / logits_scaling(model.config)).exp()
            fresh = torch.multinomial(chances.cpu(), 1, generator=generator).to(ids.device)
            ids = torch.cat([ids, fresh], dim=1)
    return ids


def divergence(model: Any, head: Head, lesson: Lesson) -> tuple[torch.Tensor, int]:
    """(KL(lesson || model) in nats per token, times the batch's rows; rows). Gradients flow through the KL."""
    found, chosen = log_probabilities(model, lesson.batch), predicted(lesson.batch)
    target = head(lesson.inputs[chosen])
    loss = kl_div(found[chosen].flatten(0, -2), target.flatten(0, -2), reduction="batchmean", log_target=True)
    return loss * len(found), len(found)


def kl_of(model: Any, head: Head, lessons: Sequence[Lesson]) -> float:
    """KL(lessons || model) in nats per token."""
    return mean_kl(model, [lesson.batch for lesson in lessons], (head(lesson.inputs) for lesson in lessons))
