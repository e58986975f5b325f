"""The shapes and bit-widths in which a checkpoint's layers use the kernels."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..checkpoint.reader import Checkpoint
from ..errors import MoeCollabError
from .triton.trial import ExpertsShape, LinearShape

__all__ = ["Layers", "layers_of"]

_EXPERT = re.compile(r"(?P<layer>.*\.experts)\.(?P<index>\d+)\.(?P<projection>\w+)$")
_GATES = ("gate_proj", "w1")
# What vLLM fuses into one linear layer.
_FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


@dataclass
class Layers:
    """The shapes of all layers in which the same `bits` occur (16 = unquantized); `group` divides their group sizes."""

    bits: tuple[int, ...]
    group: int
    experts: set[ExpertsShape] = field(default_factory=set)
    linears: set[LinearShape] = field(default_factory=set)


class _Matrix(NamedTuple):
    module: str
    bits: int
    rows: int
    columns: int
    group: int


def layers_of(path: Path) -> list[Layers]:
    """The quantized layers of a checkpoint. Raises `MoeCollabError` if it has none, or is none."""
    checkpoint = Checkpoint(path)
    places: dict[str, list[_Matrix]] = defaultdict(list)
    for matrix in _matrices(checkpoint):
        expert = _EXPERT.match(matrix.module)
        parent, _, name = matrix.module.rpartition(".")
        places[expert["layer"] if expert else f"{parent}.{_FUSED.get(name, name)}"].append(matrix)
    found: dict[tuple[int, ...], Layers] = {}
    for place, matrices in places.items():
        bits = tuple(sorted({m.bits for m in matrices}))
        if bits == (16,):
            continue
        group = math.gcd(*(m.group for m in matrices))
        layers = found.setdefault(bits, Layers(bits, group))
        layers.group = math.gcd(layers.group, group)
        if place.endswith(".experts"):
            layers.experts.add(_experts_shape(checkpoint, matrices))
        else:
            layers.linears.add(LinearShape(sum(m.rows for m in matrices), matrices[0].columns))
    if not found:
        raise MoeCollabError(f"{path}: no layer is quantized. Name a compressed checkpoint.")
    return list(found.values())


def _matrices(checkpoint: Checkpoint) -> Iterator[_Matrix]:
    """The matrices of all quantized modules, and of unquantized experts with bits of 16 and group 0."""
    for name in checkpoint.names():
        module, _, suffix = name.rpartition(".")
        if suffix == "weight_packed":
            rows, columns = checkpoint.tensor(f"{module}.weight_shape").tolist()
            weights = (checkpoint.scheme(module) or {}).get("weights")
            if not weights:
                raise MoeCollabError(f"{name}: no config group in config.json targets it.")
            size = weights.get("group_size")
            yield _Matrix(module, weights["num_bits"], rows, columns, size if size and size > 0 else columns)
        elif suffix == "weight" and _EXPERT.match(module):
            rows, columns = checkpoint.tensor(name).shape
            yield _Matrix(module, 16, rows, columns, 0)


def _experts_shape(checkpoint: Checkpoint, matrices: list[_Matrix]) -> ExpertsShape:
    experts = {match["index"] for m in matrices if (match := _EXPERT.match(m.module))}
    gate = next(m for m in matrices if m.module.rpartition(".")[2] in _GATES)
    config = checkpoint.config.get("text_config") or checkpoint.config
    top_k = config.get("num_experts_per_tok")
    if not isinstance(top_k, int):
        raise MoeCollabError(f"{checkpoint.path}/config.json: num_experts_per_tok, a number, is missing.")
    return ExpertsShape(gate.columns, gate.rows, len(experts), top_k)
