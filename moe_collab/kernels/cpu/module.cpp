// Registers the ops.
#include "fused_experts.h"
#include "linear.h"
#include "repack.h"
#include "rounding.h"

namespace moe_collab {
std::string configure(std::string name, int64_t bits, int64_t prefetch);
}

STABLE_TORCH_LIBRARY_FRAGMENT(moe_collab, m) {
  m.def(
      "fused_experts_cpu(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor codes, Tensor scales, "
      "Tensor zero_points, Tensor table, Tensor? bias, Tensor? expert_map, str activation, "
      "bool apply_router_weight_on_input, int activation_bits) -> Tensor");
  m.def(
      "linear_cpu(Tensor x, Tensor codes, Tensor scales, Tensor zero_points, Tensor table, Tensor? bias, "
      "int activation_bits, int num_rows) -> Tensor");
  m.def(
      "repack_cpu(Tensor packed, int num_bits, bool padded, int row, int column, Tensor descriptor, "
      "Tensor(a!) codes) -> ()");
  m.def("widen_cpu(Tensor codes, Tensor descriptor, Tensor wide, Tensor(a!) target) -> ()");
  m.def(
      "round_search(Tensor weights, Tensor importance, Tensor scales, Tensor zeros, int low, int high, "
      "Tensor(a!) losses, Tensor(b!) chosen) -> ()");
  m.def(
      "round_feed_back(Tensor weights, Tensor(a!) left, Tensor scales, Tensor zeros, Tensor order, Tensor factor, "
      "int begin, int low, int high, Tensor(b!) codes, Tensor(c!) errors) -> ()");
  m.def(
      "round_descend(Tensor(a!) codes, Tensor(b!) scales, Tensor zeros, Tensor slope, Tensor moments, int begin, "
      "int low, int high, str scale_dtype, Tensor(c!) change) -> ()");
  m.def("configure_cpu(str name, int bits, int prefetch) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(moe_collab, CPU, m) {
  m.impl("fused_experts_cpu", TORCH_BOX(&moe_collab::fused_experts));
  m.impl("linear_cpu", TORCH_BOX(&moe_collab::linear));
  m.impl("repack_cpu", TORCH_BOX(&moe_collab::repack));
  m.impl("widen_cpu", TORCH_BOX(&moe_collab::widen));
  m.impl("round_search", TORCH_BOX(&moe_collab::round_search));
  m.impl("round_feed_back", TORCH_BOX(&moe_collab::round_feed_back));
  m.impl("round_descend", TORCH_BOX(&moe_collab::round_descend));
}

STABLE_TORCH_LIBRARY_IMPL(moe_collab, CompositeExplicitAutograd, m) {
  m.impl("configure_cpu", TORCH_BOX(&moe_collab::configure));
}
