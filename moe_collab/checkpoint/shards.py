"""The files of a checkpoint, written tensor by tensor and verified one after the other.

A safetensors file begins with the names, shapes and places of all its tensors. These are known before any tensor is
made, so each is made when its turn comes, put in its place and let go: memory holds what one call of `make` gives,
however large the file. The bytes are those that the safetensors library writes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from loguru import logger

from ..errors import MoeCollabError
from .atomic import Rejected
from .sizes import TensorEntry, cut_into_shards, file_layout, safetensors_bytes
from .verify import Digest, differing_tensors, tensor_digest

__all__ = ["Finished", "write_shards"]

Make = Callable[[str], Mapping[str, torch.Tensor]]
"""Name of a tensor -> that tensor, and others that come of the same work, by name."""


class Finished(Protocol):
    """Knows which files were written and verified, also by processes that were killed."""

    def recall(self, file: str) -> Mapping[str, Digest] | None:
        """Digests of the tensors of a file that was finished, None if it was not."""

    def note(self, file: str, digests: Mapping[str, Digest]) -> None:
        """Remember that a file is finished, with the digests of its tensors."""


def write_shards(
    directory: Path,
    entries: Sequence[TensorEntry],
    make: Make,
    max_shard_size: float,
    finished: Finished | None = None,
) -> dict[str, Digest]:
    """Write `entries` in order, cut into files of `max_shard_size` bytes, and the index if there are several files.

    `make` may be called again for a tensor that it gave before. Returns the digest of each tensor. Each file is read
    back from the disk and compared before the next is begun; one that differs is written once more. Raises `Rejected`,
    naming file and tensor, if it differs again.

    With `finished`, files in `directory` that were finished before, and are as they were, are not written again.
    Whatever else is in `directory` is removed.
    """
    shards = cut_into_shards(entries, max_shard_size)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    files = dict(zip(["model.safetensors"] if len(shards) == 1 else names, shards, strict=True))
    found = {} if finished is None else _take_finished(directory, files, finished)
    for name, shard in files.items():
        if name not in found:
            found[name] = _write_verified(directory / name, shard, make)
            if finished is not None:
                finished.note(name, found[name])
    if len(files) != 1:
        where = {entry.name: name for name, shard in files.items() for entry in shard}
        index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": where}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / "model.safetensors.index.json").write_text(text)
    return {name: digest for file in files for name, digest in found[file].items()}


def _take_finished(
    directory: Path, files: Mapping[str, list[TensorEntry]], finished: Finished
) -> dict[str, Mapping[str, Digest]]:
    """Digests of the tensors of those `files` that are there, by file; all else in `directory` is removed."""
    taken: dict[str, Mapping[str, Digest]] = {}
    for name, entries in files.items():
        known = finished.recall(name)
        if known is not None and _is_as_written(directory / name, entries, known):
            taken[name] = known
            logger.info("{}: was written before and is verified again", name)
    for path in directory.iterdir():
        if path.name not in taken:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return taken


def _is_as_written(path: Path, entries: list[TensorEntry], digests: Mapping[str, Digest]) -> bool:
    """Whether the file at `path` is there, with every byte that was written."""
    if differing_tensors(path, digests):
        return False
    head, _ = file_layout(entries)
    with open(path, "rb") as file:
        return file.read(len(head)) == head


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
    with _renamed_when_on_disk(path) as file:
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
    return digests


@contextmanager
def _renamed_when_on_disk(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place when the block has written it, and is removed if that fails."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # what is read back then comes from the disk, not out of memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
