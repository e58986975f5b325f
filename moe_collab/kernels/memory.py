"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_memory"]

# Files below /sys/fs/cgroup, for versions 2 and 1 of cgroups: the limit, the memory in use, and (as a file and a key in
# it) the part of the memory in use that can be reclaimed.
_GROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that Linux counts as available, or fewer if a container's limit leaves fewer; 0 where that is not known."""
    try:
        found = [_fields(root / "proc/meminfo")["MemAvailable:"] * 1024]
    except (OSError, KeyError):
        return 0
    for limit, used, statistics, reclaimable in _GROUPS:
        try:
            group = root / "sys/fs/cgroup"
            free = int((group / limit).read_text()) - int((group / used).read_text())
            found.append(free + _fields(group / statistics)[reclaimable])
        except (OSError, KeyError, ValueError):  # no such group, or "max": no limit
            continue
    return max(0, min(found))


def _fields(path: Path) -> dict[str, int]:
    """Lines of a name, a number, and perhaps a unit."""
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines()) if len(words) > 1}
