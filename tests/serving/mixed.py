"""Checkpoints in which every expert of a layer has another scheme, and their dequantized twins."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import load_file, save_file

from integration.tiny_models import build_tiny
from moe_collab.architectures import MASKED_BIAS, StackedExperts, find_family
from moe_collab.checkpoint.groups import write_quantization_config
from moe_collab.checkpoint.load import write_dense_twin
from moe_collab.formats import TERNARY, pack, pack_ternary

# (bits, group size, symmetric) by expert; -1 = per channel, None = 16 bits. Groups of 128 straddle two ranks.
SCHEMES = [(2, 32, False), (3, 32, True), (4, 128, True), (5, 64, False), (6, 32, True), (8, -1, True), None]
LAST = [
    [(4, 128, False), (4, 128, False), (3, 64, True)],
    [(TERNARY, 32, True), (TERNARY, 32, True), (TERNARY, 128, True)],
]
"""The last expert's gate, up and down, in the first and in the second layer."""
LINEAR = {
    "q_proj": (4, 32, True),
    "k_proj": (3, 32, False),
    "v_proj": (8, -1, True),
    "o_proj": (TERNARY, 128, True),
    "q_a_proj": (4, 32, False),
    "kv_a_proj_with_mqa": (3, 32, True),
    "q_b_proj": (8, 32, True),
    "kv_b_proj": (6, 32, True),
    "gate_proj": (2, 32, False),
    "up_proj": (4, 64, True),
    "down_proj": (5, 32, True),
    "lm_head": (5, 32, True),
}
"""Of the second layer, and of lm_head; the last three are shared experts'.

In vLLM q, k and v are one fused weight, and so are q_a and kv_a, gate and up.
"""


def build_mixed(
    family: str, path: Path, masked: Mapping[int, tuple[int, ...]] = MappingProxyType({}), **overrides: int
) -> tuple[Path, Path]:
    """(checkpoint, float32 twin) of a tiny model: experts of ternary, 2, 3, 4, 5, 6, 8 and 16 bits, and `LINEAR`.

    `masked`: layer -> experts that its router's selection bias rules out and that are not stored.
    """
    build_tiny(family, path, **overrides)
    described = find_family(family)
    projections = described.checkpoint_projections
    originals = load_file(path / "model.safetensors")
    if described.stacked:
        originals = _one_by_one(originals, described.stacked)
    tensors, schemes, plain = {}, {}, []
    for name, weight in originals.items():
        module = name.removesuffix(".weight")
        match = re.search(r"\.experts\.(\d+)\.(\w+)$", module)
        linear = None if ".layers.0." in name else LINEAR.get(module.rpartition(".")[2])
        layer = int(".layers.1." in name)
        dropped = masked.get(int(layer_of[1]), ()) if (layer_of := re.search(r"\.layers\.(\d+)\.", name)) else ()
        if match and int(match[1]) in dropped:
            continue
        if dropped and name.endswith("e_score_correction_bias"):
            weight[list(dropped)] = MASKED_BIAS
        scheme = _scheme(layer, int(match[1]), projections.index(match[2])) if match else linear
        if scheme is None:
            tensors[name] = weight
            plain += [module] if match or (weight.ndim == 2 and "embed" not in name) else []
            continue
        # Every second layer is stored as compressed-tensors 0.17 did.
        stored = _quantize_ternary(weight, scheme) if scheme[0] == TERNARY else _quantize(weight, scheme, layer == 1)
        tensors.update({f"{module}.{k}": v for k, v in stored.items()})
        schemes[module] = _described(scheme)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
    (path / "config.json").write_text(json.dumps(config))
    write_quantization_config(path, schemes, plain)
    twin = path.with_name(path.name + "-twin")
    write_dense_twin(path, twin, torch.float32)
    return path, twin


def _one_by_one(tensors: Mapping[str, torch.Tensor], layout: StackedExperts) -> dict[str, torch.Tensor]:
    """The inverse of `stack_experts`, for experts neither transposed nor interleaved."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith((layout.gate_up, layout.down)):
            stacks = (tensor,) if name.endswith(layout.down) else tensor.chunk(2, dim=1)
            names = ("down_proj",) if name.endswith(layout.down) else ("gate_proj", "up_proj")
            block = name.removesuffix(layout.down).removesuffix(layout.gate_up)
            for projection, stack in zip(names, stacks, strict=True):
                found |= {f"{block}experts.{i}.{projection}.weight": w.clone() for i, w in enumerate(stack)}
        else:
            found[name] = tensor
    return found


def _scheme(layer: int, expert: int, projection: int) -> tuple[int, int, bool] | None:
    return SCHEMES[expert] if expert < len(SCHEMES) else LAST[layer][projection]


def _described(scheme: tuple[int, int, bool]) -> dict:
    bits, group, symmetric = scheme
    strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    ternary = bits == TERNARY
    weights = {"num_bits": 2 if ternary else bits, "type": "int", "symmetric": symmetric, "dynamic": False, **strategy}
    return {"format": "ternary-packed" if ternary else "pack-quantized", "weights": weights}


def _quantize_ternary(weight: torch.Tensor, scheme: tuple[int, int, bool]) -> dict[str, torch.Tensor]:
    rows, columns = weight.shape
    x = weight.float().reshape(rows, -1, scheme[1])
    size = x.abs().mean(-1, keepdim=True)
    codes = (x.sign() * (x.abs() > 0.7 * size)).to(torch.int8).reshape(rows, columns)
    scale = (1.5 * size).squeeze(-1).bfloat16()
    shape = torch.tensor([rows, columns])
    return {"weight_packed": pack_ternary(codes, scheme[1]), "weight_scale": scale, "weight_shape": shape}


def _quantize(weight: torch.Tensor, scheme: tuple[int, int, bool], padded: bool) -> dict[str, torch.Tensor]:
    bits, group, symmetric = scheme
    rows, columns = weight.shape
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    x = weight.float().reshape(rows, -1, columns if group == -1 else group)
    if symmetric:
        scale = (x.abs().amax(-1) / (high + 0.5)).bfloat16()
        zero = torch.zeros_like(scale).float()
    else:
        scale = ((x.amax(-1) - x.amin(-1)) / (high - low)).bfloat16()
        zero = (low - x.amin(-1) / scale.float()).round().clamp(low, high)
    codes = (x / scale.float()[..., None] + zero[..., None]).round().clamp(low, high).to(torch.int8)
    store = _pack_padded if padded else pack
    stored = {"weight_packed": store(codes.reshape(rows, columns), bits), "weight_scale": scale}
    stored["weight_shape"] = torch.tensor([rows, columns])
    if not symmetric:
        stored["weight_zero_point"] = store(zero.to(torch.int8).T, bits).T.contiguous()
    return stored


def _pack_padded(codes: torch.Tensor, bits: int) -> torch.Tensor:
    per_word = 32 // bits
    unsigned = torch.nn.functional.pad(codes.long() + (1 << (bits - 1)), (0, -codes.shape[1] % per_word))
    shifts = torch.arange(per_word) * bits
    return (unsigned.reshape(len(codes), -1, per_word) << shifts).sum(-1).to(torch.int32)
