"""Rounded weights of a model on disk stay packed: dense values are made again whenever somebody reads them.

So rounding writes no second dense copy of the model, and everything that reads `module.weight` goes on as if there were
one. In memory the dense values take the place of the original ones.
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.offload.cache import DiskCache
from torch import nn

from ...distributed import store
from ...rounding import PackedGrid
from .source_cache import OuterCache, SourceCache

__all__ = ["PackedCache", "is_packed", "write_rounded"]


class PackedCache(OuterCache):
    """The parameters of a rounded module on disk. All but `weight` are where `inner`, whose place it takes, has them.

    `weight` is made of packed codes, which stay where they were written when the module was rounded, and of the scales
    and zero points that it has at the time. Another weight that is written to it is kept dense from then on.
    """

    def __init__(self, inner: DiskCache | SourceCache, rounded: PackedGrid) -> None:
        self.inner, self._scheme, self._shape = inner, rounded.scheme, rounded.shape
        self.words = rounded.words
        """The packed codes."""
        weight = inner.offloaded_values["weight"]
        empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        self._weight = nn.Parameter(empty, requires_grad=False)
        self.offloaded_values = dict(inner.offloaded_values) | {"weight": self._weight}

    @property
    def is_packed(self) -> bool:
        """Whether the weight is still the rounded one."""
        return self.offloaded_values["weight"] is self._weight

    @property
    def rounded(self) -> PackedGrid:
        """The rounded weight, with the scales and zero points that the module has."""
        zeros = None if self._scheme.symmetric else self["weight_zero_point"]
        return PackedGrid(self._scheme, self._shape, self.words, self["weight_scale"], zeros)

    def onload(self, offloaded: torch.Tensor | None) -> torch.Tensor | None:
        """As `OffloadCache.onload`."""
        if offloaded is not self._weight:
            return self.inner.onload(offloaded)
        values = self.rounded.values(torch.device(self.onload_device))
        return nn.Parameter(values.to(self._weight.dtype), requires_grad=False)

    def offload(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """As `OffloadCache.offload`."""
        return self.inner.offload(tensor)

    def update_offload(self, offloaded: torch.Tensor, data: torch.Tensor | None) -> None:
        """As `OffloadCache.update_offload`."""
        if offloaded is not self._weight or data is None:
            self.inner.update_offload(offloaded, data)
            return
        dense = nn.Parameter(data.detach().to(self._weight.dtype), requires_grad=False)
        self.offloaded_values["weight"] = self.inner.offload(dense)


def is_packed(module: Any) -> bool:
    """Whether a module holds its rounded weight packed."""
    cache = module._parameters
    return isinstance(cache, PackedCache) and cache.is_packed


@torch.no_grad()
def write_rounded(module: Any, rounded: PackedGrid) -> None:
    """Put a rounded weight, its scales and its zero points into a module whose scheme is attached."""
    store(module, "weight_scale", rounded.scales.to(module.weight_scale.dtype))
    if rounded.zeros is not None:
        store(module, "weight_zero_point", rounded.zeros.to(module.weight_zero_point.dtype))
    if isinstance(module._parameters, DiskCache | SourceCache):
        module._parameters = PackedCache(module._parameters, rounded)
    else:
        store(module, "weight", rounded.values().to(module.weight.dtype))
