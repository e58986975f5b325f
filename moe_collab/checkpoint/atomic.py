"""A file or directory that is either the old one or the complete new one, never half of each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import MoeCollabError

__all__ = ["replace_directory", "replace_text"]


def replace_text(path: str | Path, text: str) -> None:
    """Write `text` beside `path`, then rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


@contextmanager
def replace_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory beside `target`; when the block succeeds it takes `target`'s place.

    Files of the old directory that the new one lacks, such as a tokenizer, come along; old weights do not.
    When the block raises, `target` is as it was. Raises `MoeCollabError` if `target` is a file.
    """
    target = target.absolute()
    if target.exists() and not target.is_dir():
        raise MoeCollabError(f"{target}: a file stands where the checkpoint should go. Name a directory.")
    beside, old = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        os.replace(old, target)  # a run was killed between the two renames below
    for stale in (beside, old):
        shutil.rmtree(stale, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        if target.exists():
            _carry_over(target, beside)
            os.replace(target, old)
        os.replace(beside, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(beside, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _carry_over(old: Path, new: Path) -> None:
    for file in old.iterdir():
        weights = file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json")
        if weights or (new / file.name).exists():
            continue
        if file.is_dir():
            shutil.copytree(file, new / file.name)
        else:
            shutil.copy2(file, new / file.name)
