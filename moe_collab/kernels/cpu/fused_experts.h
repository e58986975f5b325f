#pragma once

#include "runtime.h"

namespace moe_collab {

// The op behind the schema of `moe_collab.kernels.reference.fused_experts`, over tiles.
Tensor fused_experts(const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids, const Tensor& codes,
                     const Tensor& scales, const Tensor& zero_points, const Tensor& table,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& expert_map,
                     std::string activation, bool apply_router_weight_on_input, int64_t activation_bits);

}  // namespace moe_collab
