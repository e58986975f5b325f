// Argument checks of the loops of rounding, and their rows split over threads.
#include "rounding.h"

namespace moe_collab {
namespace {

constexpr int64_t kTileRows = 16;  // as many as a vector of `rounding_loops.h` has lanes

void require_matrix(const Tensor& tensor, const char* name, int64_t rows, int64_t columns) {
  require_cpu(tensor, name);
  require(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 2 && tensor.is_contiguous(),
          name, ": contiguous float32 [rows, columns] expected");
  require(tensor.size(0) == rows && tensor.size(1) == columns, name, ": [", rows, ", ", columns, "] expected, not [",
          tensor.size(0), ", ", tensor.size(1), "]");
}

const float* in(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }
float* out(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

struct Shape {
  int64_t rows, columns;
  int group;
};

// Checks `scales` and `zeros` [rows, groups] against a matrix whose columns they share.
Shape shape_of(const Tensor& matrix, const Tensor& scales, const Tensor& zeros) {
  require(matrix.dim() == 2 && scales.dim() == 2, "a weight and its scales have two dimensions");
  const int64_t rows = matrix.size(0), columns = matrix.size(1), groups = scales.size(1);
  require(groups > 0 && columns % groups == 0, columns, " columns cannot share ", groups, " scales");
  require_matrix(scales, "scales", rows, groups);
  require_matrix(zeros, "zeros", rows, groups);
  return {rows, columns, static_cast<int>(columns / groups)};
}

// The block of columns from `begin` on that `block` [rows, n] is about.
int end_of(const Tensor& block, const char* name, const Shape& shape, int64_t begin) {
  require(block.dim() == 2, name, ": [rows, columns of the block] expected");
  require_matrix(block, name, shape.rows, block.size(1));
  const int64_t end = begin + block.size(1);
  require(begin >= 0 && end <= shape.columns && block.size(1) <= kMaxBlock, name, ": columns ", begin, " to ", end,
          " are no block of ", shape.columns);
  return static_cast<int>(end);
}

template <class Arguments>
void each_tile(void (*loop)(const Arguments&, int64_t, int), const Arguments& arguments, const Shape& shape) {
  const int64_t tiles = (shape.rows + kTileRows - 1) / kTileRows;
  parallel_rows(tiles, kTileRows * kMaxBlock * sizeof(float), [&](int64_t from, int64_t to) {
    for (int64_t tile = from; tile < to; ++tile)
      loop(arguments, tile * kTileRows, static_cast<int>(std::min(kTileRows, shape.rows - tile * kTileRows)));
  });
}

}  // namespace

void round_search(const Tensor& weights, const Tensor& importance, const Tensor& scales, const Tensor& zeros,
                  int64_t low, int64_t high, Tensor losses, Tensor chosen) {
  require(weights.dim() == 2 && scales.dim() == 3 && zeros.dim() == 3, "weights [rows, columns], scales and zeros "
          "[candidates, rows, groups] expected");
  const int64_t rows = weights.size(0), columns = weights.size(1), groups = scales.size(2);
  require_matrix(weights, "weights", rows, columns);
  require_cpu(importance, "importance");
  require(importance.scalar_type() == ScalarType::Float && importance.dim() == 1 && importance.size(0) == columns &&
              importance.is_contiguous(), "importance: contiguous float32 [", columns, "] expected");
  require(groups > 0 && columns % groups == 0, columns, " columns cannot share ", groups, " scales");
  for (const Tensor* tensor : {&scales, &zeros}) {
    require_cpu(*tensor, "scales and zeros");
    require(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous() && tensor->size(0) == scales.size(0) &&
                tensor->size(1) == rows && tensor->size(2) == groups,
            "scales and zeros: contiguous float32 of one shape [candidates, ", rows, ", ", groups, "] expected");
  }
  require_matrix(losses, "losses", rows, groups);
  require_cpu(chosen, "chosen");
  require(chosen.scalar_type() == ScalarType::Long && chosen.dim() == 2 && chosen.size(0) == rows &&
              chosen.size(1) == groups && chosen.is_contiguous(), "chosen: contiguous int64 [", rows, ", ", groups,
          "] expected");
  const Search search{in(weights), in(importance), in(scales), in(zeros), rows, columns,
                      static_cast<int>(columns / groups), static_cast<int>(scales.size(0)), static_cast<float>(low),
                      static_cast<float>(high), out(losses), static_cast<int64_t*>(chosen.mutable_data_ptr())};
  const Kernels& kernels = *settings().kernels;
  parallel_rows(rows, columns * scales.size(0), [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) kernels.search(search, row);
  });
}

void round_feed_back(const Tensor& weights, Tensor left, const Tensor& scales, const Tensor& zeros,
                     const Tensor& order, const Tensor& factor, int64_t begin, int64_t low, int64_t high, Tensor codes,
                     Tensor errors) {
  const Shape shape = shape_of(weights, scales, zeros);
  require_matrix(weights, "weights", shape.rows, shape.columns);
  require_matrix(left, "left", shape.rows, shape.columns);
  require_matrix(codes, "codes", shape.rows, shape.columns);
  require_matrix(factor, "factor", shape.columns, shape.columns);
  require_cpu(order, "order");
  require(order.scalar_type() == ScalarType::Long && order.dim() == 1 && order.size(0) == shape.columns &&
              order.is_contiguous(), "order: contiguous int64 [", shape.columns, "] expected");
  const int64_t* columns = static_cast<const int64_t*>(order.const_data_ptr());
  const int end = end_of(errors, "errors", shape, begin);
  for (int64_t j = begin; j < end; ++j)
    require(columns[j] >= 0 && columns[j] < shape.columns, "order: there is no column ", columns[j]);
  const FeedBack arguments{in(weights), out(left), in(scales), in(zeros), columns, in(factor), shape.columns,
                           shape.group, static_cast<int>(begin), end, static_cast<float>(low),
                           static_cast<float>(high), out(codes), out(errors)};
  each_tile(settings().kernels->feed_back, arguments, shape);
}

void round_descend(Tensor codes, Tensor scales, const Tensor& zeros, const Tensor& slope, const Tensor& moments,
                   int64_t begin, int64_t low, int64_t high, std::string scale_dtype, Tensor change) {
  const Shape shape = shape_of(codes, scales, zeros);
  require_matrix(codes, "codes", shape.rows, shape.columns);
  require_matrix(slope, "slope", shape.rows, shape.columns);
  require_matrix(moments, "moments", shape.columns, shape.columns);
  const int end = end_of(change, "change", shape, begin);
  const bool whole = shape.group > kMaxBlock ? begin / shape.group == (end - 1) / shape.group
                                             : begin % shape.group == 0 && end % shape.group == 0;
  require(whole, "change: a block has whole groups, or lies in one");
  require(scale_dtype == "bfloat16" || scale_dtype == "float16" || scale_dtype == "float32",
          "scale_dtype: bfloat16, float16 or float32 expected, not ", scale_dtype);
  const Dtype dtype = scale_dtype == "bfloat16" ? Dtype::bfloat16
                      : scale_dtype == "float16" ? Dtype::float16 : Dtype::float32;
  const Descent arguments{out(codes), out(scales), in(zeros), in(slope), in(moments), shape.columns, shape.group,
                          static_cast<int>(begin), end, static_cast<float>(low), static_cast<float>(high), dtype,
                          out(change)};
  each_tile(settings().kernels->descend, arguments, shape);
}

}  // namespace moe_collab
