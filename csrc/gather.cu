#include "cuda_check.h"
#include "gather.h"

namespace eventkern {
namespace {

constexpr int kThreads = 256;
constexpr int kTileRows = 64;  // rows whose place a block looks up before it copies them

// One block per (sample, segment): segments 0..K-1 are the streams, segment K the targets. One thread finds the span,
// since the others would all make the same search. Neighbouring threads write neighbouring items and read neighbouring
// codes. Each thread walks through its items' (row, category) by adding the step between them, with no division.
template <typename Code, typename Out>
__global__ void __launch_bounds__(kThreads) gather_windows_kernel(WindowGather gather, unsigned long long* num_labels) {
  __shared__ Span span;
  __shared__ int64_t first_codes[kTileRows];  // where each row's codes begin, -1 for padding
  const int64_t sample = blockIdx.x;
  const int segment = static_cast<int>(blockIdx.y);
  const bool is_target = segment == gather.num_streams;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    const int64_t anchor = gather.anchors[gather.windows[sample]];
    span = is_target ? target_span(gather, anchor) : source_span(gather, gather.streams[segment], anchor);
    // A sum of integers is the same in any order, so this atomic is deterministic.
    if (is_target) atomicAdd(num_labels, static_cast<unsigned long long>(span.num_rows - 1));
  }
  __syncthreads();
  const int num_categories = gather.num_categories;
  const int length = is_target ? gather.num_targets : gather.src_seq_len;
  const int padding = is_target ? 0 : length - span.num_rows;
  const int64_t segment_rows = is_target ? sample * length : (sample * gather.num_streams + segment) * length;
  Out* out = static_cast<Out*>(is_target ? gather.targets : gather.sources) + segment_rows * num_categories;
  const Code* const codes = static_cast<const Code*>(gather.codes);
  const int step_rows = kThreads / num_categories;
  const int step_categories = kThreads % num_categories;
  for (int tile = 0; tile < length; tile += kTileRows) {
    const int num_rows = length - tile < kTileRows ? length - tile : kTileRows;
    if (thread < num_rows) {
      const int event = tile + thread - padding;
      const bool is_filled = event >= 0 && event < span.num_rows;
      first_codes[thread] = is_filled ? row_at(span, event) * num_categories : -1;
    }
    __syncthreads();
    int row = thread / num_categories;
    int category = thread % num_categories;
    for (int64_t i = thread; row < num_rows; i += kThreads) {
      const int64_t first = first_codes[row];
      int32_t code = 0;
      if (first >= 0) {
        code = static_cast<int32_t>(codes[first + category]);
        if (code >= gather.cuts[category]) code = 1;
      }
      out[i] = static_cast<Out>(code);
      row += step_rows;
      category += step_categories;
      if (category >= num_categories) {
        category -= num_categories;
        ++row;
      }
    }
    out += int64_t{num_rows} * num_categories;
    __syncthreads();
  }
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
    gather_windows_kernel<Code, Out><<<grid, kThreads, 0, cuda_stream>>>(gather, counter);
  });
  cuda_check(cudaGetLastError(), "gather_windows kernel");
}

}  // namespace eventkern
