"""Companion files that cannot be read are no reason to lose a checkpoint."""

import shutil

import pytest

from moe_collab.checkpoint import companions
from moe_collab.checkpoint.companions import copy_companions


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("config.json", "LICENSE", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


def test_a_file_that_may_not_be_read_is_left_out(source, tmp_path, monkeypatch):
    stock = shutil.copyfile

    def refusing(file, target):
        if file.name == "LICENSE":
            raise PermissionError(13, "not yours", str(file))
        return stock(file, target)

    monkeypatch.setattr(companions.shutil, "copyfile", refusing)
    assert copy_companions(source, tmp_path / "staged") == ["tokenizer.json"]


def test_a_folder_that_may_not_be_read_is_left_out(source, tmp_path, monkeypatch):
    (source / "lost+found").mkdir()
    monkeypatch.setattr(companions.os, "access", lambda path, mode: path.name != "lost+found")
    assert copy_companions(source, tmp_path / "staged") == ["LICENSE", "tokenizer.json"]
