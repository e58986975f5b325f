"""Repacking: what a tile holds is what the checkpoint held, whatever is cut out of it, in either packing."""

import pytest
import torch

from moe_collab import MoeCollabError
from moe_collab.formats import TERNARY, pack_ternary, packed_width
from moe_collab.kernels import cpu
from moe_collab.kernels.arena import Arena, Cut
from moe_collab.kernels.cpu.widening import widen_ternary
from moe_collab.kernels.descriptors import TensorSpec
from moe_collab.kernels.plain import PLAIN
from moe_collab.kernels.reference import linear

from .layers import load, random_weight

cpu.load()


def pack_padded(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The layout of compressed-tensors 0.17: 32 // bits codes a word."""
    per_word = 32 // bits
    unsigned = torch.nn.functional.pad(codes.long() + (1 << (bits - 1)), (0, -codes.shape[1] % per_word))
    shifts = torch.arange(per_word) * bits
    return (unsigned.reshape(len(codes), -1, per_word) << shifts).sum(-1).to(torch.int32)


def multiply(arena: Arena, x: torch.Tensor, rows: int) -> torch.Tensor:
    op = linear if arena.layout is PLAIN else torch.ops.moe_collab.linear_cpu
    return op(x, arena.codes, arena.scales, arena.zero_points, arena.table, None, 16, rows)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("num_bits", [TERNARY, 2, 3, 4, 5, 6, 7, 8, 16])
def test_a_cut_of_a_stored_tensor(num_bits, padded):
    generator = torch.Generator().manual_seed(num_bits)
    full = TensorSpec(num_bits, 48, 384, 32 if num_bits < 16 else 0)
    weight = random_weight(full, generator)
    packed = weight.packed
    if padded and num_bits in (3, 5, 6, 7):
        codes = (weight.dense / weight.scales.float().repeat_interleave(32, 1)).round().to(torch.int8)
        packed = pack_padded(codes, num_bits)
        assert packed.shape[1] == packed_width(384, num_bits, padded=True)
    spec = TensorSpec(num_bits, 20, 192, full.group_size)
    arena = Arena([spec], cpu.TileLayout())
    arena.write_codes(0, packed, Cut((48, 384), row=9, column=192))
    if weight.scales is not None:
        arena.write_scales(0, weight.scales[9:29, 6:])
    x = torch.randn(3, 192)
    torch.testing.assert_close(multiply(arena, x, 20), x @ weight.dense[9:29, 192:].T, rtol=1e-3, atol=1e-3)


def test_ternary_in_either_storage():
    generator = torch.Generator().manual_seed(0)
    weight = random_weight(TensorSpec(TERNARY, 40, 256, 128), generator)
    found, sizes = [], []
    for bits in (TERNARY, 2):
        arena = Arena([weight.spec], cpu.TileLayout(ternary_bits=bits))
        arena.write_codes(0, weight.packed)
        arena.write_scales(0, weight.scales)
        found.append(multiply(arena, torch.eye(256), 40))
        sizes.append(arena.codes.numel())
    torch.testing.assert_close(found[0], found[1])
    assert sizes == [48 * 256 * 26 // 128, 48 * 256 // 4]


@pytest.mark.parametrize(("columns", "group"), [(256, 128), (96, 32), (60, 20), (200, 200)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_widening_ternary_weights(columns, group, symmetric):
    generator = torch.Generator().manual_seed(0)
    specs = [TensorSpec(TERNARY, 40, columns, group, symmetric), TensorSpec(4, 20, columns, group)]
    weights = [random_weight(spec, generator) for spec in (*specs, specs[0])]
    arena = load(weights, cpu.TileLayout(ternary_bits=TERNARY))
    x = torch.eye(columns)
    before, size, codes = multiply(arena, x, 100), arena.codes.numel(), arena.codes.clone()
    assert widen_ternary(arena, keep_free=1 << 60)
    assert torch.equal(arena.codes, codes) and arena.table[:, 0].tolist() == [TERNARY, 4, TERNARY]
    assert not widen_ternary(arena, keep_free=0)
    assert arena.table[:, 0].tolist() == [2, 4, 2] and arena.codes.numel() != size
    torch.testing.assert_close(multiply(arena, x, 100), before)
    assert not widen_ternary(arena, keep_free=1 << 60)


def test_widening_refuses_another_weight():
    narrow = Arena([TensorSpec(TERNARY, 16, 64, 32)], cpu.TileLayout(ternary_bits=TERNARY))
    wide = Arena([TensorSpec(TERNARY, 16, 64, 64), TensorSpec(TERNARY, 16, 64, 32)], cpu.TileLayout())
    widen = torch.ops.moe_collab.widen_cpu
    with pytest.raises((ValueError, RuntimeError), match="wide: the same weight in 2 bits"):
        widen(narrow.codes, narrow.table[0], wide.table[0], wide.codes)
    with pytest.raises((ValueError, RuntimeError), match="lies outside the arena of 64 bytes"):
        widen(narrow.codes, narrow.table[0], wide.table[1], wide.codes[:64])


@pytest.mark.parametrize(
    ("values", "expected"),
    [(torch.tensor([0.5, -0.25]), torch.bfloat16), (torch.tensor([0.1, 0.5]), torch.float32)],
    ids=["exact", "not exact"],
)
def test_scales_stay_exact(values, expected):
    arena = Arena([TensorSpec(4, 2, 32, 32)] * 2, cpu.TileLayout())
    arena.write_scales(0, torch.ones(2, 1))
    arena.write_scales(1, values[:, None])
    assert arena.scales.dtype == expected
    assert arena.scales.view(2, -1)[:, :2].tolist() == [[1.0, 1.0], values.tolist()]


def test_what_does_not_fit_is_refused():
    arena = Arena([TensorSpec(4, 16, 64, 32), TensorSpec(TERNARY, 16, 64, 32)], cpu.TileLayout())
    before = arena.codes.clone()
    words = torch.zeros(16, 8, dtype=torch.int32)
    with pytest.raises(MoeCollabError, match="cannot hold 16 x 64"):
        arena.write_codes(0, words[:, :5])
    with pytest.raises((ValueError, RuntimeError), match="does not hold rows 8 to 24"):
        arena.write_codes(0, words, Cut((16, 64), row=8))
    with pytest.raises((ValueError, RuntimeError), match=r"does not hold .* columns 64 to 128"):
        arena.write_codes(1, pack_ternary(torch.zeros(16, 64, dtype=torch.int8), 32), Cut((16, 64), column=64))
    with pytest.raises((ValueError, RuntimeError), match="packed: int32"):
        arena.write_codes(0, words.long())
    bad = arena.table[0].clone()
    bad[2] = 1 << 40
    with pytest.raises((ValueError, RuntimeError), match="codes: offset"):
        torch.ops.moe_collab.repack_cpu(words, 4, False, 0, 0, bad, arena.codes)
    assert torch.equal(arena.codes, before)
