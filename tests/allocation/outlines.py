"""Outlines of tiny checkpoints whose experts are stored one by one, read from the files' headers alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import safe_open

from moe_collab.checkpoint.sizes import TensorEntry
from moe_collab.outline import LayerOutline, Matrix, ModelOutline
from moe_collab.routers import RouterLimits

_EXPERT = re.compile(r"(?P<layer>.*)\.experts\.(?P<index>\d+)\.(?P<projection>\w+)$")


def outline_of_checkpoint(path: Path) -> ModelOutline:
    """What the checkpoint at `path` is made of; names in the model are those in the file."""
    config = json.loads((path / "config.json").read_text())
    with safe_open(path / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.offset_keys()}
    entries = [TensorEntry(n, s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()]
    shapes = {e.name.removesuffix(".weight"): e for e in entries if e.name.endswith(".weight") and len(e.shape) == 2}
    layers = sorted({m["layer"] for name in shapes if (m := _EXPERT.match(name))})
    num_experts = config.get("num_experts") or config.get("n_routed_experts") or config["num_local_experts"]
    routers = {f"{layer}.gate" for layer in layers}
    matrices = {
        name: _matrix(name, entry, layers)
        for name, entry in shapes.items()
        if name not in routers and "embed_tokens" not in name
    }
    return ModelOutline(
        entries=tuple(entries),
        matrices=matrices,
        layers=tuple(_layer(layer, num_experts, entries) for layer in layers),
        limits=RouterLimits(
            num_experts, config["num_experts_per_tok"], config.get("n_group") or 1, config.get("topk_group") or 1
        ),
        modules={name: name for name in {entry.name.rpartition(".")[0] for entry in entries}},
    )


def _matrix(name: str, entry: TensorEntry, layers: list[str]) -> Matrix:
    rows, columns = entry.shape
    if match := _EXPERT.match(name):
        layer = layers.index(match["layer"])
        return Matrix(name, name, (rows, columns), entry.dtype, layer, int(match["index"]), match["projection"])
    return Matrix(name, name, (rows, columns), entry.dtype)


def _layer(name: str, num_experts: int, entries: list[TensorEntry]) -> LayerOutline:
    rows = tuple(entry.name for entry in entries if entry.name.startswith(f"{name}.gate."))
    biased = any(entry.endswith("e_score_correction_bias") for entry in rows)
    return LayerOutline(name, f"{name}.experts", tuple(range(num_experts)), rows, biased)
