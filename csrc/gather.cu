#include "cuda_check.h"
#include "gather.h"

namespace eventkern {
namespace {

// One block per (sample, segment): segments 0..K-1 are the streams, segment K the targets.
template <typename Code, typename Out>
__global__ void gather_windows_kernel(WindowGather gather, unsigned long long* num_labels) {
  const int64_t sample = blockIdx.x;
  const int segment = blockIdx.y;
  const bool is_target = segment == gather.num_streams;
  const int64_t anchor = gather.anchors[gather.windows[sample]];
  const Span span = is_target ? target_span(gather, anchor) : source_span(gather, gather.streams[segment], anchor);
  const int length = is_target ? gather.num_targets : gather.src_seq_len;
  const int padding = is_target ? 0 : length - span.num_rows;
  Out* out = is_target ? static_cast<Out*>(gather.targets) + sample * length * gather.num_categories
                       : static_cast<Out*>(gather.sources) +
                             (sample * gather.num_streams + segment) * length * gather.num_categories;
  for (int i = threadIdx.x; i < length * gather.num_categories; i += blockDim.x) {
    const int event = i / gather.num_categories - padding;
    const bool is_filled = event >= 0 && event < span.num_rows;
    out[i] = is_filled ? read_code<Code, Out>(gather, row_at(span, event), i % gather.num_categories) : Out{0};
  }
  // A sum of integers is the same in any order, so this atomic is deterministic.
  if (is_target && threadIdx.x == 0) atomicAdd(num_labels, static_cast<unsigned long long>(span.num_rows - 1));
}

}  // namespace

void gather_windows_cuda(const WindowGather& gather, int64_t* num_labels, int device, void* stream) {
  auto* const cuda_stream = static_cast<cudaStream_t>(stream);
  auto* const counter = reinterpret_cast<unsigned long long*>(num_labels);
  const DeviceGuard guard(device);
  cuda_check(cudaMemsetAsync(counter, 0, sizeof(*counter), cuda_stream), "cudaMemsetAsync");
  if (gather.batch_size == 0) return;
  const dim3 grid(static_cast<unsigned>(gather.batch_size), static_cast<unsigned>(gather.num_streams + 1));
  dispatch_widths(gather.code_bytes, gather.out_bytes, [&]<typename Code, typename Out>() {
    gather_windows_kernel<Code, Out><<<grid, 256, 0, cuda_stream>>>(gather, counter);
  });
  cuda_check(cudaGetLastError(), "gather_windows kernel");
}

}  // namespace eventkern
