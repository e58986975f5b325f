"""Which files of a checkpoint are finished: noted in `work`, so that a save that is killed goes on there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...calibration.results import Results, key_of
from ...checkpoint.sizes import cut_into_shards
from ...checkpoint.verify import Digest
from .likeness import few_of_each
from .live_tensors import LiveTensors

__all__ = ["FinishedFiles"]


class FinishedFiles:
    """Notes of the files in which `model` is saved as `tensors` in `directory`, kept in the results `known`.

    What is noted holds for the same directory, for files that are cut in the same way, and for a model whose tensors,
    as far as a few values of each tell, are the same: that the recipe is does not prove it, for a stock modifier may
    come to another result each time, and a file that the recipe names may have changed.
    """

    def __init__(
        self, known: Results, model: Any, tensors: LiveTensors, directory: Path, max_shard_size: float
    ) -> None:
        self._known, self._tensors = known, tensors
        layout = cut_into_shards(tensors.entries, max_shard_size)
        self._key = key_of(str(directory.resolve()), layout, few_of_each(model))

    def recall(self, file: str) -> dict[str, Digest] | None:
        """Digests of the tensors of a file that was finished, None if it was not.

        The packed modules in it then count as made.
        """
        noted = self._known.noted(self._name(file))
        if noted is None:
            return None
        self._tensors.digests |= noted["modules"]
        return noted["tensors"]

    def note(self, file: str, digests: Mapping[str, Digest]) -> None:
        """Remember that a file is finished, unless it holds weights that are not what a quantizer makes."""
        owners = {name.rpartition(".")[0] for name in digests}
        if any(f"{owner}.weight" in self._tensors.unsound for owner in owners):
            return
        modules = {name: digest for name, digest in self._tensors.digests.items() if name in owners}
        noted = {"tensors": dict(digests), "modules": modules}
        if self._known.noted(self._name(file)) != noted:
            self._known.note(self._name(file), noted)

    def _name(self, file: str) -> str:
        return f"{file}-{self._key}"
