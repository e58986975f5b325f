"""Repacking: what a tile holds is what the checkpoint held, whatever is cut out of it, in either packing."""

import pytest
import torch

from moe_collab import MoeCollabError
from moe_collab.formats import TERNARY, pack_ternary, packed_width
from moe_collab.kernels import cpu
from moe_collab.kernels.arena import Arena, Cut
from moe_collab.kernels.descriptors import TensorSpec
from moe_collab.kernels.plain import PLAIN
from moe_collab.kernels.reference import linear

from .layers import random_weight

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
