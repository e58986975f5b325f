"""Fair timing on a shared machine: all contenders in turn, round after round, and the bandwidth probe among them."""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from moe_collab.kernels.arena import allocate

__all__ = ["Stream", "interleave"]

_PROBE_BYTES = 1 << 28


class Stream:
    """Reads 256 MiB from memory, another part of 1 GiB each time, and checks the sum."""

    def __init__(self, threads: int, build: Path) -> None:
        build.mkdir(parents=True, exist_ok=True)
        library = build / "stream.so"
        source = Path(__file__).with_name("stream.cpp")
        command = ["g++", "-O3", "-march=native", "-funroll-loops", "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        self._checksum = ctypes.CDLL(str(library.resolve())).checksum
        self._checksum.restype = ctypes.c_uint64
        self._checksum.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        self._memory = allocate(4 * _PROBE_BYTES // 8, torch.int64)
        self._memory.random_()
        self._expected = [int(part.sum()) % (1 << 64) for part in self._memory.chunk(4)]
        self._threads, self._pool = threads, ThreadPoolExecutor(threads)
        self._next = 0

    def read(self) -> float:
        """Bytes per second of one probe."""
        part, self._next = self._next, (self._next + 1) % 4
        count = _PROBE_BYTES // 8 // self._threads
        start = self._memory.data_ptr() + part * _PROBE_BYTES
        began = time.perf_counter()
        sums = self._pool.map(lambda t: self._checksum(start + 8 * t * count, count), range(self._threads))
        total = sum(sums) % (1 << 64)
        seconds = time.perf_counter() - began
        if total != self._expected[part]:
            raise RuntimeError("the bandwidth probe read something else than was written")
        return _PROBE_BYTES / seconds


def interleave(
    contenders: dict[str, Callable[[int], object]], rounds: int, stream: Stream | None = None
) -> tuple[dict[str, float], float]:
    """(median seconds of each contender, median bytes per second of the probe).

    In each round everyone runs, so that what slows the machine slows all: twice to wake its threads (and let the
    previous one's stop spinning), then four times timed, on other inputs each time. A contender is called with a
    running number; its attribute `rest`, if it has one, is called afterwards.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    rates = []
    for start in range(0, 6 * rounds, 6):
        if stream is not None:
            time.sleep(0.02)
            rates += [stream.read() for _ in range(3)][1:]
        for name, run in contenders.items():
            run(start)
            run(start + 1)
            for index in range(start + 2, start + 6):
                began = time.perf_counter()
                run(index)
                seconds[name].append(time.perf_counter() - began)
            getattr(run, "rest", lambda: None)()
    return {name: statistics.median(s) for name, s in seconds.items()}, statistics.median(rates) if rates else 0.0
