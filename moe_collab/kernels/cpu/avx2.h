// 256-bit registers: half a line each, for processors with AVX2 and, where VNNI is true, AVX-VNNI.
#pragma once

#include <immintrin.h>

#include "tile_dot.h"

namespace moe_collab {
namespace {

template <bool VNNI>
struct Avx2 {
  static constexpr int kHalves = 2, kBytes = 32;
  static constexpr bool kFullRange = false, kPaired = !VNNI;
  using Bytes = __m256i;
  using Int = __m256i;
  using Float = __m256;

  static MOE_INLINE Bytes load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static MOE_INLINE Bytes mask(Bytes b, int m) { return _mm256_and_si256(b, _mm256_set1_epi8(static_cast<char>(m))); }
  static MOE_INLINE Bytes merge(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
  template <int S>
  static MOE_INLINE Bytes shift(Bytes b) {
    if constexpr (S > 0) return _mm256_srli_epi16(b, S);
    if constexpr (S < 0) return _mm256_slli_epi16(b, -S);
    return b;
  }

  static MOE_INLINE __m256i spread(const int8_t* x) { return _mm256_set1_epi32(quad(x)); }
  static MOE_INLINE Int widen(Int sum, __m256i pairs) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static MOE_INLINE __m256i add_products(__m256i pairs, Bytes quad, __m256i x) {
    return _mm256_add_epi16(pairs, _mm256_maddubs_epi16(quad, x));
  }
  // Without VNNI products go through 16-bit sums, which hold as many quads as MOST codes allow.
  template <int MOST>
  static MOE_INLINE Int dot_small(Int sum, const Bytes* quads, const int8_t* x) {
    constexpr int kTogether = 32767 / (2 * 127 * MOST) >= 8 ? 8 : 32767 / (2 * 127 * MOST) >= 4 ? 4 : 2;
    static_assert(kTogether * 2 * 127 * MOST <= 32767);
#pragma GCC unroll 4
    for (int q = 0; q < 8; q += kTogether) {
      __m256i pairs = _mm256_maddubs_epi16(quads[q], spread(x + 4 * q));
#pragma GCC unroll 8
      for (int i = 1; i < kTogether; ++i)
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(quads[q + i], spread(x + 4 * (q + i))));
      sum = widen(sum, pairs);
    }
    return sum;
  }
  template <int BITS>
  static MOE_INLINE Int dot_plane(Int sum, const Bytes* quads, const int8_t* x) {
    if constexpr (VNNI) {
#pragma GCC unroll 8
      for (int q = 0; q < 8; ++q) sum = _mm256_dpbusd_avx_epi32(sum, quads[q], spread(x + 4 * q));
      return sum;
    } else if constexpr (BITS == 8) {
      Bytes part[8];
      for (int q = 0; q < 8; ++q) part[q] = mask(quads[q], 15);
      sum = dot_small<15>(sum, part, x);
      for (int q = 0; q < 8; ++q) part[q] = mask(shift<4>(quads[q]), 15);
      return add(sum, shift_left<4>(dot_small<15>(zero(), part, x)));
    } else {
      return dot_small<(1 << BITS) - 1>(sum, quads, x);
    }
  }
  template <int BITS, int M, int P>
  static MOE_INLINE void dot8(const Bytes* quads, const Activations* x, int k, int half, Int (&acc)[M][P][2]) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      acc[m][0][half] = dot_plane<BITS>(acc[m][0][half], quads, x[m].high + k);
      if constexpr (P == 2) acc[m][1][half] = dot_plane<BITS>(acc[m][1][half], quads, x[m].low + k);
    }
  }

  // As in avx512.cpp.
  static MOE_INLINE void trits(Bytes b, Bytes* out) {
    const __m256i low = _mm256_set1_epi16(255), third = _mm256_set1_epi16(171);
#pragma GCC unroll 5
    for (int i = 0; i < 5; ++i) {
      const __m256i even = _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_and_si256(b, low), third), 9);
      const __m256i odd = _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_srli_epi16(b, 8), third), 9);
      const __m256i quotient = _mm256_or_si256(even, _mm256_slli_epi16(odd, 8));
      out[i] = _mm256_sub_epi8(b, _mm256_add_epi8(quotient, _mm256_add_epi8(quotient, quotient)));
      b = quotient;
    }
  }
  static MOE_INLINE Bytes pairs(const uint8_t* p) {
    const __m256i r = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return mask(r | _mm256_slli_epi32(r, 6) | _mm256_slli_epi32(r, 12) | _mm256_slli_epi32(r, 18), 3);
  }

  static MOE_INLINE Int zero() { return _mm256_setzero_si256(); }
  static MOE_INLINE Int set(int x) { return _mm256_set1_epi32(x); }
  static MOE_INLINE Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static MOE_INLINE Int subtract(Int a, Int b) { return _mm256_sub_epi32(a, b); }
  static MOE_INLINE Int multiply(Int a, int b) { return _mm256_mullo_epi32(a, _mm256_set1_epi32(b)); }
  template <int S>
  static MOE_INLINE Int shift_left(Int a) { return _mm256_slli_epi32(a, S); }
  static MOE_INLINE Int load_int8(const int8_t* p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }

  static MOE_INLINE Float zero_float() { return _mm256_setzero_ps(); }
  static MOE_INLINE Float set_float(float x) { return _mm256_set1_ps(x); }
  static MOE_INLINE Float to_float(Int a) { return _mm256_cvtepi32_ps(a); }
  static MOE_INLINE Float scale(Float a, float b) { return _mm256_mul_ps(a, _mm256_set1_ps(b)); }
  static MOE_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static MOE_INLINE Float add_float(Float a, Float b) { return _mm256_add_ps(a, b); }
  static MOE_INLINE Float load_float(const float* p) { return _mm256_loadu_ps(p); }
  static MOE_INLINE Float load_bfloat16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static MOE_INLINE void load_pairs(const uint8_t* p, Float& even, Float& odd) {
    const __m256i both = load(p);
    even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static MOE_INLINE void store(float* p, Float a) { _mm256_storeu_ps(p, a); }
};

}  // namespace
}  // namespace moe_collab
