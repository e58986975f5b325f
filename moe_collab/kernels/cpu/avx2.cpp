// AVX2 alone.
#include "avx2.h"

namespace moe_collab {
const Kernels kAvx2Kernels = make_kernels<Avx2<false>, 2>("avx2");
}
