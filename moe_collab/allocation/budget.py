"""Sizes in bytes as people write them: reading and printing."""

from __future__ import annotations

import re

from ..errors import MoeCollabError

__all__ = ["format_bytes", "parse_bytes"]

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}
_UNITS |= {f"{p}IB": 1024 ** (i + 1) for i, p in enumerate("KMGT")}


def parse_bytes(text: int | str, key: str = "budget") -> int:
    """Bytes in `3100000`, `"3.1MB"`, `"103 GB"` (powers of 1000) or `"128GiB"` (powers of 1024).

    Raises `MoeCollabError` naming `key` for anything else, and for a budget that is not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise MoeCollabError(f"{key}: {text!r} is no size. Write bytes (3100000), '3.1MB', '103GB' or '128GiB'.")
    size = round(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    if size <= 0:
        raise MoeCollabError(f"{key}: {text!r} is not positive.")
    return size


def format_bytes(size: int) -> str:
    """`3100000` -> `3.1 MB` (powers of 1000), with the exact count where rounding hides it."""
    value, unit = float(size), "B"
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{size} bytes" if unit == "B" else f"{value:.4g} {unit} ({size} bytes)"
