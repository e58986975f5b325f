"""How far ahead to prefetch, measured once per processor and kept: too near and too far both cost up to a third."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from loguru import logger

from ..arena import Arena
from ..descriptors import Field
from . import configure

__all__ = ["cache_path", "tune"]

_DISTANCES = (1024, 2048, 4096, 6144, 8192)
_ROUNDS = 15
# Less than this may sit in a cache, and says nothing about memory.
_ENOUGH_BYTES = 64 << 20
_BYTES_PER_CALL = 4 << 20


def cache_path() -> Path:
    """Where measurements are kept: prefetch.json in $XDG_CACHE_HOME/moe-collab (~/.cache/moe-collab)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-collab" / "prefetch.json"


def tune(arena: Arena) -> dict[int, int]:
    """Set the prefetch distance for every storage of `arena`'s weights; returns bytes by bits.

    What the cache knows for this processor, instruction set and number of threads is taken from there; the rest is
    measured on `arena`, unless it is too small to tell.
    """
    known = _read()
    key = f"{_processor()} | {configure()} | {torch.get_num_threads()} threads"
    mine = {int(bits): int(distance) for bits, distance in known.get(key, {}).items()}
    fresh = {}
    for bits, rows in _by_bits(arena).items():
        if bits not in mine and sum(size for _, size in rows) >= _ENOUGH_BYTES:
            fresh[bits] = _fastest(arena, bits, rows)
    for bits, distance in (mine | fresh).items():
        configure(num_bits=bits, prefetch=distance)
    if fresh:
        _write(known | {key: {str(b): d for b, d in (mine | fresh).items()}})
        logger.info(f"moe_collab: prefetch distances measured, in bytes by bits: {fresh}; kept in {cache_path()}")
    return mine | fresh


def _by_bits(arena: Arena) -> dict[int, list[tuple[int, int]]]:
    """bits -> (index, bytes) of the weights stored so that have the commonest number of columns."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for index, (spec, row) in enumerate(zip(arena.specs, arena.table.tolist(), strict=True)):
        if row[Field.NUM_BITS]:
            found[row[Field.NUM_BITS], spec.columns].append((index, arena.layout.num_codes(spec)))
    best: dict[int, list[tuple[int, int]]] = {}
    for (bits, _), rows in found.items():
        if len(rows) > len(best.get(bits, [])):
            best[bits] = rows
    return best


def _fastest(arena: Arena, bits: int, rows: list[tuple[int, int]]) -> int:
    """The distance with the least median time, on other weights in each call."""
    per_call = max(1, _BYTES_PER_CALL // rows[0][1])
    batches = [[i for i, _ in rows[at : at + per_call]] for at in range(0, len(rows) - per_call + 1, per_call)]
    x = torch.randn(1, arena.specs[rows[0][0]].columns, dtype=torch.bfloat16)
    seconds: dict[int, list[float]] = {distance: [] for distance in _DISTANCES}
    call = 0
    for _ in range(_ROUNDS):
        for distance in _DISTANCES:
            configure(num_bits=bits, prefetch=distance)
            # Neighbours would be prefetched by the previous call.
            batch = batches[call * 7 % len(batches)]
            call += 1
            began = time.perf_counter()
            torch.ops.moe_collab.linear_cpu(
                x, arena.codes, arena.scales, arena.zero_points, arena.table[batch], None, 16,
                sum(arena.specs[i].rows for i in batch),
            )  # fmt: skip
            seconds[distance].append(time.perf_counter() - began)
    return min(_DISTANCES, key=lambda distance: statistics.median(seconds[distance]))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _read() -> dict[str, dict[str, int]]:
    """An unreadable cache is measured anew."""
    try:
        known = json.loads(cache_path().read_text())
        return known if all(isinstance(v, dict) for v in known.values()) else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _write(known: dict[str, dict[str, int]]) -> None:
    """A cache that cannot be written is no reason not to serve."""
    try:
        cache_path().parent.mkdir(parents=True, exist_ok=True)
        staged = cache_path().with_suffix(f".{os.getpid()}")
        staged.write_text(json.dumps(known, indent=1))
        staged.replace(cache_path())
    except OSError as error:
        logger.warning(f"moe_collab: prefetch distances are not kept: {error}")
