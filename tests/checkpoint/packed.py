"""Checkpoints as we write them, made of those that transformers writes: experts one by one, and packed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from integration.tiny_models import build_tiny, tiny_config
from moe_collab.architectures import StackedExperts, find_family
from moe_collab.checkpoint.groups import config_groups
from moe_collab.formats import dequantize, pack


def build_packed(family: str, path: Path, **overrides: int) -> Path:
    """A tiny model of any family whose routed experts are packed, each by itself."""
    build_tiny(family, path, **overrides)
    described = find_family(tiny_config(family).model_type)
    if described is not None and described.stacked:
        tensors = one_by_one(load_file(path / "model.safetensors"), described.stacked)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert quantize_experts(path)
    return path


def quantize_experts(path: Path) -> dict[str, torch.Tensor]:
    """Pack the routed experts of the checkpoint in place, 3 or 4 bits; what it computes with, by tensor name."""
    file = path / "model.safetensors"
    tensors, dense, schemes = load_file(file), {}, {}
    for i, name in enumerate(sorted(n for n in tensors if ".experts." in n and n.endswith(".weight"))):
        module, bits, weight = name.removesuffix(".weight"), 3 + i % 2, tensors.pop(name)
        rows, columns = weight.shape
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), weight.shape).to(torch.int8)
        scale = (torch.rand(rows, columns // 32) / 20).bfloat16()
        tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_scale"] = pack(codes, bits), scale
        tensors[f"{module}.weight_shape"] = torch.tensor([rows, columns])
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
        schemes[module] = {"weights": weights, "format": "pack-quantized"}
        dense[name] = dequantize(codes, scale, dtype=torch.float32)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    groups = config_groups(schemes)
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": groups}
    (path / "config.json").write_text(json.dumps(config))
    return dense


def one_by_one(tensors: Mapping[str, torch.Tensor], layout: StackedExperts) -> dict[str, torch.Tensor]:
    """A family's own tensors with the stacked experts taken apart."""
    found = {}
    for name, tensor in tensors.items():
        block, parts = name.removesuffix("_bias"), ()
        for stack, projections in ((layout.gate_up, ("gate_proj", "up_proj")), (layout.down, ("down_proj",))):
            if block.endswith(f".{stack}"):
                block, parts = block.removesuffix(stack), projections
        kind = "bias" if name.endswith("_bias") else "weight"
        stacked = tensor.mT if parts and layout.transposed and kind == "weight" else tensor
        for i, projection in enumerate(parts):
            rows = stacked[:, i :: len(parts)] if layout.interleaved else stacked.chunk(len(parts), dim=1)[i]
            found |= {f"{block}experts.{e}.{projection}.{kind}": w.clone().contiguous() for e, w in enumerate(rows)}
        if not parts:
            found[name] = tensor
    return found


def edit_config(path: Path, **values: object) -> None:
    """Change the checkpoint's config.json; None removes a key."""
    config = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def mask(path: Path, experts: list[int], value: float) -> None:
    """Set the experts' selection biases in the checkpoint in place."""
    tensors = load_file(path / "model.safetensors")
    for name, bias in tensors.items():
        if name.endswith("e_score_correction_bias"):
            bias[experts] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def drop(path: Path, experts: list[int]) -> None:
    """Remove the experts' tensors from the checkpoint in place."""
    tensors = load_file(path / "model.safetensors")
    gone = tuple(f".experts.{expert}." for expert in experts)
    kept = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in gone)}
    assert len(kept) < len(tensors)
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
