"""Tensors that may be larger than memory: in files that the kernel pages in and out, or in memory."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..errors import MoeCollabError

__all__ = ["Scratch"]


class Scratch:
    """Makes tensors in mapped files of a new folder inside `folder`, or, if that is None, in memory.

    What is computed with them is the same either way. A file is gone once `discard` is called or the scratch is closed.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = None
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._folder = TemporaryDirectory(prefix="moe-collab-scratch-", dir=folder)
        self._files: dict[str, Path] = {}

    def check_room(self, size: int, what: str) -> None:
        """Raise `MoeCollabError` if `what` needs `size` bytes and the folder's disk has fewer left."""
        if self._folder is None:
            return
        free = shutil.disk_usage(self._folder.name).free
        if free < size:
            raise MoeCollabError(
                f"{Path(self._folder.name).parent}: {what} needs up to {size / 1e9:.1f} GB of scratch files, but only "
                f"{free / 1e9:.1f} GB are free. Free some, calibrate with fewer tokens, or let output_dir be on a "
                "larger disk; nothing was changed."
            )

    def zeros(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of zeros on the CPU, called `name`; it takes the place of an earlier one of that name.

        Raises `MoeCollabError` with the bytes needed if the disk has no room for it.
        """
        if self._folder is None or not math.prod(shape):
            return torch.zeros(shape, dtype=dtype)
        self.discard(name)
        file = Path(self._folder.name) / f"{len(self._files)}-{os.urandom(4).hex()}"
        size = math.prod(shape) * dtype.itemsize
        _reserve(file, size, name)
        self._files[name] = file
        return torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=dtype).reshape(shape)

    def keep(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A copy of `value`, called `name`."""
        kept = self.zeros(name, tuple(value.shape), value.dtype)
        return kept.copy_(value)

    def discard(self, name: str) -> None:
        """Delete the file of tensor `name`, if there is one; whoever still holds the tensor can go on reading it."""
        if file := self._files.pop(name, None):
            file.unlink()

    def close(self) -> None:
        """Delete all files."""
        self._files.clear()
        if self._folder is not None:
            self._folder.cleanup()


def _reserve(file: Path, size: int, name: str) -> None:
    """Make a file of `size` zeros whose room on the disk is certain: a mapped page without room kills the process."""
    with open(file, "wb") as stream:
        try:
            os.posix_fallocate(stream.fileno(), 0, size)
        except OSError as error:
            file.unlink()
            free = os.statvfs(file.parent)
            raise MoeCollabError(
                f"{file.parent}: no room for {name}, {size} bytes; {free.f_bavail * free.f_frsize} are free "
                f"({error.strerror}). Free some, or name a folder on a larger disk."
            ) from error
