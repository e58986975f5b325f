"""Moves into an output directory that fail, are interrupted or killed: the old or the new is always whole."""

import errno
import os
from pathlib import Path

import pytest

from moe_collab import MoeCollabError
from moe_collab.checkpoint.atomic import (
    COMPLETE,
    PARTIAL,
    check_output_directory,
    replace_directory,
)
from moe_collab.checkpoint.reader import Checkpoint

from .directories import files, others_are_there, save, value, with_others, write


def nth_fails(monkeypatch, n, error):
    """Make the `n`-th os.replace from now raise `error`; returns how often it was called."""
    rename, calls = os.replace, []

    def failing(source, destination):
        calls.append(source)
        if len(calls) == n:
            raise error
        rename(source, destination)

    monkeypatch.setattr(os, "replace", failing)
    return calls


ERRORS = {
    "busy": OSError(errno.EBUSY, "busy"),
    "other": OSError(errno.EXDEV, "other"),
    "full": OSError(errno.ENOSPC, "full"),
    "interrupt": KeyboardInterrupt(),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize(("old", "new"), [(1, 1), (1, 3), (3, 1), (3, 2), (3, 3)])
def test_moves_that_fail_are_taken_back(error, old, new, tmp_path, monkeypatch):
    n = 0
    while True:
        n, target = n + 1, tmp_path / f"{n}"
        target.mkdir()
        write(target, 1.0, old)
        with_others(target)
        with monkeypatch.context() as patch:
            calls = nth_fails(patch, n, error)
            try:
                save(target, 2.0, new)
            except (MoeCollabError, KeyboardInterrupt) as raised:
                said = f"{raised}{getattr(raised, '__notes__', '')}"
            else:
                break
        assert value(target) == 1.0 and value(target / COMPLETE) == 2.0 and others_are_there(target)
        assert str(target / COMPLETE) in said and not list((target / COMPLETE).glob(".*"))
        save(target, 3.0, new)
        assert value(target) == 3.0 and not (target / COMPLETE).exists()
    assert n == len(calls) + 1 > 6


def test_moves_that_cannot_be_taken_back_are_ended_by_the_next_save(tmp_path, monkeypatch):
    save(tmp_path, 1.0)
    rename, calls = os.replace, []

    def failing(source, destination):
        calls.append(source)
        if len(calls) > 5:
            raise OSError(errno.EIO, "broken")
        rename(source, destination)

    with monkeypatch.context() as patch, pytest.raises(MoeCollabError, match=r"Nor could .* Nothing is lost"):
        patch.setattr(os, "replace", failing)
        save(tmp_path, 2.0)
    with pytest.raises(MoeCollabError, match="cut off"):
        Checkpoint(tmp_path)
    check_output_directory(tmp_path)
    assert value(tmp_path) == 2.0 and len(files(tmp_path)) == 3


def killed_at(n: int, target: Path, shards: int) -> int:
    """Exit code of a process, forked as a new one would take seconds to start, that dies at its `n`-th os.replace."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    rename, calls = os.replace, []

    def dying(source, destination):
        calls.append(source)
        if len(calls) == n:
            os._exit(7)
        rename(source, destination)

    os.replace = dying
    try:
        save(target, 2.0, shards)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize(("old", "new"), [(1, 3), (3, 2)])
def test_a_killed_process_is_followed_by_a_save_that_succeeds(old, new, tmp_path):
    n, code = 0, 7
    while code == 7:
        n, target = n + 1, tmp_path / f"{n}"
        target.mkdir()
        write(target, 1.0, old)
        with_others(target)
        code = killed_at(n, target, new)
        with pytest.raises(RuntimeError), replace_directory(target):
            assert value(target) in (1.0, 2.0) and others_are_there(target)
            raise RuntimeError
        save(target, 3.0, old)
        assert value(target) == 3.0 and others_are_there(target) and not (target / PARTIAL).exists()
    assert code == 0 and n > 6
