"""What the C library keeps of memory that was freed."""

from __future__ import annotations

import ctypes

__all__ = ["return_what_is_freed"]

_M_MMAP_THRESHOLD = -3
"""As glibc's malloc.h has it."""
_LARGE = 1 << 20


def return_what_is_freed() -> None:
    """From now on, give memory of 1 MiB or more back to the system as soon as it is freed, if glibc has it in hand.

    By itself glibc comes to keep whatever is smaller than 32 MiB, in a heap that scattered small objects hold open:
    with experts of a few MB it grew by some 30 MB a layer. New memory for every large tensor costs 14 % of time there.
    It holds for the rest of the process.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
