"""The oracle: mixed-bit fused experts in plain torch, behind the schema every fast backend shares."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import MoeCollabError
from ..formats import dequantize, packed_width, unpack
from .descriptors import Field

__all__ = ["dequantize_expert", "fused_experts"]

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def dequantize_expert(
    codes: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor, descriptor: list[int]
) -> torch.Tensor:
    """The float32 (16 bits: bfloat16) weight [rows, columns] that one row of the descriptor table names."""
    bits, group_size, start, scale_start, zero_start, rows, columns = descriptor
    words = packed_width(columns, bits)
    stored = codes[start : start + rows * words]
    if bits == 16:
        return stored.view(torch.bfloat16).view(rows, columns)
    groups = columns // group_size
    scale = scales[scale_start : scale_start + rows * groups].view(rows, groups)
    zero = None if zero_start < 0 else zero_points[zero_start : zero_start + rows * groups].view(rows, groups)
    return dequantize(unpack(stored.view(rows, words), bits, (rows, columns)), scale, zero)


@torch.library.custom_op("moe_collab::fused_experts", mutates_args=())
def fused_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    table: torch.Tensor,
    expert_map: torch.Tensor | None,
    activation: str,
    apply_router_weight_on_input: bool,
) -> torch.Tensor:
    """sum_k w_k * down_k(act(gate_k x) * up_k x) over the `topk_ids` of each token, [tokens, hidden].

    `x` [tokens, hidden]; `topk_weights`, `topk_ids` [tokens, top_k]; `codes` int32, `scales` float32 and
    `zero_points` int8 are the layer's arenas; `table` as in `descriptors.Field`; `expert_map` [global experts]
    gives local ids, -1 = on another rank. Experts of 0 bits add nothing. Raises `MoeCollabError` naming the argument.
    """
    _check(x, topk_weights, topk_ids, codes, table, activation)
    local = topk_ids.long() if expert_map is None else expert_map[topk_ids.long()].long()
    descriptors = table.tolist()
    act = _ACTIVATIONS[activation]
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in local.unique().tolist():
        if expert < 0 or descriptors[expert][0][Field.NUM_BITS] == 0:
            continue
        tokens, slots = torch.where(local == expert)
        weights = topk_weights[tokens, slots, None].float()
        gate, up, down = (dequantize_expert(codes, scales, zero_points, d).to(x.dtype) for d in descriptors[expert])
        hidden = x[tokens]
        if apply_router_weight_on_input:
            hidden = (hidden.float() * weights).to(x.dtype)
        result = ((act(hidden @ gate.T) * (hidden @ up.T)) @ down.T).float()
        output.index_add_(0, tokens, result if apply_router_weight_on_input else result * weights)
    return output.to(x.dtype)


@fused_experts.register_fake
def _(x, topk_weights, topk_ids, codes, scales, zero_points, table, expert_map, activation, on_input):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _check(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    codes: torch.Tensor,
    table: torch.Tensor,
    activation: str,
) -> None:
    if activation not in _ACTIVATIONS:
        raise MoeCollabError(f"activation: {activation!r} is not served; known are {sorted(_ACTIVATIONS)}.")
    if x.ndim != 2 or topk_ids.shape != topk_weights.shape or topk_ids.shape[0] != x.shape[0]:
        raise MoeCollabError(
            f"topk_ids {list(topk_ids.shape)} and topk_weights {list(topk_weights.shape)} must both be [tokens, top_k] "
            f"for x {list(x.shape)} [tokens, hidden]."
        )
    if table.dtype != torch.int64 or table.shape[1:] != (3, len(Field)):
        raise MoeCollabError(
            f"table: int64 [experts, 3, {len(Field)}] expected, got {table.dtype} {list(table.shape)}."
        )
    if codes.dtype != torch.int32:
        raise MoeCollabError(f"codes: int32 expected, got {codes.dtype}.")
