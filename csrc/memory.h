// What a kernel tells the memory beforehand. Huge pages for large fresh tensors: a first touch of a 4 KiB page costs
// more than all that a kernel does to it (measured under virtualisation: 16 MiB took 7.1 ms to fill in small pages,
// 0.26 ms in huge ones).
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace eventkern {

inline constexpr int64_t kHugeTensor = 4 << 20;  // bytes from which a tensor is worth huge pages

// Asks for huge pages in [address, address + num_bytes), where the system grants them on request; a hint, never an
// error.
inline void advise_huge_pages([[maybe_unused]] void* address, [[maybe_unused]] int64_t num_bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(address) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(address) + num_bytes) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Brings num_bytes at base[offset] into the first-level cache (kLevel 3) or the second (2). The offset may be wild,
// since nothing is read: it counts without a sign, so that it may also wrap around.
template <int kLevel, typename Scalar>
[[gnu::always_inline]] inline void prefetch(const Scalar* base, uint64_t offset, int64_t num_bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(base) + offset * sizeof(Scalar);
  for (int64_t byte = 0; byte < num_bytes; byte += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(address + byte), 0, kLevel);
  }
}

}  // namespace eventkern
