"""The oracle against the formula it states."""

import pytest
import torch

from moe_collab import MoeCollabError
from moe_collab.formats import TERNARY
from moe_collab.kernels import arena as arenas
from moe_collab.kernels.arena import Arena, Cut
from moe_collab.kernels.descriptors import TensorSpec
from moe_collab.kernels.plain import PLAIN
from moe_collab.kernels.reference import fused_experts, linear
from moe_collab.kernels.triton import FieldLayout

from .layers import expert_specs, load, random_weight

HIDDEN, WIDTH = 32, 16
BITS = [(2, 3, 4), (5, 6, 8), (16, 16, 2), (TERNARY, 7, TERNARY), (0, 0, 0)]
REST = (None, None, "silu", False, 16)


def build_layer(symmetric=False):
    """(arenas and table, dense float32 weights per expert) of a random layer."""
    generator = torch.Generator().manual_seed(0)
    weights = [random_weight(spec, generator) for spec in expert_specs(HIDDEN, WIDTH, BITS, 16, symmetric)]
    arena = load(weights)
    dense = [w.dense for w in weights]
    arenas = (arena.codes, arena.scales, arena.zero_points, arena.table.view(len(BITS), 3, -1))
    return arenas, [dense[3 * e : 3 * e + 3] for e in range(len(BITS))]


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
    found = fused_experts(x, weights, ids, *arenas, None, None, "silu", on_input, 16)
    torch.testing.assert_close(found, expected(x, weights, ids, dense, on_input), rtol=1e-4, atol=1e-4)


def test_expert_map_leaves_out_other_ranks():
    arenas, dense = build_layer()
    x, weights, ids = routing()
    expert_map = torch.tensor([1, 0, -1, -1, -1], dtype=torch.int32)
    found = fused_experts(x, weights, ids, *arenas, None, expert_map, "silu", False, 16)
    swapped = [dense[1], dense[0], None, None, None]
    torch.testing.assert_close(found, expected(x, weights, ids, swapped, present={0, 1}), rtol=1e-4, atol=1e-4)


def test_no_tokens():
    arenas, _ = build_layer()
    empty = torch.zeros(0, 2)
    assert fused_experts(torch.zeros(0, HIDDEN), empty, empty.long(), *arenas, *REST).shape == (0, HIDDEN)


def test_wrong_arguments_are_named():
    arenas, _ = build_layer()
    x, weights, ids = routing()
    with pytest.raises(MoeCollabError, match="activation: 'relu'"):
        fused_experts(x, weights, ids, *arenas, None, None, "relu", False, 16)
    with pytest.raises(MoeCollabError, match="topk_ids"):
        fused_experts(x, weights, ids[:3], *arenas, *REST)
    with pytest.raises(MoeCollabError, match="9 bits are not served"):
        TensorSpec(9, 8, 8, 8)
    with pytest.raises(MoeCollabError, match="group size 3 does not divide 8"):
        TensorSpec(4, 8, 8, 3)


def test_biases_and_a_negative_id():
    arenas, dense = build_layer()
    x, weights, ids = routing()
    ids[0, 0] = -1
    bias = torch.randn(len(BITS), 2 * WIDTH + HIDDEN)
    found = fused_experts(x, weights, ids, *arenas, bias, None, "swigluoai", False, 16)
    expert = int(ids[0, 1])
    (gate, up, down), (g, u, d) = dense[expert], bias[expert].split([WIDTH, WIDTH, HIDDEN])
    gated, linear_part = (gate @ x[0] + g).clamp(max=7), (up @ x[0] + u).clamp(-7, 7)
    y = down @ (gated * torch.sigmoid(1.702 * gated) * (linear_part + 1)) + d
    gone = not dense[expert][0].any()
    torch.testing.assert_close(found[0], torch.zeros(HIDDEN) if gone else weights[0, 1] * y, rtol=1e-4, atol=1e-4)


def test_linear_concatenates_its_pieces():
    generator = torch.Generator().manual_seed(1)
    weights = [random_weight(TensorSpec(b, rows, 32, 16 if b < 16 else 0), generator) for b, rows in ((3, 5), (16, 7))]
    arena = load(weights)
    x, bias = torch.randn(4, 32), torch.randn(12)
    found = linear(x, arena.codes, arena.scales, arena.zero_points, arena.table, bias, 16, 12)
    torch.testing.assert_close(found, x @ torch.cat([w.dense for w in weights]).T + bias, rtol=1e-4, atol=1e-4)
    with pytest.raises(MoeCollabError, match="table: its pieces make"):
        linear(x, arena.codes, arena.scales, arena.zero_points, arena.table, bias, 16, 13)


def test_an_arena_refuses_what_does_not_fit():
    arena = Arena([TensorSpec(4, 8, 32, 16)], PLAIN)
    with pytest.raises(MoeCollabError, match=r"\[8, 4\] does not hold rows 8 to 16"):
        arena.write_codes(0, torch.zeros(8, 4, dtype=torch.int32), Cut((16, 32), row=8))


@pytest.mark.parametrize("layout", [PLAIN, FieldLayout()], ids=["plain", "fields"])
@pytest.mark.parametrize("num_bits", [TERNARY, 3, 5, 8, 16])
def test_a_weight_unpacked_in_pieces(monkeypatch, layout, num_bits):
    weight = random_weight(TensorSpec(num_bits, 40, 352, 32 if num_bits < 16 else 0), torch.Generator().manual_seed(0))
    found = []
    for at_once in (1 << 20, 352 * 7):
        monkeypatch.setattr(arenas, "_AT_ONCE", at_once)
        found.append(Arena([TensorSpec(num_bits, 30, 320, weight.spec.group_size)], layout))
        found[-1].write_codes(0, weight.packed, Cut((40, 352), row=9, column=32))
    assert torch.equal(found[0].codes, found[1].codes)


def test_traces_through_the_fake_kernel():
    arenas, _ = build_layer()
    torch.library.opcheck(fused_experts, (*routing(), *arenas, *REST), test_utils=("test_schema", "test_faketensor"))
