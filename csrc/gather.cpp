#include "gather.h"

#include <algorithm>

namespace eventkern {
namespace {

template <typename Code, typename Out>
void copy_rows(const WindowGather& gather, const Span& span, Out* out) {
  for (int i = 0; i < span.num_rows; ++i) {
    const int64_t row = row_at(span, i);
    for (int category = 0; category < gather.num_categories; ++category) {
      *out++ = read_code<Code, Out>(gather, row, category);
    }
  }
}

template <typename Code, typename Out>
int64_t gather_windows(const WindowGather& gather) {
  const int num_categories = gather.num_categories;
  const int64_t stream_size = int64_t{gather.src_seq_len} * num_categories;
  const int64_t target_size = int64_t{gather.num_targets} * num_categories;
  Out* sources = static_cast<Out*>(gather.sources);
  Out* targets = static_cast<Out*>(gather.targets);
  int64_t num_labels = 0;
  for (int64_t sample = 0; sample < gather.batch_size; ++sample) {
    const int64_t anchor = gather.anchors[gather.windows[sample]];
    const int64_t anchor_row = gather.key.rows[anchor];
    for (int stream = 0; stream < gather.num_streams; ++stream) {
      const Span span = source_span(gather.streams[stream], anchor_row, gather.src_seq_len);
      const int64_t padding = stream_size - int64_t{span.num_rows} * num_categories;
      std::fill_n(sources, padding, Out{0});
      copy_rows<Code, Out>(gather, span, sources + padding);
      sources += stream_size;
    }
    const Span span = target_span(gather.key, gather.limits, anchor, gather.num_targets);
    copy_rows<Code, Out>(gather, span, targets);
    const int64_t filled = int64_t{span.num_rows} * num_categories;
    std::fill_n(targets + filled, target_size - filled, Out{0});
    targets += target_size;
    num_labels += span.num_rows - 1;
  }
  return num_labels;
}

}  // namespace

void gather_windows_cpu(const WindowGather& gather, int64_t* num_labels) {
  dispatch_widths(gather, [&]<typename Code, typename Out>() { *num_labels = gather_windows<Code, Out>(gather); });
}

void gather_rows_cpu(const void* codes, int code_bytes, int num_categories, const int64_t* rows, int64_t count,
                     void* out, int out_bytes) {
  WindowGather widths{};
  widths.code_bytes = code_bytes;
  widths.out_bytes = out_bytes;
  dispatch_widths(widths, [&]<typename Code, typename Out>() {
    Out* target = static_cast<Out*>(out);
    for (int64_t i = 0; i < count; ++i) {
      const Code* source = static_cast<const Code*>(codes) + rows[i] * num_categories;
      target = std::copy_n(source, num_categories, target);
    }
  });
}

}  // namespace eventkern
