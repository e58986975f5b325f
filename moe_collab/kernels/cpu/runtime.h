// What the ops share: argument checks, the chosen instruction set, workspace, and work split over threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace moe_collab {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::string message = "moe_collab: ";
  auto text = [](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>) {
      return std::to_string(part);
    } else {
      return std::string(part);
    }
  };
  ((message += text(parts)), ...);
  throw std::invalid_argument(message);
}

// The kernels in use and their prefetch distances (bytes ahead, by bits); set through `configure`.
struct Settings {
  const Kernels* kernels;
  int prefetch[17];
};
Settings& settings();

// The arenas of a layer and its table, checked once per call.
struct Arenas {
  const uint8_t* codes = nullptr;
  int64_t num_codes = 0;
  const void* scales = nullptr;
  int64_t num_scales = 0;
  bool bfloat16_scales = false;
  const int8_t* zero_points = nullptr;
  int64_t num_zero_points = 0;

  Arenas() = default;
  Arenas(const Tensor& codes, const Tensor& scales, const Tensor& zero_points);
  // A row of the table. `name` and `index` say which, in errors.
  Matrix matrix(const int64_t* row, const char* name, int64_t index) const;
};

// Tokens of one pass: bounds the workspace.
constexpr int64_t kPass = 1024;
constexpr int kTableFields = 7;  // columns of the descriptor table

Dtype dtype_of(const Tensor& tensor, const char* name);
void require_cpu(const Tensor& tensor, const char* name);
int planes_of(int64_t activation_bits);

// Memory that grows and is kept, one per calling thread; `take` hands out 64-byte aligned pieces.
class Workspace {
 public:
  static Workspace& get();
  void reset(size_t bytes);
  template <class T>
  T* take(size_t count) {
    T* piece = reinterpret_cast<T*>(data_ + used_);
    used_ += bytes<T>(count);
    return piece;
  }
  template <class T>
  static size_t bytes(size_t count) {
    return (count * sizeof(T) + 63) / 64 * 64;
  }
  ~Workspace() { std::free(data_); }

 private:
  uint8_t* data_ = nullptr;
  size_t capacity_ = 0, used_ = 0;
};

// Rows of activations, quantized for every block layout that occurs among `matrices`.
class QuantizedRows {
 public:
  static size_t bytes(const std::vector<BlockLayout>& layouts, int64_t rows, int planes);
  QuantizedRows(Workspace&, const std::vector<BlockLayout>&, const float* exact, int columns, int64_t rows, int planes);
  void quantize(const Kernels&, int64_t begin, int64_t end);
  // Index of a matrix's layout; 16-bit matrices use the exact values.
  int find(const Matrix& w) const;
  Activations row(int layout, int64_t row) const;

 private:
  struct Buffers {
    BlockLayout layout;
    int8_t* planes;
    float* scales;
    int32_t* sums;
  };
  std::vector<Buffers> buffers_;
  const float* exact_;
  int columns_, planes_;
};

void add_layout(std::vector<BlockLayout>& layouts, const Matrix& w);

// `tile` of `w` times `count` tokens -> out[token][16].
void dot_tile(const Kernels&, const Matrix& w, int tile, const Activations* tokens, int count, int planes, float* out);

// Up to kMaxPanel tokens with the activations that `w` asks for; other matrices of the same layout may use them too.
class TokenBlock {
 public:
  // Tokens `from` to `to` of `rows`, through `indices` unless null.
  TokenBlock(const Kernels&, const Matrix& w, const QuantizedRows& rows, const int64_t* indices, int64_t from,
             int64_t to, int planes);
  // out[token][16]; `out` has room for kMaxPanel tokens.
  void dot(const Matrix& w, int tile, float* out) const;
  int layout() const { return layout_; }
  int count() const { return count_; }

 private:
  static bool use_panel(const Kernels&, const Matrix& w, int planes, int64_t count);

  const Kernels& kernels_;
  int layout_, planes_, count_;
  Activations tokens_[kMaxPanel];
  Panel panel_{};
  std::vector<uint8_t> buffer_;
};

// What a tile costs, in bytes read; arithmetic on `tokens` tokens is converted to bytes.
inline int64_t tile_cost(const Matrix& w, int64_t tokens) {
  return w.tile_bytes + tokens * w.padded_columns;
}

// Splits `costs.size()` items, each of `tiles` equal tiles, evenly by cost: calls work(item, first tile, last tile)
// from as many threads as pay. What a tile computes never depends on the split.
struct Item {
  int64_t tiles, tile_cost;
};
void split_work(const std::vector<Item>& items, const std::function<void(int64_t, int64_t, int64_t)>& work);

void parallel_rows(int64_t rows, int64_t columns, const std::function<void(int64_t, int64_t)>& work);

}  // namespace moe_collab
