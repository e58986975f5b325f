"""A progress bar for stages that take long, with the time left and the most memory seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

__all__ = ["stage"]

T = TypeVar("T")

_PATIENCE = 10
"""Seconds until a bar is shown: what is done by then needs none."""


def stage(what: str, items: Sequence[T]) -> Iterator[T]:
    """`items` one after the other, with a bar that says `what` is done to them."""
    peak = 0
    with tqdm(items, desc=what, delay=_PATIENCE, dynamic_ncols=True) as bar:
        for item in bar:
            yield item
            peak = max(peak, _memory())
            if peak:
                bar.set_postfix_str(f"{peak / 1e9:.1f} GB", refresh=False)


def _memory() -> int:
    """Bytes of this process that are no mapped files, 0 where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return sum(1024 * int(lines[key].split()[0]) for key in ("RssAnon", "RssShmem") if key in lines)
