// Rows are copied out of the store into a block that the first-level cache holds, and widened from there as one flat
// array: every vector is full, for any number of categories. Which rows a batch needs is worked out for a group of
// samples at a time, and rows are asked for well before they are read: a gather in shuffled order waits for memory and
// for nothing else, so it must wait for many rows at once.
#include "gather.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>

#include "lanes.h"
#include "memory.h"
#include "parallel.h"

namespace eventkern {
namespace {

constexpr int kGroup = 16;              // samples planned together
constexpr int kRowsAhead = 64;          // from the row that is copied to the one asked for
constexpr int kSpansAhead = 2;          // from the span that is copied to the one whose first rows are asked for
constexpr int64_t kRowGrain = 1 << 15;  // fewer rows than this do not pay for a second thread

template <typename Scalar, int kCount>
struct VectorOf {
  typedef Scalar type __attribute__((vector_size(kCount * sizeof(Scalar))));
};

template <typename Out>
constexpr int kOuts = 64 / sizeof(Out);  // in one vector

// Buffers of one call. A block of kOuts rows is num_categories whole vectors.
template <typename Code, typename Out>
struct Scratch {
  int num_categories;
  int64_t block_size;               // codes in a block
  std::unique_ptr<Code[]> largest;  // codes that are not cut, of each category in turn, for a block and one vector
  std::unique_ptr<Code[]> block;

  // cuts may be null: none.
  Scratch(int categories, const int32_t* cuts)
      : num_categories(categories),
        block_size(int64_t{categories} * kOuts<Out>),
        largest(new Code[block_size + kOuts<Out>]),
        block(new Code[block_size]) {
    constexpr int32_t kLargest = std::numeric_limits<Code>::max();
    for (int64_t i = 0; i < block_size + kOuts<Out>; ++i) {
      if (i < categories) {
        largest[i] = static_cast<Code>(cuts ? std::min(cuts[i] - 1, kLargest) : kLargest);
      } else {
        largest[i] = largest[i - categories];
      }
    }
  }
};

template <typename Code, typename Out>
EVENTKERN_INLINE void widen_vector(const Code* codes, const Code* largest, Out* out) {
  using Codes = typename VectorOf<Code, kOuts<Out>>::type;
  using Outs = typename VectorOf<Out, kOuts<Out>>::type;
  Codes values, limits;
  std::memcpy(&values, codes, sizeof values);
  std::memcpy(&limits, largest, sizeof limits);
  values = values > limits ? Codes{} + Code{1} : values;
  const Outs wide = __builtin_convertvector(values, Outs);
  std::memcpy(out, &wide, sizeof wide);
}

// num_rows rows that lie one after another.
template <typename Code, typename Out>
EVENTKERN_INLINE void widen_rows(const Code* codes, int64_t num_rows, const Scratch<Code, Out>& scratch, Out* out) {
  const int64_t count = num_rows * scratch.num_categories;
  const Code* const largest = scratch.largest.get();
  int64_t whole = 0;
  for (; whole + scratch.block_size <= count; whole += scratch.block_size) {
    for (int64_t i = 0; i < scratch.block_size; i += kOuts<Out>) {
      widen_vector(codes + whole + i, largest + i, out + whole + i);
    }
  }
  int64_t done = whole;
  for (; done + kOuts<Out> <= count; done += kOuts<Out>) {
    widen_vector(codes + done, largest + (done - whole), out + done);
  }
  if (done == count) return;
  if (count >= kOuts<Out>) {  // the last vector covers a part of the one before it again
    const int64_t start = count - kOuts<Out>;
    const int64_t place = start < whole ? start - whole + scratch.block_size : start - whole;
    widen_vector(codes + start, largest + place, out + start);
  } else {
    Code few[kOuts<Out>] = {};
    Out wide[kOuts<Out>];
    std::memcpy(few, codes, count * sizeof(Code));
    widen_vector(few, largest, wide);
    std::memcpy(out, wide, count * sizeof(Out));
  }
}

// Into the second-level cache, which waits for more lines at once than the first.
EVENTKERN_INLINE void prefetch_row(const char* codes, int64_t row, int64_t row_bytes) {
  const char* const begin = codes + row * row_bytes;
  for (int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(begin + byte, 0, 2);
  __builtin_prefetch(begin + row_bytes - 1, 0, 2);
}

// The first rows of a span. Rows one after another need it for the first few lines: the processor sees the rest coming.
EVENTKERN_INLINE void prefetch_span(const char* codes, int64_t row_bytes, const Span& span) {
  const int count = std::min(span.num_rows, kRowsAhead);
  if (span.rows) {
    for (int i = 0; i < count; ++i) prefetch_row(codes, span.rows[i], row_bytes);
  } else {
    prefetch<2>(codes, span.first * row_bytes, std::min<int64_t>(count * row_bytes, 512));
  }
}

// Copies rows to a block in pieces of kPiece bytes, the last of which may cover a part of the one before it again. Of
// the num_left rows of the span from here on, those kRowsAhead further are asked for.
template <int kPiece>
EVENTKERN_INLINE void copy_rows(const char* codes, int64_t row_bytes, const int64_t* rows, int64_t count,
                                int64_t num_left, char* block) {
  for (int64_t i = 0; i < count; ++i) {
    if (i + kRowsAhead < num_left) prefetch_row(codes, rows[i + kRowsAhead], row_bytes);
    const char* const row = codes + rows[i] * row_bytes;
    for (int64_t byte = 0; byte + kPiece <= row_bytes; byte += kPiece) std::memcpy(block + byte, row + byte, kPiece);
    std::memcpy(block + row_bytes - kPiece, row + row_bytes - kPiece, kPiece);
    block += row_bytes;
  }
}

template <typename Code, typename Out>
EVENTKERN_INLINE void gather_span(const void* codes, const Span& span, Scratch<Code, Out>& scratch, Out* out) {
  if (!span.rows) {
    const Code* const first = static_cast<const Code*>(codes) + span.first * scratch.num_categories;
    widen_rows(first, span.num_rows, scratch, out);
    return;
  }
  const int64_t row_bytes = scratch.num_categories * int64_t{sizeof(Code)};
  const char* const bytes = static_cast<const char*>(codes);
  char* const block = reinterpret_cast<char*>(scratch.block.get());
  for (int done = 0; done < span.num_rows; done += kOuts<Out>) {
    const int64_t* const rows = span.rows + done;
    const int num_left = span.num_rows - done;
    const int count = std::min(num_left, kOuts<Out>);
    if (row_bytes >= 32) {
      copy_rows<32>(bytes, row_bytes, rows, count, num_left, block);
    } else if (row_bytes >= 16) {
      copy_rows<16>(bytes, row_bytes, rows, count, num_left, block);
    } else if (row_bytes >= 4) {
      copy_rows<4>(bytes, row_bytes, rows, count, num_left, block);
    } else {
      copy_rows<1>(bytes, row_bytes, rows, count, num_left, block);
    }
    widen_rows(scratch.block.get(), count, scratch, out + int64_t{done} * scratch.num_categories);
  }
}

// The sources of one stream for `count` samples. Each anchor's place in its entity's list is found by halving all the
// lists together, so that the cache misses of one search overlap with those of the others.
void plan_stream(const WindowGather& gather, const EntityIndex& index, const int64_t* anchor_rows, int count,
                 Span* spans, int stride) {
  int32_t entities[kGroup];
  int64_t begins[kGroup], ends[kGroup], lengths[kGroup];
  int64_t longest = 0;
  for (int i = 0; i < count; ++i) entities[i] = index.entity_of_row[anchor_rows[i]];
  for (int i = 0; i < count; ++i) {
    const bool is_missing = entities[i] < 0;
    begins[i] = ends[i] = is_missing ? 0 : index.offsets[entities[i]];
    lengths[i] = is_missing ? 0 : index.offsets[entities[i] + 1] - begins[i];
    longest = std::max(longest, lengths[i]);
  }
  // The anchor's row stands at one of lengths[i] positions from ends[i] on.
  for (; longest > 1; longest -= longest / 2) {
    for (int i = 0; i < count; ++i) {
      const int64_t half = lengths[i] / 2;
      const bool is_before = half > 0 && index.rows[ends[i] + half - 1] < anchor_rows[i];
      ends[i] += is_before ? half : 0;
      lengths[i] -= half;
    }
  }
  for (int i = 0; i < count; ++i) {
    spans[i * stride] = last_rows(index.rows, begins[i], ends[i], gather.src_seq_len);
  }
}

// spans[sample][segment] for `count` samples from `windows` on; segment num_streams is the targets.
void plan_spans(const WindowGather& gather, const int64_t* windows, int count, Span* spans) {
  const int stride = gather.num_streams + 1;
  int64_t anchors[kGroup], anchor_rows[kGroup];
  for (int i = 0; i < count; ++i) anchors[i] = gather.anchors[windows[i]];
  for (int i = 0; i < count; ++i) anchor_rows[i] = gather.key.rows[anchors[i]];
  for (int i = 0; i < count; ++i) spans[i * stride + gather.num_streams] = target_span(gather, anchors[i]);
  for (int stream = 0; stream < gather.num_streams; ++stream) {
    const EntityIndex& index = gather.streams[stream];
    if (needs_search(gather, index)) {
      plan_stream(gather, index, anchor_rows, count, spans + stream, stride);
    } else {
      for (int i = 0; i < count; ++i) spans[i * stride + stream] = source_span(gather, index, anchors[i]);
    }
  }
}

template <typename Code, typename Out>
EVENTKERN_CLONES int64_t gather_windows(const WindowGather& gather, Scratch<Code, Out>& scratch) {
  const int64_t num_categories = gather.num_categories;
  const int64_t row_bytes = num_categories * int64_t{sizeof(Code)};
  const char* const codes = static_cast<const char*>(gather.codes);
  const int num_segments = gather.num_streams + 1;
  Out* sources = static_cast<Out*>(gather.sources);
  Out* targets = static_cast<Out*>(gather.targets);
  int64_t num_labels = 0;
  Span spans[kGroup * (kMaxStreams + 1)];
  for (int64_t group = 0; group < gather.batch_size; group += kGroup) {
    const int count = static_cast<int>(std::min<int64_t>(kGroup, gather.batch_size - group));
    const int num_spans = count * num_segments;
    plan_spans(gather, gather.windows + group, count, spans);
    for (int i = 0; i < std::min(kSpansAhead, num_spans); ++i) prefetch_span(codes, row_bytes, spans[i]);
    for (int i = 0; i < num_spans; ++i) {
      const int list = i + 2 * kSpansAhead;  // so that it is there when its rows are asked for
      if (list < num_spans && spans[list].rows) prefetch<2>(spans[list].rows, 0, kRowsAhead * sizeof(int64_t));
      if (i + kSpansAhead < num_spans) prefetch_span(codes, row_bytes, spans[i + kSpansAhead]);
      const Span& span = spans[i];
      const int64_t filled = span.num_rows * num_categories;
      if (i % num_segments == gather.num_streams) {
        const int64_t size = gather.num_targets * num_categories;
        gather_span(codes, span, scratch, targets);
        std::fill_n(targets + filled, size - filled, Out{0});
        targets += size;
        num_labels += span.num_rows - 1;
      } else {
        const int64_t padding = gather.src_seq_len * num_categories - filled;
        std::fill_n(sources, padding, Out{0});
        gather_span(codes, span, scratch, sources + padding);
        sources += padding + filled;
      }
    }
  }
  return num_labels;
}

template <typename Code, typename Out>
EVENTKERN_CLONES void gather_rows(const void* codes, const int64_t* rows, int64_t count, Scratch<Code, Out>& scratch,
                                  Out* out) {
  constexpr int kMost = 1 << 30;  // rows in a span
  for (int64_t done = 0; done < count; done += kMost) {
    const Span span{rows + done, 0, static_cast<int>(std::min<int64_t>(count - done, kMost))};
    prefetch_span(static_cast<const char*>(codes), scratch.num_categories * int64_t{sizeof(Code)}, span);
    gather_span(codes, span, scratch, out + done * scratch.num_categories);
  }
}

// The first position whose row is not in [0, num_rows); -1 where there is none.
EVENTKERN_CLONES int64_t first_outside(const int64_t* rows, int64_t count, int64_t num_rows) {
  const uint64_t limit = num_rows;
  bool is_outside = false;
  for (int64_t i = 0; i < count; ++i) is_outside |= static_cast<uint64_t>(rows[i]) >= limit;
  if (!is_outside) return -1;
  return std::find_if(rows, rows + count, [=](int64_t row) { return static_cast<uint64_t>(row) >= limit; }) - rows;
}

}  // namespace

void gather_windows_cpu(const WindowGather& gather, int64_t* num_labels) {
  dispatch_widths(gather.code_bytes, gather.out_bytes, [&]<typename Code, typename Out>() {
    Scratch<Code, Out> scratch(gather.num_categories, gather.cuts);
    *num_labels = gather_windows<Code, Out>(gather, scratch);
  });
}

int64_t gather_rows_cpu(const RowGather& gather, const int64_t* rows, int64_t count, void* out, int out_bytes,
                        int num_threads) {
  const int64_t outside = first_outside(rows, count, gather.num_rows);
  if (outside >= 0) return outside;
  const int num_parts = parts_for(count, kRowGrain, num_threads);
  dispatch_widths(gather.code_bytes, out_bytes, [&]<typename Code, typename Out>() {
    const auto gather_part = [&](int part) {
      const Range range = split_range(count, kOuts<Out>, part, num_parts);
      Scratch<Code, Out> scratch(gather.num_categories, nullptr);
      gather_rows<Code, Out>(gather.codes, rows + range.begin, range.end - range.begin, scratch,
                             static_cast<Out*>(out) + range.begin * gather.num_categories);
    };
    if (num_parts == 1) {
      gather_part(0);
      return;
    }
#pragma omp parallel for num_threads(num_parts) schedule(static, 1)
    for (int part = 0; part < num_parts; ++part) gather_part(part);
  });
  return -1;
}

}  // namespace eventkern
