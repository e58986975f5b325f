"""Calibration tokens in micro-batches of a fixed size, in which every pass computes.

How many tokens are computed together never depends on the memory at hand or on the number of processes, so neither do
the last bits of what comes out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import TypeVar

import torch

from ..errors import MoeCollabError

__all__ = ["MicroBatches", "held_out"]

T = TypeVar("T")

_TOKENS = 4096
"""Most tokens of a micro-batch, unless a single row has more."""


class MicroBatches:
    """Rows of calibration tokens, in the order of the data; no micro-batch has rows of two of the given batches.

    Tokens are counted through all micro-batches, padding included: those of micro-batch i are `span(i)`.
    """

    def __init__(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []
        for batch in batches:
            rows = max(1, _TOKENS // batch["input_ids"].shape[1])
            parts = {name: value.cpu().split(rows) for name, value in batch.items()}
            self.batches += [dict(zip(parts, part, strict=True)) for part in zip(*parts.values(), strict=True)]
        self._starts = [0, *accumulate(batch["input_ids"].numel() for batch in self.batches)]

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def num_tokens(self) -> int:
        """All tokens, padding included."""
        return self._starts[-1]

    def span(self, index: int) -> slice:
        """The tokens of micro-batch `index`."""
        return slice(self._starts[index], self._starts[index + 1])

    def shape(self, index: int) -> tuple[int, int]:
        """(rows, length) of micro-batch `index`."""
        rows, length = self.batches[index]["input_ids"].shape
        return rows, length

    @cached_property
    def valid(self) -> torch.Tensor:
        """Which tokens are no padding, bool [tokens]."""
        masks = (batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in self.batches)
        return torch.cat([mask.bool().flatten() for mask in masks])

    def check_any(self) -> None:
        """Raise `MoeCollabError` if there is nothing, or nothing but padding."""
        if not self.batches or not bool(self.valid.any()):
            raise MoeCollabError("calibration reached no token. Give oneshot() a non-empty dataset.")

    @cached_property
    def predicted(self) -> torch.Tensor:
        """Which tokens are no padding and followed by one that is none, bool [tokens]."""
        found = torch.zeros_like(self.valid)
        for index in range(len(self)):
            own = found[self.span(index)].view(self.shape(index))
            valid = self.valid[self.span(index)].view(self.shape(index))
            own[:, :-1] = valid[:, 1:] & valid[:, :-1]
        return found

    def row_of(self, token: int) -> int:
        """The number of the calibration sequence that `token` is in, counted from 0."""
        row = 0
        for index in range(len(self)):
            span, (rows, length) = self.span(index), self.shape(index)
            if token < span.stop:
                return row + (token - span.start) // length
            row += rows
        raise IndexError(token)


def held_out(batches: Sequence[T]) -> tuple[list[T], list[T]]:
    """(batches to learn from, batches to judge by).

    Every eighth batch, or the last of fewer than eight, is held out to judge by. These are spread over the whole set,
    because calibration text comes sorted, say by source. A single batch serves for both.
    """
    if not batches:
        raise MoeCollabError("calibration reached no token. Give oneshot() a non-empty dataset.")
    step = min(8, len(batches))
    rest = [batch for position, batch in enumerate(batches) if position % step != step - 1]
    return rest or list(batches), list(batches[step - 1 :: step])
