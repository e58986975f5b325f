"""The launches: three for routed experts, one for a linear layer. Nothing waits for the device."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton

from ..reference import check_experts
from .configs import Config, choose
from .kernels import combine_kernel, down_kernel, gate_up_kernel, linear_kernel
from .layout import BLOCK
from .routing import sort_pairs

__all__ = ["INTERPRETED", "SORT_ABOVE", "device_names", "fused_experts", "linear"]

INTERPRETED = not isinstance(linear_kernel, triton.JITFunction)
"""TRITON_INTERPRET=1: kernels run in NumPy, on the CPU; their float16 and float32 are right, their bfloat16 is not."""

SORT_ABOVE = 128
"""Pairs, a power of two; up to as many, each program finds its own."""
_COMBINED_ROWS = 256


@torch.library.custom_op("moe_collab::fused_experts_triton", mutates_args=())
def fused_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    activation: str,
    apply_router_weight_on_input: bool,
    activation_bits: int,
    kinds: int,
    zeros: bool,
    unit: int,
    width: int,
) -> torch.Tensor:
    """As `reference.fused_experts`, of arenas in `FieldLayout`.

    What a launch must know and the device's table knows: `kinds`, `zeros`, `unit` as in `product.product`; `width`,
    rows of gate.
    """
    check_experts(x, topk_weights, topk_ids, codes, table, activation)
    (num_tokens, hidden), top_k = x.shape, topk_ids.shape[1]
    if not kinds or not topk_ids.numel():
        return torch.zeros_like(x)
    gate_up, down = (choose(device_names(), kinds, kernel, num_tokens) for kernel in ("gate_up", "down"))
    arenas, num_pairs = (codes, scales, zero_points, table), num_tokens * top_k
    x, ids, factors = x.contiguous(), topk_ids.flatten().contiguous(), topk_weights.flatten().contiguous()
    shared: dict[str, Any] = {
        "PAIRS": SORT_ABOVE,
        "KINDS": kinds,
        "ZEROS": zeros,
        "UNIT": unit,
        "PTX": _has_ptx(x),
    }
    blocks = {}
    if num_pairs > SORT_ABOVE:
        local = ids if expert_map is None else torch.where(ids < 0, -1, expert_map[ids.clamp(min=0)])
        blocks = {t: sort_pairs(local, len(table), t) for t in {gate_up.tokens, down.tokens}}

    def programs(config: Config) -> tuple[int, tuple[torch.Tensor | None, ...]]:
        if not blocks:
            return num_pairs, (None,) * 4
        return len(blocks[config.tokens].expert), tuple(blocks[config.tokens])

    inner = x.new_empty(num_pairs, width)
    count, places = programs(gate_up)
    gate_up_kernel[(triton.cdiv(width, gate_up.rows), count)](
        x, factors, ids, *places, expert_map, *arenas, bias, inner,
        num_pairs, top_k, hidden, width, 2 * width + hidden,
        ON_INPUT=apply_router_weight_on_input, ACTIVATION=activation, WHOLE=hidden % BLOCK == 0,
        **shared, **_tile(gate_up),
    )  # fmt: skip
    partial = torch.empty(down.split, num_pairs, hidden, dtype=torch.float32, device=x.device)
    count, places = programs(down)
    down_kernel[(triton.cdiv(hidden, down.rows), count, down.split)](
        inner, ids, *places, expert_map, *arenas, partial, num_pairs, hidden, width,
        WHOLE=width % BLOCK == 0, SPLIT=down.split, **shared, **_tile(down),
    )  # fmt: skip
    output = torch.empty_like(x)
    combine_kernel[(num_tokens, triton.cdiv(hidden, _COMBINED_ROWS))](
        partial, factors, ids, expert_map, table, bias, output,
        num_pairs, hidden, width, 2 * width + hidden,
        ON_INPUT=apply_router_weight_on_input, TOP_K=top_k, SPLIT=down.split, ROWS=_COMBINED_ROWS,
    )  # fmt: skip
    return output


@fused_experts.register_fake
def _(x, *arguments):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@torch.library.custom_op("moe_collab::linear_triton", mutates_args=())
def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    activation_bits: int,
    num_rows: int,
    kinds: int,
    zeros: bool,
    unit: int,
) -> torch.Tensor:
    """As `reference.linear`; see `fused_experts`."""
    num_tokens, columns = x.shape
    output, pieces = x.new_empty(num_tokens, num_rows), len(table)
    tile = choose(device_names(), kinds, "linear", num_tokens)
    if num_tokens:
        linear_kernel[(triton.cdiv(num_rows, tile.rows) + pieces - 1, triton.cdiv(num_tokens, tile.tokens))](
            x.contiguous(), codes, scales, zero_points, table, bias, output, num_tokens, columns, num_rows,
            PIECES=pieces, KINDS=kinds, ZEROS=zeros, UNIT=unit, WHOLE=columns % BLOCK == 0,
            PTX=_has_ptx(x), **_tile(tile),
        )  # fmt: skip
    return output


@linear.register_fake
def _(x, codes, scales, zero_points, table, bias, activation_bits, num_rows, kinds, zeros, unit):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], num_rows)


def _has_ptx(x: torch.Tensor) -> bool:
    """Whether kernels for activations like `x` may contain PTX."""
    return x.is_cuda and torch.version.hip is None and x.dtype != torch.float32


@cache
def device_names() -> tuple[str, ...]:
    """As configs.json calls the device in use, the most particular name first."""
    if not torch.cuda.is_available():
        return ("cuda",)
    name = torch.cuda.get_device_name()
    if torch.version.hip is not None:
        return name, torch.cuda.get_device_properties().gcnArchName.partition(":")[0], "hip"
    major, minor = torch.cuda.get_device_capability()
    return name, f"sm_{major}{minor}", "cuda"


def _tile(config: Config) -> dict[str, int]:
    return {
        "ROWS": config.rows,
        "TOKENS": config.tokens,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
