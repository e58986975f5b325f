// Checkpoint codes -> tiles. The inverse of what the kernels unpack, driven by the same table of bit fields.
#include "repack.h"

#include <cstring>

namespace moe_collab {
namespace {

// Reads stored codes: dense (32 codes in `bits` words), padded (32 / bits codes a word), ternary bytes, or bfloat16.
struct Stored {
  const uint8_t* data;
  int64_t row_bytes, group;  // group: of ternary bytes, which start anew with each
  int bits;
  bool padded;

  uint32_t word(const uint8_t* row, int64_t i) const {
    uint32_t w;
    std::memcpy(&w, row + 4 * i, 4);
    return w;
  }
  // The unsigned code.
  uint32_t at(int64_t r, int64_t c) const {
    const uint8_t* row = data + r * row_bytes;
    if (bits == kTernary) {
      static constexpr int kPowers[5] = {1, 3, 9, 27, 81};
      const int64_t inside = c % group;
      return row[c / group * ((group + 4) / 5) + inside / 5] / kPowers[inside % 5] % 3;
    }
    const int64_t per = 32 / bits, bit = padded ? c / per * 32 + c % per * bits : c * bits;
    const int64_t index = bit >> 5, offset = bit & 31;
    uint64_t window = word(row, index);
    if (offset + bits > 32) window |= static_cast<uint64_t>(word(row, index + 1)) << 32;
    return (window >> offset) & ((1u << bits) - 1);
  }
};

// codes[r][k] of one unit, zero points where there is no weight.
using Unit = uint8_t[kRows][kTernaryUnit];

template <int BITS>
void write_unit(const Unit& codes, uint8_t* out) {
  std::memset(out, 0, kLine * BITS);
  for (const BitField& f : Fields<BITS>::table) {
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < 4; ++j) {
        const int code = codes[r][4 * f.quad + j];
        out[kLine * f.line + 4 * r + j] |= (f.shift >= 0 ? code << f.shift : code >> -f.shift) & f.mask;
      }
    }
  }
}

void write_ternary_unit(const Unit& codes, uint8_t* lines, uint8_t* tail) {
  for (int line = 0; line < 3; ++line) {
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < 4; ++j) {
        int value = 0;
        for (int i = 4; i >= 0; --i) value = 3 * value + codes[r][4 * (5 * line + i) + j];
        lines[kLine * line + 4 * r + j] = static_cast<uint8_t>(value);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    tail[r] = 0;
    for (int j = 0; j < 4; ++j) tail[r] |= codes[r][60 + j] << (2 * j);
  }
}

void write_unit(int bits, const Unit& codes, uint8_t* out) {
  switch (bits) {
    case 2:
      return write_unit<2>(codes, out);
    case 3:
      return write_unit<3>(codes, out);
    case 4:
      return write_unit<4>(codes, out);
    case 5:
      return write_unit<5>(codes, out);
    case 6:
      return write_unit<6>(codes, out);
    default:
      return write_unit<8>(codes, out);
  }
}

void write_tile(const Matrix& w, const Stored& stored, int64_t row, int64_t column, int tile, uint8_t* out) {
  const int unit = w.bits == kTernary ? kTernaryUnit : kUnit;
  const int valid_rows = std::min(kRows, w.rows - tile * kRows);
  // Signed codes keep their value: the zero point of the storage replaces the stored one.
  const int from = stored.bits == kTernary ? 1 : 1 << (stored.bits - 1);
  const int lift = w.zero_point - from;
  uint8_t* tail = out + w.padded_columns * 3;
  Unit codes;
  for (int g = 0; g < w.groups; ++g) {
    for (int at = 0; at < w.padded_group; at += unit) {
      std::memset(codes, w.zero_point, sizeof(codes));
      for (int r = 0; r < valid_rows; ++r) {
        for (int k = 0; k < unit && at + k < w.group; ++k)
          codes[r][k] = stored.at(row + tile * kRows + r, column + g * w.group + at + k) + lift;
      }
      if (w.bits == kTernary) {
        write_ternary_unit(codes, out, tail);
        out += 3 * kLine;
        tail += kRows;
      } else {
        write_unit(w.bits, codes, out);
        out += kLine * w.bits;
      }
    }
  }
}

void write_bfloat16_tile(const Matrix& w, const Stored& stored, int64_t row, int64_t column, int tile, uint8_t* out) {
  std::memset(out, 0, w.tile_bytes);
  for (int r = 0; r < std::min(kRows, w.rows - tile * kRows); ++r) {
    const uint8_t* source = stored.data + (row + tile * kRows + r) * stored.row_bytes + 2 * column;
    for (int k = 0; k < w.columns; ++k)
      std::memcpy(out + kLine * (k / 2) + 4 * r + 2 * (k % 2), source + 2 * k, 2);
  }
}

// The inverse of write_ternary_unit, 32 columns each, one higher: 2-bit codes have zero point 2.
void widen_unit(const uint8_t* lines, const uint8_t* tail, Unit& low, Unit& high) {
  const auto put = [&](int r, int column, int trit) {
    (column < kUnit ? low : high)[r][column % kUnit] = static_cast<uint8_t>(trit + 1);
  };
  for (int line = 0; line < 3; ++line) {
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < 4; ++j) {
        int value = lines[kLine * line + 4 * r + j];
        for (int i = 0; i < 5; ++i, value /= 3) put(r, 4 * (5 * line + i) + j, value % 3);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < 4; ++j) put(r, 60 + j, tail[r] >> (2 * j) & 3);
}

void widen_tile(const Matrix& from, const Matrix& to, const uint8_t* in, uint8_t* out) {
  const uint8_t* tail = in + from.padded_columns * 3;
  Unit low, high;
  for (int g = 0; g < from.groups; ++g) {
    for (int at = 0; at < from.padded_group; at += kTernaryUnit, in += 3 * kLine, tail += kRows) {
      widen_unit(in, tail, low, high);
      write_unit<2>(low, out);
      out += kLine * 2;
      // A ternary group is padded to whole units of 64 columns, one of 2 bits to 32.
      if (at + kUnit >= to.padded_group) continue;
      write_unit<2>(high, out);
      out += kLine * 2;
    }
  }
}

// Where one row of the table says that a weight's codes lie; its scales and zero points may lie anywhere.
Matrix find_codes(const Tensor& codes, const Tensor& descriptor, const char* name) {
  require_cpu(descriptor, "descriptor");
  require_cpu(codes, name);
  require(descriptor.scalar_type() == ScalarType::Long && descriptor.numel() == kTableFields,
          "descriptor: a row of the table, int64 [7], expected");
  require(codes.scalar_type() == ScalarType::Byte, name, ": uint8 expected");
  const int64_t* d = static_cast<const int64_t*>(descriptor.const_data_ptr());
  const int64_t row_of_codes[kTableFields] = {d[0], d[1], d[2], 0, -1, d[5], d[6]};
  Arenas arenas;
  arenas.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
  arenas.num_codes = codes.numel();
  arenas.num_scales = INT64_MAX;
  return arenas.matrix(row_of_codes, "weight", 0);
}

}  // namespace

void repack(const Tensor& packed, int64_t num_bits, bool padded, int64_t row, int64_t column,
            const Tensor& descriptor, Tensor codes) {
  require_cpu(packed, "packed");
  require(packed.dim() == 2, "packed: two dimensions expected");
  require(num_bits == kTernary || (num_bits >= 2 && num_bits <= 8) || num_bits == 16, "num_bits: ", num_bits,
          " is neither ternary (1), 2 to 8 nor 16");
  const Matrix w = find_codes(codes, descriptor, "codes");
  require(w.bits != 0 && (w.bits == 16) == (num_bits == 16) && (w.bits != kTernary || num_bits == kTernary) &&
              (num_bits == kTernary || w.bits >= num_bits),
          "descriptor: ", w.bits, " bits cannot hold codes of ", num_bits);
  const int64_t rows = packed.size(0), words = packed.size(1);
  Stored stored{static_cast<const uint8_t*>(packed.const_data_ptr()), 0, w.group, static_cast<int>(num_bits), false};
  const int64_t width = column + w.columns;
  bool fits = row >= 0 && column >= 0 && row + w.rows <= rows;
  if (num_bits == 16) {
    require(packed.scalar_type() == ScalarType::BFloat16, "packed: bfloat16 expected for 16 bits");
    stored.row_bytes = 2 * words;
    fits = fits && width <= words;
  } else if (num_bits == kTernary) {
    require(packed.scalar_type() == ScalarType::Byte, "packed: uint8 expected for ternary");
    stored.row_bytes = words;
    fits = fits && column % w.group == 0 && width / w.group * ((w.group + 4) / 5) <= words;
  } else {
    require(packed.scalar_type() == ScalarType::Int, "packed: int32 expected");
    stored.row_bytes = 4 * words;
    stored.padded = padded;
    const int64_t per_word = 32 / num_bits;
    fits = fits && (padded ? (width + per_word - 1) / per_word : (width * num_bits + 31) / 32) <= words;
  }
  require(fits, "packed: [", rows, ", ", words, "] does not hold rows ", row, " to ", row + w.rows, ", columns ", column,
          " to ", width, " of ", num_bits, " bits");
  uint8_t* out = const_cast<uint8_t*>(w.codes);
  torch::stable::parallel_for(0, w.tiles, 4, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const auto write = w.bits == 16 ? write_bfloat16_tile : write_tile;
      write(w, stored, row, column, static_cast<int>(tile), out + tile * w.tile_bytes);
    }
  });
}

void widen(const Tensor& codes, const Tensor& descriptor, const Tensor& wide, Tensor target) {
  const Matrix from = find_codes(codes, descriptor, "codes"), to = find_codes(target, wide, "target");
  require(from.bits == kTernary && to.bits == 2 && from.rows == to.rows && from.columns == to.columns &&
              from.group == to.group,
          "wide: the same weight in 2 bits instead of ternary expected");
  uint8_t* out = const_cast<uint8_t*>(to.codes);
  torch::stable::parallel_for(0, from.tiles, 4, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile)
      widen_tile(from, to, from.codes + tile * from.tile_bytes, out + tile * to.tile_bytes);
  });
}

}  // namespace moe_collab
