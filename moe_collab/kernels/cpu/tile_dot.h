// The kernel, once for all instruction sets: V supplies registers, this file the order of work.
//
// V::kHalves registers of V::kBytes bytes make up one 64-byte line (16 rows). V::Int holds 32-bit sums of as many
// rows, V::Float likewise. Everything is inlined into one function per (V, BITS, tokens M, planes P).
#pragma once

#include <cstring>
#include <utility>

#include "kernels.h"
#include "rounding_loops.h"

#define MOE_INLINE inline __attribute__((always_inline))
#define MOE_LAMBDA_INLINE __attribute__((always_inline))

namespace moe_collab {
namespace {

MOE_INLINE int32_t quad(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return four;
}

// Into the second-level cache: there is room for the long distances that memory wants (5 % over the first level).
MOE_INLINE void prefetch_line(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }

template <class V>
struct Tile {
  using Bytes = typename V::Bytes;
  using Int = typename V::Int;
  using Float = typename V::Float;
  static constexpr int H = V::kHalves;

  // --- unpacking: quads[q] = codes of quad q of a unit, one byte each ---

  template <int BITS, int I>
  static MOE_INLINE void add_field(const uint8_t* unit, Bytes* quads) {
    constexpr BitField f = Fields<BITS>::table[I];
    constexpr int mask = f.shift >= 0 ? f.mask >> f.shift : f.mask << -f.shift;
    Bytes part = V::template shift<f.shift>(V::load(unit + kLine * f.line));
    if constexpr (mask != 255) part = V::mask(part, mask);
    constexpr bool first = [] {
      for (int i = 0; i < I; ++i)
        if (Fields<BITS>::table[i].quad == Fields<BITS>::table[I].quad) return false;
      return true;
    }();
    if constexpr (first) {
      quads[f.quad] = part;
    } else {
      quads[f.quad] = V::merge(quads[f.quad], part);
    }
  }

  // One quad alone.
  template <int BITS, int Q>
  static MOE_INLINE Bytes unpack_quad(const uint8_t* unit) {
    Bytes quads[8];
    [&]<int... I>(std::integer_sequence<int, I...>) MOE_LAMBDA_INLINE {
      ([&] {
        if constexpr (Fields<BITS>::table[I].quad == Q) add_field<BITS, I>(unit, quads);
      }(), ...);
    }(std::make_integer_sequence<int, kNumFields<BITS>>{});
    return quads[Q];
  }

  template <int BITS>
  static MOE_INLINE void unpack(const uint8_t* unit, Bytes* quads) {
    [&]<int... I>(std::integer_sequence<int, I...>) MOE_LAMBDA_INLINE {
      (add_field<BITS, I>(unit, quads), ...);
    }(std::make_integer_sequence<int, kNumFields<BITS>>{});
  }

  // --- sums of a block: acc[token][plane] ---

  template <int BITS, int M, int P>
  static MOE_INLINE void block_unpacked(const uint8_t* codes, int columns, int prefetch, int half, int at,
                                        const Activations* x, Int (&acc)[M][P][H]) {
    for (int k = 0; k < columns; k += kUnit, codes += kLine * BITS) {
      Bytes quads[8];
      unpack<BITS>(codes, quads);
      if (half == 0)
        for (int line = 0; line < BITS; ++line) prefetch_line(codes + prefetch + kLine * line);
      V::template dot8<BITS, M, P>(quads, x, at + k, half, acc);
    }
  }

  // Masked fields are multiplied where they lie, one sum per shift; sums are shifted once, at the block's end.
  template <int BITS, int I, int P>
  static MOE_INLINE void add_raw(const uint8_t* unit, const Activations& x, int k, Int (&acc)[16][P]) {
    constexpr BitField f = Fields<BITS>::table[I];
    Bytes part = V::load(unit + kLine * f.line);
    if constexpr (f.mask != 255) part = V::mask(part, f.mask);
    constexpr int c = f.shift + (BITS == 8 ? 8 * (I & 1) : 0);
    acc[c][0] = V::dot(acc[c][0], part, x.high + k + 4 * f.quad);
    if constexpr (P == 2) acc[c][1] = V::dot(acc[c][1], part, x.low + k + 4 * f.quad);
  }

  template <int BITS, int P>
  static MOE_INLINE void block_raw(const uint8_t* codes, int columns, int prefetch, int at, const Activations* x,
                                   Int (&out)[1][P][H]) {
    Int acc[16][P];
    for (auto& c : acc)
      for (auto& a : c) a = V::zero();
    for (int k = 0; k < columns; k += kUnit, codes += kLine * BITS) {
#pragma GCC unroll 8
      for (int line = 0; line < BITS; ++line) prefetch_line(codes + prefetch + kLine * line);
      [&]<int... I>(std::integer_sequence<int, I...>) MOE_LAMBDA_INLINE {
        (add_raw<BITS, I, P>(codes, *x, at + k, acc), ...);
      }(std::make_integer_sequence<int, kNumFields<BITS>>{});
    }
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      out[0][p][0] = acc[0][p];
      [&]<int... S>(std::integer_sequence<int, S...>) MOE_LAMBDA_INLINE {
        (merge_raw<BITS, S + 1>(acc[S + 1][p], out[0][p][0]), ...);
      }(std::make_integer_sequence<int, 15>{});
    }
  }

  // One token without VNNI: both halves of a quad share the activations, and products stay in 16 bits as long as they
  // fit, over several units where codes are small.
  template <int BITS, int P>
  static MOE_INLINE void block_paired(const uint8_t* codes, int columns, int prefetch, int at, const Activations* x,
                                      Int (&acc)[1][P][H]) {
    constexpr int kFit = 32767 / (2 * 127 * ((1 << BITS) - 1));  // quads
    Bytes pairs[P][H];
    const auto clear = [&]() MOE_LAMBDA_INLINE {
      for (auto& p : pairs)
        for (auto& b : p) b = V::zero();
    };
    const auto widen = [&]() MOE_LAMBDA_INLINE {
      for (int p = 0; p < P; ++p)
        for (int h = 0; h < H; ++h) acc[0][p][h] = V::widen(acc[0][p][h], pairs[p][h]);
    };
    clear();
    for (int k = 0; k < columns; k += kUnit, codes += kLine * BITS) {
#pragma GCC unroll 8
      for (int line = 0; line < BITS; ++line) prefetch_line(codes + prefetch + kLine * line);
      const int8_t* high = x->high + at + k;
      const int8_t* low = x->low + at + k;
      [&]<int... Q>(std::integer_sequence<int, Q...>) MOE_LAMBDA_INLINE {
        ([&]() MOE_LAMBDA_INLINE {
          const Bytes first = unpack_quad<BITS, Q>(codes), second = unpack_quad<BITS, Q>(codes + V::kBytes);
          const Bytes upper = V::spread(high + 4 * Q);
          pairs[0][0] = V::add_products(pairs[0][0], first, upper);
          pairs[0][1] = V::add_products(pairs[0][1], second, upper);
          if constexpr (P == 2) {
            const Bytes lower = V::spread(low + 4 * Q);
            pairs[1][0] = V::add_products(pairs[1][0], first, lower);
            pairs[1][1] = V::add_products(pairs[1][1], second, lower);
          }
          if constexpr (kFit < 32 && (Q + 1) % (kFit >= 8 ? 8 : 4) == 0) {
            widen();
            clear();
          }
        }(), ...);
      }(std::make_integer_sequence<int, 8>{});
    }
    if constexpr (kFit >= 32) widen();
  }

  template <int BITS, int C>
  static MOE_INLINE void merge_raw(Int sum, Int& total) {
    constexpr bool used = [] {
      for (int i = 0; i < kNumFields<BITS>; ++i)
        if (Fields<BITS>::table[i].shift + (BITS == 8 ? 8 * (i & 1) : 0) == C) return true;
      return false;
    }();
    if constexpr (used) total = V::add(total, V::template shift_right<C % 8>(sum));
  }

  template <int M, int P>
  static MOE_INLINE void block_ternary(const uint8_t* codes, const uint8_t* tail, int columns, int prefetch, int half,
                                       int at, const Activations* x, Int (&acc)[M][P][H]) {
    for (int k = 0; k < columns; k += kTernaryUnit, codes += 3 * kLine, tail += kRows) {
      Bytes quads[16];
      for (int line = 0; line < 3; ++line) {
        V::trits(V::load(codes + kLine * line), quads + 5 * line);
        if (half == 0) prefetch_line(codes + prefetch + kLine * line);
      }
      quads[15] = V::pairs(tail + kRows / H * half);
      V::template dot8<2, M, P>(quads, x, at + k, half, acc);
      V::template dot8<2, M, P>(quads + 8, x, at + k + kUnit, half, acc);
    }
  }

  // --- a tile ---

  template <int BITS, int M, int P>
  static void dot(const Matrix& w, int tile, const Activations* x, float* out, int prefetch) {
    constexpr int kStorage = BITS == kTernary ? 3 * kLine / kTernaryUnit : 2 * BITS;  // bytes of lines per column
    const int columns = w.padded_columns, block = w.block, per_group = w.padded_group / block;
    const uint8_t* codes = w.codes + tile * w.tile_bytes;
    const uint8_t* tail = codes + columns * 3;
    const int64_t first = static_cast<int64_t>(tile) * w.groups * kRows;
    Float total[M][H];
    for (auto& t : total)
      for (auto& f : t) f = V::zero_float();
    for (int b = 0, g = 0, left = per_group; b < columns / block; ++b, codes += kStorage * block) {
      Int acc[M][P][H];
      for (auto& t : acc)
        for (auto& p : t)
          for (auto& h : p) h = V::zero();
      if constexpr (BITS == kTernary) {
        for (int h = 0; h < H; ++h)
          block_ternary<M, P>(codes + V::kBytes * h, tail, block, prefetch, h, b * block, x, acc);
        tail += block / kTernaryUnit * kRows;
      } else if constexpr (V::kFullRange && M == 1 && (BITS <= 4 || BITS == 8)) {
        block_raw<BITS, P>(codes, block, prefetch, b * block, x, acc);
      } else if constexpr (V::kPaired && M == 1 && BITS <= 5) {
        block_paired<BITS, P>(codes, block, prefetch, b * block, x, acc);
      } else {
        for (int h = 0; h < H; ++h)
          block_unpacked<BITS, M, P>(codes + V::kBytes * h, block, prefetch, h, b * block, x, acc);
      }
      for (int h = 0; h < H; ++h) {
        const int64_t at = first + g * kRows + h * (kRows / H);
        const Float scale = w.bfloat16_scales ? V::load_bfloat16(static_cast<const uint16_t*>(w.scales) + at)
                                              : V::load_float(static_cast<const float*>(w.scales) + at);
        const Int zero = w.zero_points == nullptr ? V::set(w.zero_point)
                                                  : V::add(V::set(w.zero_point), V::load_int8(w.zero_points + at));
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          Int sum = acc[m][0][h];
          if constexpr (P == 2) sum = V::add(V::template shift_left<7>(sum), acc[m][1][h]);
          sum = V::subtract(sum, V::multiply(zero, x[m].sum[b]));
          total[m][h] = V::fma(V::to_float(sum), V::scale(scale, x[m].scale[b]), total[m][h]);
        }
      }
      if (--left == 0) ++g, left = per_group;
    }
    for (int m = 0; m < M; ++m)
      for (int h = 0; h < H; ++h) V::store(out + m * kRows + h * (kRows / H), total[m][h]);
  }

  template <int M>
  static void dot_bfloat16(const Matrix& w, int tile, const Activations* x, float* out, int prefetch) {
    const uint8_t* codes = w.codes + tile * w.tile_bytes;
    Float total[M][2][H];
    for (auto& t : total)
      for (auto& p : t)
        for (auto& f : p) f = V::zero_float();
    for (int k = 0; k < w.columns; k += 2, codes += kLine) {
      prefetch_line(codes + prefetch);
      for (int h = 0; h < H; ++h) {
        Float even, odd;
        V::load_pairs(codes + V::kBytes * h, even, odd);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          total[m][0][h] = V::fma(even, V::set_float(x[m].exact[k]), total[m][0][h]);
          total[m][1][h] = V::fma(odd, V::set_float(x[m].exact[k + 1]), total[m][1][h]);
        }
      }
    }
    for (int m = 0; m < M; ++m)
      for (int h = 0; h < H; ++h)
        V::store(out + m * kRows + h * (kRows / H), V::add_float(total[m][0][h], total[m][1][h]));
  }
};

// The instances for 1, 2, 4 and 8 tokens; those beyond MAX are never called.
template <class V, int BITS, int P, int MAX, int M = 1>
constexpr DotTile instance() {
  if constexpr (M > MAX) {
    return nullptr;
  } else if constexpr (BITS == 16) {
    return &Tile<V>::template dot_bfloat16<M>;
  } else {
    return &Tile<V>::template dot<BITS, M, P>;
  }
}

// The table of instruction set V, whose kernels take up to MAX tokens.
template <class V, int MAX>
constexpr Kernels make_kernels(const char* name) {
  Kernels kernels{name, MAX, {}, {}, quantize, apply_gate, to_float, from_float,
                  search, feed_back, descend};
  [&]<int... F>(std::integer_sequence<int, F...>) {
    ((kernels.dot[F][0][0] = instance<V, kFormatBits[F], 1, MAX, 1>(),
      kernels.dot[F][0][1] = instance<V, kFormatBits[F], 1, MAX, 2>(),
      kernels.dot[F][0][2] = instance<V, kFormatBits[F], 1, MAX, 4>(),
      kernels.dot[F][0][3] = instance<V, kFormatBits[F], 1, MAX, 8>(),
      kernels.dot[F][1][0] = instance<V, kFormatBits[F], 2, MAX, 1>(),
      kernels.dot[F][1][1] = instance<V, kFormatBits[F], 2, MAX, 2>(),
      kernels.dot[F][1][2] = instance<V, kFormatBits[F], 2, MAX, 4>(),
      kernels.dot[F][1][3] = instance<V, kFormatBits[F], 2, MAX, 8>()),
     ...);
  }(std::make_integer_sequence<int, 8>{});
  return kernels;
}

}  // namespace
}  // namespace moe_collab
