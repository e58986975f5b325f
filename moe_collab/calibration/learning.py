"""Training of a compressed model's small tensors, end to end or block by block, judged on held-out tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from compressed_tensors.offload import disable_offloading
from torch import nn

from ..moe_model import MoEModel
from .adam import Adam, pauses
from .at_hand import at_hand
from .block_lessons import BlockError, BlockLessons
from .head import Head
from .live import float32_weights, frozen
from .results import Bookmark
from .small_tensors import SmallTensor, as_stored, in_place
from .stream import Stream
from .teacher import Lessons, divergence, kl_of

__all__ = ["LEARNING_COPIES", "Learned", "learn_blocks", "learn_predictions", "take_values", "values_of"]

T = TypeVar("T")

LEARNING_COPIES = 5
"""Numbers for each weight: itself, in float32 and as it is, and three on the way from its factor to their product and
back."""
_RATES = (0.3, 1.0, 3.0)
"""Learning rates that are tried, as multiples of each tensor's `pace`."""
_TRIAL_SHARE = 4
"""A rate is tried for a quarter of the steps."""
_PATIENCE = 3
"""Judgements in a row without a gain after which learning stops."""


class Learned(NamedTuple):
    """Loss on held-out tokens before and after, and the best learning rate and step, both 0 if there was no gain."""

    before: float
    after: float
    rate: float
    steps: int


@torch.no_grad()
def learn_predictions(
    model: Any, tensors: Sequence[SmallTensor], lessons: Lessons, steps: int, bookmark: Bookmark
) -> Learned:
    """Train `tensors` to minimize KL(lessons || model), nats per token; they end as held-out lessons judge them best.

    What it takes is `fit.end_to_end` with `LEARNING_COPIES`. It goes on from `bookmark`.
    """
    with disable_offloading(), float32_weights(model), frozen(model), in_place(tensors):
        judge = partial(kl_of, model, lessons.head, lessons.unseen)
        return _learn(tensors, lessons.known, partial(divergence, model, lessons.head), judge, steps, bookmark)


def _learn(
    tensors: Sequence[SmallTensor],
    data: Sequence[T],
    loss: Callable[[T], tuple[torch.Tensor, int]],
    judge: Callable[[], float],
    steps: int,
    bookmark: Bookmark,
) -> Learned:
    """Try each learning rate for some steps, then train with the best one from the start again.

    Training stops early when `judge` sees no gain. `tensors` end with the best values seen, which may be the first.

    `bookmark` keeps at every judgement all scores so far, the best values and the state of Adam. What was decided
    follows from the scores: those of an earlier process are gone through again, without a step, as far as they go.
    """
    parameters = [tensor.learned for tensor in tensors]
    start = [parameter.detach().clone() for parameter in parameters]
    kept = bookmark.found() or {}
    scores = kept["scores"].tolist() if kept else [judge()]
    best = [kept.get(f"best.{index}", value) for index, value in enumerate(start)]
    before, *known = scores
    after, found = before, (0.0, 0)

    def run(rate: float, steps: int) -> float:
        nonlocal best, after, found
        _restore(parameters, start)
        adam = Adam([([tensor.learned], rate * tensor.pace) for tensor in tensors], data, loss, steps)
        lowest, stale = math.inf, 0
        for step in pauses(steps):
            if known:
                score = known.pop(0)
                if not known:
                    adam.go_on_from(kept)
            else:
                adam.go_to(step)
                scores.append(score := judge())
                if score < after:
                    best = [parameter.detach().clone() for parameter in parameters]
                state = {f"best.{index}": value for index, value in enumerate(best)}
                bookmark.put(adam.state() | state | {"scores": torch.tensor(scores, dtype=torch.float64)})
            if score < after:
                after, found = score, (rate, step)
            stale = 0 if score < lowest else stale + 1
            lowest = min(lowest, score)
            if stale == _PATIENCE or not math.isfinite(score):
                break
        return lowest

    trials = {rate: run(rate, max(1, steps // _TRIAL_SHARE)) for rate in _RATES}
    run(min(trials, key=trials.__getitem__), steps)
    _restore(parameters, best)
    return Learned(before, after, *found)


def _restore(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)


@torch.no_grad()
def learn_blocks(
    model: Any, moe: MoEModel, tensors: Mapping[str, SmallTensor], lessons: BlockLessons, steps: int
) -> tuple[dict[str, Learned], float]:
    """Train `tensors` (by module name) block by block, to bring each block's output closer to the original block's.

    The loss is `BlockError`, nats per token. Tensors outside the blocks do not learn. A block's input is what the
    blocks before it put out after they have learned, rounded as they will be stored, so it makes up for their errors
    too. One block at a time is in memory, its experts included, in float32 and in its own type: of DeepSeek-V3 69 GB.

    Returns (block name -> what it learned, KL on held-out tokens with all of that in nats each). What has been learned
    is kept in the lessons' results, block by block, and within a block at every judgement.
    """
    stream, results = Stream(model, moe, lessons.data, lessons.scratch), lessons.results

    def own(block: str) -> dict[str, SmallTensor]:
        return {module: tensor for module, tensor in tensors.items() if module.startswith(f"{block}.")}

    def through(block: str, hidden: torch.Tensor, into: torch.Tensor) -> None:
        learning, bookmark = own(block), Bookmark(results, f"learning.{block}")
        # What is read of a block stays in memory while it learns: products with factors are made from it.
        with disable_offloading(), at_hand(stream.decoder.blocks[block].modules(), stream.device):
            if learning and results.get(f"learned.{block}") is None:
                loss = partial(_block_loss, stream, lessons.error(block), block, hidden)
                with in_place(learning.values()):
                    judge = partial(_mean, loss, lessons.unseen)
                    found = _learn(list(learning.values()), lessons.known, loss, judge, steps, bookmark)
                results.note(f"learned.{block}", found)
                results.put(f"learned.{block}", values_of(learning))
            bookmark.remove()
            if learning:
                take_values(learning, results.kept(f"learned.{block}"))
            with as_stored(learning.values()):
                for index in stream.own:
                    output = stream.call(block, index, stream.rows(hidden, index)).flatten(0, 1)
                    into[stream.data.span(index)] = output.to("cpu", stream.dtype)

    with stream.running():
        last = stream.forward("learned", "learning", through)[len(stream.decoder.names)]
    learned = {}
    for block in stream.decoder.names:
        if learning := own(block):  # an earlier process may have learned it
            take_values(learning, results.kept(f"learned.{block}"))
            learned[block] = Learned(*results.noted(f"learned.{block}"))
    return learned, lessons.kl(stream, Head.of(model, stream.device), last)


def values_of(tensors: Mapping[str, SmallTensor]) -> dict[str, torch.Tensor]:
    """What `tensors` have learned, by the same names."""
    return {name: tensor.learned.detach() for name, tensor in tensors.items()}


def take_values(tensors: Mapping[str, SmallTensor], values: Mapping[str, torch.Tensor]) -> None:
    """Give `tensors` what others of these names have learned."""
    for name, tensor in tensors.items():
        tensor.learned.data.copy_(values[name])


def _block_loss(
    stream: Stream, error: BlockError, block: str, hidden: torch.Tensor, index: int
) -> tuple[torch.Tensor, int]:
    """(The mean loss of micro-batch `index`'s tokens, times its rows; rows), if `block` gets `hidden` [tokens, H]."""
    found = stream.call(block, index, stream.rows(hidden, index)).flatten(0, 1)
    rows, _ = stream.data.shape(index)
    return error.of(found, stream.data.span(index)).mean() * rows, rows


def _mean(loss: Callable[[int], tuple[torch.Tensor, int]], data: Sequence[int]) -> float:
    losses, rows = zip(*map(loss, data), strict=True)
    return float(sum(losses)) / sum(rows)
