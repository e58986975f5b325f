// Plain loops that each instruction set's file compiles (and the compiler vectorizes) for itself.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels.h"

namespace moe_collab {
namespace {

inline uint32_t bits_of(float x) {
  uint32_t b;
  std::memcpy(&b, &x, 4);
  return b;
}

inline float float_of(uint32_t b) {
  float x;
  std::memcpy(&x, &b, 4);
  return x;
}

constexpr uint32_t kInfinity = 0x7f800000;
// Smaller blocks than this (their step would be subnormal) count as zero.
constexpr float kTiny = 1e-30f;

// One block of `valid` values, padded with zeros to `size`. Non-finite values make the block's scale NaN, so that
// every product with it is NaN.
template <int PLANES>
inline void quantize_block(const float* __restrict x, int valid, int size, int8_t* __restrict high,
                           int8_t* __restrict low, float* scale, int32_t* sum) {
  constexpr float kMost = PLANES == 2 ? 16256.0f : 127.0f;  // 127 * 128: both planes stay within int8
  uint32_t most = 0;
  for (int i = 0; i < valid; ++i) {
    const uint32_t magnitude = bits_of(x[i]) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  const bool finite = most < kInfinity;
  const float step = finite ? float_of(most) / kMost : NAN;
  const float inverse = finite && float_of(most) > kTiny ? kMost / float_of(most) : 0.0f;
  uint32_t total = 0;
  for (int i = 0; i < valid; ++i) {
    // Adding 1.5 * 2^23 rounds to an integer, which the low bits then hold. (Of non-finite values: anything.)
    const uint32_t q = bits_of(x[i] * inverse + 12582912.0f) - 0x4b400000u;
    total += q;
    if constexpr (PLANES == 2) {
      const int32_t h = static_cast<int32_t>(q + 64) >> 7;
      high[i] = static_cast<int8_t>(h);
      low[i] = static_cast<int8_t>(q - static_cast<uint32_t>(h) * 128);
    } else {
      high[i] = static_cast<int8_t>(q);
    }
  }
  std::memset(high + valid, 0, size - valid);
  if constexpr (PLANES == 2) std::memset(low + valid, 0, size - valid);
  *scale = step;
  *sum = finite ? static_cast<int32_t>(total) : 0;
}

template <int PLANES>
void quantize_row(const float* x, const BlockLayout& layout, int8_t* high, int8_t* low, float* scale, int32_t* sum) {
  for (int group = 0; group < layout.columns; group += layout.group) {
    for (int at = 0; at < layout.padded_group; at += layout.block) {
      const int left = layout.group - at < 0 ? 0 : layout.group - at;
      const int valid = left < layout.block ? left : layout.block;
      quantize_block<PLANES>(x + group + at, valid, layout.block, high, low, scale++, sum++);
      high += layout.block;
      low += layout.block;
    }
  }
}

void quantize(const float* x, const BlockLayout& layout, int planes, int8_t* high, int8_t* low, float* scale,
              int32_t* sum) {
  if (planes == 2) {
    quantize_row<2>(x, layout, high, low, scale, sum);
  } else {
    quantize_row<1>(x, layout, high, low, scale, sum);
  }
}

// exp to 2 ulp: 2^n times a polynomial of degree 6 on [-ln2/2, ln2/2] (Cephes). NaN stays NaN.
inline float exp_fast(float x) {
  const float bounded = x > 88.0f ? 88.0f : x < -87.0f ? -87.0f : x;
  const float shifted = bounded * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * float_of((bits_of(shifted) << 23) + 0x3f800000u);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_fast(-x)); }

// erf to 1.5e-7 (Abramowitz and Stegun, 7.1.26).
inline float erf_fast(float x) {
  const float a = x < 0 ? -x : x;
  const float t = 1.0f / (1.0f + 0.3275911f * a);
  const float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  const float e = 1.0f - p * exp_fast(-a * a);
  return x < 0 ? -e : e;
}

void apply_gate(Gating gating, int n, float* gate, const float* up) {
  switch (gating) {
    case Gating::silu:
      for (int i = 0; i < n; ++i) gate[i] = gate[i] * sigmoid(gate[i]) * up[i];
      break;
    case Gating::gelu:
      for (int i = 0; i < n; ++i) gate[i] = 0.5f * gate[i] * (1.0f + erf_fast(gate[i] * 0.70710678f)) * up[i];
      break;
    case Gating::gelu_tanh:  // 0.5 (1 + tanh(z)) = sigmoid(2 z)
      for (int i = 0; i < n; ++i) {
        const float g = gate[i];
        gate[i] = g * sigmoid(1.5957691216f * (g + 0.044715f * g * g * g)) * up[i];
      }
      break;
    case Gating::swigluoai:  // gpt-oss: both clamped at 7, gate * sigmoid(1.702 gate) * (up + 1)
      for (int i = 0; i < n; ++i) {
        const float g = gate[i] > 7.0f ? 7.0f : gate[i];
        const float u = up[i] > 7.0f ? 7.0f : up[i] < -7.0f ? -7.0f : up[i];
        gate[i] = g * sigmoid(1.702f * g) * (u + 1.0f);
      }
      break;
  }
}

void to_float(Dtype dtype, const void* x, int64_t n, float factor, float* out) {
  switch (dtype) {
    case Dtype::float32:
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<const float*>(x)[i] * factor;
      break;
    case Dtype::bfloat16:
      for (int64_t i = 0; i < n; ++i)
        out[i] = float_of(static_cast<uint32_t>(static_cast<const uint16_t*>(x)[i]) << 16) * factor;
      break;
    case Dtype::float16:
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(static_cast<const _Float16*>(x)[i]) * factor;
      break;
  }
}

inline uint16_t bfloat16_of(float x) {
  const uint32_t b = bits_of(x);
  const uint32_t rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((b & 0x7fffffff) > kInfinity ? (b >> 16) | 64 : rounded);
}

void from_float(Dtype dtype, const float* x, int64_t n, void* out) {
  switch (dtype) {
    case Dtype::float32:
      std::memcpy(out, x, n * sizeof(float));
      break;
    case Dtype::bfloat16:
      for (int64_t i = 0; i < n; ++i) static_cast<uint16_t*>(out)[i] = bfloat16_of(x[i]);
      break;
    case Dtype::float16:
      for (int64_t i = 0; i < n; ++i) static_cast<_Float16*>(out)[i] = static_cast<_Float16>(x[i]);
      break;
  }
}

}  // namespace
}  // namespace moe_collab
