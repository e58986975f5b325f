// AVX2 with the 256-bit dot product of AVX-VNNI.
#include "avx2.h"

namespace moe_collab {
const Kernels kAvxVnniKernels = make_kernels<Avx2<true>, 4>("avxvnni");
}
