"""How large the saved checkpoint will be, to the byte, for any choice of schemes and experts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache

import torch

from ..architectures import MoELayer, MoEModel
from ..checkpoint.sizes import TensorEntry, checkpoint_bytes, quantized_entries
from ..formats import DENSE, Scheme
from .naming import checkpoint_entries, checkpoint_names, checkpoint_tensors, entry_of

__all__ = ["CheckpointLayout"]

_HEADER_BYTES = 70
"""About what a tensor takes in a file's JSON header besides its name: keys, shape, two offsets of nine digits."""


class CheckpointLayout:
    """The tensors of `model` as they will be saved; `modules` by name are those that may be quantized."""

    def __init__(self, model: torch.nn.Module, moe: MoEModel, modules: Mapping[str, torch.nn.Linear]) -> None:
        self._modules = modules
        self._unquantized = checkpoint_entries(model)
        experts = [(layer.name, index, name) for layer in moe.layers for name, index, *_ in layer.projections()]
        names = checkpoint_names(model, [*{*modules, *(name for *_, name in experts)}])
        self._saved_as = {f"{names[name]}.weight": name for name in modules}
        self._expert = {names[name]: (layer, index) for layer, index, name in experts}
        router_rows = {name: layer.name for layer in moe.layers for name in _router_tensors(moe, layer)}
        saved = checkpoint_tensors(model, list(router_rows))
        self._router = {saved[name]: layer for name, layer in router_rows.items()}
        self._cells = cache(_cell)

    def size(self, name: str, scheme: Scheme, header: bool = True) -> int:
        """Bytes of module `name` stored at `scheme`; with `header`, about what the file's header takes for it too."""
        weight = self._modules[name].weight
        entries, data, suffixes = self._cells(tuple(weight.shape), weight.dtype, scheme)
        return data + header * (suffixes + len(entries) * (len(name) + _HEADER_BYTES))

    def file_bytes(
        self,
        schemes: Mapping[str, Scheme],
        dropped: Mapping[str, Collection[int]] | None = None,
        physical: bool = False,
    ) -> int:
        """Size of all safetensors files: modules at `schemes`, experts `dropped` (layer -> indices) left out.

        `physical` pruning numbers the other experts anew and shortens the router's tensors too.
        """
        dropped = {layer: frozenset(gone) for layer, gone in (dropped or {}).items() if gone}
        entries: list[TensorEntry] = []
        for entry in self._unquantized:
            saved, _, suffix = entry.name.rpartition(".")
            layer, index = self._expert.get(saved, ("", -1))
            gone = dropped.get(layer, frozenset())
            if index in gone:
                continue
            if physical and gone:
                saved = re.sub(r"(?<=\.experts\.)\d+(?=\.)", str(index - sum(i < index for i in gone)), saved, count=1)
            if physical and (lost := dropped.get(self._router.get(entry.name, ""))):
                entry = replace(entry, shape=(entry.shape[0] - len(lost), *entry.shape[1:]))
            scheme = schemes.get(self._saved_as.get(entry.name, ""), DENSE)
            if scheme.is_packed:
                dtype = self._modules[self._saved_as[entry.name]].weight.dtype
                parts, _, _ = self._cells(entry.shape, dtype, scheme)
                entries += [TensorEntry(saved + part.name, part.dtype, part.shape) for part in parts]
            elif gone:
                entries.append(replace(entry, name=f"{saved}.{suffix}"))
            else:
                entries.append(entry)
        return checkpoint_bytes(entries)


def _cell(shape: tuple[int, int], dtype: torch.dtype, scheme: Scheme) -> tuple[list[TensorEntry], int, int]:
    """(what is stored of a matrix, each entry's name following the module's; bytes; characters of these names)."""
    dense = entry_of(".weight", torch.empty(shape, dtype=dtype, device="meta"))
    entries = [dense]
    if scheme.is_packed:
        group = scheme.group_of(shape[1])
        entries = quantized_entries("", shape, scheme.num_bits, group, scheme.symmetric, scale_dtype=dense.dtype)
    return entries, sum(entry.nbytes for entry in entries), sum(len(entry.name) for entry in entries)


def _router_tensors(moe: MoEModel, layer: MoELayer) -> list[str]:
    """Names of the tensors of a layer's router, and of a selection bias beside it: a row for each expert."""
    router = f"{layer.name}.{moe.family.router}"
    names = [f"{router}.{name}" for name in (*layer.router._parameters, *layer.router._buffers)]
    beside = layer.bias_holder is layer.block
    return [*names, f"{layer.name}.e_score_correction_bias"] if beside else names
