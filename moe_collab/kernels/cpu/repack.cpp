// Checkpoint codes -> tiles. The inverse of what the kernels unpack, driven by the same table of bit fields.
#include "repack.h"

#include <cstring>
#include <utility>

namespace moe_collab {
namespace {

// Reads stored codes: dense (32 codes in `bits` words), padded (32 / bits codes a word), ternary bytes, or bfloat16.
struct Stored {
  const uint8_t* data;
  int64_t row_bytes, group;  // group: of ternary bytes, which start anew with each
  int bits;
  bool padded;

  // `count` unsigned codes of row r from column c on.
  void read(int64_t r, int64_t c, int count, uint8_t* out) const {
    const uint8_t* row = data + r * row_bytes;
    if (bits == kTernary) return read_ternary(row, c, count, out);
    if (c % 32 == 0 && count == 32 && (!padded || 32 % bits == 0)) return read_words(row + c / 8 * bits, out);
    for (int i = 0; i < count; ++i) out[i] = static_cast<uint8_t>(at(row, c + i));
  }

 private:
  static uint32_t word(const uint8_t* row, int64_t i) {
    uint32_t w;
    std::memcpy(&w, row + 4 * i, 4);
    return w;
  }
  uint32_t at(const uint8_t* row, int64_t c) const {
    const int64_t per = 32 / bits, bit = padded ? c / per * 32 + c % per * bits : c * bits;
    const int64_t index = bit >> 5, offset = bit & 31;
    uint64_t window = word(row, index);
    if (offset + bits > 32) window |= static_cast<uint64_t>(word(row, index + 1)) << 32;
    return (window >> offset) & ((1u << bits) - 1);
  }
  void read_ternary(const uint8_t* row, int64_t c, int count, uint8_t* out) const {
    static constexpr int kPowers[5] = {1, 3, 9, 27, 81};
    const int64_t inside = c % group;
    const uint8_t* next = row + c / group * ((group + 4) / 5) + inside / 5;
    int left = 5 - static_cast<int>(inside % 5), value = *next++ / kPowers[inside % 5];
    for (int i = 0; i < count; ++i, value /= 3, --left) {
      if (left == 0) left = 5, value = *next++;
      out[i] = static_cast<uint8_t>(value % 3);
    }
  }
  template <int BITS>
  static void read_whole(const uint8_t* from, uint8_t* out) {
    uint32_t words[BITS + 1] = {};
    std::memcpy(words, from, 4 * BITS);
#pragma GCC unroll 32
    for (int k = 0; k < 32; ++k) {
      const int index = k * BITS / 32, offset = k * BITS % 32;
      const uint64_t window = words[index] | static_cast<uint64_t>(words[index + 1]) << 32;
      out[k] = (window >> offset) & ((1u << BITS) - 1);
    }
  }
  // 32 codes that fill whole words; one by one they take three times as long.
  void read_words(const uint8_t* from, uint8_t* out) const {
    switch (bits) {
      case 2:
        return read_whole<2>(from, out);
      case 3:
        return read_whole<3>(from, out);
      case 4:
        return read_whole<4>(from, out);
      case 5:
        return read_whole<5>(from, out);
      case 6:
        return read_whole<6>(from, out);
      case 7:
        return read_whole<7>(from, out);
      default:
        return read_whole<8>(from, out);
    }
  }
};

// The codes of one unit, a line for each quad in the order of the storage; zero points where there is no weight.
using Unit = uint8_t[kTernaryUnit / 4][kLine];

template <int BITS, int I>
void write_field(const uint8_t (*quads)[kLine], uint8_t* out) {
  constexpr BitField f = Fields<BITS>::table[I];
  for (int i = 0; i < kLine; ++i) {
    const int code = quads[f.quad][i];
    out[kLine * f.line + i] |= (f.shift >= 0 ? code << std::max(f.shift, 0) : code >> std::max(-f.shift, 0)) & f.mask;
  }
}

template <int BITS>
void write_unit(const uint8_t (*quads)[kLine], uint8_t* __restrict out) {
  alignas(64) uint8_t lines[kLine * BITS] = {};
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (write_field<BITS, I>(quads, lines), ...);
  }(std::make_integer_sequence<int, kNumFields<BITS>>{});
  std::memcpy(out, lines, sizeof(lines));
}

void write_ternary_unit(const Unit& quads, uint8_t* lines, uint8_t* tail) {
  for (int line = 0; line < 3; ++line) {
    for (int i = 0; i < kLine; ++i) {
      const auto trit = [&](int n) { return quads[5 * line + n][i]; };
      lines[kLine * line + i] =
          static_cast<uint8_t>(trit(0) + 3 * trit(1) + 9 * trit(2) + 27 * trit(3) + 81 * trit(4));
    }
  }
  for (int r = 0; r < kRows; ++r) {
    tail[r] = 0;
    for (int j = 0; j < 4; ++j) tail[r] |= quads[15][4 * r + j] << (2 * j);
  }
}

void write_unit(int bits, const Unit& quads, uint8_t* out) {
  switch (bits) {
    case 2:
      return write_unit<2>(quads, out);
    case 3:
      return write_unit<3>(quads, out);
    case 4:
      return write_unit<4>(quads, out);
    case 5:
      return write_unit<5>(quads, out);
    case 6:
      return write_unit<6>(quads, out);
    default:
      return write_unit<8>(quads, out);
  }
}

void write_tile(const Matrix& w, const Stored& stored, int64_t row, int64_t column, int tile, uint8_t* out) {
  const int unit = w.bits == kTernary ? kTernaryUnit : kUnit;
  const int valid_rows = std::min(kRows, w.rows - tile * kRows);
  // Signed codes keep their value: the zero point of the storage replaces the stored one.
  const int from = stored.bits == kTernary ? 1 : 1 << (stored.bits - 1);
  const int lift = w.zero_point - from;
  uint8_t* tail = out + w.padded_columns * 3;
  Unit quads;
  for (int g = 0; g < w.groups; ++g) {
    for (int at = 0; at < w.padded_group; at += unit) {
      std::memset(quads, w.zero_point, sizeof(quads));
      const int valid = std::clamp(w.group - at, 0, unit);
      for (int r = 0; r < valid_rows; ++r) {
        uint8_t codes[kTernaryUnit];
        std::memset(codes + valid, from, sizeof(codes) - valid);
        if (valid > 0) stored.read(row + tile * kRows + r, column + g * w.group + at, valid, codes);
        for (int q = 0; q < unit / 4; ++q) {
          uint32_t four;  // none of them overflows
          std::memcpy(&four, codes + 4 * q, 4);
          four += static_cast<uint32_t>(lift) * 0x01010101u;
          std::memcpy(quads[q] + 4 * r, &four, 4);
        }
      }
      if (w.bits == kTernary) {
        write_ternary_unit(quads, out, tail);
        out += 3 * kLine;
        tail += kRows;
      } else {
        write_unit(w.bits, quads, out);
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

// The inverse of write_ternary_unit, one higher: 2-bit codes have zero point 2.
void widen_unit(const uint8_t* lines, const uint8_t* tail, Unit& quads) {
  for (int line = 0; line < 3; ++line) {
    for (int i = 0; i < kLine; ++i) {
      unsigned value = lines[kLine * line + i];
      for (int n = 0; n < 5; ++n, value /= 3) quads[5 * line + n][i] = static_cast<uint8_t>(value % 3 + 1);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < 4; ++j) quads[15][4 * r + j] = (tail[r] >> (2 * j) & 3) + 1;
}

void widen_tile(const Matrix& from, const Matrix& to, const uint8_t* in, uint8_t* out) {
  const uint8_t* tail = in + from.padded_columns * 3;
  Unit quads;
  for (int g = 0; g < from.groups; ++g) {
    for (int at = 0; at < from.padded_group; at += kTernaryUnit, in += 3 * kLine, tail += kRows) {
      widen_unit(in, tail, quads);
      write_unit<2>(quads, out);
      out += kLine * 2;
      // A ternary group is padded to whole units of 64 columns, one of 2 bits to 32.
      if (at + kUnit >= to.padded_group) continue;
      write_unit<2>(quads + kUnit / 4, out);
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
