"""`Workspace`: where a calibration keeps what it makes, for a while or so that it outlasts the process."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path
from tempfile import gettempdir, mkdtemp

from filelock import BaseFileLock, FileLock, Timeout

from ..distributed import agreed, is_distributed, is_source_process, wait
from .heap import return_what_is_freed
from .results import Results
from .scratch import Scratch

__all__ = ["TemporaryFolder", "Workspace"]

_PREFIX, _LOCK = "moe-collab-scratch-", ".lock"


class Workspace:
    """Room for tensors (`scratch`), and for what was found out with them (`results`).

    Without `folder` both are in memory. With it they are in files of a temporary folder inside it, or, if they are to
    be `durable`, in the folder itself: whoever makes a workspace there later finds them. The processes of `torchrun`
    share files, also where none were asked for.

    With files, memory of the process is to stay small, so that what is freed goes back to the system (see `heap`).
    """

    def __init__(self, folder: Path | None = None, durable: bool = False) -> None:
        if folder is None and is_distributed():
            folder = Path(gettempdir())
        self._temporary: TemporaryFolder | None = None
        if folder is not None:
            return_what_is_freed()
        if folder is not None and not durable:
            if is_source_process():
                self._temporary = TemporaryFolder(folder)
            folder = agreed(folder if self._temporary is None else self._temporary.path)
        self.scratch = Scratch(folder and folder / "scratch", durable)
        self.results = Results(folder and folder / "results", durable)

    def close(self) -> None:
        """Delete all files, but for results that are durable."""
        self.scratch.close()
        wait()
        if self._temporary is not None:
            self._temporary.cleanup()


class TemporaryFolder:
    """A new folder inside `parent`, gone after `cleanup`, or when the process ends. What killed ones left goes first.

    A process holds a lock in its folder as long as it lives, however it ends.
    """

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        for file in parent.glob(f"{_PREFIX}*/{_LOCK}"):
            _remove_unless_locked(file)
        self.path = Path(mkdtemp(prefix=_PREFIX, dir=parent))
        lock = FileLock(self.path / _LOCK)
        lock.acquire()
        self.cleanup = weakref.finalize(self, _remove, lock, self.path)


def _remove(lock: BaseFileLock, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()


def _remove_unless_locked(file: Path) -> None:
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except (Timeout, OSError):  # its process lives, or it is somebody else's
        return
    _remove(lock, file.parent)
