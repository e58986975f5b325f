// AVX-512 for few tokens, and for many the matrix unit: an unpacked block of a tile, [quads][16 rows][4], is already
// the operand it wants.
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "avx512.h"

namespace moe_collab {
namespace {

constexpr int kTileRows = 16;

// Registers of 64 bytes a row: 0 (sums), 1 and 2 (tokens), 4 and 5 (weights) of 16 rows; 3, 6 and 7 take the place of
// 0 to 2 for the last `rest` tokens. What another library had set up for this thread is put back.
class TileConfiguration {
 public:
  explicit TileConfiguration(int rest) {
    _tile_storeconfig(before_);
    alignas(64) uint8_t ours[64] = {1};
    for (int i = 0; i < 8; ++i) {
      ours[16 + 2 * i] = 64;
      ours[48 + i] = static_cast<uint8_t>(i == 3 || i >= 6 ? rest : kTileRows);
    }
    _tile_loadconfig(ours);
  }
  ~TileConfiguration() {
    if (before_[0] == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(before_);
    }
  }

 private:
  alignas(64) uint8_t before_[64];
};

template <int BITS>
MOE_INLINE void unpack_block(const uint8_t* codes, const uint8_t* tail, int columns, int prefetch, uint8_t* out) {
  __m512i quads[16];
  if constexpr (BITS == kTernary) {
    for (int k = 0; k < columns; k += kTernaryUnit, codes += 3 * kLine, tail += kRows) {
      for (int line = 0; line < 3; ++line) {
        prefetch_line(codes + prefetch + kLine * line);
        Avx512::trits(Avx512::load(codes + kLine * line), quads + 5 * line);
      }
      quads[15] = Avx512::pairs(tail);
      for (int q = 0; q < 16; ++q, out += kLine) _mm512_store_si512(out, quads[q]);
    }
  } else {
    for (int k = 0; k < columns; k += kUnit, codes += kLine * BITS) {
      for (int line = 0; line < BITS; ++line) prefetch_line(codes + prefetch + kLine * line);
      Tile<Avx512>::unpack<BITS>(codes, quads);
      for (int q = 0; q < 8; ++q, out += kLine) _mm512_store_si512(out, quads[q]);
    }
  }
}

// sums = up to 16 tokens of one plane times the block, whose operands are in registers 4 (and 5).
MOE_INLINE void multiply(const int8_t* tokens, bool full, bool two, int32_t* sums) {
  const int stride = two ? 128 : 64;
  if (full) {
    _tile_zero(0);
    _tile_loadd(1, tokens, stride);
    _tile_dpbsud(0, 1, 4);
    if (two) {
      _tile_loadd(2, tokens + 64, stride);
      _tile_dpbsud(0, 2, 5);
    }
    _tile_stored(0, sums, 64);
  } else {
    _tile_zero(3);
    _tile_loadd(6, tokens, stride);
    _tile_dpbsud(3, 6, 4);
    if (two) {
      _tile_loadd(7, tokens + 64, stride);
      _tile_dpbsud(3, 7, 5);
    }
    _tile_stored(3, sums, 64);
  }
}

template <int BITS, int P>
void dot_panel(const Matrix& w, int tile, const Panel& x, float* out, int prefetch) {
  const int rest = x.rows % kTileRows;
  const TileConfiguration configuration(rest == 0 ? kTileRows : rest);
  constexpr int kStorage = BITS == kTernary ? 3 * kLine / kTernaryUnit : 2 * BITS;
  alignas(64) uint8_t operand[32 * kLine];
  alignas(64) int32_t sums[P][kTileRows * kRows];
  const uint8_t* codes = w.codes + tile * w.tile_bytes;
  const uint8_t* tail = codes + w.padded_columns * 3;
  const int64_t first = static_cast<int64_t>(tile) * w.groups * kRows;
  const int blocks = w.padded_columns / w.block, per_group = w.padded_group / w.block;
  std::memset(out, 0, sizeof(float) * x.rows * kRows);
  for (int b = 0; b < blocks; ++b, codes += kStorage * w.block, tail += w.block / kTernaryUnit * kRows) {
    unpack_block<BITS>(codes, tail, w.block, prefetch, operand);
    _tile_loadd(4, operand, kLine);
    if (w.block == 128) _tile_loadd(5, operand + 16 * kLine, kLine);
    const int64_t at = first + b / per_group * kRows;
    const __m512 scale = w.bfloat16_scales ? Avx512::load_bfloat16(static_cast<const uint16_t*>(w.scales) + at)
                                           : Avx512::load_float(static_cast<const float*>(w.scales) + at);
    __m512i zero = _mm512_set1_epi32(w.zero_point);
    if (w.zero_points != nullptr) zero = _mm512_add_epi32(zero, Avx512::load_int8(w.zero_points + at));
    const int8_t* planes = x.planes + static_cast<int64_t>(b) * P * x.rows * w.block;
    const float* steps = x.scales + b * x.rows;
    const int32_t* totals = x.sums + b * x.rows;
    for (int m = 0; m < x.rows; m += kTileRows) {
      const int rows = std::min(kTileRows, x.rows - m);
      for (int p = 0; p < P; ++p)
        multiply(planes + (p * x.rows + m) * w.block, rows == kTileRows, w.block == 128, sums[p]);
#pragma GCC unroll 4
      for (int t = 0; t < rows; ++t) {
        __m512i sum = _mm512_load_si512(sums[0] + t * kRows);
        if constexpr (P == 2)
          sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 7), _mm512_load_si512(sums[P - 1] + t * kRows));
        sum = _mm512_sub_epi32(sum, Avx512::multiply(zero, totals[m + t]));
        float* y = out + (m + t) * kRows;
        const __m512 step = Avx512::scale(scale, steps[m + t]);
        _mm512_storeu_ps(y, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), step, _mm512_loadu_ps(y)));
      }
    }
  }
}

constexpr Kernels make_amx() {
  Kernels kernels = make_kernels<Avx512, 8>("amx");
  [&]<int... F>(std::integer_sequence<int, F...>) {
    ((kernels.panel[F + 1][0] = &dot_panel<kFormatBits[F + 1], 1>, kernels.panel[F + 1][1] = &dot_panel<kFormatBits[F + 1], 2>),
     ...);
  }(std::make_integer_sequence<int, 7>{});
  return kernels;
}

}  // namespace

const Kernels kAmxKernels = make_amx();

// The system hands out the tile registers' state only on request, once for a process.
bool request_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace moe_collab
