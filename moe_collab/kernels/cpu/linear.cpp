// x W^T for a weight in pieces [rows_i, columns] that may differ in bits (as fused q, k and v may).
#include "linear.h"

#include <cstring>

namespace moe_collab {
namespace {

struct Piece {
  Matrix weight;
  int64_t first_row;
};

void piece_tiles(const Kernels& kernels, const Piece& piece, const QuantizedRows& x, int64_t num_tokens, int64_t first,
                 int64_t last, int planes, const float* bias, Dtype dtype, uint8_t* out, int64_t out_columns) {
  const int64_t size = dtype == Dtype::float32 ? 4 : 2;
  float y[kMaxPanel * kRows];
  for (int64_t from = 0; from < num_tokens; from += kMaxPanel) {
    const int64_t to = std::min<int64_t>(num_tokens, from + kMaxPanel);
    const TokenBlock tokens(kernels, piece.weight, x, nullptr, from, to, planes);
    for (int tile = static_cast<int>(first); tile < last; ++tile) {
      const int64_t column = piece.first_row + tile * kRows;
      const int valid = std::min(kRows, piece.weight.rows - tile * kRows);
      tokens.dot(piece.weight, tile, y);
      for (int m = 0; m < tokens.count(); ++m) {
        if (bias != nullptr)
          for (int r = 0; r < valid; ++r) y[m * kRows + r] += bias[column + r];
        kernels.from_float(dtype, y + m * kRows, valid, out + ((from + m) * out_columns + column) * size);
      }
    }
  }
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& scales, const Tensor& zero_points,
              const Tensor& table, const std::optional<Tensor>& bias, int64_t activation_bits, int64_t num_rows) {
  const int planes = planes_of(activation_bits);
  require_cpu(x, "x");
  require(x.dim() == 2, "x: [tokens, columns] expected");
  const Dtype dtype = dtype_of(x, "x");
  require_cpu(table, "table");
  require(table.scalar_type() == ScalarType::Long && table.dim() == 2 && table.size(1) == kTableFields,
          "table: int64 [pieces, 7] expected");
  const Arenas arenas(codes, scales, zero_points);
  const int64_t* rows = static_cast<const int64_t*>(table.const_data_ptr());
  const int64_t num_tokens = x.size(0), columns = x.size(1);
  std::vector<Piece> pieces;
  std::vector<BlockLayout> layouts;
  int64_t out_columns = 0;
  for (int64_t i = 0; i < table.size(0); ++i) {
    const Matrix w = arenas.matrix(rows + i * kTableFields, "piece", i);
    require(w.columns == columns, "table: piece ", i, " has ", w.columns, " columns, x has ", columns);
    pieces.push_back({w, out_columns});
    add_layout(layouts, w);
    out_columns += w.rows;
  }
  require(out_columns == num_rows, "table: its pieces have ", out_columns, " rows, num_rows is ", num_rows);
  const float* offsets = nullptr;
  if (bias.has_value()) {
    require_cpu(*bias, "bias");
    require(bias->scalar_type() == ScalarType::Float && bias->numel() == out_columns, "bias: float32 [", out_columns,
            "] expected");
    offsets = static_cast<const float*>(bias->const_data_ptr());
  }
  Tensor out = torch::stable::new_empty(x, {num_tokens, out_columns});
  const Kernels& kernels = *settings().kernels;
  const int64_t size = dtype == Dtype::float32 ? 4 : 2;
  for (int64_t start = 0; start < num_tokens; start += kPass) {
    const int64_t count = std::min(kPass, num_tokens - start);
    Workspace& workspace = Workspace::get();
    workspace.reset(Workspace::bytes<float>(count * columns) + QuantizedRows::bytes(layouts, count, planes));
    float* exact = workspace.take<float>(count * columns);
    QuantizedRows quantized(workspace, layouts, exact, static_cast<int>(columns), count, planes);
    const uint8_t* source = static_cast<const uint8_t*>(x.const_data_ptr()) + start * columns * size;
    parallel_rows(count, columns, [&](int64_t begin, int64_t end) {
      kernels.to_float(dtype, source + begin * columns * size, (end - begin) * columns, 1.0f, exact + begin * columns);
      quantized.quantize(kernels, begin, end);
    });
    std::vector<Item> items;
    for (const Piece& piece : pieces) items.push_back({piece.weight.tiles, tile_cost(piece.weight, count)});
    uint8_t* target = static_cast<uint8_t*>(out.mutable_data_ptr()) + start * out_columns * size;
    split_work(items, [&](int64_t i, int64_t first, int64_t last) {
      piece_tiles(kernels, pieces[i], quantized, count, first, last, planes, offsets, dtype, target, out_columns);
    });
  }
  return out;
}

}  // namespace moe_collab
