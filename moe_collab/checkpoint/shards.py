"""The files of a checkpoint, written tensor by tensor and verified one after the other.

A safetensors file begins with the names, shapes and places of all its tensors. These are known before any tensor is
made, so each is made when its turn comes, put in its place and let go: memory holds what one call of `make` gives,
however large the file. The bytes are those that the safetensors library writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from loguru import logger

from ..errors import MoeCollabError
from .atomic import Rejected
from .sizes import TensorEntry, cut_into_shards, file_layout, safetensors_bytes
from .verify import Digest, differing_tensors, tensor_digest

__all__ = ["write_shards"]

Make = Callable[[str], Mapping[str, torch.Tensor]]
"""Name of a tensor -> that tensor, and others that come of the same work, by name."""


def write_shards(
    directory: Path, entries: Sequence[TensorEntry], make: Make, max_shard_size: float
) -> dict[str, Digest]:
    """Write `entries` in order, cut into files of `max_shard_size` bytes, and the index if there are several files.

    `make` may be called again for a tensor that it gave before. Returns the digest of each tensor. Each file is read
    back from the disk and compared before the next is begun; one that differs is written once more. Raises `Rejected`,
    naming file and tensor, if it differs again.
    """
    shards = cut_into_shards(entries, max_shard_size)
    if len(shards) == 1:
        return _write_verified(directory / "model.safetensors", shards[0], make)
    digests: dict[str, Digest] = {}
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        digests |= _write_verified(directory / name, shard, make)
        where |= dict.fromkeys((entry.name for entry in shard), name)
    index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": where}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / "model.safetensors.index.json").write_text(text)
    return digests


def _write_verified(path: Path, entries: list[TensorEntry], make: Make) -> dict[str, Digest]:
    """Write one file and read it back; digests of its tensors."""
    for attempt in ("first", "last"):
        digests = _write(path, entries, make)
        problems = differing_tensors(path, digests)
        if not problems:
            logger.info("{}: {} bytes written and verified", path.name, safetensors_bytes(entries))
            return digests
        listed = "\n  ".join(problems[:10])
        if attempt == "first":
            logger.warning("the disk does not hold what was written, so it is written once more:\n  {}", listed)
    raise Rejected(
        "the disk does not hold what was written to it, twice. Save to another disk; if that fails too, look for "
        f"faulty memory.\n  {listed}"
    )


def _write(path: Path, entries: list[TensorEntry], make: Make) -> dict[str, Digest]:
    """Write one file under another name, have it reach the disk, and rename it; digests of its tensors."""
    head, starts = file_layout(entries)
    digests: dict[str, Digest] = {}
    made: Mapping[str, torch.Tensor] = {}
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(head)
        for entry in entries:
            if entry.name not in made:
                made = {}  # what was made last is let go before more is made
                made = make(entry.name)
            tensor = made[entry.name].detach().cpu().contiguous()
            if (tuple(tensor.shape), tensor.nbytes) != (entry.shape, entry.nbytes):
                raise MoeCollabError(
                    f"{entry.name}: the model holds {tensor.dtype} {list(tensor.shape)} where it has announced "
                    f"{entry.dtype} {list(entry.shape)}. Report it; nothing was saved."
                )
            file.seek(starts[entry.name])
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            digests[entry.name] = tensor_digest(tensor)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # what is read back then comes from the disk, not out of memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    os.replace(partial, path)
    return digests
