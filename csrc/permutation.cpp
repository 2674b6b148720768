#include "permutation.h"

#include "parallel.h"

namespace eventkern {
namespace {

constexpr int kBlock = 1024;             // positions permuted at a time: 8 KiB of output, 12 KiB of walkers
constexpr int64_t kGrain = 16 * kBlock;  // fewer positions than this do not pay for a second thread

// The values outside [0, n) walk on together as a compacted vector, so that the walk is vector code too.
EVENTKERN_CLONES void permute_range(const Permutation& permutation, int64_t start, int64_t count, int64_t* out) {
  const Permutation local = permutation;
  uint64_t walking[kBlock];
  int32_t slot[kBlock];
  for (int64_t block = 0; block < count; block += kBlock) {
    const int size = static_cast<int>(std::min<int64_t>(kBlock, count - block));
    int64_t* values = out + block;
    for (int i = 0; i < size; ++i) values[i] = static_cast<int64_t>(permute_domain(local, start + block + i));
    int num_walking = 0;
    for (int i = 0; i < size; ++i) {
      slot[num_walking] = i;
      walking[num_walking] = values[i];
      num_walking += static_cast<uint64_t>(values[i]) >= local.n;
    }
    while (num_walking > 0) {
      for (int i = 0; i < num_walking; ++i) walking[i] = permute_domain(local, walking[i]);
      int num_outside = 0;
      for (int i = 0; i < num_walking; ++i) {
        const uint64_t value = walking[i];
        const int32_t target = slot[i];
        values[target] = static_cast<int64_t>(value);
        walking[num_outside] = value;
        slot[num_outside] = target;
        num_outside += value >= local.n;
      }
      num_walking = num_outside;
    }
  }
}

}  // namespace

void permutation_cpu(const Permutation& permutation, int64_t start, int64_t count, int64_t* out, int num_threads) {
  const int64_t grains = (count + kGrain - 1) / kGrain;
  const int num_parts = static_cast<int>(std::clamp<int64_t>(grains, 1, allowed_threads(num_threads)));
  if (num_parts == 1) {
    permute_range(permutation, start, count, out);
    return;
  }
#pragma omp parallel for num_threads(num_parts) schedule(static, 1)
  for (int part = 0; part < num_parts; ++part) {
    const Range range = split_range(count, kBlock, part, num_parts);
    permute_range(permutation, start + range.begin, range.end - range.begin, out + range.begin);
  }
}

}  // namespace eventkern
