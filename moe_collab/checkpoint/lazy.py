"""A tensor of a checkpoint that is known by its shape and type, and read when somebody needs its values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["LazyTensor"]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read, and dequantized, when it is sliced: as transformers slices what it loads."""

    like: torch.Tensor
    """Its shape and type, on the meta device."""
    read: Callable[[], torch.Tensor]
    read_one: Callable[[int], torch.Tensor] | None = None
    """Reads what lies at one index of the first dimension, and no more; None if all must be read for that."""
    stored_as: str = ""
    """The tensor of the checkpoint that holds its values, or their codes; empty if several do, or none."""
    file: Path | None = None
    """The file that holds that tensor."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.read()[index]

    def one(self, index: int) -> torch.Tensor:
        """What lies at one index of the first dimension."""
        return self.read()[index] if self.read_one is None else self.read_one(index)

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""
        return self.like.dtype

    def is_floating_point(self) -> bool:
        """As of a tensor; transformers asks where config.json names no type."""
        return self.like.is_floating_point()
