#include "runtime.h"

namespace moe_collab {

namespace {

constexpr int kDefaultPrefetch = 4096;
// Work below this many bytes is not worth another thread.
constexpr int64_t kBytesPerThread = 32768;

// Every set this processor can run, best first.
std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> found{&kScalarKernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    found.insert(found.begin(), &kAvx2Kernels);
    if (__builtin_cpu_supports("avxvnni")) found.insert(found.begin(), &kAvxVnniKernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni")) {
      found.insert(found.begin(), &kAvx512Kernels);
      static const bool amx =
          __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") && request_amx();
      if (amx) found.insert(found.begin(), &kAmxKernels);
    }
  }
#endif
  return found;
}

}  // namespace

Settings& settings() {
  static Settings current = [] {
    Settings s{usable_kernels().front(), {}};
    std::fill(std::begin(s.prefetch), std::end(s.prefetch), kDefaultPrefetch);
    return s;
  }();
  return current;
}

// Chooses the instruction set by name ("" keeps it, "best" is the default) and, where `bits` is not 0, a prefetch
// distance. Returns the name in use.
std::string configure(std::string name, int64_t bits, int64_t prefetch) {
  if (!name.empty()) {
    const auto usable = usable_kernels();
    const auto found = std::find_if(usable.begin(), usable.end(),
                                    [&](const Kernels* k) { return name == "best" || name == k->name; });
    std::string known;
    for (const Kernels* k : usable) known += std::string(known.empty() ? "" : ", ") + k->name;
    require(found != usable.end(), "name: ", name, " is not an instruction set of this processor (", known, ")");
    settings().kernels = *found;
  }
  if (bits != 0) {
    require(bits > 0 && bits <= 16, "bits: ", bits, " is not between 1 and 16");
    require(prefetch >= 0 && prefetch <= 1 << 20, "prefetch: ", prefetch, " is not between 0 and 1 MiB");
    settings().prefetch[bits] = static_cast<int>(prefetch);
  }
  return settings().kernels->name;
}

void require_cpu(const Tensor& tensor, const char* name) {
  require(tensor.is_cpu(), name, ": a CPU tensor expected");
  require(tensor.is_contiguous(), name, ": a contiguous tensor expected");
}

Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      throw std::invalid_argument(std::string("moe_collab: ") + name + ": float32, bfloat16 or float16 expected");
  }
}

int planes_of(int64_t activation_bits) {
  require(activation_bits == 8 || activation_bits == 16, "activation_bits: ", activation_bits, " is neither 8 nor 16");
  return activation_bits == 16 ? 2 : 1;
}

Arenas::Arenas(const Tensor& c, const Tensor& s, const Tensor& z) {
  require_cpu(c, "codes");
  require_cpu(s, "scales");
  require_cpu(z, "zero_points");
  require(c.scalar_type() == ScalarType::Byte, "codes: uint8 tiles expected (repack them first)");
  const Dtype dtype = dtype_of(s, "scales");
  require(dtype != Dtype::float16, "scales: float32 or bfloat16 expected");
  require(z.scalar_type() == ScalarType::Char, "zero_points: int8 expected");
  codes = static_cast<const uint8_t*>(c.const_data_ptr());
  num_codes = c.numel();
  scales = s.const_data_ptr();
  num_scales = s.numel();
  bfloat16_scales = dtype == Dtype::bfloat16;
  zero_points = static_cast<const int8_t*>(z.const_data_ptr());
  num_zero_points = z.numel();
}

Matrix Arenas::matrix(const int64_t* row, const char* name, int64_t index) const {
  const int64_t bits = row[0], group = row[1], at = row[2], scale_at = row[3], zero_at = row[4];
  const int64_t rows = row[5], columns = row[6];
  if (bits == 0) return {};
  const bool packed = bits == kTernary || (bits >= 2 && bits <= 6) || bits == 8;
  require(packed || bits == 16, "table: row ", index, " (", name, ") has ", bits,
          " bits; tiles of ternary, 2 to 6, 8 and 16 bits are served");
  require(rows > 0 && columns > 0 && rows < 1 << 30 && columns < 1 << 24, "table: row ", index, " (", name,
          ") has a shape of ", rows, " x ", columns);
  require(bits == 16 ? columns % 2 == 0 : group > 0 && columns % group == 0, "table: row ", index, " (", name,
          ") has groups of ", group, ", which do not divide ", columns, " columns");
  Matrix w(static_cast<int>(bits), static_cast<int>(rows), static_cast<int>(columns), static_cast<int>(group));
  w.bfloat16_scales = bfloat16_scales;
  require(at >= 0 && at <= num_codes - w.tiles * w.tile_bytes, "codes: offset ", at, " of table row ", index, " (",
          name, ") lies outside the arena of ", num_codes, " bytes");
  w.codes = codes + at;
  if (bits == 16) return w;
  require(scale_at >= 0 && scale_at <= num_scales - w.num_scales(), "scales: offset ", scale_at, " of table row ",
          index, " (", name, ") lies outside the arena of ", num_scales);
  w.scales = static_cast<const uint8_t*>(scales) + scale_at * (bfloat16_scales ? 2 : 4);
  if (zero_at < 0) return w;
  require(zero_at <= num_zero_points - w.num_scales(), "zero_points: offset ", zero_at, " of table row ", index, " (",
          name, ") lies outside the arena of ", num_zero_points);
  w.zero_points = zero_points + zero_at;
  return w;
}

Workspace& Workspace::get() {
  static thread_local Workspace workspace;
  return workspace;
}

void Workspace::reset(size_t bytes) {
  used_ = 0;
  if (bytes <= capacity_) return;
  std::free(data_);
  capacity_ = (bytes + 4095) / 4096 * 4096;
  data_ = static_cast<uint8_t*>(std::aligned_alloc(64, capacity_));
  if (data_ != nullptr) return;
  capacity_ = 0;
  throw std::bad_alloc();
}

void add_layout(std::vector<BlockLayout>& layouts, const Matrix& w) {
  if (w.bits == 0 || w.bits == 16) return;
  const BlockLayout layout = block_layout(w);
  if (std::find(layouts.begin(), layouts.end(), layout) == layouts.end()) layouts.push_back(layout);
}

size_t QuantizedRows::bytes(const std::vector<BlockLayout>& layouts, int64_t rows, int planes) {
  size_t total = 0;
  for (const BlockLayout& l : layouts)
    total += Workspace::bytes<int8_t>(rows * l.padded_columns() * planes) +
             2 * Workspace::bytes<float>(rows * l.blocks());
  return total;
}

QuantizedRows::QuantizedRows(Workspace& workspace, const std::vector<BlockLayout>& layouts, const float* exact,
                             int columns, int64_t rows, int planes)
    : exact_(exact), columns_(columns), planes_(planes) {
  for (const BlockLayout& l : layouts)
    buffers_.push_back({l, workspace.take<int8_t>(rows * l.padded_columns() * planes),
                        workspace.take<float>(rows * l.blocks()), workspace.take<int32_t>(rows * l.blocks())});
}

void QuantizedRows::quantize(const Kernels& kernels, int64_t begin, int64_t end) {
  for (const Buffers& b : buffers_) {
    for (int64_t row = begin; row < end; ++row) {
      int8_t* high = b.planes + row * b.layout.padded_columns() * planes_;
      kernels.quantize(exact_ + row * columns_, b.layout, planes_, high, high + b.layout.padded_columns(),
                       b.scales + row * b.layout.blocks(), b.sums + row * b.layout.blocks());
    }
  }
}

int QuantizedRows::find(const Matrix& w) const {
  if (w.bits == 0 || w.bits == 16) return -1;
  const BlockLayout layout = block_layout(w);
  int i = 0;
  while (!(buffers_[i].layout == layout)) ++i;
  return i;
}

Activations QuantizedRows::row(int layout, int64_t row) const {
  const float* exact = exact_ + row * columns_;
  if (layout < 0) return {nullptr, nullptr, nullptr, nullptr, exact};
  const Buffers& b = buffers_[layout];
  const int8_t* high = b.planes + row * b.layout.padded_columns() * planes_;
  const int64_t at = row * b.layout.blocks();
  return {high, high + b.layout.padded_columns(), b.scales + at, b.sums + at, exact};
}

void dot_tile(const Kernels& kernels, const Matrix& w, int tile, const Activations* tokens, int count, int planes,
              float* out) {
  const DotTile* dot = kernels.dot[format_index(w.bits)][planes - 1];
  const int prefetch = settings().prefetch[w.bits];
  while (count > 0) {
    int most = kernels.max_tokens, log = most == 8 ? 3 : most == 4 ? 2 : most == 2 ? 1 : 0;
    while (most > count) most /= 2, --log;
    dot[log](w, tile, tokens, out, prefetch);
    tokens += most;
    out += most * kRows;
    count -= most;
  }
}

namespace {

// Fewer tokens than this leave most of the matrix unit idle.
constexpr int kFewestForPanel = 12;

}  // namespace

bool TokenBlock::use_panel(const Kernels& kernels, const Matrix& w, int planes, int64_t count) {
  return count >= kFewestForPanel && w.block % 64 == 0 && w.bits != 16 &&
         kernels.panel[format_index(w.bits)][planes - 1] != nullptr;
}

TokenBlock::TokenBlock(const Kernels& kernels, const Matrix& w, const QuantizedRows& rows, const int64_t* indices,
                       int64_t from, int64_t to, int planes)
    : kernels_(kernels), layout_(rows.find(w)), planes_(planes), count_(static_cast<int>(to - from)) {
  for (int i = 0; i < count_; ++i) tokens_[i] = rows.row(layout_, indices == nullptr ? from + i : indices[from + i]);
  if (!use_panel(kernels, w, planes, count_)) return;
  const int blocks = w.padded_columns / w.block;
  const int64_t values = static_cast<int64_t>(count_) * w.padded_columns * planes;
  buffer_.resize(values + 8 * static_cast<int64_t>(count_) * blocks);
  uint8_t* target = buffer_.data();
  float* scales = reinterpret_cast<float*>(target + values);
  int32_t* sums = reinterpret_cast<int32_t*>(scales + static_cast<int64_t>(count_) * blocks);
  panel_ = {reinterpret_cast<int8_t*>(target), scales, sums, count_};
  for (int b = 0; b < blocks; ++b) {
    for (int p = 0; p < planes; ++p, target += count_ * w.block)
      for (int i = 0; i < count_; ++i)
        std::copy_n((p == 0 ? tokens_[i].high : tokens_[i].low) + b * w.block, w.block, target + i * w.block);
    for (int i = 0; i < count_; ++i) {
      scales[b * count_ + i] = tokens_[i].scale[b];
      sums[b * count_ + i] = tokens_[i].sum[b];
    }
  }
}

void TokenBlock::dot(const Matrix& w, int tile, float* out) const {
  if (panel_.rows > 0 && use_panel(kernels_, w, planes_, count_)) {
    kernels_.panel[format_index(w.bits)][planes_ - 1](w, tile, panel_, out, settings().prefetch[w.bits]);
  } else {
    dot_tile(kernels_, w, tile, tokens_, count_, planes_, out);
  }
}

void split_work(const std::vector<Item>& items, const std::function<void(int64_t, int64_t, int64_t)>& work) {
  int64_t total = 0;
  for (const Item& item : items) total += item.tiles * item.tile_cost;
  if (total == 0) return;
  const int64_t threads =
      std::min<int64_t>(torch::stable::get_num_threads(), (total + kBytesPerThread - 1) / kBytesPerThread);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    // Thread t does the tiles that start within [t, t + 1) of `threads` equal shares of the cost.
    const auto share = [&](int64_t t) { return static_cast<int64_t>(static_cast<double>(total) * t / threads); };
    const int64_t low = share(begin), high = end == threads ? total : share(end);
    int64_t before = 0;
    for (size_t i = 0; i < items.size(); ++i) {
      const auto tile_at = [&](int64_t cost) {
        const int64_t tile = (cost - before + items[i].tile_cost - 1) / items[i].tile_cost;
        return std::clamp<int64_t>(cost <= before ? 0 : tile, 0, items[i].tiles);
      };
      const int64_t first = tile_at(low), last = tile_at(high);
      if (first < last) work(static_cast<int64_t>(i), first, last);
      before += items[i].tiles * items[i].tile_cost;
    }
  });
}

void parallel_rows(int64_t rows, int64_t columns, const std::function<void(int64_t, int64_t)>& work) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(1, columns)), work);
}

}  // namespace moe_collab
