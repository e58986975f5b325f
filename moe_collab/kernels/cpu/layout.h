// The tiled layout of one weight [rows, columns], shared by repacking and by every kernel.
//
// A tile holds 16 rows. Within it columns come in groups that share a scale, each padded to a multiple of 32, and
// groups in blocks (32, 64 or 128 columns) over which integer products are summed. 32 columns form a unit of
// `bits` lines of 64 bytes; byte 4 r + j of a line belongs to row r and to column 4 q + j of some quad q, the
// order that int8 dot-product instructions want. `kFields` says which bits of which line hold a quad's codes:
// the one table behind repacking, the scalar kernel and the vector kernels.
//
// Codes are unsigned, with zero point 2^(bits-1) when symmetric. Ternary (bits = kTernary) stores five trits a byte,
// 16 quads in 3 lines plus 16 bytes of 2-bit codes for the last quad; the tile's tails follow its lines.
// 16 bits are bfloat16: a line holds columns 2i and 2i+1 of 16 rows, interleaved.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe_collab {

constexpr int kRows = 16;
constexpr int kUnit = 32;
constexpr int kLine = 64;
constexpr int kTernary = 1;
constexpr int kTernaryUnit = 64;
constexpr int kTernaryUnitBytes = 3 * kLine + kRows;

// Where codes lie: (line & mask) >> shift adds to the code of `quad`; a negative shift goes left.
struct BitField {
  int line, mask, shift, quad;
};

template <int BITS>
struct Fields;

// Whole bytes.
template <>
struct Fields<8> {
  static constexpr BitField table[] = {{0, 255, 0, 0}, {1, 255, 0, 1}, {2, 255, 0, 2}, {3, 255, 0, 3},
                                       {4, 255, 0, 4}, {5, 255, 0, 5}, {6, 255, 0, 6}, {7, 255, 0, 7}};
};
// Nibbles, and two lines of 2-bit fields on top.
template <>
struct Fields<6> {
  static constexpr BitField table[] = {{0, 15, 0, 0}, {0, 240, 4, 1}, {1, 15, 0, 2}, {1, 240, 4, 3},
                                       {2, 15, 0, 4}, {2, 240, 4, 5}, {3, 15, 0, 6}, {3, 240, 4, 7},
                                       {4, 3, -4, 0}, {4, 12, -2, 1}, {4, 48, 0, 2}, {4, 192, 2, 3},
                                       {5, 3, -4, 4}, {5, 12, -2, 5}, {5, 48, 0, 6}, {5, 192, 2, 7}};
};
// Nibbles, and one line of single bits on top.
template <>
struct Fields<5> {
  static constexpr BitField table[] = {{0, 15, 0, 0}, {0, 240, 4, 1}, {1, 15, 0, 2}, {1, 240, 4, 3},
                                       {2, 15, 0, 4}, {2, 240, 4, 5}, {3, 15, 0, 6}, {3, 240, 4, 7},
                                       {4, 1, -4, 0}, {4, 2, -3, 1},  {4, 4, -2, 2}, {4, 8, -1, 3},
                                       {4, 16, 0, 4}, {4, 32, 1, 5},  {4, 64, 2, 6}, {4, 128, 3, 7}};
};
template <>
struct Fields<4> {
  static constexpr BitField table[] = {{0, 15, 0, 0}, {0, 240, 4, 1}, {1, 15, 0, 2}, {1, 240, 4, 3},
                                       {2, 15, 0, 4}, {2, 240, 4, 5}, {3, 15, 0, 6}, {3, 240, 4, 7}};
};
// Two codes a byte in six bits; the spare two bits of the three lines make up quads 6 and 7.
template <>
struct Fields<3> {
  static constexpr BitField table[] = {{0, 7, 0, 0},   {0, 56, 3, 1}, {1, 7, 0, 2},   {1, 56, 3, 3}, {2, 7, 0, 4},
                                       {2, 56, 3, 5}, {0, 192, 6, 6}, {2, 64, 4, 6}, {1, 192, 6, 7}, {2, 128, 5, 7}};
};
template <>
struct Fields<2> {
  static constexpr BitField table[] = {{0, 3, 0, 0}, {0, 12, 2, 1}, {0, 48, 4, 2}, {0, 192, 6, 3},
                                       {1, 3, 0, 4}, {1, 12, 2, 5}, {1, 48, 4, 6}, {1, 192, 6, 7}};
};

template <int BITS>
constexpr int kNumFields = sizeof(Fields<BITS>::table) / sizeof(BitField);

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// One row of the descriptor table, resolved against the arenas; what kernels need is worked out once.
struct Matrix {
  const uint8_t* codes = nullptr;
  const void* scales = nullptr;         // [tiles, groups, 16]
  const int8_t* zero_points = nullptr;  // likewise, signed; null = symmetric
  bool bfloat16_scales = false;
  int bits = 0, rows = 0, columns = 0, group = 0;
  int tiles = 0, groups = 0, padded_group = 0, padded_columns = 0;
  int block = 0;  // columns summed in integers before a scale is applied
  int zero_point = 0;
  int64_t tile_bytes = 0;

  Matrix() = default;
  Matrix(int bits, int rows, int columns, int group) : bits(bits), rows(rows), columns(columns), group(group) {
    tiles = round_up(rows, kRows) / kRows;
    if (bits == 16) {
      padded_columns = columns;
      tile_bytes = int64_t{2} * kRows * columns;
      return;
    }
    groups = columns / group;
    padded_group = round_up(group, bits == kTernary ? kTernaryUnit : kUnit);
    padded_columns = groups * padded_group;
    block = padded_group % 128 == 0 ? 128 : padded_group % 64 == 0 ? 64 : kUnit;
    zero_point = bits == kTernary ? 1 : 1 << (bits - 1);
    tile_bytes = bits == kTernary ? round_up(padded_columns / kTernaryUnit * kTernaryUnitBytes, kLine)
                                  : int64_t{padded_columns} * kRows * bits / 8;
  }
  int64_t num_scales() const { return int64_t{tiles} * groups * kRows; }
};

}  // namespace moe_collab
