"""Part of `make bench-cpu`: how fast checkpoint tensors become tiles, in bytes of the checkpoint a second."""

from __future__ import annotations

import statistics
import time

import torch

from moe_collab.formats import TERNARY
from moe_collab.kernels import cpu
from moe_collab.kernels.arena import Arena
from moe_collab.kernels.cpu.widening import widen_ternary
from moe_collab.kernels.descriptors import TensorSpec

from .random_weights import random_weight

__all__ = ["bench_repack"]

_ROWS, _COLUMNS, _GROUP = 768, 2048, 128
_COPIES, _REPEATS = 32, 5


def bench_repack(threads: int) -> list[dict]:
    """Rows of cpu.json: each kind of tensor of a Qwen3-30B-A3B expert, then ternary tiles into 2-bit ones."""
    rows = []
    for bits in (16, 8, 6, 5, 4, 3, 2, TERNARY):
        spec = TensorSpec(bits, _ROWS, _COLUMNS, _GROUP if bits < 16 else 0)
        arena = Arena([spec] * _COPIES, cpu.TileLayout(ternary_bits=TERNARY))
        packed, _ = random_weight(spec, torch.Generator().manual_seed(0))
        times = []
        for _ in range(_REPEATS):
            for index in range(_COPIES):
                began = time.perf_counter()
                arena.write_codes(index, packed)
                times.append(time.perf_counter() - began)
        # The first round also takes the memory from the system.
        rows.append(_row("ternary 1.6" if bits == TERNARY else str(bits), threads, times[_COPIES:], packed.nbytes))
    began = time.perf_counter()
    size = arena.codes.nbytes
    widen_ternary(arena, keep_free=0)
    return [*rows, _row("ternary 1.6 to 2", threads, [time.perf_counter() - began], size)]


def _row(bits: str, threads: int, seconds: list[float], size: int) -> dict:
    middle = statistics.median(seconds)
    row = {"case": "repack", "shape": f"{_ROWS}x{_COLUMNS}", "bits": bits, "tokens": None, "threads": threads}
    row |= {"ours_us": round(middle * 1e6, 1), "gb_s": round(size / middle / 1e9, 3)}
    print(*row.values(), flush=True)
    return row
