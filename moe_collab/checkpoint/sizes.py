"""The size of safetensors files, to the byte, before they are written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..formats import TERNARY, ternary_width

__all__ = [
    "DEFAULT_SHARD_SIZE",
    "TORCH_TYPES",
    "TensorEntry",
    "checkpoint_bytes",
    "cut_into_shards",
    "file_layout",
    "quantized_entries",
    "safetensors_bytes",
]

DEFAULT_SHARD_SIZE = 20_000_000_000
"""llm-compressor's; transformers' own is 50 GB."""

_BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32}
_BITS |= {"F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8}
_BITS |= {"F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8}
# The order of the writer's dtype enumeration: tensors are stored from its end to its beginning.
_ENUMERATION = [
    "BOOL",
    "U8",
    "I8",
    "F8_E5M2",
    "F8_E4M3",
    "F8_E8M0",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "C64",
    "F64",
    "I64",
    "U64",
]
TORCH_TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
"""What torch calls the types of safetensors."""
_RANK = {dtype: rank for rank, dtype in enumerate(reversed(_ENUMERATION))}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as a safetensors header lists it; `dtype` as in safetensors (`BF16`, `I32`, ...)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * _BITS[self.dtype] // 8


def file_layout(
    entries: Iterable[TensorEntry], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """What stands before the data of one file, and where in the file each tensor's data begins.

    8 bytes, then a JSON header padded to a multiple of 8. `metadata` None is what transformers writes, `{"format":
    "pt"}`; empty means that the file has none.
    """
    metadata = {"format": "pt"} if metadata is None else metadata
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: dict[str, int] = {}
    offset = 0
    # Offsets have more digits the later a tensor lies, so the writer's order matters.
    for entry in sorted(entries, key=lambda e: (_RANK[e.dtype], e.name)):
        end = offset + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [offset, end]}
        starts[entry.name], offset = offset, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}


def safetensors_bytes(entries: Iterable[TensorEntry], metadata: Mapping[str, str] | None = None) -> int:
    """Size of one file; `metadata` as in `file_layout`."""
    entries = list(entries)
    return len(file_layout(entries, metadata)[0]) + sum(entry.nbytes for entry in entries)


def cut_into_shards(
    entries: Iterable[TensorEntry], max_shard_size: float = DEFAULT_SHARD_SIZE
) -> list[list[TensorEntry]]:
    """The tensors of each file of a checkpoint, cut as transformers cuts it: in order, greedily.

    A tensor that is larger than `max_shard_size` gets a file of its own.
    """
    shards: list[list[TensorEntry]] = []
    current: list[TensorEntry] = []
    size = 0
    for entry in entries:
        if entry.nbytes > max_shard_size:
            shards.append([entry])
            continue
        if size + entry.nbytes > max_shard_size:
            shards.append(current)
            current, size = [], 0
        current.append(entry)
        size += entry.nbytes
    if current:
        shards.append(current)
    return shards


def checkpoint_bytes(entries: Iterable[TensorEntry], max_shard_size: float = DEFAULT_SHARD_SIZE) -> int:
    """Size of all `*.safetensors` files of a checkpoint."""
    return sum(safetensors_bytes(shard) for shard in cut_into_shards(entries, max_shard_size))


def quantized_entries(
    name: str,
    shape: tuple[int, ...],
    num_bits: int,
    group_size: int | None,
    symmetric: bool,
    scale_dtype: str = "BF16",
    g_idx: bool = False,
) -> list[TensorEntry]:
    """What stands in a checkpoint for module `name` with a weight of `shape` [rows, columns] in `num_bits`.

    `num_bits` `TERNARY` is the format `ternary-packed` (always symmetric), others are `pack-quantized`; `group_size`
    None or -1 is one scale a row (strategy `channel`).
    """
    rows, columns = shape
    group = columns if group_size in (None, -1) else group_size
    groups = math.ceil(columns / group)
    ternary = num_bits == TERNARY
    width = ternary_width(columns, group) if ternary else math.ceil(columns * num_bits / 32)
    entries = [
        TensorEntry(f"{name}.weight_packed", "U8" if ternary else "I32", (rows, width)),
        TensorEntry(f"{name}.weight_scale", scale_dtype, (rows, groups)),
        TensorEntry(f"{name}.weight_shape", "I64", (2,)),
    ]
    if not symmetric and not ternary:
        words = math.ceil(rows * num_bits / 32)
        entries.append(TensorEntry(f"{name}.weight_zero_point", "I32", (words, groups)))
    if g_idx:
        entries.append(TensorEntry(f"{name}.weight_g_idx", "I32", (columns,)))
    return entries
