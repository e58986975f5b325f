"""What tells a model's weights from others, without reading all of them."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.offload.cache import DiskCache
from safetensors import safe_open

from .compat import DEQUANTIZED
from .packed_weights import PackedCache
from .source_cache import SourceCache

__all__ = ["few_of_each"]

_SOME = 64
"""Values of each tensor that are compared."""


def few_of_each(model: Any) -> list[str]:
    """A line for each tensor of a live model, which changes with most changes of its values.

    One that is still in the file it was loaded from is known by that file; of all others some values are read.
    """
    with disable_onloading():
        lines = sorted(
            f"{name}.{own} {_known_by(cache, value)}"
            for name, module in model.named_modules()
            for cache in (module._parameters, module._buffers)
            for own, value in cache.items()
            if value is not None
        )
    return [*lines, getattr(model, DEQUANTIZED, "")]


def _known_by(cache: Any, value: torch.Tensor) -> str:
    if isinstance(cache, PackedCache):
        if cache.is_packed and value is cache.offloaded_values["weight"]:
            return _values(cache.words)
        cache = cache.inner
    if isinstance(cache, SourceCache) and (source := cache.source_of(value)) is not None:
        return f"{source.stored_as} {value.dtype} {_file(source.file) if source.file else ''}"
    if not isinstance(cache, DiskCache | SourceCache):
        return _values(value)
    entry = DiskCache.index[value]
    path = Path(entry["safetensors_file"])
    if path.is_symlink():
        return f"{entry['weight_name']} {_file(path.resolve())}"
    with safe_open(path, "pt") as file:
        return _values(file.get_tensor(entry["weight_name"]))


def _file(path: Path) -> str:
    status = path.stat()
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"


def _values(tensor: torch.Tensor) -> str:
    """The type, and digits that change with most changes of the values."""
    flat = tensor.detach().flatten()
    some = flat[:: max(1, len(flat) // _SOME)][:_SOME].cpu().double()
    return f"{tensor.dtype} {blake2b(some.numpy().tobytes(), digest_size=8).hexdigest()}"
