#include <algorithm>

#include "cuda_check.h"
#include "permutation.h"

namespace eventkern {
namespace {

constexpr int kWarpSize = 32;
constexpr int kWarps = 8;               // in a block
constexpr int64_t kWantedWarps = 8192;  // about what a large card holds at a time
constexpr int64_t kMaxPerWarp = 4096;   // so many that the last walkers of a warp, too few to fill it, do not count

// A warp permutes its positions 32 at a time. Values outside [0, n) go onto a stack of its own and walk on as soon as
// 32 of them are there, so that every pass through the network is one of a full warp, whatever share of its domain n
// is. The 8 bytes of an index take about 30 instructions of logic and shifts, as many as an H100 issues in the time of
// storing 8 bytes: each one more shows.
__global__ void __launch_bounds__(kWarps* kWarpSize)
    permutation_kernel(Permutation permutation, int64_t start, int64_t count, int per_warp, int64_t* out) {
  __shared__ uint64_t walkers[kWarps][2 * kWarpSize];
  __shared__ int walker_slots[kWarps][2 * kWarpSize];
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t first = (int64_t{blockIdx.x} * kWarps + warp) * per_warp;
  if (first >= count) return;
  const int size = static_cast<int>(min(static_cast<int64_t>(per_warp), count - first));
  int64_t* const values = out + first;
  uint64_t position = start + first + lane;
  int next = lane;
  const int end = size + lane;  // next < end says the same on all lanes
  int num_walkers = 0;
  while (true) {
    uint64_t value = position;
    int slot = next;
    if (num_walkers < kWarpSize && next < end) {
      position += kWarpSize;
      next += kWarpSize;
    } else if (num_walkers > 0) {
      const int taken = min(num_walkers, kWarpSize);
      num_walkers -= taken;
      value = walkers[warp][num_walkers + lane];
      slot = lane < taken ? walker_slots[warp][num_walkers + lane] : size;
      __syncwarp();
    } else {
      break;
    }
    value = permute_domain(permutation, value);
    const bool is_outside = value >= permutation.n && slot < size;
    if (value < permutation.n && slot < size) values[slot] = static_cast<int64_t>(value);
    const unsigned outside = __ballot_sync(~0u, is_outside);
    if (is_outside) {
      const int place = num_walkers + __popc(outside & ((1u << lane) - 1));
      walkers[warp][place] = value;
      walker_slots[warp][place] = slot;
    }
    num_walkers += __popc(outside);
    __syncwarp();
  }
}

}  // namespace

void permutation_cuda(const Permutation& permutation, int64_t start, int64_t count, int64_t* out, int device,
                      void* stream) {
  if (count == 0) return;
  const int64_t wanted = (count / kWantedWarps + kWarpSize - 1) / kWarpSize * kWarpSize;
  const int64_t per_warp = std::clamp<int64_t>(wanted, kWarpSize, kMaxPerWarp);
  const int64_t blocks = (count + per_warp * kWarps - 1) / (per_warp * kWarps);
  const DeviceGuard guard(device);
  permutation_kernel<<<static_cast<unsigned>(blocks), kWarps * kWarpSize, 0, static_cast<cudaStream_t>(stream)>>>(
      permutation, start, count, static_cast<int>(per_warp), out);
  cuda_check(cudaGetLastError(), "permutation kernel");
}

}  // namespace eventkern
