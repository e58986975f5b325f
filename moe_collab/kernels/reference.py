"""The oracle that all fast kernels are tested against: the same custom ops, with the same arguments, in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import MoeCollabError
from ..formats import TERNARY, dequantize, ternary_width, unpack, unpack_ternary
from .descriptors import Field
from .plain import row_words

__all__ = ["check_experts", "dequantize_weight", "fused_experts", "linear"]

_Gate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _swigluoai(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The activation of gpt-oss: gate * sigmoid(1.702 gate) * (up + 1), gate clamped at 7 and up to -7 ... 7."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


_ACTIVATIONS: dict[str, _Gate] = {
    "silu": lambda gate, up: torch.nn.functional.silu(gate) * up,
    "gelu": lambda gate, up: torch.nn.functional.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: torch.nn.functional.gelu(gate, approximate="tanh") * up,
    "swigluoai": _swigluoai,
}


def dequantize_weight(
    codes: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor, descriptor: list[int]
) -> torch.Tensor:
    """The float32 (16 bits: bfloat16) weight [rows, columns] that one row of the descriptor table names."""
    bits, group_size, start, scale_start, zero_start, rows, columns = descriptor
    words = row_words(bits, columns, group_size)
    stored = codes[start : start + rows * words].view(rows, words)
    if bits == 16:
        return stored.view(torch.bfloat16)
    groups = columns // group_size
    scale = scales[scale_start : scale_start + rows * groups].view(rows, groups)
    zero = None if zero_start < 0 else zero_points[zero_start : zero_start + rows * groups].view(rows, groups)
    if bits == TERNARY:
        trits = stored.view(torch.uint8)[:, : ternary_width(columns, group_size)]
        return dequantize(unpack_ternary(trits, (rows, columns), group_size), scale, zero)
    return dequantize(unpack(stored, bits, (rows, columns)), scale, zero)


@torch.library.custom_op("moe_collab::fused_experts", mutates_args=())
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
) -> torch.Tensor:
    """sum_k w_k * down_k(act(gate_k x) * up_k x) over the `topk_ids` of each token, [tokens, hidden].

    `x` [tokens, hidden]; `topk_weights`, `topk_ids` [tokens, top_k], a negative id = no expert; `codes`, `scales` and
    `zero_points` are the layer's arenas; `table` as in `descriptors.Field`; `bias` float32 [experts, 2 intermediate +
    hidden], for gate, up and down; `expert_map` [global experts] gives local ids, -1 = on another rank. Experts of 0
    bits add nothing. `activation_bits` 16 or 8: what backends that multiply integers round activations to; this one
    does not. Raises `MoeCollabError` naming the argument.
    """
    check_experts(x, topk_weights, topk_ids, codes, table, activation)
    ids = topk_ids.long()
    local = ids if expert_map is None else torch.where(ids < 0, -1, expert_map[ids.clamp(min=0)].long())
    descriptors = table.tolist()
    gated = _ACTIVATIONS[activation]
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in local.unique().tolist():
        if expert < 0 or descriptors[expert][0][Field.NUM_BITS] == 0:
            continue
        tokens, slots = torch.where(local == expert)
        weights = topk_weights[tokens, slots, None].float()
        gate, up, down = (dequantize_weight(codes, scales, zero_points, d).to(x.dtype) for d in descriptors[expert])
        offsets: tuple[torch.Tensor | float, ...] = (0.0, 0.0, 0.0)
        if bias is not None:
            offsets = bias[expert].to(x.dtype).split([gate.shape[0], up.shape[0], down.shape[0]])
        hidden = x[tokens]
        if apply_router_weight_on_input:
            hidden = (hidden.float() * weights).to(x.dtype)
        inner = gated(hidden @ gate.T + offsets[0], hidden @ up.T + offsets[1])
        result = (inner @ down.T + offsets[2]).float()
        output.index_add_(0, tokens, result if apply_router_weight_on_input else result * weights)
    return output.to(x.dtype)


@fused_experts.register_fake
def _(x, topk_weights, topk_ids, codes, scales, zero_points, table, bias, expert_map, activation, on_input, bits):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@torch.library.custom_op("moe_collab::linear", mutates_args=())
def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    activation_bits: int,
    num_rows: int,
) -> torch.Tensor:
    """x W^T + bias, [tokens, num_rows], for `x` [tokens, columns] and a weight in pieces of rows.

    `table` [pieces, 7] describes the pieces, whose rows are concatenated and may differ in bits; `bias` float32
    [num_rows]; the arenas and `activation_bits` are those of `fused_experts`. `num_rows` is the sum of the pieces'
    rows, given so that shapes are known without reading the table.
    """
    pieces = [dequantize_weight(codes, scales, zero_points, d).to(x.dtype) for d in table.tolist()]
    weight = torch.cat(pieces)
    if weight.shape != (num_rows, x.shape[1]):
        raise MoeCollabError(f"table: its pieces make {list(weight.shape)}, expected [{num_rows}, {x.shape[1]}].")
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


@linear.register_fake
def _(x, codes, scales, zero_points, table, bias, activation_bits, num_rows):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], num_rows)


def check_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    codes: torch.Tensor,
    table: torch.Tensor,
    activation: str,
) -> None:
    """Raise `MoeCollabError` naming the argument of `fused_experts` that cannot be right."""
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
