"""Ternary bytes, frozen; and the format as compressed-tensors sees it, in the version installed."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_collab import MoeCollabError
from moe_collab.checkpoint import ternary_packed
from moe_collab.formats import dequantize, pack_ternary, ternary_width, unpack_ternary

ternary_packed.register()

# codes[i, j] = (5 i + 7 j + j^2 / 2) mod 3 - 1, in groups of 16: four bytes each, the last of one trit.
GOLDEN = [[39, 119, 114, 1, 114, 100, 58, 1], [164, 7, 23, 0, 23, 69, 207, 0]]


def codes_of(rows: int = 2, columns: int = 32) -> torch.Tensor:
    i, j = torch.arange(rows)[:, None], torch.arange(columns)
    return ((5 * i + 7 * j + j * j // 2) % 3 - 1).to(torch.int8)


def test_golden_bytes():
    codes = codes_of()
    assert pack_ternary(codes, 16).tolist() == GOLDEN
    assert torch.equal(unpack_ternary(torch.tensor(GOLDEN, dtype=torch.uint8), (2, 32), 16), codes)


def test_width():
    assert (ternary_width(128, 128), ternary_width(256, 128), ternary_width(256, 32)) == (26, 52, 56)


@given(rows=st.integers(1, 5), groups=st.integers(1, 4), group=st.integers(1, 130))
@settings(max_examples=60, deadline=None)
def test_round_trip(rows, groups, group):
    codes = codes_of(rows, groups * group)
    assert torch.equal(unpack_ternary(pack_ternary(codes, group), codes.shape, group), codes)


def test_other_codes_and_widths_are_refused():
    with pytest.raises(MoeCollabError, match="lie in -1, 0, 1; got -1 to 2"):
        pack_ternary(torch.tensor([[2, -1]], dtype=torch.int8), 2)
    with pytest.raises(MoeCollabError, match="group size 3 does not divide 32"):
        pack_ternary(codes_of(), 3)
    with pytest.raises(MoeCollabError, match=r"shape \[2, 7\] cannot hold 2 x 32 trits in groups of 16"):
        unpack_ternary(torch.zeros(2, 7, dtype=torch.uint8), (2, 32), 16)


def scheme(group: int | None, **changes: object) -> QuantizationScheme:
    fields = {"num_bits": 2, "symmetric": True, "group_size": group, "strategy": "group" if group else "channel"}
    return QuantizationScheme(targets=["x"], weights=QuantizationArgs(**fields | changes), format="ternary-packed")


def test_registration_is_idempotent_and_survives_json():
    before = len(CompressionFormat)
    ternary_packed.register()
    assert len(CompressionFormat) == before
    assert CompressionFormat("ternary-packed").value == "ternary-packed"
    config = QuantizationConfig(config_groups={"group_0": scheme(128)}, format="ternary-packed")
    again = QuantizationConfig.model_validate_json(config.model_dump_json())
    assert again.config_groups["group_0"].format == "ternary-packed"


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_compressor_is_exact(group, device):
    codes, scale = codes_of(6, 96), (torch.rand(6, 96 // group if group else 1) - 0.5).bfloat16()
    weight = dequantize(codes, scale)
    state = {"weight": weight.to(device), "weight_scale": scale.to(device), "weight_zero_point": torch.zeros(6, 1)}
    compressor = BaseCompressor.get_value_from_registry("ternary-packed")
    packed = compressor.compress(state, scheme(group))
    assert set(packed) == {"weight_packed", "weight_scale", "weight_shape"}
    assert packed["weight_packed"].shape == (6, ternary_width(96, group or 96))
    if device == "cpu":
        assert torch.equal(compressor.decompress(packed, scheme(group))["weight"], weight)
    elif group:
        assert compressor.decompress(packed, scheme(group))["weight"].shape == (6, 96)


def test_a_weight_off_the_grid_is_refused_not_rounded():
    codes, scale = codes_of(6, 96), torch.ones(6, 3)
    for wrong in (2.0, -2.0, 0.5, float("nan")):
        weight = dequantize(codes, scale)
        weight[3, 7] = wrong
        with pytest.raises(MoeCollabError, match="cannot be stored ternary"):
            ternary_packed.TernaryCompressor.compress({"weight": weight, "weight_scale": scale}, scheme(32))
    with pytest.raises(MoeCollabError, match="num_bits 2, symmetric"):
        ternary_packed.TernaryCompressor.compress({"weight": weight, "weight_scale": scale}, scheme(32, num_bits=3))
