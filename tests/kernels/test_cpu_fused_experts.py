"""The C++ fused experts against the reference, on every instruction set this processor has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_collab.formats import TERNARY
from moe_collab.kernels import cpu
from moe_collab.kernels.reference import fused_experts

from .layers import expert_specs, load, random_weight

cpu.load()
fused_experts_cpu = torch.ops.moe_collab.fused_experts_cpu
BITS = (TERNARY, 2, 3, 4, 5, 6, 7, 8, 16)
# Largest relative error, in the Frobenius norm, against float32: 8-bit activations are an opt-in.
LIMITS = {16: 0.0025, 8: 0.03}


def instruction_sets() -> list[str]:
    try:
        cpu.configure("none")
    except ValueError as error:
        return str(error).split("(")[1].rstrip(")").split(", ")
    raise AssertionError("an unknown instruction set was accepted")


@pytest.fixture(autouse=True, params=instruction_sets())
def instructions(request):
    cpu.configure(request.param)
    yield
    cpu.configure("best")


def build(hidden, width, bits, group, symmetric=True, scale_dtype=torch.bfloat16, ternary_bits=2, seed=0):
    """(arguments of the reference, arguments of the kernel), from codes to table."""
    generator = torch.Generator().manual_seed(seed)
    specs = expert_specs(hidden, width, bits, group, symmetric)
    weights = [random_weight(spec, generator, scale_dtype) for spec in specs]
    arenas = [load(weights), load(weights, cpu.TileLayout(ternary_bits))]
    return [(a.codes, a.scales, a.zero_points, a.table.view(len(bits), 3, -1)) for a in arenas]


def route(tokens, experts, top_k, hidden, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    x = torch.randn(tokens, hidden, generator=generator)
    return x, torch.rand(tokens, top_k, generator=generator), ids.int()


def error(found, expected):
    return float((found.float() - expected).norm() / expected.norm().clamp(min=1e-30))


def assert_close(plain, tiled, routing, bias=None, expert_map=None, activation="silu", on_input=False, bits=16):
    rest = (bias, expert_map, activation, on_input, bits)
    x, weights, ids = routing
    expected = fused_experts(x.float(), weights.float(), ids, *plain, *rest)
    assert error(fused_experts_cpu(*routing, *tiled, *rest), expected) < LIMITS[bits]


@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("tokens", [1, 3, 21, 150])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", BITS)
def test_equals_the_reference(num_bits, symmetric, tokens, activation_bits):
    plain, tiled = build(256, 128, [(num_bits,) * 3] * 4, 128, symmetric)
    assert_close(plain, tiled, route(tokens, 4, 2, 256), bits=activation_bits)


@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("group", [64, 192])
@pytest.mark.parametrize("num_bits", BITS)
def test_blocks_of_64_columns_and_many_tokens(num_bits, group, activation_bits):
    """AMX sums over 128 columns or, as here, 64; ternary in five trits a byte too."""
    plain, tiled = build(192, 192, [(num_bits,) * 3] * 2, group, False, ternary_bits=TERNARY)
    assert_close(plain, tiled, route(37, 2, 2, 192), bits=activation_bits)


@settings(max_examples=60, deadline=None)
@given(
    st.data(),
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 6),
    st.integers(1, 12),
    st.booleans(),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
)
def test_any_shape_mix_and_routing(data, half_hidden, half_width, experts, tokens, symmetric, scale_dtype):
    hidden, width = 2 * half_hidden, 2 * half_width
    common = [g for g in (-1, 2, 16, 32, 64, 128) if g == -1 or (hidden % g == 0 and width % g == 0)]
    group = data.draw(st.sampled_from(common))
    triple = st.tuples(*[st.sampled_from(BITS)] * 3)
    bits = [data.draw(st.one_of(triple, st.just((0, 0, 0)))) for _ in range(experts)]
    ternary_bits = data.draw(st.sampled_from([TERNARY, 2]))
    plain, tiled = build(hidden, width, bits, group, symmetric, scale_dtype, ternary_bits)
    routing = route(tokens, experts, data.draw(st.integers(1, experts)), hidden)
    # Few columns leave rounding nowhere to average out, so the bound is that of a single value.
    expected = fused_experts(*routing, *plain, None, None, "silu", False, 16)
    found = fused_experts_cpu(*routing, *tiled, None, None, "silu", False, 16)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swigluoai"])
def test_activations_biases_and_dtypes(activation, dtype):
    plain, tiled = build(256, 128, [(4, 4, 3), (2, 2, 4), (16, 16, 8)], 64, symmetric=False)
    x, weights, ids = route(5, 3, 2, 256)
    bias = torch.randn(3, 2 * 128 + 256)
    assert_close(plain, tiled, ((3 * x).to(dtype), weights, ids), bias, None, activation)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_expert_map_and_weight_on_input(on_input, id_dtype):
    plain, tiled = build(128, 64, [(4, 4, 4), (2, 2, 2)], 64)
    x, weights, ids = route(9, 4, 2, 128)
    ids[3, 1] = -1
    expert_map = torch.tensor([1, -1, 0, -1], dtype=id_dtype)
    assert_close(plain, tiled, (x, weights.bfloat16(), ids.to(id_dtype)), None, expert_map, "silu", on_input)


def test_does_not_depend_on_threads_or_company():
    _, tiled = build(256, 128, [(4, 4, 3), (2, 2, 2), (3, 3, 4)], 128)
    rest = (*tiled, None, None, "silu", False, 16)
    x, weights, ids = route(300, 3, 2, 256)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(fused_experts_cpu(x, weights, ids, *rest))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    alone = fused_experts_cpu(x[7:8].contiguous(), weights[7:8].contiguous(), ids[7:8].contiguous(), *rest)
    torch.testing.assert_close(alone[0], found[0][7], rtol=1e-5, atol=1e-6)


def test_nothing_to_do():
    _, tiled = build(128, 64, [(4, 4, 4), (0, 0, 0)], 64)
    rest = (*tiled, None, None, "silu", False, 16)
    x, weights, ids = route(4, 2, 1, 128)
    assert fused_experts_cpu(x[:0], weights[:0], ids[:0], *rest).shape == (0, 128)
    assert not fused_experts_cpu(x, weights, torch.ones_like(ids), *rest).any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_activations_stay_with_their_token(poison):
    plain, tiled = build(128, 64, [(4, 4, 4), (16, 16, 2)], 64)
    x, weights, ids = route(6, 2, 2, 128)
    clean = fused_experts_cpu(x, weights, ids, *tiled, None, None, "silu", False, 16)
    x[2, 5] = poison
    expected = fused_experts(x, weights, ids, *plain, None, None, "silu", False, 16)
    found = fused_experts_cpu(x, weights, ids, *tiled, None, None, "silu", False, 16)
    assert not expected[2].isfinite().any() and not found[2].isfinite().any()
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(found[others], clean[others], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e18])
def test_extreme_activations(size):
    plain, tiled = build(128, 64, [(8, 8, 8)], 64)
    x, weights, ids = route(2, 1, 1, 128)
    expected = fused_experts(size * x, weights, ids, *plain, None, None, "silu", False, 16)
    found = fused_experts_cpu(size * x, weights, ids, *tiled, None, None, "silu", False, 16)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()) + 1e-30)


def changed(arguments, **changes):
    names = ["x", "topk_weights", "topk_ids", "codes", "scales", "zero_points", "table"]
    return [changes.get(name, value) for name, value in zip(names, arguments, strict=True)]


def test_wrong_arguments_are_named():
    _, tiled = build(128, 64, [(4, 4, 4), (2, 2, 2)], 64, symmetric=False)
    good = (*route(4, 2, 2, 128), *tiled)
    x, weights, ids, codes, scales, zeros, table = good
    rest = [None, None, "silu", False, 16]

    def with_field(field, value):
        wrong = table.clone()
        wrong[1, 2, field] = value
        return wrong

    cases = {
        "x: float32": {"x": x.double()},
        "x: ": {"x": x[0]},
        "x: a contiguous": {"x": x.T.contiguous().T},
        "topk_ids and topk_weights": {"topk_ids": ids[:2]},
        "topk_ids: int32": {"topk_ids": ids.float()},
        "topk_ids: expert 7": {"topk_ids": ids + 7},
        "topk_weights: float32": {"topk_weights": weights.long()},
        "codes: uint8": {"codes": codes.to(torch.int32)},
        "codes: offset": {"codes": codes[:-64].clone()},
        "scales: offset": {"scales": scales[:-1].clone()},
        "scales: float32 or": {"scales": scales.half()},
        "zero_points: offset": {"zero_points": zeros[:-1].clone()},
        "zero_points: int8": {"zero_points": zeros.int()},
        "table: int64": {"table": table.int()},
        "has 9 bits": {"table": with_field(0, 9)},
        "groups of 48": {"table": with_field(1, 48)},
        "codes: offset -64": {"table": with_field(2, -64)},
        "codes: offset 4611686018427387904": {"table": with_field(2, 1 << 62)},
        "expert 1 is not": {"table": with_field(5, 32)},
    }
    for message, change in cases.items():
        with pytest.raises((ValueError, RuntimeError), match=message):
            fused_experts_cpu(*changed(good, **change), *rest)
    for message, position, value in [
        ("activation: 'relu'", 2, "relu"),
        ("activation_bits: 4", 4, 4),
        ("bias: float32", 0, torch.zeros(3)),
        ("expert_map: expert 5", 1, torch.tensor([5, 5])),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            fused_experts_cpu(*good, *[value if i == position else v for i, v in enumerate(rest)])


def test_traces_through_the_fake_kernel():
    _, tiled = build(128, 64, [(4, 4, 4)], 64)
    arguments = (*route(4, 1, 1, 128), *tiled, None, None, "silu", False, 16)
    torch.library.opcheck(fused_experts_cpu, arguments, test_utils=("test_schema", "test_faketensor"))
