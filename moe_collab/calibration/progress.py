"""A progress bar for stages that take long, with the time left and the most memory seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from ..distributed import is_source_process, share, wait

__all__ = ["spread", "stage"]

T = TypeVar("T")

_PATIENCE = 10
"""Seconds until a bar is shown: what is done by then needs none."""


def stage(what: str, items: Sequence[T]) -> Iterator[T]:
    """`items` one after the other, with a bar that says `what` is done to them."""
    peak = 0
    with tqdm(items, desc=what, delay=_PATIENCE, dynamic_ncols=True, disable=not is_source_process()) as bar:
        for item in bar:
            yield item
            peak = max(peak, _memory())
            if peak:
                bar.set_postfix_str(f"{peak / 1e9:.1f} GB", refresh=False)


def spread(
    what: str, items: Sequence[T], is_known: Callable[[T], bool], prepare: Callable[[], object], do: Callable[[T], None]
) -> None:
    """Have `do` done to each of `items` that is not known yet, in one process of `torchrun` each.

    If there is any, all processes first `prepare` together. All is done when it returns.
    """
    missing = [item for item in items if not is_known(item)]
    wait()
    if missing:
        prepare()
    for item in stage(what, share(missing)):
        do(item)
    wait()


def _memory() -> int:
    """Bytes of this process that are no mapped files, 0 where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return sum(1024 * int(lines[key].split()[0]) for key in ("RssAnon", "RssShmem") if key in lines)
