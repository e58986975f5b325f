"""Weights of a model on disk that are as they were published: read, and dequantized, whenever somebody needs them.

So no second copy of the model is written. What changes is written to a folder, as llm-compressor does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.offload import offload_module
from compressed_tensors.offload.cache import DiskCache, OffloadCache
from compressed_tensors.offload.utils import to_tensor

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


class SourceCache(OuterCache):
    """The parameters, or buffers, of a module: some in their checkpoint, the others where `inner` has them.

    `sources`: name -> (tensor on the meta device, what is read for it). A tensor that is written to goes to `inner`.
    """

    def __init__(self, inner: DiskCache, sources: Mapping[str, tuple[torch.Tensor, LazyTensor]]) -> None:
        self.inner = inner
        self._sources = {tensor: source for tensor, source in sources.values()}
        self.offloaded_values = {name: tensor for name, (tensor, _) in sources.items()} | inner.offloaded_values
        self.offload_dir = inner.offload_dir

    def source_of(self, offloaded: torch.Tensor) -> LazyTensor | None:
        """What is read for a tensor; None if it was written to."""
        return self._sources.get(offloaded)

    def onload(self, offloaded: torch.Tensor | None) -> torch.Tensor | None:
        """As `OffloadCache.onload`."""
        if offloaded is None or offloaded not in self._sources:
            return self.inner.onload(offloaded)
        values = self._sources[offloaded].read().to(self.onload_device, offloaded.dtype)
        return to_tensor(values, offloaded)

    def offload(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """As `OffloadCache.offload`."""
        return tensor if tensor in self._sources else self.inner.offload(tensor)

    def update_offload(self, offloaded: torch.Tensor, data: torch.Tensor | None) -> None:
        """As `OffloadCache.update_offload`."""
        if offloaded not in self._sources or data is None:
            self.inner.update_offload(offloaded, data)
            return
        name = next(name for name, tensor in self.offloaded_values.items() if tensor is offloaded)
        self.offloaded_values[name] = self.inner.offload(to_tensor(data.detach().to(offloaded.dtype), offloaded))
        del self._sources[offloaded]

    def __delitem__(self, key: Any) -> None:
        offloaded = self.offloaded_values[key]
        if self._sources.pop(offloaded, None) is None and offloaded is not None:
            self.inner.offloaded_values.setdefault(key, offloaded)
            del self.inner[key]
        super().__delitem__(key)


def offload_to_source(
    module: torch.nn.Module, sources: Mapping[str, LazyTensor], device: torch.device, folder: str
) -> None:
    """Leave those parameters and buffers of `module` on disk that have `sources`, by name; what else it has goes there.

    All are brought to `device` when they are used; what changes is written to `folder`.
    """
    taken: dict[str, dict[str, tuple[torch.Tensor, LazyTensor]]] = {}
    for kind in ("_parameters", "_buffers"):
        own = getattr(module, kind)
        taken[kind] = {name: (own[name], sources[name]) for name in own if name in sources}
        setattr(module, kind, {name: tensor for name, tensor in own.items() if name not in sources})
    offload_module(module, device, "disk", offload_dir=folder)
    for kind, found in taken.items():
        if found:
            setattr(module, kind, SourceCache(getattr(module, kind), found))
