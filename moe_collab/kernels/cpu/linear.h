#pragma once

#include "runtime.h"

namespace moe_collab {

// The op behind the schema of `moe_collab.kernels.reference.linear`, over tiles.
Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& scales, const Tensor& zero_points,
              const Tensor& table, const std::optional<Tensor>& bias, int64_t activation_bits, int64_t num_rows);

}  // namespace moe_collab
