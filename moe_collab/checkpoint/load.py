"""Compressed checkpoints in transformers, dequantized; neither llm-compressor nor vLLM is needed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..errors import MoeCollabError
from .empty import EmptyModel, model_of, stock_conversions
from .lazy import LazyTensor
from .reader import Checkpoint
from .twin import dense_twin

__all__ = ["load", "stock_conversions", "write_dense_twin"]

_PASSED_ON = ("attn_implementation", "device_map", "experts_implementation", "max_memory", "offload_folder")
"""Arguments of from_pretrained() that are of use here. Others would choose other weights, or none, or other shapes."""

_SHARD = 2 << 30
"""About how many bytes of a dense twin are in memory at a time, and in a file."""


def load(path: str | Path, dtype: torch.dtype | None = None, **from_pretrained: Any) -> Any:
    """The transformers model that config.json names, or else a causal language model, with the dequantized weights.

    `dtype` None keeps the checkpoint's. `from_pretrained` may be `attn_implementation`, `experts_implementation`,
    `device_map`, `max_memory` and `offload_folder`, as transformers knows them. The memory needed is that of the
    unquantized model and, as transformers reads four at a time, of four of its matrices; to disk goes only what
    `device_map` sends there. The files at `path` are not needed afterwards. Raises `MoeCollabError`, in most cases
    before any weight is read, if a tensor is missing, unknown to the model, or unreadable; no weight is ever left at
    its random start.
    """
    if refused := sorted(set(from_pretrained).difference(_PASSED_ON)):
        raise MoeCollabError(f"load() takes {', '.join(_PASSED_ON)} of from_pretrained(), not {', '.join(refused)}.")
    empty = EmptyModel(path, dtype)
    return model_of(empty.checkpoint, empty.tensors(), dtype, **from_pretrained)


def write_dense_twin(path: str | Path, output: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the same model unquantized, as its family's own checkpoints: what the one at `path` computes with.

    Dequantized weights get `dtype`, or else that of their scales; other tensors stay as they are. About 2 GiB are in
    memory at a time, and in one file.
    """
    checkpoint, output = Checkpoint(path), Path(output)
    output.mkdir(parents=True, exist_ok=True)
    _write_shards(dense_twin(checkpoint, dtype), output)
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in checkpoint.path.glob("*.json"):
        if file.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copy2(file, output / file.name)


def _write_shards(tensors: Mapping[str, LazyTensor], output: Path) -> None:
    """Write one file, or several and their index, each read only when it is written."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.like.nbytes > _SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.like.nbytes
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(t.like.nbytes for t in tensors.values())}, "weight_map": where}
        (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for file, names in zip(files, shards, strict=True):
        save_file({name: tensors[name].read() for name in names}, output / file, metadata={"format": "pt"})
