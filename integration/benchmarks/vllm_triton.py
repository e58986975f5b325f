"""vLLM's own Triton MoE kernels, bfloat16 and 4 bits, taken out of an installed vLLM when the benchmark runs.

Only their file is read: vLLM itself need not be importable, so its sources in a folder are enough. What is called is
the two matrix products of a layer; sorting, activation and the sum over experts are not, which favours them.
"""

from __future__ import annotations

import ast
import importlib.util
import math
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from moe_collab.kernels.triton.trial import ExpertsShape, activations, device

__all__ = ["Tile", "VllmExperts", "find_vllm", "kernels_of"]

_FILE = "model_executor/layers/fused_moe/fused_moe.py"
_FUNCTIONS = ("write_zeros_to_output", "fused_moe_kernel", "fused_moe_kernel_gptq_awq")
_COMPUTE = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Tile(NamedTuple):
    """Of one program of theirs."""

    m: int
    n: int
    k: int
    group_m: int = 1
    num_warps: int = 4
    num_stages: int = 3


def find_vllm() -> Path | None:
    """The folder of the installed package."""
    spec = importlib.util.find_spec("vllm")
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def kernels_of(vllm: Path, folder: Path) -> Any:
    """A module with the kernels, written to `folder`, because Triton reads its functions' files."""
    source = (vllm / _FILE).read_text()
    functions = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name in _FUNCTIONS]
    if len(functions) < len(_FUNCTIONS):
        raise RuntimeError(f"{vllm / _FILE} has no longer all of {', '.join(_FUNCTIONS)}")
    lines = source.splitlines()
    parts = ["\n".join(lines[f.decorator_list[0].lineno - 1 : f.end_lineno]) for f in functions]
    path = folder / "vllm_kernels.py"
    path.write_text("\n\n\n".join(["import triton\nimport triton.language as tl", *parts]) + "\n")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


class VllmExperts:
    """Layers of random weights, alike, each call of the next one.

    `bits` are 16, or 4 in groups, as `fused_moe_kernel_gptq_awq` wants them.
    """

    def __init__(self, kernels: Any, shape: ExpertsShape, bits: int, group: int = 128) -> None:
        self.shape, self.bits, self.group = shape, bits, group
        self._kernel = kernels.fused_moe_kernel if bits == 16 else kernels.fused_moe_kernel_gptq_awq
        sizes = ((2 * shape.width, shape.hidden), (shape.hidden, shape.width))
        self.layers = [[self._random(shape.experts, *s) for s in sizes] for _ in range(shape.copies(bits / 8))]

    def _random(self, experts: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weights, scales): bfloat16 [experts, rows, columns], or pairs of codes in bytes and a scale for a group."""
        place = device()
        if self.bits == 16:
            dtype = activations(1, 1).dtype
            return torch.empty(experts, rows, columns, dtype=dtype, device=place).normal_(std=0.01), None
        codes = torch.empty(experts, rows, columns // 2, dtype=torch.uint8, device=place).random_()
        scales = torch.rand(experts, rows, columns // math.gcd(self.group, columns), device=place)
        return codes, (0.01 * (scales + 0.5)).bfloat16()

    def calls(self, ids: list[torch.Tensor], tile: Tile) -> list[Callable[[], torch.Tensor]]:
        """One call for each of the routings int32 [tokens, top_k]; returns down's output [pairs, hidden]."""
        tokens, top_k = ids[0].shape
        x, inner = activations(tokens, self.shape.hidden), activations(tokens * top_k, self.shape.width)
        both, out = x.new_empty(tokens * top_k, 2 * self.shape.width), x.new_empty(tokens * top_k, self.shape.hidden)

        def call(blocks: tuple[torch.Tensor, ...], layer: list[Any]) -> torch.Tensor:
            self.product(x, both, layer[0], blocks, top_k, tile)
            return self.product(inner, out, layer[1], blocks, 1, tile)

        every = [aligned(routing.to(x.device), tile.m, self.shape.experts) for routing in ids]
        return [partial(call, blocks, layer) for blocks, layer in zip(every, cycle(self.layers), strict=False)]

    def product(
        self,
        a: torch.Tensor,
        c: torch.Tensor,
        weight: tuple[torch.Tensor, torch.Tensor | None],
        blocks: tuple[torch.Tensor, ...],
        top_k: int,
        tile: Tile,
    ) -> torch.Tensor:
        """c [pairs, rows] = each pair's row of a [pairs / top_k, columns] times its expert's weight."""
        b, scale = weight
        columns, rows = a.shape[1], c.shape[1]
        sorted_ids, expert_ids, count = blocks
        strides = {"am": a.stride(0), "ak": 1, "be": b.stride(0), "bk": 1, "bn": b.stride(1), "cm": c.stride(0)}
        strides |= dict.fromkeys(("cn", "asm", "ask", "bse", "bsk", "bsn", "bbe", "bbn", "bze", "bzk", "bzn"), 0)
        strides["cn"] = 1
        if scale is not None:
            strides |= {"bse": scale.stride(0), "bsn": scale.stride(1), "bsk": 1}
        arguments = {
            "a_ptr": a, "b_ptr": b, "c_ptr": c, "b_bias_ptr": None, "a_scale_ptr": None, "b_scale_ptr": scale,
            "b_zp_ptr": None, "topk_weights_ptr": None, "sorted_token_ids_ptr": sorted_ids,
            "expert_ids_ptr": expert_ids, "num_tokens_post_padded_ptr": count,
            "N": rows, "K": columns, "EM": len(sorted_ids),
            "num_valid_tokens": len(c), "block_k_diviable": columns % tile.k == 0, "top_k": top_k,
            "group_size": math.gcd(self.group, columns), "group_n": 0, "group_k": 0, "naive_block_assignment": False,
            "BLOCK_SIZE_M": tile.m, "BLOCK_SIZE_N": tile.n, "BLOCK_SIZE_K": tile.k, "GROUP_SIZE_M": tile.group_m,
            "SPLIT_K": 1, "MUL_ROUTED_WEIGHT": False, "compute_type": _COMPUTE[a.dtype], "has_zp": False,
            "use_int4_w4a16": True, "use_int8_w8a16": False, "use_fp8_w8a8": False, "use_int8_w8a8": False,
            "per_channel_quant": False, "HAS_BIAS": False, "SWAP_AB": False, "USE_TD": False,
        } | {f"stride_{name}": stride for name, stride in strides.items()}  # fmt: skip
        known = {name: value for name, value in arguments.items() if name in self._kernel.arg_names}
        grid = (triton.cdiv(len(sorted_ids), tile.m) * triton.cdiv(rows, tile.n),)
        self._kernel[grid](**known, num_warps=tile.num_warps, num_stages=tile.num_stages)
        return c


def aligned(ids: torch.Tensor, block: int, experts: int) -> tuple[torch.Tensor, ...]:
    """(pairs by expert, each expert's filled up to whole blocks; expert of each block; length), as vLLM sorts them."""
    flat = ids.flatten().long()
    blocks = (torch.bincount(flat, minlength=experts) + block - 1) // block
    starts = blocks.cumsum(0) * block - blocks * block
    ranked = flat.sort(stable=True)
    first = torch.searchsorted(ranked.values, torch.arange(experts, device=ids.device))
    total = int(blocks.sum()) * block
    order = torch.full((total,), flat.numel(), dtype=torch.int32, device=ids.device)
    within = torch.arange(flat.numel(), device=ids.device) - first[ranked.values]
    order[starts[ranked.values] + within] = ranked.indices.int()
    expert = torch.repeat_interleave(torch.arange(experts, device=ids.device), blocks).int()
    return order, expert, torch.tensor([total], dtype=torch.int32, device=ids.device)
