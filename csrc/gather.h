// The window gather: from window numbers to the (B, K, S, C) sources and (B, T + 1, C) targets of a batch, read
// straight from the store. The rules of "which rows" stand here once, for host and device (nvcc:
// --expt-relaxed-constexpr).
#pragma once

#include <cstdint>

namespace eventkern {

// Rows of the store that belong to each entity, in time order (compressed sparse rows). The stream of all events has
// null pointers.
struct EntityIndex {
  const int32_t* entity_of_row;  // (num_rows,), -1 where the row has no entity
  const int64_t* offsets;        // (num_entities + 1,)
  const int64_t* rows;           // (offsets[num_entities],), ascending within an entity
};

inline constexpr int kMaxStreams = 8;

struct WindowGather {
  const void* codes;  // (num_rows, num_categories), code_bytes wide
  int code_bytes;     // 1, 2: unsigned; 4: signed
  int num_categories;
  const int32_t* cuts;  // (num_categories,): a code at or above its cut becomes 1
  EntityIndex key;
  const int64_t* limits;  // (num_keys,): exclusive end, in key.rows, of what targets may reach
  int num_streams;
  EntityIndex streams[kMaxStreams];
  int src_seq_len;
  int num_targets;         // T + 1: the anchor and the T events after it
  const int64_t* anchors;  // (num_windows,): positions in key.rows
  const int64_t* windows;  // (batch_size,): positions in anchors
  int64_t batch_size;
  void* sources;  // (batch_size, num_streams, src_seq_len, num_categories), out_bytes wide
  void* targets;  // (batch_size, num_targets, num_categories)
  int out_bytes;  // 4 | 8, signed
};

// A run of num_rows rows: rows[first...] of an entity's list, or first, first + 1, ... itself where rows is null.
// padding rows of class 0 stand before it (sources) or after it (targets).
struct Span {
  const int64_t* rows;
  int64_t first;
  int num_rows;
};

constexpr int64_t row_at(const Span& span, int i) { return span.rows ? span.rows[span.first + i] : span.first + i; }

// The last `length` events strictly before `anchor_row` of the anchor row's own entity, or of all events.
constexpr Span source_span(const EntityIndex& index, int64_t anchor_row, int length) {
  int64_t begin = 0;
  int64_t end = anchor_row;
  if (index.rows) {
    const int32_t entity = index.entity_of_row[anchor_row];
    if (entity < 0) return {nullptr, 0, 0};
    begin = index.offsets[entity];
    int64_t above = index.offsets[entity + 1];
    end = begin;
    while (end < above) {  // the first position of this entity whose row is not before the anchor
      const int64_t middle = end + (above - end) / 2;
      if (index.rows[middle] < anchor_row) {
        end = middle + 1;
      } else {
        above = middle;
      }
    }
  }
  const int64_t first = end - begin > length ? end - length : begin;
  return {index.rows, first, static_cast<int>(end - first)};
}

// The anchor and the events after it, as far as its key's limit reaches.
constexpr Span target_span(const EntityIndex& key, const int64_t* limits, int64_t anchor, int num_targets) {
  const int64_t limit = limits[key.entity_of_row[key.rows[anchor]]];
  const int64_t end = anchor + num_targets < limit ? anchor + num_targets : limit;
  return {key.rows, anchor, static_cast<int>(end - anchor)};
}

template <typename Code, typename Out>
constexpr Out read_code(const WindowGather& gather, int64_t row, int category) {
  const Code code = static_cast<const Code*>(gather.codes)[row * gather.num_categories + category];
  return static_cast<int32_t>(code) >= gather.cuts[category] ? Out{1} : static_cast<Out>(code);
}

// Calls launch.template operator()<Code, Out>() for the widths in `gather`.
template <typename Launch>
constexpr void dispatch_widths(const WindowGather& gather, Launch launch) {
  auto with_out = [&]<typename Code>() {
    gather.out_bytes == 4 ? launch.template operator()<Code, int32_t>() : launch.template operator()<Code, int64_t>();
  };
  if (gather.code_bytes == 1) {
    with_out.template operator()<uint8_t>();
  } else if (gather.code_bytes == 2) {
    with_out.template operator()<uint16_t>();
  } else {
    with_out.template operator()<int32_t>();
  }
}

// Both return nothing: the number of labels is the sum over the batch of target_span().num_rows - 1, written to
// num_labels.
void gather_windows_cpu(const WindowGather& gather, int64_t* num_labels);
void gather_windows_cuda(const WindowGather& gather, int64_t* num_labels, int device, void* stream);

// rows[i] of codes, widened, into out (count, num_categories); rows are in range.
void gather_rows_cpu(const void* codes, int code_bytes, int num_categories, const int64_t* rows, int64_t count,
                     void* out, int out_bytes);

}  // namespace eventkern
