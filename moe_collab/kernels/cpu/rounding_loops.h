// The loops of rounding that go column by column, for 16 rows at a time: a row stands in each lane of a vector. They
// compute what `moe_collab.rounding.loops` does in torch. The compiler cuts the vectors to what a processor has.
#pragma once

#include "loops.h"

namespace moe_collab {
namespace {

constexpr int kLanes = 16;
using Lanes = float __attribute__((vector_size(4 * kLanes)));

inline Lanes all(float x) { return Lanes{} + x; }

inline Lanes clamped(Lanes x, Lanes low, Lanes high) {
  const Lanes least = x < low ? low : x;
  return least > high ? high : least;
}

// To the nearest integer, halves to even, of magnitudes below 2^22: the sum's last bit stands for 1.
inline Lanes rounded(Lanes x) { return (x + 12582912.0f) - 12582912.0f; }

// The code nearest to `weight`. It is bounded first: a whole number is added to both ends, so the code is the same.
inline Lanes nearest(Lanes weight, Lanes scale, Lanes zero, float low, float high) {
  return rounded(clamped(weight / scale, low - zero, high - zero)) + zero;
}

// out[j][row] = from[row][j], and `fill` in the lanes of missing rows.
inline void load_tile(const float* from, int64_t stride, int rows, int columns, float fill, Lanes* out) {
  for (int j = 0; j < columns; ++j)
    for (int r = 0; r < kLanes; ++r) out[j][r] = r < rows ? from[r * stride + j] : fill;
}

inline void store_tile(const Lanes* from, int64_t stride, int rows, int columns, float* to) {
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < columns; ++j) to[r * stride + j] = from[j][r];
}

inline Lanes load_column(const float* from, int64_t stride, int rows, float fill) {
  Lanes out = all(fill);
  for (int r = 0; r < rows; ++r) out[r] = from[r * stride];
  return out;
}

inline void store_column(Lanes from, int64_t stride, int rows, float* to) {
  for (int r = 0; r < rows; ++r) to[r * stride] = from[r];
}

// target[i] += factor * row[i]
inline void add_scaled(Lanes factor, const float* row, int count, Lanes* target) {
  for (int i = 0; i < count; ++i) target[i] += factor * row[i];
}

void feed_back(const FeedBack& x, int64_t row, int rows) {
  Lanes left[kMaxBlock], errors[kMaxBlock];
  const int count = x.end - x.begin;
  const int64_t groups = x.columns / x.group, first = row * x.columns;
  load_tile(x.left + first + x.begin, x.columns, rows, count, 0.0f, left);
  for (int j = count - 1; j >= 0; --j) {
    const int64_t column = x.order[x.begin + j], group = row * groups + column / x.group;
    const Lanes scale = load_column(x.scales + group, groups, rows, 1.0f);
    const Lanes zero = load_column(x.zeros + group, groups, rows, 0.0f);
    const Lanes code = nearest(left[j], scale, zero, x.low, x.high);
    errors[j] = (code - zero) * scale - load_column(x.weights + first + column, x.columns, rows, 0.0f);
    add_scaled(-errors[j], x.factor + (x.begin + j) * x.columns + x.begin, j, left);
    store_column(code, x.columns, rows, x.codes + first + column);
  }
  store_tile(errors, count, rows, count, x.errors + row * count);
}

// The scale that fits best with these codes, and the slope that it gives.
inline Lanes fitted(const Descent& x, const Lanes* codes, int begin, int end, Lanes zero, Lanes scale, Lanes* slope) {
  Lanes pulled[kMaxBlock] = {}, gain{}, curvature{};
  const int count = x.end - x.begin;
  for (int j = begin; j < end; ++j)
    add_scaled(codes[j] - zero, x.moments + (x.begin + j) * x.columns + x.begin, count, pulled);
  for (int j = begin; j < end; ++j) {
    gain += (codes[j] - zero) * slope[j];
    curvature += (codes[j] - zero) * pulled[j];
  }
  const Lanes bounded = curvature < 1e-9f ? all(1e-9f) : curvature;
  const Lanes wide = scale - gain / (curvature + 1e-3f * bounded);
  uint8_t stored[4 * kLanes];
  Lanes found;
  from_float(x.scale_dtype, reinterpret_cast<const float*>(&wide), kLanes, stored);
  to_float(x.scale_dtype, stored, kLanes, 1.0f, reinterpret_cast<float*>(&found));
  const Lanes size = found < 0 ? -found : found;
  found = (size > 1e-8f) & (size < INFINITY) ? found : scale;
  for (int i = 0; i < count; ++i) slope[i] += (found - scale) * pulled[i];
  return found;
}

void descend(const Descent& x, int64_t row, int rows) {
  Lanes slope[kMaxBlock], codes[kMaxBlock], before[kMaxBlock];
  const int count = x.end - x.begin, size = x.group < count ? x.group : count;
  const int64_t groups = x.columns / x.group, first = row * x.columns + x.begin;
  load_tile(x.slope + first, x.columns, rows, count, 0.0f, slope);
  load_tile(x.codes + first, x.columns, rows, count, 0.0f, codes);
  for (int begin = 0; begin < count; begin += size) {
    const int end = begin + size < count ? begin + size : count;
    const int64_t group = row * groups + (x.begin + begin) / x.group;
    const Lanes zero = load_column(x.zeros + group, groups, rows, 0.0f);
    Lanes scale = load_column(x.scales + group, groups, rows, 1.0f);
    for (int j = begin; j < end; ++j) before[j] = (codes[j] - zero) * scale;
    if (x.group <= count) {
      scale = fitted(x, codes, begin, end, zero, scale, slope);
      store_column(scale, groups, rows, x.scales + group);
    }
    for (int j = begin; j < end; ++j) {
      const float* moments = x.moments + (x.begin + j) * x.columns + x.begin;
      const Lanes best = rounded(clamped(codes[j] - slope[j] / (moments[j] * scale), all(x.low), all(x.high)));
      const auto moved = best != codes[j];
      bool any = false;
      for (int r = 0; r < kLanes; ++r) any |= moved[r] != 0;
      if (any) add_scaled((best - codes[j]) * scale, moments, count, slope);
      codes[j] = best;
      before[j] = (best - zero) * scale - before[j];
    }
  }
  store_tile(codes, x.columns, rows, count, x.codes + first);
  store_tile(before, count, rows, count, x.change + row * count);
}

// The first `count` floats at `from`, and zeros.
inline Lanes load(const float* from, int count) {
  Lanes out{};
  if (count >= kLanes)
    std::memcpy(&out, from, sizeof out);
  else
    std::memcpy(&out, from, count * sizeof(float));
  return out;
}

void search(const Search& x, int64_t row) {
  constexpr int kTogether = 4;  // candidates, so that one need not wait for the sums of another
  const int groups = static_cast<int>(x.columns / x.group);
  for (int g = 0; g < groups; ++g) {
    const float* weights = x.weights + row * x.columns + g * x.group;
    const float* importance = x.importance + g * x.group;
    float best = INFINITY;
    int64_t chosen = 0;
    for (int first = 0; first < x.candidates; first += kTogether) {
      Lanes scale[kTogether], inverse[kTogether], low[kTogether], high[kTogether], sums[kTogether] = {};
      for (int k = 0; k < kTogether; ++k) {
        const int64_t c = first + k < x.candidates ? first + k : x.candidates - 1;
        const int64_t at = (c * x.rows + row) * groups + g;
        scale[k] = all(x.scales[at]), inverse[k] = all(1.0f / x.scales[at]);
        low[k] = all(x.low - x.zeros[at]), high[k] = all(x.high - x.zeros[at]);
      }
      for (int j = 0; j < x.group; j += kLanes) {
        const Lanes weight = load(weights + j, x.group - j), weighing = load(importance + j, x.group - j);
        for (int k = 0; k < kTogether; ++k) {
          const Lanes error = rounded(clamped(weight * inverse[k], low[k], high[k])) * scale[k] - weight;
          sums[k] += weighing * error * error;
        }
      }
      for (int k = 0; k < kTogether; ++k) {
        float loss = 0;
        for (int r = 0; r < kLanes; ++r) loss += sums[k][r];
        if (loss < best) best = loss, chosen = first + k;
      }
    }
    x.losses[row * groups + g] = best;
    x.chosen[row * groups + g] = chosen;
  }
}

}  // namespace
}  // namespace moe_collab
