"""How large the saved checkpoint will be, to the byte, for any choice of schemes and experts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache

from ..checkpoint.sizes import TensorEntry, checkpoint_bytes, quantized_entries
from ..formats import DENSE, Scheme
from ..outline import Matrix, ModelOutline

__all__ = ["CheckpointLayout"]

_HEADER_BYTES = 70
"""About what a tensor takes in a file's JSON header besides its name: keys, shape, two offsets of nine digits."""


class CheckpointLayout:
    """The tensors of a model as they will be saved; only `matrices`, by name in the live model, may be quantized."""

    def __init__(self, outline: ModelOutline, matrices: Mapping[str, Matrix]) -> None:
        self._outline, self._matrices = outline, matrices
        self._quantizable = {f"{matrix.saved_as}.weight": matrix for matrix in matrices.values()}
        self._expert = {
            matrix.saved_as: (outline.layers[matrix.layer].name, matrix.expert)
            for matrix in outline.matrices.values()
            if matrix.layer is not None
        }
        self._router = {name: layer.name for layer in outline.layers for name in layer.router_tensors}
        self._cells = cache(_cell)

    def size(self, name: str, scheme: Scheme, header: bool = True) -> int:
        """Bytes of matrix `name` stored at `scheme`; with `header`, about what the file's header takes for it too."""
        matrix = self._matrices[name]
        entries, data, suffixes = self._cells(matrix.shape, matrix.dtype, scheme)
        return data + header * (suffixes + len(entries) * (len(name) + _HEADER_BYTES))

    def file_bytes(
        self,
        schemes: Mapping[str, Scheme],
        dropped: Mapping[str, Collection[int]] | None = None,
        physical: bool = False,
    ) -> int:
        """Size of all safetensors files: matrices at `schemes`, experts `dropped` (layer -> indices) left out.

        `physical` pruning numbers the other experts anew and shortens the router's tensors too.
        """
        lost = {layer: frozenset(gone) for layer, gone in (dropped or {}).items() if gone}
        return checkpoint_bytes(
            stored for entry in self._outline.entries for stored in self._stored(entry, schemes, lost, physical)
        )

    def _stored(
        self,
        entry: TensorEntry,
        schemes: Mapping[str, Scheme],
        dropped: Mapping[str, frozenset[int]],
        physical: bool,
    ) -> list[TensorEntry]:
        """What becomes of one tensor of the unquantized checkpoint."""
        module, _, suffix = entry.name.rpartition(".")
        layer, index = self._expert.get(module, ("", -1))
        gone = dropped.get(layer, frozenset())
        if index in gone:
            return []
        if physical and gone:
            position = str(index - sum(other < index for other in gone))
            module = re.sub(r"(?<=\.experts\.)\d+(?=\.)", position, module, count=1)
        if physical and (lost := dropped.get(self._router.get(entry.name, ""))):
            entry = replace(entry, shape=(entry.shape[0] - len(lost), *entry.shape[1:]))
        matrix = self._quantizable.get(entry.name)
        scheme = DENSE if matrix is None else schemes.get(matrix.name, DENSE)
        if matrix is None or not scheme.is_packed:
            return [replace(entry, name=f"{module}.{suffix}")] if gone else [entry]
        parts, _, _ = self._cells(matrix.shape, matrix.dtype, scheme)
        return [TensorEntry(module + part.name, part.dtype, part.shape) for part in parts]


def _cell(shape: tuple[int, int], dtype: str, scheme: Scheme) -> tuple[list[TensorEntry], int, int]:
    """(tensors that a matrix is stored as, named by what follows the module's name; their bytes; the names' length)."""
    entries = [TensorEntry(".weight", dtype, shape)]
    if scheme.is_packed:
        group = scheme.group_of(shape[1])
        entries = quantized_entries("", shape, scheme.num_bits, group, scheme.symmetric, scale_dtype=dtype)
    return entries, sum(entry.nbytes for entry in entries), sum(len(entry.name) for entry in entries)
