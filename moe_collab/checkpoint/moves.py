"""Files that move out of a hidden directory into the one around it, all or none.

The order is: (1) what is in the way goes aside into the hidden directory, config.json first, then the index, then the
rest, among it the weights of the older checkpoint; (2) the new weights come in, then the other files, then the index,
and config.json last; (3) what went aside is deleted.

Nobody opens a directory without config.json as a checkpoint. As it is the first to go and the last to come, whoever
finds one finds all files of the same checkpoint, and never shards of two, even where both use the same names.

A journal in the hidden directory, written before the first move, lists all moves. A process that is killed leaves:

- before the journal: the old checkpoint whole, and a hidden directory that the next save deletes or goes on with;
- in (1) or (2): no config.json, all files either in place or hidden, and the journal. `Checkpoint` says so when it is
  asked to read; the next save, or `check_output_directory`, ends the moves (what is done is seen from where each file
  lies), so that the new checkpoint, which was verified before, is there;
- in (3): the new checkpoint whole, and a hidden directory that the next save deletes.

An error or an interrupt takes the moves back in the opposite order: then the old checkpoint is there, and the new one
is kept, complete, in another hidden directory.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Moves", "NotMoved", "has_journal", "rename_hidden"]

_JOURNAL, _REPLACED = ".journal.json", ".replaced"
_CONFIG, _INDEX, _SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"


class NotMoved(Exception):
    """Moves that failed because of the error it is raised from; the message says what lies where now."""


def has_journal(staged: Path) -> bool:
    """Whether moves out of `staged` were begun and not ended."""
    return (staged / _JOURNAL).exists()


def rename_hidden(source: Path, destination: Path) -> Path:
    """Where the hidden directory `source` is afterwards; what was at `destination` is removed."""
    try:
        shutil.rmtree(destination, ignore_errors=True)
        os.replace(source, destination)
    except OSError:
        return source
    return destination


@dataclass(frozen=True)
class Moves:
    """Files that go aside, out of the way of new ones, and files that come out of `staged`, each in this order.

    Names are relative to the directory around `staged` and to `staged`. What goes aside lies in `staged` until all
    moves are done. Files that do not come in are kept in a directory named `complete` if the moves fail.
    """

    staged: Path
    complete: Path
    aside: list[str]
    placed: list[str]

    @classmethod
    def plan(cls, staged: Path, complete: Path) -> Moves:
        """The config goes first and comes last: what is half moved cannot be taken for a checkpoint."""
        placed = [str(path.relative_to(staged)) for path in staged.rglob("*") if not path.is_dir()]
        aside = {name for name in placed if os.path.lexists(staged.parent / name)}
        if _CONFIG in placed:
            aside |= _old_checkpoint(staged.parent, sharded=_INDEX in placed)
        return cls(staged, complete, sorted(aside, key=_position)[::-1], sorted(placed, key=_position))

    @classmethod
    def read(cls, staged: Path, complete: Path) -> Moves:
        """What the journal lists that a killed process left in `staged`."""
        return cls(staged, complete, **json.loads((staged / _JOURNAL).read_text()))

    def run(self) -> None:
        """Do what is not done yet and remove `staged`; if it fails, take all of it back and raise `NotMoved`."""
        try:
            self._write_journal()
            self._forward()
        except BaseException as error:
            what_is_where = self._take_back()
            if isinstance(error, Exception):
                raise NotMoved(what_is_where) from error
            error.add_note(what_is_where)
            raise
        (self.staged / _JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self.staged, ignore_errors=True)
        shutil.rmtree(self.complete, ignore_errors=True)  # an older one, which this one has replaced

    def _write_journal(self) -> None:
        partial = self.staged / f"{_JOURNAL}.partial"
        partial.write_text(json.dumps({"aside": self.aside, "placed": self.placed}))
        os.replace(partial, self.staged / _JOURNAL)

    def _forward(self) -> None:
        for name in self.aside:
            if not os.path.lexists(self.staged / _REPLACED / name):
                _move(self.staged.parent / name, self.staged / _REPLACED / name)
        for name in self.placed:
            _move(self.staged / name, self.staged.parent / name)

    def _back(self) -> None:
        for name in reversed(self.placed):
            # What is still staged has not come in; a file of that name is the old one.
            if not os.path.lexists(self.staged / name):
                _move(self.staged.parent / name, self.staged / name)
        for name in reversed(self.aside):
            _move(self.staged / _REPLACED / name, self.staged.parent / name)
        for parent in {self.staged.parent / Path(name).parent for name in self.placed} - {self.staged.parent}:
            with suppress(OSError):  # it has other files in it
                parent.rmdir()

    def _take_back(self) -> str:
        """Put every file where it was and keep the staged ones; says what lies where."""
        target = self.staged.parent
        try:
            self._back()
        except OSError as error:
            return (
                f"Nor could the moves be taken back ({error}). New files that did not move are in {self.staged}, old "
                f"ones in {self.staged / _REPLACED}; the next save into {target} ends the moves. Nothing is lost."
            )
        kept = rename_hidden(self.staged, self.complete)
        if kept == self.complete:  # if not, the journal protects it from the next save, which ends the moves instead
            shutil.rmtree(kept / _REPLACED, ignore_errors=True)
            for name in (_JOURNAL, f"{_JOURNAL}.partial"):
                with suppress(OSError):
                    (kept / name).unlink()
        return (
            f"What is new is complete and was kept in {kept}: copy it where you want it, before the next save into "
            f"{target}, which replaces it. Nothing else in {target} has changed."
        )


def _move(source: Path, destination: Path) -> None:
    """Move a file or directory that is there."""
    if os.path.lexists(source):
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, destination)


def _position(name: str) -> tuple[int, str]:
    """Where a file stands among those that come in: weights, then the others, the index, and the config."""
    last = {_INDEX: 2, _CONFIG: 3}
    return last.get(name, 0 if name.endswith(".safetensors") else 1), name


def _old_checkpoint(target: Path, sharded: bool) -> set[str]:
    """Index and weights of the checkpoint that lies in `target`, and none of anyone else's files.

    A model.safetensors without a config is one too where shards will lie: transformers would read it in their place.
    """
    shards: set[str] = set()
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # what is no index names no shards
        shards = {
            name for name in json.loads((target / _INDEX).read_text())["weight_map"].values() if isinstance(name, str)
        }
    if (target / _CONFIG).exists() or sharded:
        shards.add(_SINGLE)
    plain = {name for name in shards if name == Path(name).name and name.endswith(".safetensors")}
    return {name for name in plain | {_INDEX} if os.path.lexists(target / name)}
