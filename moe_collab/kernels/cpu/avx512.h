// AVX-512 with VNNI: one 64-byte register is one line.
#pragma once

#include <immintrin.h>

#include "tile_dot.h"

namespace moe_collab {
namespace {

struct Avx512 {
  static constexpr int kHalves = 1, kBytes = 64;
  static constexpr bool kFullRange = true, kPaired = false;
  using Bytes = __m512i;
  using Int = __m512i;
  using Float = __m512;

  static MOE_INLINE Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static MOE_INLINE Bytes mask(Bytes b, int m) { return _mm512_and_si512(b, _mm512_set1_epi8(static_cast<char>(m))); }
  static MOE_INLINE Bytes merge(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
  template <int S>
  static MOE_INLINE Bytes shift(Bytes b) {
    if constexpr (S > 0) return _mm512_srli_epi16(b, S);
    if constexpr (S < 0) return _mm512_slli_epi16(b, -S);
    return b;
  }

  static MOE_INLINE Int dot(Int sum, Bytes codes, const int8_t* x) {
    return _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(quad(x)));
  }
  template <int BITS, int M, int P>
  static MOE_INLINE void dot8(const Bytes* quads, const Activations* x, int k, int, Int (&acc)[M][P][1]) {
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        acc[m][0][0] = dot(acc[m][0][0], quads[q], x[m].high + k + 4 * q);
        if constexpr (P == 2) acc[m][1][0] = dot(acc[m][1][0], quads[q], x[m].low + k + 4 * q);
      }
    }
  }

  // Five trits of each byte: value = sum of trit_i 3^i, divided by 3 through multiplication by 171 / 512.
  static MOE_INLINE void trits(Bytes b, Bytes* out) {
    const __m512i low = _mm512_set1_epi16(255), third = _mm512_set1_epi16(171);
#pragma GCC unroll 5
    for (int i = 0; i < 5; ++i) {
      const __m512i even = _mm512_srli_epi16(_mm512_mullo_epi16(_mm512_and_si512(b, low), third), 9);
      const __m512i odd = _mm512_srli_epi16(_mm512_mullo_epi16(_mm512_srli_epi16(b, 8), third), 9);
      const __m512i quotient = _mm512_or_si512(even, _mm512_slli_epi16(odd, 8));
      out[i] = _mm512_sub_epi8(b, _mm512_add_epi8(quotient, _mm512_add_epi8(quotient, quotient)));
      b = quotient;
    }
  }
  // Byte r holds four 2-bit codes, for byte lanes 4 r to 4 r + 3.
  static MOE_INLINE Bytes pairs(const uint8_t* p) {
    const __m512i r = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return mask(r | _mm512_slli_epi32(r, 6) | _mm512_slli_epi32(r, 12) |
                    _mm512_slli_epi32(r, 18),
                3);
  }

  static MOE_INLINE Int zero() { return _mm512_setzero_si512(); }
  static MOE_INLINE Int set(int x) { return _mm512_set1_epi32(x); }
  static MOE_INLINE Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static MOE_INLINE Int subtract(Int a, Int b) { return _mm512_sub_epi32(a, b); }
  static MOE_INLINE Int multiply(Int a, int b) { return _mm512_mullo_epi32(a, _mm512_set1_epi32(b)); }
  template <int S>
  static MOE_INLINE Int shift_left(Int a) { return _mm512_slli_epi32(a, S); }
  template <int S>
  static MOE_INLINE Int shift_right(Int a) { return _mm512_srai_epi32(a, S); }
  static MOE_INLINE Int load_int8(const int8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  static MOE_INLINE Float zero_float() { return _mm512_setzero_ps(); }
  static MOE_INLINE Float set_float(float x) { return _mm512_set1_ps(x); }
  static MOE_INLINE Float to_float(Int a) { return _mm512_cvtepi32_ps(a); }
  static MOE_INLINE Float scale(Float a, float b) { return _mm512_mul_ps(a, _mm512_set1_ps(b)); }
  static MOE_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static MOE_INLINE Float add_float(Float a, Float b) { return _mm512_add_ps(a, b); }
  static MOE_INLINE Float load_float(const float* p) { return _mm512_loadu_ps(p); }
  static MOE_INLINE Float load_bfloat16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static MOE_INLINE void load_pairs(const uint8_t* p, Float& even, Float& odd) {
    const __m512i both = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static MOE_INLINE void store(float* p, Float a) { _mm512_storeu_ps(p, a); }
};

}  // namespace
}  // namespace moe_collab
