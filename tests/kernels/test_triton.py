"""The Triton kernels, interpreted, against the reference: `TRITON_INTERPRET=1 pytest tests/kernels/test_triton*.py`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_collab import MoeCollabError
from moe_collab.formats import TERNARY
from moe_collab.kernels import backends, reference
from moe_collab.kernels.descriptors import TensorSpec

from .layers import error, expert_specs, load, random_weight

pytest.importorskip("triton")
from moe_collab.kernels import triton
from moe_collab.kernels.triton import configs, ops
from moe_collab.kernels.triton.routing import sort_pairs

pytestmark = pytest.mark.skipif(not ops.INTERPRETED, reason="needs TRITON_INTERPRET=1")
BITS = (TERNARY, 2, 3, 4, 5, 6, 7, 8, 16)
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3}


def assert_close(hidden, width, bits, group, tokens, top_k, dtype=torch.float32, symmetric=True, bias=False, **options):
    generator = torch.Generator().manual_seed(0)
    specs = expert_specs(hidden, width, bits, group, symmetric)
    weights = [random_weight(spec, generator) for spec in specs]
    ids = options.pop("ids", None)
    if ids is None:
        ids = torch.stack([torch.randperm(len(bits), generator=generator)[:top_k] for _ in range(tokens)]).int()
    factors = torch.rand(ids.shape, generator=generator)
    x = torch.randn(len(ids), hidden, generator=generator).to(dtype)
    biases = torch.randn(len(bits), 2 * width + hidden, generator=generator) if bias else None
    rest = (biases, options.get("expert_map"), options.get("activation", "silu"), options.get("on_input", False), 16)
    arenas = [load(weights), load(weights, triton.FieldLayout())]
    plain, fields = ((a.codes, a.scales, a.zero_points, a.table.view(len(bits), 3, -1)) for a in arenas)
    expected = reference.fused_experts(x.float(), factors, ids, *plain, *rest)
    found = triton.fused_experts(specs)(x, factors, ids, *fields, *rest)
    assert found.dtype == dtype and error(found, expected) < LIMITS[dtype]


@settings(max_examples=6, deadline=None)
@given(
    hidden=st.sampled_from([64, 288]),
    width=st.sampled_from([32, 96]),
    bits=st.lists(st.tuples(*[st.sampled_from((0, *BITS))] * 3), min_size=2, max_size=3),
    group=st.sampled_from([-1, 16, 32]),
    tokens=st.integers(1, 5),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    symmetric=st.booleans(),
)
def test_random_layers(hidden, width, bits, group, tokens, dtype, symmetric):
    bits = [(0, 0, 0) if 0 in row else row for row in bits]
    assert_close(hidden, width, bits, group, tokens, 2, dtype, symmetric)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", list(LIMITS))
def test_every_kind(bits, dtype):
    assert_close(512, 64, [(bits, bits, bits)] * 3, 64, 3, 2, dtype, symmetric=bits == TERNARY)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swigluoai"])
@pytest.mark.parametrize("on_input", [False, True])
def test_activations_and_biases(activation, on_input):
    options = {"activation": activation, "on_input": on_input, "bias": True}
    assert_close(64, 32, [(4, 4, 2), (3, 3, 3), (16, 16, 16)], 32, 4, 2, **options)


@pytest.mark.parametrize("sort_above", [1, 256])
def test_absent_experts_and_other_ranks_add_nothing(monkeypatch, sort_above):
    monkeypatch.setattr(ops, "SORT_ABOVE", sort_above)
    ids = torch.tensor([[0, 3], [5, -1], [2, 4], [1, 5], [3, 2]], dtype=torch.int32)
    here = torch.tensor([2, -1, 0, 1, -1, 3], dtype=torch.int32)
    assert_close(64, 32, [(4, 4, 4), (0, 0, 0), (3, 2, 8), (2, 2, 2)], 32, 5, 2, ids=ids, expert_map=here)
    nobody = torch.full_like(ids, -1)
    assert_close(64, 32, [(4, 4, 4)] * 2, 32, 5, 2, ids=nobody)


@pytest.mark.parametrize("sort_above", [1, 256])
def test_more_tokens_than_a_tile_and_an_expert_chosen_twice(monkeypatch, sort_above):
    monkeypatch.setattr(ops, "SORT_ABOVE", sort_above)
    ids = torch.zeros(70, 2, dtype=torch.int64)
    ids[::3, 1] = 1
    assert_close(64, 32, [(4, 4, 4), (2, 3, 4)], 32, 70, 2, torch.float16, ids=ids)


def test_columns_in_shares(monkeypatch):
    tile = configs.Config(rows=32, tokens=4, split=3, num_warps=1, num_stages=1)
    monkeypatch.setattr(ops, "choose", lambda *_: tile)
    assert_close(64, 320, [(4, 4, 4), (2, 2, 2), (16, 16, 16)], 64, 3, 2, bias=True)


def test_nothing_to_do():
    assert_close(64, 32, [(0, 0, 0)] * 2, 32, 3, 2)
    assert_close(64, 32, [(4, 4, 4)] * 2, 32, 0, 2, ids=torch.zeros(0, 2, dtype=torch.int32))


@pytest.mark.parametrize("bits", [(3,), (4, 16, 2), (8, 5)])
def test_linear_layers_in_pieces(bits):
    generator = torch.Generator().manual_seed(0)
    specs = [TensorSpec(b, 24 + 16 * i, 128, 0 if b == 16 else 32, b == 16) for i, b in enumerate(bits)]
    weights = [random_weight(spec, generator) for spec in specs]
    x, rows = torch.randn(5, 128, generator=generator), sum(spec.rows for spec in specs)
    bias = torch.randn(rows, generator=generator)
    arena = load(weights, triton.FieldLayout())
    found = triton.linear(specs)(x, arena.codes, arena.scales, arena.zero_points, arena.table, bias, 16, rows)
    expected = x @ torch.cat([weight.dense for weight in weights]).T + bias
    assert error(found, expected) < 1e-5


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-1, 4), min_size=1, max_size=40), st.sampled_from([1, 4, 16]))
def test_pairs_are_sorted_into_blocks_of_one_expert(ids, tokens):
    blocks = sort_pairs(torch.tensor(ids), 5, tokens)
    seen = []
    for expert, start, end in zip(*(t.tolist() for t in blocks[1:]), strict=True):
        pairs = blocks.order[start:end].tolist()
        assert len(pairs) <= tokens and (expert >= 0) == bool(pairs)
        assert all(ids[pair] == expert for pair in pairs)
        seen += pairs
    assert sorted(seen) == [pair for pair, expert in enumerate(ids) if expert >= 0]


def test_groups_that_no_kernel_knows_are_refused():
    with pytest.raises(MoeCollabError, match="group size 24"):
        load([random_weight(TensorSpec(4, 8, 48, 24), torch.Generator())], triton.FieldLayout())


def test_the_backend_by_name(monkeypatch):
    monkeypatch.setenv("MOE_COLLAB_BACKEND", "triton")
    backends.backend.cache_clear()
    try:
        assert backends.backend().name == "triton (interpreted)"
    finally:
        backends.backend.cache_clear()
