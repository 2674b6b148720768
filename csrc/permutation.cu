#include <algorithm>

#include "cuda_check.h"
#include "permutation.h"

namespace eventkern {
namespace {

__global__ void permutation_kernel(Permutation permutation, int64_t start, int64_t count, int64_t* out) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    out[i] = static_cast<int64_t>(permute(permutation, start + i));
  }
}

}  // namespace

void permutation_cuda(const Permutation& permutation, int64_t start, int64_t count, int64_t* out, int device,
                      void* stream) {
  if (count == 0) return;
  constexpr int kThreads = 256;
  constexpr int64_t kMaxBlocks = 1 << 16;
  const int64_t blocks = std::min((count + kThreads - 1) / kThreads, kMaxBlocks);
  const DeviceGuard guard(device);
  permutation_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      permutation, start, count, out);
  cuda_check(cudaGetLastError(), "permutation kernel");
}

}  // namespace eventkern
