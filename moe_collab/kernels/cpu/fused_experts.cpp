// Gate, up, activation, down and the weighted sum over a token's experts, in two sweeps over the routed experts'
// tiles. Every output element is computed by one thread in one order, whatever the number of threads.
#include "fused_experts.h"

#include <cstring>

namespace moe_collab {
namespace {

Gating gating_of(const std::string& name) {
  if (name == "silu") return Gating::silu;
  if (name == "gelu") return Gating::gelu;
  if (name == "gelu_tanh") return Gating::gelu_tanh;
  if (name == "swigluoai") return Gating::swigluoai;
  throw std::invalid_argument("moe_collab: activation: '" + name +
                              "' is not served; known are gelu, gelu_tanh, silu, swigluoai");
}

struct Expert {
  Matrix gate, up, down;
  const float* bias;       // gate, up, down; or null
  int64_t first, last;     // its pairs
};

struct Layer {
  const Kernels& kernels;
  std::vector<Expert> experts;  // those routed to, by id
  std::vector<int64_t> tokens;  // of each pair, sorted by expert
  std::vector<float> weights;   // of each pair
  Gating gating;
  int hidden, width, planes;
  bool weight_on_input;
};

// --- first sweep: h = act(gate x) * up x ---

void add_bias(const float* bias, int count, int valid, float* values) {
  for (int m = 0; m < count; ++m)
    for (int r = 0; r < valid; ++r) values[m * kRows + r] += bias[r];
}

// Blocks of tokens whose activations stay in the second-level cache while tiles go by. Gate and up take turns tile by
// tile: longer runs of either were 5 % slower.
void gate_up_tiles(const Layer& layer, const Expert& e, const QuantizedRows& x, const int64_t* rows, int64_t first,
                   int64_t last, float* h) {
  float g[kMaxPanel * kRows], u[kMaxPanel * kRows];
  for (int64_t from = e.first; from < e.last; from += kMaxPanel) {
    const int64_t to = std::min<int64_t>(e.last, from + kMaxPanel);
    const TokenBlock tokens(layer.kernels, e.gate, x, rows, from, to, layer.planes);
    std::optional<TokenBlock> others;
    if (x.find(e.up) != tokens.layout()) others.emplace(layer.kernels, e.up, x, rows, from, to, layer.planes);
    for (int tile = static_cast<int>(first); tile < last; ++tile) {
      const int at = tile * kRows, valid = std::min(kRows, layer.width - at), count = tokens.count();
      tokens.dot(e.gate, tile, g);
      (others ? *others : tokens).dot(e.up, tile, u);
      if (e.bias != nullptr) {
        add_bias(e.bias + at, count, valid, g);
        add_bias(e.bias + layer.width + at, count, valid, u);
      }
      layer.kernels.gate(layer.gating, count * kRows, g, u);
      for (int m = 0; m < count; ++m)
        std::memcpy(h + (from + m) * layer.width + at, g + m * kRows, valid * sizeof(float));
    }
  }
}

// --- second sweep: out += weight * (down h) ---

void down_tiles(const Layer& layer, const Expert& e, const QuantizedRows& h, int64_t first, int64_t last, float* out) {
  float y[kMaxPanel * kRows];
  for (int64_t from = e.first; from < e.last; from += kMaxPanel) {
    const int64_t to = std::min<int64_t>(e.last, from + kMaxPanel);
    const TokenBlock tokens(layer.kernels, e.down, h, nullptr, from, to, layer.planes);
    for (int tile = static_cast<int>(first); tile < last; ++tile) {
      const int at = tile * kRows, valid = std::min(kRows, layer.hidden - at);
      tokens.dot(e.down, tile, y);
      if (e.bias != nullptr) add_bias(e.bias + 2 * layer.width + at, tokens.count(), valid, y);
      for (int m = 0; m < tokens.count(); ++m) {
        const float weight = layer.weight_on_input ? 1.0f : layer.weights[from + m];
        float* sum = out + layer.tokens[from + m] * layer.hidden + at;
        for (int r = 0; r < valid; ++r) sum[r] += weight * y[m * kRows + r];
      }
    }
  }
}

void run(const Layer& layer, Dtype dtype, const uint8_t* x, int64_t num_tokens, uint8_t* out) {
  const int64_t pairs = static_cast<int64_t>(layer.tokens.size()), size = dtype == Dtype::float32 ? 4 : 2;
  // With the router's weight on the input every pair has an input of its own.
  const int64_t inputs = layer.weight_on_input ? pairs : num_tokens;
  std::vector<BlockLayout> in_layouts, mid_layouts;
  std::vector<Item> first_items, second_items;
  for (const Expert& e : layer.experts) {
    add_layout(in_layouts, e.gate);
    add_layout(in_layouts, e.up);
    add_layout(mid_layouts, e.down);
    const int64_t tokens = e.last - e.first;
    first_items.push_back({e.gate.tiles, tile_cost(e.gate, tokens) + tile_cost(e.up, tokens)});
  }
  Workspace& workspace = Workspace::get();
  workspace.reset(Workspace::bytes<float>(inputs * layer.hidden) + Workspace::bytes<float>(pairs * layer.width) +
                  Workspace::bytes<float>(num_tokens * layer.hidden) +
                  QuantizedRows::bytes(in_layouts, inputs, layer.planes) +
                  QuantizedRows::bytes(mid_layouts, pairs, layer.planes));
  float* exact = workspace.take<float>(inputs * layer.hidden);
  float* h = workspace.take<float>(pairs * layer.width);
  float* sums = workspace.take<float>(num_tokens * layer.hidden);
  QuantizedRows in(workspace, in_layouts, exact, layer.hidden, inputs, layer.planes);
  QuantizedRows mid(workspace, mid_layouts, h, layer.width, pairs, layer.planes);

  parallel_rows(inputs, layer.hidden, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = layer.weight_on_input ? layer.tokens[i] : i;
      layer.kernels.to_float(dtype, x + token * layer.hidden * size, layer.hidden,
                             layer.weight_on_input ? layer.weights[i] : 1.0f, exact + i * layer.hidden);
    }
    in.quantize(layer.kernels, begin, end);
  });
  const int64_t* rows = layer.weight_on_input ? nullptr : layer.tokens.data();
  split_work(first_items, [&](int64_t i, int64_t first, int64_t last) {
    gate_up_tiles(layer, layer.experts[i], in, rows, first, last, h);
  });
  parallel_rows(pairs, layer.width, [&](int64_t begin, int64_t end) { mid.quantize(layer.kernels, begin, end); });
  // Threads own columns of the output, so that experts add up in the same order everywhere.
  int64_t cost = num_tokens * 2;
  for (const Expert& e : layer.experts) cost += tile_cost(e.down, e.last - e.first);
  const int64_t tiles = (layer.hidden + kRows - 1) / kRows;
  split_work({{tiles, cost}}, [&](int64_t, int64_t first, int64_t last) {
    const int64_t begin = first * kRows, count = std::min<int64_t>(layer.hidden, last * kRows) - begin;
    for (int64_t t = 0; t < num_tokens; ++t) std::memset(sums + t * layer.hidden + begin, 0, count * sizeof(float));
    for (const Expert& e : layer.experts) down_tiles(layer, e, mid, first, last, sums);
    for (int64_t t = 0; t < num_tokens; ++t)
      layer.kernels.from_float(dtype, sums + t * layer.hidden + begin, count, out + (t * layer.hidden + begin) * size);
  });
}

// --- routing ---

struct Routing {
  const Tensor &weights, &ids;
  const std::optional<Tensor>& map;
  int64_t num_experts, top_k;

  template <class T>
  static int64_t get(const Tensor& tensor, int64_t i) {
    return static_cast<const T*>(tensor.const_data_ptr())[i];
  }
  static int64_t integer(const Tensor& tensor, int64_t i) {
    return tensor.scalar_type() == ScalarType::Int ? get<int32_t>(tensor, i) : get<int64_t>(tensor, i);
  }
  // The local expert of a pair; -1 = none.
  int64_t local(int64_t pair) const {
    int64_t id = integer(ids, pair);
    if (id < 0) return -1;
    if (map.has_value()) {
      require(id < map->numel(), "topk_ids: ", id, " is beyond expert_map's ", map->numel(), " experts");
      id = integer(*map, id);
    }
    require(id < num_experts, map.has_value() ? "expert_map" : "topk_ids", ": expert ", id, " is beyond the table's ",
            num_experts);
    return id;
  }
};

void require_integer(const Tensor& tensor, const char* name) {
  require_cpu(tensor, name);
  require(tensor.scalar_type() == ScalarType::Int || tensor.scalar_type() == ScalarType::Long, name,
          ": int32 or int64 expected");
}

}  // namespace

Tensor fused_experts(const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids, const Tensor& codes,
                     const Tensor& scales, const Tensor& zero_points, const Tensor& table,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& expert_map,
                     std::string activation, bool apply_router_weight_on_input, int64_t activation_bits) {
  const Gating gating = gating_of(activation);
  const int planes = planes_of(activation_bits);
  require_cpu(x, "x");
  require(x.dim() == 2, "x: [tokens, hidden] expected");
  const Dtype dtype = dtype_of(x, "x");
  require_cpu(topk_weights, "topk_weights");
  const Dtype weights_dtype = dtype_of(topk_weights, "topk_weights");
  require_integer(topk_ids, "topk_ids");
  require(topk_ids.dim() == 2 && topk_weights.dim() == 2 && topk_ids.size(0) == x.size(0) &&
              topk_weights.size(0) == x.size(0) && topk_ids.size(1) == topk_weights.size(1),
          "topk_ids and topk_weights: both must be [tokens, top_k] for x [tokens, hidden]");
  require_cpu(table, "table");
  require(table.scalar_type() == ScalarType::Long && table.dim() == 3 && table.size(1) == 3 &&
              table.size(2) == kTableFields,
          "table: int64 [experts, 3, 7] expected");
  if (expert_map.has_value()) require_integer(*expert_map, "expert_map");
  const Arenas arenas(codes, scales, zero_points);
  const Routing routing{topk_weights, topk_ids, expert_map, table.size(0), topk_ids.size(1)};
  const int64_t* rows = static_cast<const int64_t*>(table.const_data_ptr());
  const int64_t num_tokens = x.size(0), hidden = x.size(1), width = table.size(0) == 0 ? 0 : [&] {
    for (int64_t e = 0; e < table.size(0); ++e)
      if (rows[e * 3 * kTableFields] != 0) return rows[e * 3 * kTableFields + 5];
    return int64_t{0};
  }();
  if (bias.has_value()) {
    require_cpu(*bias, "bias");
    require(bias->scalar_type() == ScalarType::Float && bias->numel() == table.size(0) * (2 * width + hidden),
            "bias: float32 [experts, 2 intermediate + hidden] expected");
  }
  Tensor out = torch::stable::empty_like(x);
  const int64_t size = dtype == Dtype::float32 ? 4 : 2;
  for (int64_t start = 0; start < num_tokens; start += kPass) {
    const int64_t count = std::min(kPass, num_tokens - start), base = start * routing.top_k;
    const int64_t num_pairs = count * routing.top_k;
    std::vector<int64_t> local(num_pairs), ends(table.size(0) + 1, 0);
    for (int64_t i = 0; i < num_pairs; ++i) {
      const int64_t e = routing.local(base + i);
      local[i] = e >= 0 && rows[e * 3 * kTableFields] != 0 ? e : -1;
      if (local[i] >= 0) ++ends[local[i] + 1];
    }
    Layer layer{*settings().kernels, {}, {}, {}, gating, static_cast<int>(hidden), static_cast<int>(width), planes,
                apply_router_weight_on_input};
    for (int64_t e = 0; e < table.size(0); ++e) {
      const int64_t first = ends[e];
      ends[e + 1] += first;
      if (ends[e + 1] == first) continue;
      Expert expert{arenas.matrix(rows + (3 * e) * kTableFields, "gate", 3 * e),
                    arenas.matrix(rows + (3 * e + 1) * kTableFields, "up", 3 * e + 1),
                    arenas.matrix(rows + (3 * e + 2) * kTableFields, "down", 3 * e + 2),
                    bias.has_value()
                        ? static_cast<const float*>(bias->const_data_ptr()) + e * (2 * width + hidden)
                        : nullptr,
                    first, ends[e + 1]};
      const auto is = [](const Matrix& w, int64_t r, int64_t c) { return w.rows == r && w.columns == c; };
      require(is(expert.gate, width, hidden) && is(expert.up, width, hidden) && is(expert.down, hidden, width),
              "table: expert ", e, " is not ", width, " x ", hidden, " (gate, up) and ", hidden, " x ", width,
              " (down), as x and the other experts ask");
      layer.experts.push_back(expert);
    }
    layer.tokens.resize(ends.back());
    layer.weights.resize(ends.back());
    std::vector<float> weights(num_pairs);
    const int64_t weight_size = weights_dtype == Dtype::float32 ? 4 : 2;
    layer.kernels.to_float(weights_dtype,
                           static_cast<const uint8_t*>(topk_weights.const_data_ptr()) + base * weight_size, num_pairs,
                           1.0f, weights.data());
    std::vector<int64_t> next(ends.begin(), ends.end() - 1);
    for (int64_t i = 0; i < num_pairs; ++i) {
      if (local[i] < 0) continue;
      const int64_t at = next[local[i]]++;
      layer.tokens[at] = i / routing.top_k;
      layer.weights[at] = weights[i];
    }
    run(layer, dtype, static_cast<const uint8_t*>(x.const_data_ptr()) + start * hidden * size, count,
        static_cast<uint8_t*>(out.mutable_data_ptr()) + start * hidden * size);
  }
  return out;
}

}  // namespace moe_collab
