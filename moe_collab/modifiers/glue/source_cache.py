"""Weights of a model on disk that are as they were published: read, and dequantized, whenever somebody needs them.

So no second copy of the model is written. What changes is written to a folder, as llm-compressor does it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from compressed_tensors.offload import offload_module
from compressed_tensors.offload.cache import DiskCache, OffloadCache
from compressed_tensors.offload.utils import to_tensor
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.weak import WeakIdKeyDictionary

from ...checkpoint.lazy import LazyTensor

__all__ = ["OuterCache", "SourceCache", "offload_to_source"]


class OuterCache(OffloadCache):
    """A cache around another one: it has some tensors of a module itself, and the others where `inner` has them."""

    inner: Any

    @property
    def onload_device(self) -> Any:  # type: ignore[override]
        """Where tensors are read to."""
        return self.inner.onload_device

    @onload_device.setter
    def onload_device(self, device: Any) -> None:
        self.inner.onload_device = device

    @property
    def offload_device(self) -> Any:  # type: ignore[override]
        """Where they are kept."""
        return self.inner.offload_device


class _Place(NamedTuple):
    """Where the values of a tensor are."""

    source: LazyTensor
    """What is read for it, unless `changed` exists."""
    changed: Path
    """The file for other values, the same in all processes."""


class SourceCache(OuterCache):
    """The parameters, or buffers, of a module: `own` are in their checkpoint, by name, the others where `inner` is.

    A value that is written goes to a file of its own, which all processes of `torchrun` see from then on; as with
    `DiskCache` one of them may write alone.
    """

    places: ClassVar[Any] = WeakIdKeyDictionary()
    """Of each tensor on the meta device that is in a checkpoint, whichever module has it, or several."""

    def __init__(self, inner: DiskCache, own: Mapping[str, torch.Tensor]) -> None:
        self.inner, self.offload_dir = inner, inner.offload_dir
        self.offloaded_values = dict(own) | inner.offloaded_values

    def source_of(self, offloaded: torch.Tensor) -> LazyTensor | None:
        """What is read for a tensor; None if it was written to."""
        place = self.places.get(offloaded)
        return None if place is None or place.changed.exists() else place.source

    def onload(self, offloaded: torch.Tensor | None) -> torch.Tensor | None:
        """As `OffloadCache.onload`."""
        if offloaded is None or offloaded not in self.places:
            return self.inner.onload(offloaded)
        if (source := self.source_of(offloaded)) is not None:
            values = source.read()
        else:
            with safe_open(self.places[offloaded].changed, "pt") as file:
                values = file.get_tensor("weight")
        return to_tensor(values.to(self.onload_device, offloaded.dtype), offloaded)

    def offload(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """As `OffloadCache.offload`."""
        return tensor if tensor in self.places else self.inner.offload(tensor)

    def update_offload(self, offloaded: torch.Tensor, data: torch.Tensor | None) -> None:
        """As `OffloadCache.update_offload`."""
        if offloaded not in self.places or data is None:
            self.inner.update_offload(offloaded, data)
            return
        file = self.places[offloaded].changed
        partial = file.with_suffix(f".{os.getpid()}")
        values = data.detach().reshape(offloaded.shape).to("cpu", offloaded.dtype)
        save_file({"weight": values.contiguous()}, partial)
        partial.replace(file)

    def __delitem__(self, key: Any) -> None:
        offloaded = self.offloaded_values[key]
        if offloaded is not None and offloaded not in self.places:
            self.inner.offloaded_values[key] = offloaded
            del self.inner[key]
        super().__delitem__(key)


def offload_to_source(
    name: str, module: torch.nn.Module, sources: Mapping[str, LazyTensor], device: torch.device, folder: Path
) -> None:
    """Leave those parameters and buffers of `module` on disk that have `sources`, by name; what else it has goes there.

    All are brought to `device` when they are used; what changes is written to `folder`, in files that have the module's
    `name`.
    """
    taken: dict[str, dict[str, torch.Tensor]] = {}
    for kind in ("_parameters", "_buffers"):
        all_of_kind = getattr(module, kind)
        taken[kind] = {own: tensor for own, tensor in all_of_kind.items() if own in sources}
        setattr(module, kind, {own: tensor for own, tensor in all_of_kind.items() if own not in sources})
    offload_module(module, device, "disk", offload_dir=str(folder))
    for kind, found in taken.items():
        for own, tensor in found.items():
            if tensor not in SourceCache.places:  # a tied weight is one tensor of two modules
                SourceCache.places[tensor] = _Place(sources[own], folder / f"{name}.{own}.safetensors")
        if found:
            setattr(module, kind, SourceCache(getattr(module, kind), found))
