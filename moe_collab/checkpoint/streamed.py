"""A model larger than memory: its weights are read while they are needed, and released again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import MoeCollabError
from .empty import EmptyModel, no_progress_bars

__all__ = ["StreamedModel"]


class StreamedModel:
    """The model that `load` would give, but that its weights are on the meta device until `weights_of` reads them.

    Buffers that are not stored, such as those of rotary embeddings, are there from the start. Raises `MoeCollabError`
    where `load` would.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> None:
        self._path, self._device = Path(path), torch.device(device)
        self._empty = EmptyModel(path, dtype)
        self._tied = self._empty.tied()
        self.model: Any = self._empty.model
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    setattr(module, name, buffer.to(self._device))

    @contextmanager
    def weights_of(self, modules: Iterable[str]) -> Iterator[None]:
        """Within the block the modules of these names have their weights."""
        prefixes = tuple(f"{module}." for module in modules)
        names = [name for name in self._empty.parameters if name.startswith(prefixes)]
        stored = list(dict.fromkeys(self._tied.get(name, name) for name in names))
        try:
            self._read(stored)
            for name in names:
                self._set(name, self.model.get_parameter_or_buffer(self._tied.get(name, name)))
            yield
        finally:
            for name in {*names, *stored}:
                self._set(name, self._empty.parameters[name])

    def _read(self, names: list[str]) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        config = LoadStateDictConfig(device_map={"": self._device}, weight_mapping=self._empty.conversions)
        with no_progress_bars():
            convert_and_load_state_dict_in_model(self.model, self._empty.tensors(names), config)
        if unread := [name for name in names if self.model.get_parameter_or_buffer(name).is_meta]:
            raise MoeCollabError(f"{self._path}: {unread[:5]} cannot be read by themselves; use load() instead.")

    def _set(self, name: str, value: torch.Tensor) -> None:
        module, _, attribute = name.rpartition(".")
        setattr(self.model.get_submodule(module), attribute, value)
