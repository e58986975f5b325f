"""Rows of a benchmark that takes hours: kept as they are made, so that a run that was cut off goes on; their noise."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["Rows", "ratio_error", "standard_error"]

RESAMPLES = 1000


class Rows:
    """The rows in `file`, each known by its first columns, and printed by `line` once made."""

    def __init__(self, file: Path, line: Callable[[dict[str, Any]], str]) -> None:
        self._file, self._line = file, line
        self.rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []

    def add(self, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row that begins with `key`, made now unless it is there."""
        for row in self.rows:
            if key.items() <= row.items():
                return row
        began = time.monotonic()
        row = {**key, **make()}
        row["seconds"] = round(time.monotonic() - began)
        self.rows.append(row)
        self._file.write_text(json.dumps(self.rows, indent=1) + "\n")
        print(self._line(row), flush=True)
        return row


def standard_error(by_row: torch.Tensor) -> float:
    """Bootstrap over the test sequences."""
    return float(by_row[_resampled(len(by_row))].mean(1).std())


def ratio_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The same, of the ratio of two means over the same sequences."""
    drawn = _resampled(len(ours))
    return float((ours[drawn].mean(1) / theirs[drawn].mean(1)).std())


def _resampled(rows: int) -> torch.Tensor:
    return torch.randint(rows, (RESAMPLES, rows), generator=torch.Generator().manual_seed(0))
