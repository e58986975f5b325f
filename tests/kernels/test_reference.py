"""The oracle against the formula it states."""

import pytest
import torch

from moe_collab import MoeCollabError
from moe_collab.formats import dequantize, pack
from moe_collab.kernels.descriptors import Field, TensorSpec, plan_arena
from moe_collab.kernels.reference import fused_experts

HIDDEN, WIDTH = 32, 16
BITS = [(2, 3, 4), (5, 6, 8), (16, 16, 2), (0, 0, 0)]


def build_layer(bits=BITS, symmetric=False):
    """(arenas and table, dense float32 weights per expert) of a random layer."""
    torch.manual_seed(0)
    shapes = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    specs = [
        [
            TensorSpec(b, *s, 16 if 0 < b < 16 else 0, symmetric or b in (0, 16))
            for b, s in zip(row, shapes, strict=True)
        ]
        for row in bits
    ]
    layout = plan_arena(specs)
    codes = torch.zeros(layout.num_words, dtype=torch.int32)
    scales = torch.zeros(layout.num_scales)
    zeros = torch.zeros(layout.num_zero_points, dtype=torch.int8)
    dense = []
    for row, descriptors in zip(specs, layout.table.tolist(), strict=True):
        dense.append([_fill(spec, d, codes, scales, zeros) for spec, d in zip(row, descriptors, strict=True)])
    return (codes, scales, zeros, layout.table), dense


def _fill(spec, descriptor, codes, scales, zeros):
    def put(arena, start, values):
        arena[start : start + values.numel()] = values.flatten()

    if spec.num_bits == 0:
        return torch.zeros(spec.rows, spec.columns)
    if spec.num_bits == 16:
        weight = torch.randn(spec.rows, spec.columns).bfloat16()
        put(codes, descriptor[Field.CODES], weight.view(torch.int32))
        return weight.float()
    half = 1 << (spec.num_bits - 1)
    q = torch.randint(-half, half, (spec.rows, spec.columns)).to(torch.int8)
    s = torch.rand(spec.rows, spec.columns // 16) / half
    z = None if spec.symmetric else torch.randint(-half, half, s.shape).to(torch.int8)
    put(codes, descriptor[Field.CODES], pack(q, spec.num_bits))
    put(scales, descriptor[Field.SCALES], s)
    if z is not None:
        put(zeros, descriptor[Field.ZERO_POINTS], z)
    return dequantize(q, s, z)


def expected(x, weights, ids, dense, on_input=False, present=None):
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for w, e in zip(weights[token], ids[token], strict=True):
            if present is not None and int(e) not in present:
                continue
            gate, up, down = dense[int(e)]
            h = x[token] * w if on_input else x[token]
            y = down @ (torch.nn.functional.silu(gate @ h) * (up @ h))
            out[token] += y if on_input else w * y
    return out


def routing(tokens=9, top_k=2):
    ids = torch.stack([torch.randperm(len(BITS))[:top_k] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN), torch.rand(tokens, top_k), ids


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_matches_the_formula(on_input, symmetric):
    arenas, dense = build_layer(symmetric=symmetric)
    x, weights, ids = routing()
    found = fused_experts(x, weights, ids, *arenas, None, "silu", on_input)
    torch.testing.assert_close(found, expected(x, weights, ids, dense, on_input), rtol=1e-4, atol=1e-4)


def test_expert_map_leaves_out_other_ranks():
    arenas, dense = build_layer()
    x, weights, ids = routing()
    expert_map = torch.tensor([1, 0, -1, -1], dtype=torch.int32)
    found = fused_experts(x, weights, ids, *arenas, expert_map, "silu", False)
    swapped = [dense[1], dense[0], None, None]
    torch.testing.assert_close(found, expected(x, weights, ids, swapped, present={0, 1}), rtol=1e-4, atol=1e-4)


def test_no_tokens():
    arenas, _ = build_layer()
    empty = torch.zeros(0, 2)
    assert fused_experts(torch.zeros(0, HIDDEN), empty, empty.long(), *arenas, None, "silu", False).shape == (0, HIDDEN)


def test_wrong_arguments_are_named():
    arenas, _ = build_layer()
    x, weights, ids = routing()
    with pytest.raises(MoeCollabError, match="activation: 'relu'"):
        fused_experts(x, weights, ids, *arenas, None, "relu", False)
    with pytest.raises(MoeCollabError, match="topk_ids"):
        fused_experts(x, weights, ids[:3], *arenas, None, "silu", False)
    with pytest.raises(MoeCollabError, match=r"expert 0 gate_proj: 9 bits"):
        plan_arena([[TensorSpec(9, 8, 8, 8)] * 3])
    with pytest.raises(MoeCollabError, match="group size 3 does not divide 8"):
        plan_arena([[TensorSpec(4, 8, 8, 3)] * 3])


def test_traces_through_the_fake_kernel():
    arenas, _ = build_layer()
    torch.library.opcheck(
        fused_experts, (*routing(), *arenas, None, "silu", False), test_utils=("test_schema", "test_faketensor")
    )
