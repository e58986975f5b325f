"""Saving into every kind of directory: afterwards it holds the old checkpoint or the new one, and others' files."""

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_collab import MoeCollabError
from moe_collab.checkpoint.atomic import (
    PARTIAL,
    REJECTED,
    Rejected,
    check_output_directory,
    replace_directory,
)

from .directories import OTHERS, files, others_are_there, save, value, with_others, write


@pytest.fixture
def mounted(tmp_path):
    """Mounts a memory file system at `tmp_path/out` and returns it; the test is skipped where it may not mount."""
    place = tmp_path / "out"

    def mount(options: str = "size=1m") -> Path:
        place.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount")
        return place

    yield mount
    while os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


def test_a_mount_point(mounted):
    target = mounted()
    for new in (1.0, 2.0):
        save(target, new)
        assert value(target) == new and os.path.ismount(target)
    assert files(target) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_directory_that_cannot_be_renamed(tmp_path, monkeypatch):
    rename, target = os.replace, tmp_path / "out"

    def refusing(source, destination):
        if Path(source).is_dir():
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(source))
        rename(source, destination)

    monkeypatch.setattr(os, "replace", refusing)
    for new in (1.0, 2.0):
        save(target, new)
        assert value(target) == new
    with pytest.raises(MoeCollabError, match=PARTIAL), replace_directory(target):
        raise Rejected("wrong")


def test_a_symlink_stays_one(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    save(link, 1.0)
    assert link.is_symlink() and value(real) == 1.0
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "elsewhere")
    save(dangling, 2.0)
    assert dangling.is_symlink() and value(tmp_path / "elsewhere") == 2.0


def test_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    save(".", 1.0)
    assert value(Path()) == value(tmp_path) == 1.0 and tmp_path.stat().st_ino == before


@pytest.mark.parametrize(("old", "new"), [(1, 1), (1, 3), (3, 1), (3, 2), (3, 3)])
def test_an_older_checkpoint_goes_and_other_files_stay(old, new, tmp_path):
    write(tmp_path, 1.0, old)
    with_others(tmp_path)
    (tmp_path / "vocabulary.txt").write_text("kept")
    save(tmp_path, 2.0, new)
    assert value(tmp_path) == 2.0 and others_are_there(tmp_path)
    weights = [f"model-{i + 1:05d}-of-{new:05d}.safetensors" for i in range(new)] if new > 1 else ["model.safetensors"]
    index = ["model.safetensors.index.json"] if new > 1 else []
    assert files(tmp_path) == sorted([*OTHERS, *weights, *index, "config.json", "tokenizer.json", "vocabulary.txt"])
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    target, outside = tmp_path / "out", tmp_path / "outside.safetensors"
    target.mkdir()
    outside.write_text("kept")
    (target / "notes.txt").write_text("kept")
    weights = {"a": "../outside.safetensors", "b": str(outside), "c": "notes.txt", "d": 3}
    for index in (json.dumps({"weight_map": weights}), "{", "[]"):
        (target / "model.safetensors.index.json").write_text(index)
        save(target, 1.0)
        assert outside.read_text() == (target / "notes.txt").read_text() == "kept" and value(target) == 1.0


def test_directories_inside_are_merged(tmp_path):
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates/old.jinja").write_text("old")
    with replace_directory(tmp_path) as staged:
        (staged / "templates").mkdir()
        (staged / "templates/new.jinja").write_text("new")
    assert files(tmp_path) == ["templates/new.jinja", "templates/old.jinja"]


def test_other_directories_keep_their_weights(tmp_path):
    write(tmp_path, 1.0, 3)
    with replace_directory(tmp_path) as staged:
        (staged / "statistics.json").write_text("no checkpoint")
    assert value(tmp_path) == 1.0


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), MoeCollabError("x")])
def test_what_is_half_written_is_removed(error, tmp_path):
    target = tmp_path / "deep" / "out"
    for known in (False, True):
        if known:
            save(target, 1.0)
        with pytest.raises(type(error)), replace_directory(target) as staged:
            (staged / "model.safetensors").write_text("half")
            raise error
        assert not known or value(target) == 1.0
        assert bool(list(tmp_path.iterdir())) is known
    assert len(files(target)) == 3


def test_what_is_resumable_is_removed_only_if_we_refuse_it(tmp_path):
    target = tmp_path / "deep" / "out"
    for error, raised in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "full"), MoeCollabError)):
        with pytest.raises(raised), replace_directory(target, resumable=True) as staged:
            (staged / "first").write_text("first")
            raise error
        assert files(target) == [f"{PARTIAL}/first"]
    with pytest.raises(MoeCollabError, match="x"), replace_directory(target, resumable=True) as staged:
        assert (staged / "first").read_text() == "first"
        raise MoeCollabError("x")
    assert not list(target.iterdir())


def test_what_is_rejected_is_kept_out_of_the_way(tmp_path):
    save(tmp_path, 1.0)
    for new in (2.0, 3.0):
        with pytest.raises(MoeCollabError, match=rf"wrong\n.*{REJECTED}"), replace_directory(tmp_path) as staged:
            write(staged, new)
            raise Rejected("wrong")
        assert value(tmp_path) == 1.0 and value(tmp_path / REJECTED) == new
    save(tmp_path, 4.0)
    assert value(tmp_path) == 4.0 and value(tmp_path / REJECTED) == 3.0


def test_a_file_in_its_place_is_refused_before_anything(tmp_path):
    (tmp_path / "out").write_text("")
    for target in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(MoeCollabError, match="a file stands where"):
            check_output_directory(target)
        with pytest.raises(MoeCollabError, match="a file stands where"), replace_directory(target):
            raise AssertionError("refused too late")


def test_an_unwritable_directory_is_refused_before_anything(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(MoeCollabError, match="may not be written"), replace_directory(tmp_path):
        raise AssertionError("refused too late")


def remount(target: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(target)], check=True)


def test_a_read_only_file_system(mounted):
    target = mounted()
    save(target, 1.0)
    remount(target, "ro")
    for place in (target, target / "deeper" / "out"):
        with pytest.raises(MoeCollabError, match="read-only"):
            check_output_directory(place)
    with pytest.raises(MoeCollabError, match="read-only"), replace_directory(target):
        raise AssertionError("refused too late")
    assert value(target) == 1.0


def test_a_full_disk(mounted):
    target = mounted("size=64k")
    save(target, 1.0)
    with pytest.raises(MoeCollabError, match="the disk is full"), replace_directory(target) as staged:
        (staged / "model.safetensors").write_bytes(bytes(100_000))
    assert value(target) == 1.0 and len(files(target)) == 3
    with pytest.raises(MoeCollabError, match="the disk is full"), replace_directory(target) as staged:
        save_file({"a": torch.ones(100_000)}, staged / "model.safetensors")
    assert value(target) == 1.0 and len(files(target)) == 3
    check_output_directory(target)
    with pytest.raises(OSError), open(target / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(1024))
    with pytest.raises(MoeCollabError, match="the disk is full"):
        check_output_directory(target)


def test_checking_a_directory_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path, tmp_path / "deep" / "out", "."):
        check_output_directory(place)
    assert list(tmp_path.iterdir()) == []
