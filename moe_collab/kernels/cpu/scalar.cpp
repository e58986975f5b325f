// No instruction set in particular: what runs on any processor, and what the others are tested against.
#include "tile_dot.h"

namespace moe_collab {
namespace {

struct Scalar {
  static constexpr int kHalves = 1, kBytes = 64;
  static constexpr bool kFullRange = false, kPaired = false;
  struct Bytes {
    uint8_t at[64];
  };
  struct Int {
    int32_t at[kRows];
  };
  struct Float {
    float at[kRows];
  };

  template <class R, class F>
  static MOE_INLINE R each(F f) {
    R r;
    for (int i = 0; i < static_cast<int>(sizeof(r.at) / sizeof(r.at[0])); ++i) r.at[i] = f(i);
    return r;
  }

  static MOE_INLINE Bytes load(const uint8_t* p) { return each<Bytes>([=](int i) { return p[i]; }); }
  static MOE_INLINE Bytes mask(const Bytes& b, int m) { return each<Bytes>([&](int i) { return b.at[i] & m; }); }
  static MOE_INLINE Bytes merge(const Bytes& a, const Bytes& b) {
    return each<Bytes>([&](int i) { return a.at[i] | b.at[i]; });
  }
  template <int S>
  static MOE_INLINE Bytes shift(const Bytes& b) {
    return each<Bytes>([&](int i) { return S >= 0 ? b.at[i] >> (S & 7) : b.at[i] << (-S & 7); });
  }
  template <int BITS, int M, int P>
  static MOE_INLINE void dot8(const Bytes* quads, const Activations* x, int k, int, Int (&acc)[M][P][1]) {
    for (int q = 0; q < 8; ++q) {
      for (int m = 0; m < M; ++m) {
        for (int r = 0; r < kRows; ++r) {
          for (int j = 0; j < 4; ++j) {
            const int code = quads[q].at[4 * r + j], at = k + 4 * q + j;
            acc[m][0][0].at[r] += code * x[m].high[at];
            if constexpr (P == 2) acc[m][1][0].at[r] += code * x[m].low[at];
          }
        }
      }
    }
  }
  static MOE_INLINE void trits(Bytes b, Bytes* out) {
    for (int i = 0; i < 5; ++i) {
      out[i] = each<Bytes>([&](int j) { return b.at[j] % 3; });
      b = each<Bytes>([&](int j) { return b.at[j] / 3; });
    }
  }
  static MOE_INLINE Bytes pairs(const uint8_t* p) {
    return each<Bytes>([=](int i) { return (p[i / 4] >> (2 * (i % 4))) & 3; });
  }

  static MOE_INLINE Int zero() { return set(0); }
  static MOE_INLINE Int set(int x) { return each<Int>([=](int) { return x; }); }
  static MOE_INLINE Int add(const Int& a, const Int& b) { return each<Int>([&](int i) { return a.at[i] + b.at[i]; }); }
  static MOE_INLINE Int subtract(const Int& a, const Int& b) {
    return each<Int>([&](int i) { return a.at[i] - b.at[i]; });
  }
  static MOE_INLINE Int multiply(const Int& a, int b) { return each<Int>([&](int i) { return a.at[i] * b; }); }
  template <int S>
  static MOE_INLINE Int shift_left(const Int& a) {
    return each<Int>([&](int i) { return a.at[i] * (1 << S); });
  }
  static MOE_INLINE Int load_int8(const int8_t* p) { return each<Int>([=](int i) { return p[i]; }); }

  static MOE_INLINE Float zero_float() { return set_float(0); }
  static MOE_INLINE Float set_float(float x) { return each<Float>([=](int) { return x; }); }
  static MOE_INLINE Float to_float(const Int& a) {
    return each<Float>([&](int i) { return static_cast<float>(a.at[i]); });
  }
  static MOE_INLINE Float scale(const Float& a, float b) { return each<Float>([&](int i) { return a.at[i] * b; }); }
  static MOE_INLINE Float fma(const Float& a, const Float& b, const Float& c) {
    return each<Float>([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
  }
  static MOE_INLINE Float add_float(const Float& a, const Float& b) {
    return each<Float>([&](int i) { return a.at[i] + b.at[i]; });
  }
  static MOE_INLINE Float load_float(const float* p) { return each<Float>([=](int i) { return p[i]; }); }
  static MOE_INLINE Float load_bfloat16(const uint16_t* p) {
    return each<Float>([=](int i) { return float_of(static_cast<uint32_t>(p[i]) << 16); });
  }
  static MOE_INLINE void load_pairs(const uint8_t* p, Float& even, Float& odd) {
    uint16_t both[2 * kRows];
    std::memcpy(both, p, sizeof(both));
    for (int r = 0; r < kRows; ++r) {
      even.at[r] = float_of(static_cast<uint32_t>(both[2 * r]) << 16);
      odd.at[r] = float_of(static_cast<uint32_t>(both[2 * r + 1]) << 16);
    }
  }
  static MOE_INLINE void store(float* p, const Float& a) { std::memcpy(p, a.at, sizeof(a.at)); }
};

}  // namespace

const Kernels kScalarKernels = make_kernels<Scalar, 1>("scalar");

}  // namespace moe_collab
