"""The Triton kernels, interpreted, against the reference: `TRITON_INTERPRET=1 pytest tests/kernels/test_triton.py`."""

import json
import re
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_collab import MoeCollabError
from moe_collab.formats import TERNARY
from moe_collab.kernels import backends, reference
from moe_collab.kernels.descriptors import TensorSpec

from .layers import expert_specs, load, random_weight

pytest.importorskip("triton")
from integration.benchmarks import gpu, vllm_triton
from moe_collab.kernels import triton, tune
from moe_collab.kernels.triton import configs, ops, trial
from moe_collab.kernels.triton.fields import PTX_BITS, SPARE_PTX, field_ptx, left_of
from moe_collab.kernels.triton.routing import sort_pairs

pytestmark = pytest.mark.skipif(not ops.INTERPRETED, reason="needs TRITON_INTERPRET=1")
BITS = (TERNARY, 2, 3, 4, 5, 6, 7, 8, 16)
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3}


def error(found, expected):
    return float((found.float() - expected).norm() / expected.norm().clamp(min=1e-30))


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


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("num_bits", PTX_BITS)
def test_ptx_of_every_field(num_bits, fp16):
    """Executed here instruction by instruction, since the interpreter knows no PTX; at every place in a word."""
    generator = np.random.default_rng(0)
    lower = 4 if num_bits > 4 else num_bits
    for place, above in product(range(17 - lower), range(17 - num_bits + lower)):
        words, upper = generator.integers(0, 1 << 16, (2, 2))
        left = left_of(num_bits, place, fp16)
        minus = -((1024 if fp16 else 128) / 2**left + (1 << (num_bits - 1)) + 1)
        registers = [pair(*words), pair(*[as_bits(minus, fp16)] * 2), pair(*upper)]
        for half, word, up in zip(
            run_ptx(field_ptx(num_bits, lower, place, above, left, fp16), *registers, fp16), words, upper, strict=True
        ):
            code = int(word) >> place & ((1 << lower) - 1)
            code |= (int(up) >> above & ((1 << num_bits - lower) - 1)) << lower
            assert half == code - (1 << (num_bits - 1)) - 1


def test_ptx_of_the_last_bits_of_three_words():
    planes, spare = [pair(0x7FFF, 0x8001), pair(0x8000, 0x7FFF), pair(0xFFFF, 0x0000)], 0
    for words in planes:
        spare = pair(*run_ptx(SPARE_PTX.value, spare, words, 0, False))
    assert [half >> 13 for half in (spare & 0xFFFF, spare >> 16)] == [0b110, 0b001]


def pair(low, high) -> int:
    """Two halves of a register."""
    return int(low) | int(high) << 16


def as_bits(value: float, fp16: bool) -> int:
    return int(np.float16(value).view(np.uint16)) if fp16 else int(np.float32(value).view(np.uint32)) >> 16


def as_float(bits: int, fp16: bool) -> float:
    return float(np.uint16(bits).view(np.float16)) if fp16 else float(np.uint32(bits << 16).view(np.float32))


def run_ptx(code: str, words: int, minus: int, upper: int, fp16: bool) -> list[float]:
    """The two floats that a fragment of shifts, lop3 (and-or), mov and fma leaves in $0; without fma, their bits."""
    registers = {"$1": words, "$2": minus, "$3": upper}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for line in re.findall(r"([a-z][\w.]*) ([^;]*);", re.sub(r"\.reg .*?;", "", code)):
        name, (target, *operands) = line[0], line[1].split(", ")
        a, b, c = [*map(value, operands), 0, 0][:3]
        if name in ("shr.u32", "shl.b32"):
            result = a >> b if name == "shr.u32" else a << b & 0xFFFFFFFF
        elif name == "lop3.b32":
            assert value(operands[3]) == (0xF0 & 0xCC) | 0xAA
            result = a & b | c
        elif name == "mov.b32":
            result = a
        else:
            assert name == f"fma.rn.{'f16x2' if fp16 else 'bf16x2'}"
            halves = [[v >> 16 * i & 0xFFFF for v in (a, b, c)] for i in range(2)]
            x, y, z = ([as_float(h, fp16) for h in half] for half in zip(*halves, strict=True))
            return [p * q + r for p, q, r in zip(x, y, z, strict=True)]
        registers[target] = result
    return [registers["$0"] & 0xFFFF, registers["$0"] >> 16]


def test_the_most_particular_tile_is_chosen(monkeypatch, tmp_path):
    tile = {"rows": 16, "tokens": 8, "num_warps": 1, "num_stages": 2}
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"My GPU": {"2,4": {"down": [{"up_to": 4, **tile}]}, "any": {"down": [tile]}}}))
    monkeypatch.setenv(configs.VARIABLE, str(own))
    kinds = configs.kinds_of([2, 4, 0])
    for cached in (configs._files, configs._choose):
        cached.cache_clear()
    try:
        assert configs.choose(("My GPU", "cuda"), kinds, "down", 4).up_to == 4
        assert configs.choose(("My GPU", "cuda"), kinds, "down", 5).rows == 16
        assert configs.choose(("My GPU", "cuda"), configs.kinds_of([3]), "down", 1).up_to is None
        assert configs.choose(("My GPU", "cuda"), kinds, "gate_up", 1).rows == 32
        own.write_text('{"My GPU": {"any": {"down": [{"rows": 17}]}}}')
        configs._files.cache_clear()
        with pytest.raises(MoeCollabError, match=r"own\.json"):
            configs.choose(("My GPU", "cuda"), kinds, "down", 6)
    finally:
        for cached in (configs._files, configs._choose):
            cached.cache_clear()


@pytest.mark.parametrize("top_k", [1, 3, 8, 200])
def test_a_few_batches_run_all_that_is_compiled(monkeypatch, top_k):
    monkeypatch.setattr(ops, "device_names", lambda: ("sm_80", "cuda"))
    kinds = configs.kinds_of([6])

    def compiled(tokens):
        tiles = (configs.choose(ops.device_names(), kinds, kernel, tokens) for kernel in ("gate_up", "down"))
        return *(tile.model_dump_json(exclude={"up_to"}) for tile in tiles), tokens * top_k > ops.SORT_ABOVE

    batches = triton.batches(expert_specs(64, 32, [(6, 6, 6), (0, 0, 0)], 32), top_k)
    assert len(batches) < 7 and {compiled(t) for t in range(1, 2000)} == set(map(compiled, batches))
    assert triton.batches([TensorSpec(6, 64, 64, 32)], None)[0] == 1


def test_the_backend_by_name(monkeypatch):
    monkeypatch.setenv("MOE_COLLAB_BACKEND", "triton")
    backends.backend.cache_clear()
    try:
        assert backends.backend().name == "triton (interpreted)"
    finally:
        backends.backend.cache_clear()


def test_the_tuner_stores_tiles_that_are_then_used(monkeypatch, tmp_path):
    path = tmp_path / "tiles.json"
    tile = configs.Config(rows=16, tokens=8, num_warps=1, num_stages=1)
    other = {"Another GPU": {"any": {"down": [tile.model_dump(exclude_defaults=True)]}}}
    path.write_text(json.dumps(other))
    monkeypatch.setattr(tune, "LADDERS", {"rows": (32, 64)})
    shapes = ["--shape", "64x32x4x2", "--linear", "64x64", "--group-size", "32"]
    tune.main([*shapes, "--bits", "4", "--tokens", "3", "1", "--output", str(path)])
    stored = json.loads(path.read_text())
    assert stored.pop("Another GPU") == other["Another GPU"]
    assert list(stored) == ["interpreted"] and set(stored["interpreted"]["4"]) == {"gate_up", "down", "linear"}
    for tiles in stored["interpreted"]["4"].values():
        assert {t["rows"] for t in tiles} <= {32, 64} and [t.get("up_to") for t in tiles] in ([None], [1, None])
    before = path.read_text()
    path.write_text(before.replace('"rows"', '"row"'))
    with pytest.raises(MoeCollabError, match=r"tiles\.json"):
        tune.main([*shapes, "--output", str(path)])


def test_tiles_that_are_tried_go_before_all_files():
    tile = configs.Config(rows=16, tokens=8, num_warps=1, num_stages=1)
    usual = configs.choose(("cuda",), 1 << 4, "gate_up", 1)
    with configs.using({"down": tile}), configs.using({"linear": tile}):
        assert [configs.choose(("cuda",), 1 << 4, k, 1) for k in ("gate_up", "down", "linear")] == [usual, tile, tile]
    assert configs.choose(("cuda",), 1 << 4, "down", 1) != tile


def test_the_benchmark(monkeypatch, tmp_path):
    """As on a GPU, but for the sizes and the figures."""
    monkeypatch.setattr(gpu, "EXPERTS", {"tiny": trial.ExpertsShape(128, 64, 4, 2)})
    monkeypatch.setattr(gpu, "LINEARS", {"tiny": trial.LinearShape(64, 128)})
    for name, value in (("GROUP", 32), ("DECODE", 1), ("CHECKED", (1, 3))):
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu, "STARTS", (vllm_triton.Tile(16, 64, 64),))
    monkeypatch.setattr(gpu, "LADDERS", vllm_triton.Tile((16, 32), (64,), (64,), (1,), (4,), (3,)))
    arguments = ["--output", str(tmp_path), "--shapes", "tiny", "--bits", "2", "4", "2,4", "--tokens", "1", "2"]
    gpu.main(arguments)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["machine"]["device"] == "interpreted" and found["ceilings"]["copy_bytes_per_s"] > 0
    rows = {(row["layer"], row["tokens"], row["bits"]): row for row in found["rows"]}
    assert len(rows) == 12 and all(row["error"] < 1e-5 and row["us"] > 0 for row in found["rows"])
    assert "share_of_copy" in rows["tiny experts", 1, "2,4"] and "share_of_peak" in rows["tiny experts", 2, "2,4"]
    assert rows["tiny experts", 1, "2,4"]["vs_uniform"] > 0 and rows["tiny linear", 1, "2"]["vs_bf16"] > 0
    assert {"vs_vllm_bf16", "vs_vllm_triton_4bit"} <= set(rows["tiny experts", 1, "2"])
    exact = reference.fused_experts
    monkeypatch.setattr(reference, "fused_experts", lambda *arguments: 1.1 * exact(*arguments))
    with pytest.raises(MoeCollabError, match=r"3 parts failed:\n.*ExpertsShape.*bits, 1 tokens.*The kernels are wrong"):
        gpu.main(arguments)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert len(found["errors"]) == 3 and {row["layer"] for row in found["rows"]} == {"tiny linear"}


@pytest.mark.parametrize("bits", [4, 16])
def test_vllm_kernels_multiply_what_the_benchmark_says(bits, tmp_path):
    shape = trial.ExpertsShape(128, 64, 4, 2)
    layer = vllm_triton.VllmExperts(vllm_triton.kernels_of(vllm_triton.find_vllm(), tmp_path), shape, bits, 32)
    ids, tile = torch.tensor([[0, 3], [3, 1], [1, 0]]), vllm_triton.Tile(16, 64, 64)
    x, out = torch.randn(3, 128), torch.empty(6, 128)
    layer.product(x, out, layer.layers[0][0], vllm_triton.aligned(ids, 16, 4), 2, tile)
    weight, scales = layer.layers[0][0]
    if bits == 4:
        codes = torch.stack([weight & 15, weight >> 4], -1).flatten(2).float() - 8
        weight = codes * scales.float().repeat_interleave(32, 2)
    expected = torch.stack([weight[e] @ x[pair // 2] for pair, e in enumerate(ids.flatten().tolist())])
    assert error(out, expected) < 1e-5
