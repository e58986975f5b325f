"""Training of a compressed model's small tensors, end to end or block by block, judged on held-out tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from compressed_tensors.offload import disable_offloading
from safetensors.torch import load_file, save_file
from torch import nn

from ..decoder import Decoder
from .adam import adam_steps
from .live import float32_weights, frozen
from .small_tensors import SmallTensor, in_place
from .teacher import Batch, Lessons, divergence, kl_of

__all__ = ["BlockOutputs", "Learned", "learn_blocks", "learn_predictions"]

T = TypeVar("T")

_RATES = (0.3, 1.0, 3.0)
"""Learning rates that are tried, as multiples of each tensor's `pace`."""
_TRIAL_SHARE = 4
"""A rate is tried for a quarter of the steps."""
_JUDGEMENTS = 10
"""How often held-out tokens judge, evenly over the steps."""
_PATIENCE = 3
"""Judgements in a row without a gain after which learning stops."""


class Learned(NamedTuple):
    """Loss on held-out tokens before and after, and the best learning rate and step, both 0 if there was no gain."""

    before: float
    after: float
    rate: float
    steps: int


@torch.no_grad()
def learn_predictions(model: Any, tensors: Sequence[SmallTensor], lessons: Lessons, steps: int) -> Learned:
    """Train `tensors` to minimize KL(lessons || model), nats per token; they end as held-out lessons judge them best.

    The model has to fit in memory together with its activations for 16 sequences.
    """
    with float32_weights(model), frozen(model), in_place(tensors):
        judge = partial(kl_of, model, lessons.head, lessons.unseen)
        return _learn(tensors, lessons.known, partial(divergence, model, lessons.head), judge, steps)


def _learn(
    tensors: Sequence[SmallTensor],
    data: Sequence[T],
    loss: Callable[[T], tuple[torch.Tensor, int]],
    judge: Callable[[], float],
    steps: int,
) -> Learned:
    """Try each learning rate for some steps, then train with the best one from the start again.

    Training stops early when `judge` sees no gain. `tensors` end with the best values seen, which may be the first.
    """
    parameters = [tensor.learned for tensor in tensors]
    start = [parameter.detach().clone() for parameter in parameters]
    best, before = start, judge()
    after, found = before, (0.0, 0)

    def run(rate: float, steps: int) -> float:
        nonlocal best, after, found
        _restore(parameters, start)
        groups = [([tensor.learned], rate * tensor.pace) for tensor in tensors]
        lowest, stale = math.inf, 0
        for step, _ in enumerate(adam_steps(groups, data, loss, steps), start=1):
            if step % max(1, steps // _JUDGEMENTS) and step != steps:
                continue
            score = judge()
            stale = 0 if score < lowest else stale + 1
            lowest = min(lowest, score)
            if score < after:
                after, best, found = score, [parameter.detach().clone() for parameter in parameters], (rate, step)
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


class BlockOutputs:
    """The outputs of the original model's blocks, for batches to learn from and batches to judge by, in `folder`."""

    def __init__(self, model: Any, known: Sequence[Batch], unseen: Sequence[Batch], folder: Path) -> None:
        self.batches, self.num_known, self._folder = [*known, *unseen], len(known), folder
        decoder = Decoder(model)
        hidden = _embedded(decoder, self.batches)
        for name, block in decoder.blocks.items():
            with _computing(block) as dtype:
                hidden = _outputs([partial(_call, decoder, name, batch, dtype) for batch in self.batches], hidden)
            for position, output in enumerate(hidden):
                save_file({"output": output.contiguous().cpu()}, self._file(name, position))

    def _file(self, block: str, position: int) -> Path:
        return self._folder / f"{block}.{position}.safetensors"

    def of(self, block: str) -> list[torch.Tensor]:
        """The outputs of one block, [rows, length, H] for each batch."""
        return [load_file(self._file(block, position))["output"] for position in range(len(self.batches))]


class _Example(NamedTuple):
    """One batch at one block."""

    hidden: torch.Tensor
    """Input of the block."""
    call: Callable[[torch.Tensor], torch.Tensor]
    """The block as the model calls it for this batch."""
    target: torch.Tensor
    """Output of the original block."""
    valid: torch.Tensor
    """Which tokens are no padding, bool [rows, length]."""


@torch.no_grad()
def learn_blocks(
    model: Any, tensors: Mapping[str, SmallTensor], originals: BlockOutputs, steps: int
) -> dict[str, Learned]:
    """Train `tensors` (by module name) block by block, to bring each block's output closer to the original block's.

    The loss is the mean over tokens of ||error||^2 / ||output||^2. Tensors outside the blocks do not learn. A block's
    input is what the blocks before it put out after they have learned, so it makes up for their errors too. Only one
    block at a time is in float32; of an offloaded model, only one is in memory. Returns block name -> what it learned.
    """
    decoder = Decoder(model)
    hidden, valid = _embedded(decoder, originals.batches), [_valid(batch) for batch in originals.batches]
    found = {}
    for name, block in decoder.blocks.items():
        learning = [tensor for module, tensor in tensors.items() if module.startswith(f"{name}.")]
        with _computing(block) as dtype, in_place(learning):
            ways = [partial(_call, decoder, name, batch, dtype) for batch in originals.batches]
            if learning:
                examples = list(map(_Example, hidden, ways, originals.of(name), valid))
                known, unseen = examples[: originals.num_known], examples[originals.num_known :]
                found[name] = _learn(learning, known, _error, partial(_mean_error, unseen), steps)
            hidden = _outputs(ways, hidden)
    return found


@contextmanager
def _computing(block: nn.Module) -> Iterator[torch.dtype]:
    """Have the model's `block` in memory, in float32 if that fits; yields the type that it computes in."""
    with disable_offloading(), float32_weights(block), frozen(block):
        yield next(module.weight.dtype for module in block.modules() if isinstance(module, nn.Linear))


@torch.no_grad()
def _embedded(decoder: Decoder, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """The first block's input for each batch."""
    with disable_offloading():
        return [decoder.embed(batch) for batch in batches]


def _call(decoder: Decoder, name: str, batch: Batch, dtype: torch.dtype, hidden: torch.Tensor) -> torch.Tensor:
    """What block `name` makes of `hidden` [rows, length, H]."""
    hidden = hidden.to(dtype)
    return decoder.calls(batch, hidden)[name](decoder.blocks[name], hidden)


@torch.no_grad()
def _outputs(ways: Sequence[Callable], hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [way(x) for way, x in zip(ways, hidden, strict=True)]


def _error(example: _Example) -> tuple[torch.Tensor, int]:
    """(Sum over rows of the mean over tokens of ||error||^2 / ||target||^2, rows)."""
    target = example.target.float()
    errors = (example.call(example.hidden).float() - target).square().sum(-1)
    relative = errors / target.square().sum(-1).clamp(min=1e-12)
    return relative[example.valid].mean() * len(target), len(target)


def _mean_error(examples: Sequence[_Example]) -> float:
    errors, rows = zip(*map(_error, examples), strict=True)
    return float(sum(errors)) / sum(rows)


def _valid(batch: Batch) -> torch.Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]).bool() if mask is None else mask.bool()
