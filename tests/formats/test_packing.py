"""Both layouts of packed integers, frozen as bytes and compared with the installed compressed-tensors."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_collab import MoeCollabError
from moe_collab.formats import dequantize, pack, packed_width, unpack

# codes[i, j] = (7 * (31 i + j) + 3) mod 2^bits - 2^(bits-1), packed by compressed-tensors 0.19 and 0.17.
DENSE = {
    3: [[1402433619, 1884526448, 393237399], [-1665432932, -2103657598, 461544635]],
    5: [
        [1308378435, 2015648675, 122904957, 1260874996, 89944166],
        [-1081563012, 76248169, -362008657, 1693294208, 59641033],
    ],
    6: [
        [-1621028221, -1866738983, -1302882496, -1893720397, -1666477611, 22251267],
        [-121198372, 651441263, 401469606, -393894708, 583333739, 48881765],
    ],
    7: [
        [-217823997, 996717873, -176549279, 2104744342, 1957753088, 240724808, 22443128],
        [-1908756004, -1810228225, -1157289843, -1446212871, -612463562, 612730107, 12139011],
    ],
}
PADDED = {
    3: [[328691795, 21913025, 923089271, 5], [482050716, 175304202, 942263224, 6]],
    5: [
        [234636611, 546401933, 892737495, 165362945, 477128267, 21],
        [1065920636, 304992678, 650312432, 996646970, 235719012, 14],
    ],
    6: [
        [526455427, 49236838, 628716553, 134720748, 730977679, 236719730, 21],
        [952543452, 458281407, 1054804578, 560542469, 83323880, 662803595, 46],
    ],
    7: [
        [50611459, 109794079, 168976699, 228159319, 16809331, 75975439, 135158059, 1402695],
        [238727644, 27377656, 86543764, 145726384, 204909004, 264091624, 52725124, 758688],
    ],
}


def codes_of(bits: int) -> torch.Tensor:
    values = torch.arange(62).reshape(2, 31) * 7 + 3
    return (values % (1 << bits) - (1 << (bits - 1))).to(torch.int8)


@pytest.mark.parametrize("bits", DENSE)
def test_golden_words(bits):
    codes = codes_of(bits)
    assert pack(codes, bits).tolist() == DENSE[bits]
    for words in (DENSE[bits], PADDED[bits]):
        assert torch.equal(unpack(torch.tensor(words, dtype=torch.int32), bits, (2, 31)), codes)


@given(bits=st.integers(2, 8), rows=st.integers(1, 5), columns=st.integers(1, 5), dim=st.sampled_from([0, 1]))
@settings(max_examples=60, deadline=None)
def test_round_trip_and_installed_library(bits, rows, columns, dim):
    # Multiples of 32, as real tensors have: there the two layouts never have the same width.
    rows, columns = 32 * rows, 32 * columns
    generator = torch.Generator().manual_seed(rows * 71 + columns)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)
    assert torch.equal(unpack(pack(codes, bits, dim), bits, (rows, columns), dim), codes)
    # Whichever layout the installed version writes, we read it.
    assert torch.equal(unpack(pack_to_int32(codes, bits, packed_dim=dim), bits, (rows, columns), dim), codes)


def test_width():
    assert (packed_width(128, 3), packed_width(128, 3, padded=True)) == (12, 13)


def test_wrong_width_names_the_sizes():
    with pytest.raises(MoeCollabError, match=r"shape \[2, 11\].*2 x 128 codes of 3 bits"):
        unpack(torch.zeros(2, 11, dtype=torch.int32), 3, (2, 128))
    with pytest.raises(MoeCollabError, match="num_bits: 9"):
        pack(codes_of(3), 9)


def test_dequantize_groups_zero_points_and_g_idx():
    codes = torch.tensor([[1, -1, 2, 0]], dtype=torch.int8)
    scale, zero = torch.tensor([[0.5, 2.0]]), torch.tensor([[1, -1]], dtype=torch.int8)
    assert dequantize(codes, scale).tolist() == [[0.5, -0.5, 4.0, 0.0]]
    assert dequantize(codes, scale, zero).tolist() == [[0.0, -1.0, 6.0, 2.0]]
    assert dequantize(codes, scale, zero, torch.tensor([1, 0, 1, 0])).tolist() == [[4.0, -1.0, 6.0, -0.5]]
