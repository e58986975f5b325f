#pragma once

#include "runtime.h"

namespace moe_collab {

// The inner loops of rounding, for float32 matrices; see `moe_collab.rounding.loops`. All tensors are contiguous.

// Which of `scales` and `zeros` [candidates, rows, groups] rounds each group of `weights` [rows, columns] to nearest
// with the least squared error, weighted by `importance` [columns].
void round_search(const Tensor& weights, const Tensor& importance, const Tensor& scales, const Tensor& zeros,
                  int64_t low, int64_t high, Tensor losses, Tensor chosen);

// Error feedback in columns [begin, begin + n) of the order: writes `codes`, and errors [rows, n].
void round_feed_back(const Tensor& weights, Tensor left, const Tensor& scales, const Tensor& zeros,
                     const Tensor& order, const Tensor& factor, int64_t begin, int64_t low, int64_t high, Tensor codes,
                     Tensor errors);

// Descent on scales and codes of columns [begin, begin + n): writes both, and the change of the weight [rows, n].
void round_descend(Tensor codes, Tensor scales, const Tensor& zeros, const Tensor& slope, const Tensor& moments,
                   int64_t begin, int64_t low, int64_t high, std::string scale_dtype, Tensor change);

}  // namespace moe_collab
