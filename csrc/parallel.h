// Splits ranges and names the instruction sets. Loop bodies stay in the functions that run them: gcc's target_clones
// reaches code written inside the cloned function, and not a lambda handed to a generic parallel_for.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__) && \
    !defined(EVENTKERN_SANITIZE)
#define EVENTKERN_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVENTKERN_CLONES
#endif

namespace eventkern {

// A forked child inherits libgomp's belief in threads that it does not have, and hangs in its first region of two.
inline std::atomic<bool> is_forked_child = false;

inline void watch_forks() {
  pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });
}

// Threads that a region may open here, of those asked for.
inline int allowed_threads(int num_threads) { return is_forked_child ? 1 : std::max(num_threads, 1); }

// Parts to split work of `size` into, none smaller than `grain` but a single one.
inline int parts_for(int64_t size, int64_t grain, int num_threads) {
  return static_cast<int>(std::clamp<int64_t>(size / grain, 1, allowed_threads(num_threads)));
}

struct Range {
  int64_t begin;
  int64_t end;
};

// The part-th of num_parts nearly equal parts of [0, size), in multiples of grain.
inline Range split_range(int64_t size, int64_t grain, int part, int num_parts) {
  const int64_t grains = (size + grain - 1) / grain;
  const int64_t begin = grains * part / num_parts * grain;
  const int64_t end = grains * (part + 1) / num_parts * grain;
  return {std::min(begin, size), std::min(end, size)};
}

}  // namespace eventkern
