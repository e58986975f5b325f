"""Small tensors settled into a compressed model, end to end or block by block, judged by held-out tokens."""

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

from ..architectures import MoEModel
from .descent import descend
from .live import float32_weights, held_out
from .samples import frozen
from .small_tensors import SmallTensor, in_place
from .teacher import Lesson, divergence, kl_of

__all__ = ["BlockOutputs", "Settled", "blocks_of", "settle_blocks", "settle_predictions"]

T = TypeVar("T")

_RATES = (0.3, 1.0, 3.0)
_TRIAL_SHARE = 4
"""A rate is tried for a quarter of the steps."""
_JUDGEMENTS = 10
_PATIENCE = 3
"""Judgements without a gain before learning stops."""


class Settled(NamedTuple):
    """Loss on held-out tokens before and after, the learning rate that was best, and its steps, 0 for no gain."""

    before: float
    after: float
    rate: float
    steps: int


@torch.no_grad()
def settle_predictions(model: Any, tensors: Sequence[SmallTensor], lessons: Sequence[Lesson], steps: int) -> Settled:
    """Minimize KL(lessons || model), nats per token, by `tensors`, which are left where held-out lessons like them best.

    The model has to fit in memory, its activations of 16 sequences included.
    """
    trained, unseen = held_out(lessons)
    with float32_weights(model), frozen(model), in_place(tensors):
        return _learn(tensors, trained, partial(divergence, model), partial(kl_of, model, unseen), steps)


def _learn(
    tensors: Sequence[SmallTensor],
    data: Sequence[T],
    loss: Callable[[T], tuple[torch.Tensor, int]],
    judge: Callable[[], float],
    steps: int,
) -> Settled:
    """Try each learning rate, go on with the best, stop early; `tensors` end at their best, the start included."""
    parameters = [parameter for tensor in tensors for parameter, _ in tensor.learning]
    start = [parameter.detach().clone() for parameter in parameters]
    best, before = start, judge()
    after, found = before, (0.0, 0)

    def run(rate: float, steps: int) -> float:
        nonlocal best, after, found
        _restore(parameters, start)
        groups = [([parameter], rate * pace) for tensor in tensors for parameter, pace in tensor.learning]
        lowest, stale = math.inf, 0
        for step, _ in enumerate(descend(groups, data, loss, steps), start=1):
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
    return Settled(before, after, *found)


def _restore(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)


def blocks_of(model: nn.Module, moe: MoEModel) -> dict[str, nn.Module]:
    """The decoder's blocks by name, in order: the list of modules that the MoE layers are in."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and moe.layers[0].name.startswith(f"{name}."):
            return {f"{name}.{index}": block for index, block in enumerate(module)}
    raise AssertionError(f"{moe.layers[0].name} is in no list of blocks")


class BlockOutputs:
    """What the original model's blocks put out for `batches`, kept in `folder`: tokens x H x blocks, in its own type."""

    def __init__(self, model: Any, moe: MoEModel, batches: Sequence[Mapping[str, torch.Tensor]], folder: Path) -> None:
        self.batches, self._folder = batches, folder
        blocks = blocks_of(model, moe)
        for position, batch in enumerate(batches):
            with torch.no_grad(), _hooked(blocks, partial(self._keep, position)):
                model.base_model(**batch, use_cache=False)

    def _keep(self, position: int, name: str, _module: nn.Module, _args: tuple, _kwargs: dict, output: Any) -> None:
        save_file({"output": _hidden(output).contiguous().cpu()}, self._file(name, position))

    def _file(self, block: str, position: int) -> Path:
        return self._folder / f"{block}.{position}.safetensors"

    def of(self, block: str) -> list[torch.Tensor]:
        """The outputs of one block, [rows, length, H] for each batch."""
        return [load_file(self._file(block, position))["output"] for position in range(len(self.batches))]


class _Call(NamedTuple):
    """A batch at a block: what the block is called with, what the original block put out, and whose tokens count."""

    hidden: torch.Tensor
    rest: tuple
    named: dict[str, Any]
    target: torch.Tensor
    valid: torch.Tensor


@torch.no_grad()
def settle_blocks(
    model: Any, moe: MoEModel, tensors: Mapping[str, Sequence[SmallTensor]], originals: BlockOutputs, steps: int
) -> dict[str, Settled]:
    """Block by block, bring outputs closer to those of the original's: mean of ||error||^2 / ||output||^2 per token.

    A block sees what the settled blocks before it put out, so it makes up for their errors too. `tensors` by block
    name. Only one block at a time is in memory in float32, or at all if the model is offloaded.
    """
    blocks, calls = blocks_of(model, moe), _calls(model, moe, originals.batches)
    hidden = [call[0] for call in next(iter(calls.values()))]
    valid = [_valid(batch) for batch in originals.batches]
    found = {}
    for name, block in blocks.items():
        targets = originals.of(name)
        inputs = [
            _Call(x, rest, named, target, mask)
            for x, (_, rest, named), target, mask in zip(hidden, calls[name], targets, valid, strict=True)
        ]
        learning = tensors.get(name, ())
        with disable_offloading(), float32_weights(block), frozen(block), in_place(learning):
            run = partial(_run, block)
            if learning:
                trained, unseen = held_out(inputs)
                judge = partial(_mean_error, block, unseen)
                found[name] = _learn(learning, trained, partial(_error, block), judge, steps)
            hidden = [run(call).to(call.hidden.dtype) for call in inputs]
    return found


def _calls(model: Any, moe: MoEModel, batches: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, list[tuple]]:
    """Block name -> for each batch (hidden states or, after the first block, None; other arguments; named ones)."""
    blocks = blocks_of(model, moe)
    first = next(iter(blocks))
    seen: dict[str, list[tuple]] = {name: [] for name in blocks}

    def see(name: str, _module: nn.Module, args: tuple, kwargs: dict, _output: Any) -> None:
        named = dict(kwargs)
        hidden = named.pop("hidden_states") if "hidden_states" in named else args[0]
        seen[name].append((hidden if name == first else None, args[1:], named))

    for batch in batches:
        with _hooked(blocks, see):
            model.base_model(**batch, use_cache=False)
    return seen


@contextmanager
def _hooked(blocks: Mapping[str, nn.Module], see: Callable[..., None]) -> Iterator[None]:
    handles = [
        block.register_forward_hook(partial(see, name), with_kwargs=True) for name, block in blocks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _run(block: nn.Module, call: _Call) -> torch.Tensor:
    return _hidden(block(call.hidden, *call.rest, **call.named))


def _error(block: nn.Module, call: _Call) -> tuple[torch.Tensor, int]:
    target = call.target.float()
    errors = (_run(block, call).float() - target).square().sum(-1) / target.square().sum(-1).clamp(min=1e-12)
    return errors[call.valid].mean() * len(target), len(target)


def _mean_error(block: nn.Module, calls: Sequence[_Call]) -> float:
    errors, rows = zip(*(_error(block, call) for call in calls), strict=True)
    return float(sum(errors)) / sum(rows)


def _valid(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]).bool() if mask is None else mask.bool()
