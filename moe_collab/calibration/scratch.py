"""Tensors that may be larger than memory: in files that the kernel pages in and out, or in memory."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import torch

from ..allocation.budget import format_bytes
from ..checkpoint.atomic import replace_text
from ..distributed import agreed, is_source_process, wait
from ..errors import MoeCollabError

__all__ = ["NoRoom", "Scratch"]

_DATA, _FINISHED = ".data", ".json"
"""A tensor's values; and its shape and type, in a file that is there once the values are complete."""


class NoRoom(MoeCollabError):
    """Raised where a disk is too small."""


class Scratch:
    """Makes tensors in mapped files of `folder`, or, if that is None, in memory; what is computed is the same.

    A file is gone once `discard` is called or the scratch is closed. If it is `durable`, tensors that were finished
    outlast the process: a later scratch in the same folder finds them. All others are deleted then.

    The processes of `torchrun` share the files, so all of them make, finish and discard the same tensors in the same
    order, and each writes its part of them.
    """

    def __init__(self, folder: Path | None = None, durable: bool = False) -> None:
        self._folder, self._durable = folder, durable and folder is not None
        self._made: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for file in folder.glob(f"*{_DATA}") if is_source_process() else ():
                if not (self._durable and file.with_suffix(_FINISHED).exists()):
                    file.unlink()
            for file in folder.glob(".*.partial") if is_source_process() else ():  # of processes that were killed
                file.unlink()
            wait()

    def check_room(self, size: int, what: str) -> None:
        """Raise `NoRoom` if `what` needs `size` bytes, and the disk has fewer with what lies in the folder's parent."""
        if self._folder is None:
            return
        free = 0
        if is_source_process():
            held = sum(file.stat().st_size for file in self._folder.parent.rglob("*") if file.is_file())
            free = shutil.disk_usage(self._folder).free + held
        free = agreed(free)
        if free < size:
            raise NoRoom(
                f"{self._folder.parent}: {what} needs up to {format_bytes(size)} of files, but only "
                f"{format_bytes(free)} are free. Free some, calibrate with fewer tokens, or name a folder on a larger "
                "disk: `work`, or output_dir"
            )

    def zeros(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of zeros on the CPU, called `name`; it takes the place of an earlier one of that name.

        Raises `NoRoom` with the bytes needed if the disk has no room for it.
        """
        if self._folder is None:
            return torch.zeros(shape, dtype=dtype)
        wait()
        self.discard(name)
        if is_source_process():
            _reserve(self._folder / f"{name}{_DATA}", math.prod(shape) * dtype.itemsize, name)
        wait()
        self._made[name] = shape, dtype
        return self._mapped(name, shape, dtype)

    def _mapped(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if not math.prod(shape):
            return torch.zeros(shape, dtype=dtype)
        file = str(self._folder / f"{name}{_DATA}")  # type: ignore[operator]
        return torch.from_file(file, shared=True, size=math.prod(shape), dtype=dtype).reshape(shape)

    def keep(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A copy of `value`, called `name`, which is finished; of `torchrun`'s processes all have the same value."""
        kept = self.zeros(name, tuple(value.shape), value.dtype)
        if is_source_process():
            kept.copy_(value)
        self.finish(name)
        return kept

    def finish(self, name: str) -> None:
        """Say that tensor `name` has its final values; if the scratch is durable, they are on the disk afterwards."""
        wait()
        if not (self._durable and is_source_process()):
            return
        shape, dtype = self._made[name]
        file = self._folder / f"{name}{_DATA}"  # type: ignore[operator]
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
        replace_text(file.with_name(f"{name}{_FINISHED}"), json.dumps([shape, str(dtype).removeprefix("torch.")]))

    def find(self, name: str) -> torch.Tensor | None:
        """The finished tensor `name`, made by this process or by an earlier one, if the scratch is durable."""
        finished = None if self._folder is None else self._folder / f"{name}{_FINISHED}"
        if not self._durable or finished is None or not finished.exists():
            return None
        shape, dtype = json.loads(finished.read_text())
        data, size = finished.with_name(f"{name}{_DATA}"), math.prod(shape) * getattr(torch, dtype).itemsize
        if not data.exists() or data.stat().st_size != size:
            return None
        return self._mapped(name, tuple(shape), getattr(torch, dtype))

    def found(self, name: str) -> torch.Tensor:
        """The finished tensor `name`, which is there."""
        found = self.find(name)
        assert found is not None, name
        return found

    def discard(self, name: str) -> None:
        """Delete the files of tensor `name`, if there are any; whoever still holds the tensor can go on reading it."""
        self._made.pop(name, None)
        if self._folder is not None and is_source_process():
            for suffix in (_FINISHED, _DATA):
                (self._folder / f"{name}{suffix}").unlink(missing_ok=True)

    def discard_all(self, beginning: str) -> None:
        """Delete the files of all tensors whose names have this beginning."""
        wait()
        if self._folder is not None and is_source_process():
            for file in sorted(self._folder.glob(f"{beginning}*"), key=lambda file: file.suffix == _DATA):
                file.unlink()
        wait()

    def close(self) -> None:
        """Delete all files."""
        wait()
        if self._folder is not None and is_source_process():
            shutil.rmtree(self._folder, ignore_errors=True)


def _reserve(file: Path, size: int, name: str) -> None:
    """Make a file of `size` zeros whose room on the disk is certain: a mapped page without room kills the process."""
    with open(file, "wb") as stream:
        try:
            if size:
                os.posix_fallocate(stream.fileno(), 0, size)
        except OSError as error:
            file.unlink()
            free = os.statvfs(file.parent)
            raise NoRoom(
                f"{file.parent}: no room for {name}, {size} bytes; {free.f_bavail * free.f_frsize} are free "
                f"({error.strerror}). Free some, or name a folder on a larger disk"
            ) from error
