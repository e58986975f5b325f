// A read of memory whose checksum is returned, so that no load can be dropped: the roof of the CPU benchmark.
#include <cstddef>
#include <cstdint>

extern "C" uint64_t checksum(const uint64_t* data, size_t count) {
  uint64_t sums[32] = {};
  for (size_t i = 0; i + 32 <= count; i += 32)
    for (int j = 0; j < 32; ++j) sums[j] += data[i + j];
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  return total;
}
