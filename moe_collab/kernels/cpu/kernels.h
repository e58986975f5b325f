// What every instruction set provides: one table of functions.
#pragma once

#include "layout.h"

namespace moe_collab {

// One token's activations, quantized in blocks: x = scale * (128 high + low), or scale * high with one plane.
struct Activations {
  const int8_t* high;
  const int8_t* low;
  const float* scale;    // per block
  const int32_t* sum;    // per block, of 128 high + low (or high)
  const float* exact;    // unquantized, for 16-bit weights
};

// How the columns of a weight are spread over blocks; weights of one layout share quantized activations.
struct BlockLayout {
  int columns, group, padded_group, block;

  int padded_columns() const { return columns / group * padded_group; }
  int blocks() const { return padded_columns() / block; }
  bool operator==(const BlockLayout&) const = default;
};

// Groups without padding are told apart by their blocks alone.
inline BlockLayout block_layout(const Matrix& w) {
  if (w.padded_group == w.group) return {w.columns, w.block, w.block, w.block};
  return {w.columns, w.group, w.padded_group, w.block};
}

enum class Gating { silu, gelu, gelu_tanh, swigluoai };
enum class Dtype { float32, bfloat16, float16 };

constexpr int kMaxTokens = 8;

// out[token][16] = `tile` of `w` times each token's activations.
using DotTile = void (*)(const Matrix& w, int tile, const Activations* tokens, float* out, int prefetch);

// Many tokens' activations block by block, in the order they are read: rows of a power of two apart would fall into
// the same few lines of the first-level cache, which made the matrix unit four times slower.
struct Panel {
  const int8_t* planes;  // [block][plane][row][columns of the block]
  const float* scales;   // [block][row]
  const int32_t* sums;   // likewise
  int rows;
};

constexpr int kMaxPanel = 128;

// out[row][16].
using DotPanel = void (*)(const Matrix& w, int tile, const Panel& x, float* out, int prefetch);

// The loops of rounding (`rounding_loops.h`), over one block of at most so many columns.
constexpr int kMaxBlock = 128;

struct Search {
  const float *weights, *importance, *scales, *zeros;
  int64_t rows, columns;
  int group, candidates;
  float low, high;
  float* losses;
  int64_t* chosen;
};

struct FeedBack {
  const float* weights;
  float* left;  // weights in the order of rounding, with the errors so far made up for
  const float *scales, *zeros;
  const int64_t* order;
  const float* factor;
  int64_t columns;
  int group, begin, end;
  float low, high;
  float *codes, *errors;
};

struct Descent {
  float *codes, *scales;
  const float *zeros, *slope, *moments;
  int64_t columns;
  int group, begin, end;
  float low, high;
  Dtype scale_dtype;
  float* change;
};

struct Kernels {
  const char* name;
  int max_tokens;  // of one DotTile: 1, 2, 4 or 8
  // [storage format][planes - 1][log2 tokens]; see format_index.
  DotTile dot[8][2][4];
  // Likewise without the tokens; null where DotTile is the best there is. Blocks of 64 or 128 columns.
  DotPanel panel[8][2];
  void (*quantize)(const float* x, const BlockLayout&, int planes, int8_t* high, int8_t* low, float* scale,
                   int32_t* sum);
  // gate[i] = act(gate[i]) * up[i]
  void (*gate)(Gating, int n, float* gate, const float* up);
  void (*to_float)(Dtype, const void* x, int64_t n, float factor, float* out);
  void (*from_float)(Dtype, const float* x, int64_t n, void* out);
  // Of one row; of up to 16 rows.
  void (*search)(const Search&, int64_t row);
  void (*feed_back)(const FeedBack&, int64_t row, int rows);
  void (*descend)(const Descent&, int64_t row, int rows);
};

constexpr int format_index(int bits) {
  return bits == 16 ? 0 : bits == 8 ? 1 : bits == kTernary ? 7 : bits;  // 2 to 6 in place
}
constexpr int kFormatBits[8] = {16, 8, 2, 3, 4, 5, 6, kTernary};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvxVnniKernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAmxKernels;
bool request_amx();
#endif

}  // namespace moe_collab
