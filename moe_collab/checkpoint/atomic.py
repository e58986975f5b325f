"""A file or directory that is either the old one or the complete new one, never half of each.

A directory is never renamed: it may be a mount point, a symlink or the working directory. What goes into it is written
to a hidden directory inside it, on the same file system, and then moved out of there file by file.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import MoeCollabError
from .moves import Moves, NotMoved, has_journal, rename_hidden

__all__ = [
    "COMPLETE",
    "PARTIAL",
    "REJECTED",
    "Rejected",
    "check_output_directory",
    "remedy_for",
    "replace_directory",
    "replace_file",
    "replace_text",
    "was_cut_off",
]

PARTIAL, COMPLETE, REJECTED = ".moe-collab-partial", ".moe-collab-complete", ".moe-collab-rejected"
"""Hidden directories: being written; finished but not moved out; written but refused by its checks."""

_REMEDIES = {
    errno.EROFS: "the file system is read-only. Make it writable, or name another directory",
    errno.EACCES: "it may not be written. Change its permissions, or name another directory",
    errno.EPERM: "it may not be written. Change its permissions, or name another directory",
    errno.ENOSPC: "the disk is full. Free space, or name a directory on another disk",
    errno.EDQUOT: "the disk quota is used up. Free space, or name a directory on another disk",
    errno.EBUSY: "something holds it, such as a mount on one of its files. Release it, or name another directory",
    errno.EXDEV: "one of its files lies on another file system. Unmount that, or name another directory",
    errno.EIO: "the disk cannot be read or written. Name a directory on another disk",
    errno.ENOTDIR: "a file stands where a directory should be. Name another directory",
}


class Rejected(MoeCollabError):
    """Raised inside `replace_directory` for what is written but wrong: it is kept, out of the way."""


def replace_text(path: str | Path, text: str) -> None:
    """Write `text` beside `path`, then rename."""
    replace_file(Path(path), lambda partial: partial.write_text(text))


def replace_file(path: Path, write: Callable[[Path], object], durable: bool = True) -> None:
    """Let `write` make a file beside `path`, then rename it; if `durable`, a power failure does not undo that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # several processes may write the same at once
    write(partial)
    if durable:
        _sync(partial)
    os.replace(partial, path)
    if durable:
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Have the disk hold what was written to a file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output_directory(directory: str | Path) -> None:
    """Raise `MoeCollabError` if nothing could be saved in `directory`: a file, read-only, forbidden, or full.

    It writes a few bytes and removes them again; what is not there is not made. It first ends the moves of a save that
    was killed. Call it before calibration, so that hours are not spent on a model that cannot be saved.
    """
    target = Path(directory).resolve()
    with _in_words(target):
        _end_moves_of_killed_save(target)
        _check_is_directory(target)
        place = next(path for path in (target, *target.parents) if path.exists())
        with tempfile.NamedTemporaryFile(prefix=".moe-collab-probe-", dir=place) as probe:
            probe.write(bytes(4096))
            probe.flush()


@contextmanager
def replace_directory(directory: str | Path, resumable: bool = False) -> Iterator[Path]:
    """Yield an empty hidden directory inside `directory`; when the block succeeds, its files move to `directory`.

    Files of the same name are replaced. So are the weights of an older checkpoint, if a checkpoint was written. All
    other files stay as they are. When the block raises, what it wrote is removed and `directory` is as it was; after
    `Rejected` it is kept in `.moe-collab-rejected`. If the moves fail they are taken back, and the complete new files
    are kept in `.moe-collab-complete`. Raises `MoeCollabError` if `directory` is a file or may not be written, before
    the block runs.

    If it is `resumable`, the hidden directory is yielded with all that a killed process has left in it. What the block
    wrote also stays there if it is interrupted, or if something fails that can be cured, such as a full disk.
    """
    target = Path(directory).resolve()
    created = [path for path in (target, *target.parents) if not os.path.lexists(path)]
    try:
        with _in_words(target, resumable):
            _prepare(target, resumable)
            with _discarded_on_error(target, resumable):
                yield target / PARTIAL
            _move_out(target)
    finally:
        with suppress(OSError):  # a directory that has files in it by now is not removed
            for path in created:
                path.rmdir()


def was_cut_off(directory: Path) -> bool:
    """Whether a process was killed while new files moved into `directory`: the next save into it ends the moves."""
    return has_journal(directory / PARTIAL)


def _prepare(target: Path, resumable: bool) -> None:
    """Make a staging directory, empty unless it is `resumable`, after ending what an older save has left behind."""
    _end_moves_of_killed_save(target)
    _check_is_directory(target)
    staged = target / PARTIAL
    if staged.exists() and not resumable:
        shutil.rmtree(staged)
    staged.mkdir(parents=True, exist_ok=True)


def _check_is_directory(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise MoeCollabError(f"{target}: a file stands where the directory should go. Name another directory.")


def _end_moves_of_killed_save(target: Path) -> None:
    if not was_cut_off(target):
        return
    try:
        Moves.read(target / PARTIAL, target / COMPLETE).run()
    except NotMoved as failure:
        if was_cut_off(target):  # else the moves were taken back, and the older checkpoint is whole again
            raise _failed_moves(target, failure) from failure


@contextmanager
def _discarded_on_error(target: Path, resumable: bool) -> Iterator[None]:
    """Remove what the block has staged if it fails, or put it aside if it is `Rejected`.

    If it is `resumable`, only what we refuse is removed, for we would refuse it again.
    """
    staged = target / PARTIAL
    try:
        yield
    except Rejected as error:
        kept = rename_hidden(staged, target / REJECTED)
        said = str(error).replace(str(staged), str(kept))
        raise MoeCollabError(f"{said}\nIt was kept in {kept}, to look at; {target} is otherwise as it was.") from error
    except BaseException as error:
        if not resumable or isinstance(error, MoeCollabError):
            shutil.rmtree(staged, ignore_errors=True)
        with suppress(OSError):  # it is gone, or has files in it
            staged.rmdir()
        raise


def _move_out(target: Path) -> None:
    """Move the finished staged files to `target`, or else leave everything as it was and say where they are."""
    try:
        Moves.plan(target / PARTIAL, target / COMPLETE).run()
    except NotMoved as failure:
        raise _failed_moves(target, failure) from failure


def _failed_moves(target: Path, failure: NotMoved) -> MoeCollabError:
    cause = failure.__cause__ or failure
    return MoeCollabError(
        f"{target}: {remedy_for(cause) or 'the finished files could not move in'}. ({cause})\n{failure}"
    )


@contextmanager
def _in_words(target: Path, resumable: bool = False) -> Iterator[None]:
    """Raise what the file system refuses in the block as a `MoeCollabError` that says what to do, and what is kept."""
    try:
        yield
    except MoeCollabError:
        raise
    except Exception as error:
        remedy = remedy_for(error)
        if remedy is None and not isinstance(error, OSError):
            raise
        remedy = remedy or "the file system refused. Free the cause, or name another directory"
        if resumable and (target / PARTIAL).exists():
            remedy += f"; then start the same run again: the files that are finished are kept in {target / PARTIAL}"
        raise MoeCollabError(f"{target}: nothing was saved: {remedy}. ({error})") from error


def remedy_for(error: BaseException) -> str | None:
    """What is wrong and what to do, None if no file system says so. safetensors tells the number in its text only."""
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])
    return _REMEDIES.get(number) if isinstance(number, int) else None
