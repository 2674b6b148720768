// The window gather: from window numbers to the (B, K, S, C) sources and (B, T + 1, C) targets of a batch, read
// straight from the store. The rules of "which rows" stand here once, for host and device (nvcc:
// --expt-relaxed-constexpr).
#pragma once

#include <cstdint>

namespace eventkern {

// Rows of the store that belong to each entity, in time order (compressed sparse rows). The stream of all events has
// null pointers, and an entity that no row has may have null rows.
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

// A run of num_rows rows: rows[0], rows[1], ... of an entity's list, or first, first + 1, ... itself where rows is
// null. padding rows of class 0 stand before it (sources) or after it (targets).
struct Span {
  const int64_t* rows;
  int64_t first;
  int num_rows;
};

constexpr int64_t row_at(const Span& span, int i) { return span.rows ? span.rows[i] : span.first + i; }

// The position in index.rows of a row that has an entity: the one of its entity's, from begin to end, that holds it.
constexpr int64_t position_of(const int64_t* rows, int64_t row, int64_t begin, int64_t end) {
  while (end - begin > 1) {
    const int64_t middle = begin + (end - begin) / 2;
    (rows[middle] <= row ? begin : end) = middle;
  }
  return begin;
}

// The last `length` of the positions from begin to end, which are those of an entity's events before the anchor.
constexpr Span last_rows(const int64_t* rows, int64_t begin, int64_t end, int length) {
  const int64_t first = end - begin > length ? end - length : begin;
  return {rows ? rows + first : nullptr, first, static_cast<int>(end - first)};
}

// A stream of the key itself has its anchors' own positions.
constexpr bool needs_search(const WindowGather& gather, const EntityIndex& index) {
  return index.entity_of_row && index.entity_of_row != gather.key.entity_of_row;
}

// The last `length` events strictly before the anchor of the anchor row's own entity, or of all events.
constexpr Span source_span(const WindowGather& gather, const EntityIndex& index, int64_t anchor) {
  const int64_t row = gather.key.rows[anchor];
  if (!index.entity_of_row) return last_rows(nullptr, 0, row, gather.src_seq_len);
  const int32_t entity = index.entity_of_row[row];
  if (entity < 0) return {nullptr, 0, 0};
  const int64_t begin = index.offsets[entity];
  const int64_t end =
      needs_search(gather, index) ? position_of(index.rows, row, begin, index.offsets[entity + 1]) : anchor;
  return last_rows(index.rows, begin, end, gather.src_seq_len);
}

// The anchor and the events after it, as far as its key's limit reaches.
constexpr Span target_span(const WindowGather& gather, int64_t anchor) {
  const EntityIndex& key = gather.key;
  const int64_t limit = gather.limits[key.entity_of_row[key.rows[anchor]]];
  const int64_t end = anchor + gather.num_targets < limit ? anchor + gather.num_targets : limit;
  return {key.rows + anchor, anchor, static_cast<int>(end - anchor)};
}

// Calls launch.template operator()<Code, Out>() for these widths.
template <typename Launch>
constexpr void dispatch_widths(int code_bytes, int out_bytes, Launch launch) {
  auto with_out = [&]<typename Code>() {
    out_bytes == 4 ? launch.template operator()<Code, int32_t>() : launch.template operator()<Code, int64_t>();
  };
  if (code_bytes == 1) {
    with_out.template operator()<uint8_t>();
  } else if (code_bytes == 2) {
    with_out.template operator()<uint16_t>();
  } else {
    with_out.template operator()<int32_t>();
  }
}

// The number of labels, the sum over the batch of target_span().num_rows - 1, goes to num_labels.
void gather_windows_cpu(const WindowGather& gather, int64_t* num_labels);
void gather_windows_cuda(const WindowGather& gather, int64_t* num_labels, int device, void* stream);

struct RowGather {
  const void* codes;  // (num_rows, num_categories), code_bytes wide, as in a WindowGather
  int code_bytes;
  int num_categories;
  int64_t num_rows;
};

// rows[i] of codes, widened to out_bytes, into out (count, num_categories). Returns -1, or the first position i whose
// row does not exist; nothing is written then.
int64_t gather_rows_cpu(const RowGather& gather, const int64_t* rows, int64_t count, void* out, int out_bytes,
                        int num_threads);

}  // namespace eventkern
