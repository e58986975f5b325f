"""The C++ linear layer against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_collab.formats import TERNARY
from moe_collab.kernels import cpu
from moe_collab.kernels.descriptors import TensorSpec
from moe_collab.kernels.reference import linear

from .layers import load, random_weight

cpu.load()
linear_cpu = torch.ops.moe_collab.linear_cpu
BITS = (TERNARY, 2, 3, 4, 5, 6, 7, 8, 16)


def build(pieces, columns, group, symmetric=True):
    """(arguments of the reference, arguments of the kernel) of a weight in pieces of (bits, rows)."""
    generator = torch.Generator().manual_seed(0)
    specs = [TensorSpec(b, rows, columns, group if b < 16 else 0, symmetric or b == 16) for b, rows in pieces]
    weights = [random_weight(spec, generator) for spec in specs]
    arenas = [load(weights), load(weights, cpu.TileLayout())]
    return [(a.codes, a.scales, a.zero_points, a.table) for a in arenas]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(BITS), st.integers(1, 70)), min_size=1, max_size=4),
    st.sampled_from([(64, 32), (96, 96), (128, 128), (40, 20), (200, 200), (384, 128)]),
    st.integers(1, 70),
    st.booleans(),
    st.booleans(),
)
def test_equals_the_reference(pieces, shape, tokens, symmetric, with_bias):
    columns, group = shape
    rows = sum(r for _, r in pieces)
    plain, tiled = build(pieces, columns, group, symmetric)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=generator)
    bias = torch.randn(rows, generator=generator) if with_bias else None
    expected = linear(x, *plain, bias, 16, rows)
    found = linear_cpu(x, *tiled, bias, 16, rows)
    # An output can be near zero by cancellation, so errors are measured by how large outputs typically are.
    matrix = linear(torch.eye(columns), *plain, None, 16, rows)
    typical = float(x.norm(dim=1).max() * matrix.norm(dim=0).max()) / columns**0.5
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * typical)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keeps_the_dtype(dtype):
    plain, tiled = build([(4, 256), (3, 64)], 512, 128)
    x = torch.randn(3, 512).to(dtype)
    expected = linear(x.float(), *plain, None, 16, 320)
    found = linear_cpu(x, *tiled, None, 16, 320)
    assert found.dtype == dtype
    assert float((found.float() - expected).norm() / expected.norm()) < 0.0025
    assert linear_cpu(x[:0], *tiled, None, 16, 320).shape == (0, 320)


def test_more_tokens_than_one_pass():
    _, tiled = build([(4, 32)], 64, 32)
    x = torch.randn(1500, 64)
    found = linear_cpu(x, *tiled, None, 16, 32)
    tail = linear_cpu(x[1400:].contiguous(), *tiled, None, 16, 32)
    torch.testing.assert_close(found[1400:], tail, rtol=1e-5, atol=1e-6)


def test_wrong_arguments_are_named():
    _, (codes, scales, zeros, table) = build([(4, 32)], 64, 32, symmetric=False)
    x = torch.randn(2, 64)
    for arguments, message in [
        ((x[:, :32].contiguous(), codes, scales, zeros, table, None, 16, 32), "table: piece 0 has 64 columns"),
        ((x, codes, scales, zeros, table, None, 16, 33), "num_rows is 33"),
        ((x, codes, scales, zeros, table, torch.zeros(3), 16, 32), "bias: float32"),
        ((x, codes, scales, zeros, table[0], None, 16, 32), "table: int64"),
        ((x, codes[:64], scales, zeros, table, None, 16, 32), "codes: offset"),
        ((x.int(), codes, scales, zeros, table, None, 16, 32), "x: float32"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            linear_cpu(*arguments)


def test_traces_through_the_fake_kernel():
    _, tiled = build([(4, 32)], 64, 32)
    arguments = (torch.randn(2, 64), *tiled, None, 16, 32)
    torch.library.opcheck(linear_cpu, arguments, test_utils=("test_schema", "test_faketensor"))
