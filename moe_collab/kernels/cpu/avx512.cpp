// AVX-512 with VNNI.
#include "avx512.h"

namespace moe_collab {
const Kernels kAvx512Kernels = make_kernels<Avx512, 8>("avx512");
}
