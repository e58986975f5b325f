#pragma once

#include "runtime.h"

namespace moe_collab {

// Writes one checkpoint tensor's rows [row, row + rows) and columns [column, column + columns) as tiles; see
// `moe_collab.kernels.cpu.repack`.
void repack(const Tensor& packed, int64_t num_bits, bool padded, int64_t row, int64_t column,
            const Tensor& descriptor, Tensor codes);

// Ternary tiles -> 2-bit tiles of the same weight. `descriptor` says where it lies in `codes`, `wide` where in `target`.
void widen(const Tensor& codes, const Tensor& descriptor, const Tensor& wide, Tensor target);

}  // namespace moe_collab
