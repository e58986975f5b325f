"""Tiny checkpoints quantized as others publish them, and what the writers' own code makes of them again.

fp8 is written and dequantized by transformers; MXFP4 is random codes that it dequantizes; AWQ is packed here, and
read by compressed-tensors' converter. AutoGPTQ and GPTQModel install in neither environment (the one cannot be imported
with transformers 5, the other wants a newer torch): their format is written here, code by code, from its description.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from .packed import edit_config

__all__ = ["to_awq", "to_fp8", "to_gptq", "to_mxfp4"]

Tensors = dict[str, torch.Tensor]


def rewrite(path: Path, **quantization: Any) -> tuple[Tensors, Any]:
    """The tensors of a tiny checkpoint, and what writes others in their place."""

    def write(tensors: Tensors) -> None:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        edit_config(path, quantization_config=quantization)

    return load_file(path / "model.safetensors"), write


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor is a matrix that quantizers take: of experts and attention."""
    return tensor.ndim == 2 and "_proj." in name


def to_fp8(path: Path, scale_fmt: str | None = None, size: tuple[int, int] = (128, 128)) -> Tensors:
    """Quantize by transformers, in blocks of `size`; what transformers dequantizes it to."""
    tensors, write = rewrite(path, quant_method="fp8", weight_block_size=size, scale_fmt=scale_fmt)
    quantizer = SimpleNamespace(
        quantization_config=FineGrainedFP8Config(weight_block_size=size, scale_fmt=scale_fmt or "float")
    )
    stored, dense = {}, {}
    for name, tensor in tensors.items():
        found = Fp8Quantize(quantizer).convert({name: tensor}) if is_matrix(name, tensor) else {name: tensor}
        stored |= found
        dense[name] = tensor
        if len(found) == 2:
            dense[name] = Fp8Dequantize(quantizer)._dequantize_one(*found.values(), output_dtype=torch.bfloat16)
    write(stored)
    return dense


def to_mxfp4(path: Path) -> Tensors:
    """Replace the stacked experts of a gpt-oss by random codes; what transformers dequantizes them to."""
    tensors, write = rewrite(path, quant_method="mxfp4")
    stored, dense, generator = {}, {}, torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = dense[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        blocks = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 124, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        dense[name] = convert_moe_packed_tensors(blocks, scales)
    write(stored)
    return dense


def rounded(weight: torch.Tensor, bits: int, size: int, order: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(codes [rows, columns], scales and zero points [rows, groups]) of columns that are grouped in `order`."""
    groups = weight.float()[:, order].unflatten(1, (-1, size))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).half().clamp(min=1e-4)
    zeros = (-low / scales.float()).round().clamp(0, 2**bits - 1).int()
    codes = (groups / scales.float()[..., None]).round().int() + zeros[..., None]
    found = torch.empty_like(weight, dtype=torch.int32)
    found[:, order] = codes.clamp(0, 2**bits - 1).flatten(1)
    return found, scales, zeros


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [n, rows] back to back in int32 [n * bits / 32, rows], bit by bit."""
    found = torch.zeros(len(codes) * bits // 32, codes.shape[1], dtype=torch.int64)
    for index, code in enumerate(codes.long()):
        for bit in range(bits):
            place = index * bits + bit
            found[place // 32] |= (code >> bit & 1) << place % 32
    return torch.where(found >= 2**31, found - 2**32, found).int()


def to_gptq(path: Path, bits: int = 4, layout: str | None = "gptq", act_order: bool = False) -> Tensors:
    """Round to nearest and write as AutoGPTQ does; the rounded weights in float16."""
    edit_config(path, dtype="float16")
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": act_order}
    tensors, write = rewrite(path, **config | ({"checkpoint_format": layout} if layout else {}))
    stored, dense, generator = {}, {}, torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if not is_matrix(name, tensor):
            stored[name] = dense[name] = tensor
            continue
        columns, module = tensor.shape[1], name.removesuffix(".weight")
        order = torch.randperm(columns, generator=generator) if act_order else torch.arange(columns)
        groups = torch.empty(columns, dtype=torch.int32)
        groups[order] = torch.arange(columns, dtype=torch.int32) // 32
        codes, scales, zeros = rounded(tensor, bits, 32, order)
        less = 0 if layout == "gptq_v2" else 1
        stored |= {
            f"{module}.qweight": words(codes.T, bits),
            f"{module}.qzeros": words((zeros - less) % 2**bits, bits).T.contiguous(),
            f"{module}.scales": scales.T.contiguous(),
            f"{module}.g_idx": groups,
        }
        spread = (codes - zeros[:, groups.long()]).half()
        dense[name] = spread * scales[:, groups.long()]
    write(stored)
    return dense


def to_awq(path: Path) -> None:
    """Round to nearest, 4 bits, and write as AutoAWQ does."""
    edit_config(path, dtype="float16")
    tensors, write = rewrite(path, quant_method="awq", bits=4, group_size=32, zero_point=True, version="gemm")
    stored = {}
    for name, tensor in tensors.items():
        if not is_matrix(name, tensor):
            stored[name] = tensor
            continue
        module, columns = name.removesuffix(".weight"), tensor.shape[1]
        codes, scales, zeros = rounded(tensor, 4, 32, torch.arange(columns))
        stored |= {
            f"{module}.qweight": in_awq_order(codes.T),
            f"{module}.qzeros": in_awq_order(zeros.T),
            f"{module}.scales": scales.T.contiguous(),
        }
    write(stored)


def in_awq_order(codes: torch.Tensor) -> torch.Tensor:
    """Codes [n, rows] -> int32 [n, rows / 8]; AutoAWQ packs codes 0, 2, 4, 6, 1, 3, 5, 7 from the low bits up."""
    found = torch.zeros(len(codes), codes.shape[1] // 8, dtype=torch.int64)
    for place, code in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        found |= codes[:, code::8].long() << 4 * place
    return torch.where(found >= 2**31, found - 2**32, found).int()
