"""What stages have found out, each under a name, kept so that it is never found out twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..checkpoint.atomic import replace_file, replace_text
from ..distributed import is_source_process, wait

__all__ = ["Bookmark", "Results", "key_of"]

Found = dict[str, torch.Tensor]


class Results:
    """Keeps dictionaries of tensors, and notes, by name: in files of `folder`, or, if that is None, in memory.

    If it is `durable`, what was put is on the disk when `put` returns, whole or not at all, and later processes get it.
    """

    def __init__(self, folder: Path | None = None, durable: bool = False) -> None:
        self._folder, self._durable = folder, durable
        self._known: dict[str, Found] = {}
        self._notes: dict[str, Any] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for file in folder.glob(".*.partial") if is_source_process() else ():  # of processes that were killed
                file.unlink()
            wait()

    @property
    def durable(self) -> bool:
        """Whether later processes get what is put."""
        return self._durable

    def put(self, name: str, found: Mapping[str, torch.Tensor]) -> Found:
        """Keep `found` in the place of what was kept by that name. Returns it as `get` does."""
        if self._folder is None:
            self._known[name] = dict(found)
            return self._known[name]
        write = partial(save_file, {key: value.detach().cpu().contiguous() for key, value in found.items()})
        replace_file(self._file(name), write, self._durable)
        return self._read(name)

    def get(self, name: str) -> Found | None:
        """What is kept by that name, if there is anything; tensors of files are mapped."""
        if self._folder is None:
            return self._known.get(name)
        return self._read(name) if self._file(name).exists() else None

    def kept(self, name: str) -> Found:
        """What is kept by that name, which is there."""
        found = self.get(name)
        assert found is not None, name
        return found

    def drop(self, name: str) -> None:
        """Keep nothing by that name any longer; whoever still holds tensors of it can go on reading them."""
        if self._folder is None:
            self._known.pop(name, None)
        else:
            self._file(name).unlink(missing_ok=True)

    def note(self, name: str, value: Any) -> None:
        """Keep `value`, which JSON can hold, in the place of what was noted by that name."""
        if self._folder is None:
            self._notes[name] = value
        else:
            replace_text(self._folder / f"{name}.json", json.dumps(value))

    def noted(self, name: str) -> Any:
        """What was noted by that name, None if nothing was."""
        if self._folder is None:
            return self._notes.get(name)
        file = self._folder / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def number(self, name: str, compute: Callable[[], float]) -> float:
        """The number that is noted by that name; if there is none, what `compute` returns is noted first."""
        found = self.noted(name)
        if found is None:
            self.note(name, found := compute())
        return found

    def _file(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.safetensors"

    def _read(self, name: str) -> Found:
        with safe_open(self._file(name), "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no dictionary)


class Bookmark:
    """How far a process has come with what takes long, by a name in `results`; kept only if those are durable.

    The processes of `torchrun` do the same things and may differ in their last bits; all go on where the source was.
    """

    def __init__(self, results: Results, name: str) -> None:
        self._results, self._name = results, name

    def found(self) -> Found | None:
        """What an earlier process has put here last, if there is anything."""
        found = self._results.get(self._name) if self._results.durable else None
        wait()  # until all have it: from now on there may be another
        return found

    def put(self, state: Mapping[str, torch.Tensor]) -> None:
        """Keep `state` in the place of the last one."""
        if self._results.durable and is_source_process():
            self._results.put(self._name, state)

    def remove(self) -> None:
        """Keep nothing any longer, because what came of it is kept."""
        if self._results.durable and is_source_process():
            self._results.drop(self._name)


def key_of(*parts: Any) -> str:
    """Sixteen digits that tell `parts` from others: what a result depends on, as part of its name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
