#include "multi_embedding.h"

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "memory.h"
#include "parallel.h"

namespace eventkern {
namespace {

constexpr int kBlock = 64;                      // events whose ids are checked before their rows are read
constexpr int kChecked = 16;                    // neighbouring events whose ids are checked in one go
constexpr int64_t kSecondLevelCache = 1 << 20;  // bytes; a weight that fits is not prefetched

// The packed weight as the forward pass reads it.
template <typename Scalar>
struct Weight {
  const Scalar* data;
  int64_t stride;
  int64_t size;                   // elements from the first row's start to the last row's end
  std::vector<uint64_t> offsets;  // of each table's first row
};

// The ids of one event. A Stride known when compiling (One) saves a product for each lookup.
template <typename Id, typename Stride>
struct EventIds {
  const Id* data;
  Stride stride;

  EVENTKERN_INLINE int64_t operator[](int table) const { return data[table * stride]; }
};

using One = std::integral_constant<int64_t, 1>;

// A negative id is a large one as an unsigned number, so that one comparison finds both kinds.
template <typename Id>
using Unsigned = std::make_unsigned_t<Id>;

// Whether `count` ids lie below their bounds.
template <typename Id>
EVENTKERN_INLINE bool are_inside(const Id* ids, const Unsigned<Id>* bounds, int count) {
  int num_outside = 0;
  for (int i = 0; i < count; ++i) num_outside += static_cast<Unsigned<Id>>(ids[i]) >= bounds[i];
  return num_outside == 0;
}

// Where a row lies in the weight; of an id not checked yet, somewhere.
template <typename Ids, typename Scalar>
EVENTKERN_INLINE uint64_t offset_of(const Weight<Scalar>& weight, Ids ids, int table) {
  return weight.offsets[table] + static_cast<uint64_t>(ids[table]) * weight.stride;
}

template <typename Ids, typename Scalar>
EVENTKERN_INLINE const Scalar* row_of(const Weight<Scalar>& weight, Ids ids, int table) {
  return weight.data + offset_of(weight, ids, table);
}

// Meanwhile the same columns of the next event come into the second-level cache, where the weight does not fit it.
template <int kPairs, bool kIsPrefetched, typename Ids, typename Scalar>
EVENTKERN_INLINE void sum_columns(const Weight<Scalar>& weight, Ids ids, Ids next, int num_tables, float divisor,
                                  int64_t column, Scalar* out) {
  Columns sums[kPairs] = {};
  for (int table = 0; table < num_tables; ++table) {
    const Scalar* columns = row_of(weight, ids, table) + column;
    if constexpr (kIsPrefetched) {
      prefetch<2>(weight.data, offset_of(weight, next, table) + column, kPairs * kColumns * sizeof(Scalar));
    }
#pragma GCC unroll 4
    for (int pair = 0; pair < kPairs; ++pair) sums[pair] = sums[pair] + load(columns + pair * kColumns);
  }
#pragma GCC unroll 4
  for (int pair = 0; pair < kPairs; ++pair) {
    store(out + column + pair * kColumns, divisor == 1.0f ? sums[pair] : sums[pair] / divisor);
  }
}

// The last `count` columns, fewer than kColumns. To read past them, but within the weight, is cheaper than a copy.
template <typename Ids, typename Scalar>
EVENTKERN_INLINE void sum_end(const Weight<Scalar>& weight, Ids ids, int num_tables, float divisor, int64_t column,
                              int64_t count, Scalar* out) {
  Columns sum{};
  for (int table = 0; table < num_tables; ++table) {
    const Scalar* columns = row_of(weight, ids, table) + column;
    sum = sum + (columns - weight.data + kColumns <= weight.size ? load(columns) : load_some(columns, count));
  }
  store_some(out + column, sum / divisor, count);
}

template <bool kIsPrefetched, typename Ids, typename Scalar>
EVENTKERN_INLINE void sum_rows(const Weight<Scalar>& weight, Ids ids, Ids next, int num_tables, float divisor,
                               int64_t dim, Scalar* out) {
  int64_t column = 0;
  for (; column + 4 * kColumns <= dim; column += 4 * kColumns) {
    sum_columns<4, kIsPrefetched>(weight, ids, next, num_tables, divisor, column, out);
  }
  if (column + 2 * kColumns <= dim) {
    sum_columns<2, kIsPrefetched>(weight, ids, next, num_tables, divisor, column, out);
    column += 2 * kColumns;
  }
  if (column + kColumns <= dim) {
    sum_columns<1, kIsPrefetched>(weight, ids, next, num_tables, divisor, column, out);
    column += kColumns;
  }
  if (column < dim) sum_end(weight, ids, num_tables, divisor, column, dim - column, out);
}

// What is known of the tables before the first event.
template <typename Id>
struct Tables {
  std::vector<Unsigned<Id>> bounds;  // of ids: the tables' sizes, kChecked times one after another
  std::vector<int> large;

  Tables(const MultiEmbedding& call, int64_t scalar_bytes) : bounds(static_cast<size_t>(kChecked) * call.num_tables) {
    constexpr uint64_t kMostIds = uint64_t{std::numeric_limits<Id>::max()} + 1;
    for (int table = 0; table < call.num_tables; ++table) {
      const int64_t num_rows = call.first_rows[table + 1] - call.first_rows[table];
      const auto bound = static_cast<Unsigned<Id>>(std::min(static_cast<uint64_t>(num_rows), kMostIds));
      for (int i = 0; i < kChecked; ++i) bounds[i * call.num_tables + table] = bound;
      if (num_rows * call.dim * scalar_bytes > kLargeTable) large.push_back(table);
    }
  }
};

// Events [range.begin, range.end) to their rows of out; stops at the first id outside its table and returns its
// position.
template <typename Id, typename Stride, typename Scalar>
EVENTKERN_CLONES int64_t look_up(const MultiEmbedding& call, Stride table_stride, const Weight<Scalar>& weight,
                                 const Tables<Id>& tables, Range range, Scalar* out) {
  using Ids = EventIds<Id, Stride>;
  const int num_tables = call.num_tables;
  const int64_t dim = call.dim;
  const bool is_concat = call.mode == EmbeddingMode::kConcat;
  const int64_t width = is_concat ? num_tables * dim : dim;
  const float divisor = call.mode == EmbeddingMode::kMean ? static_cast<float>(num_tables) : 1.0f;
  const bool is_prefetched = weight.size * int64_t{sizeof(Scalar)} > kSecondLevelCache;
  const bool is_flat = std::is_same_v<Stride, One> && call.event_stride == num_tables;
  const auto ids_of = [&](int64_t event) EVENTKERN_INLINE_LAMBDA {
    return Ids{static_cast<const Id*>(call.ids) + event * call.event_stride, table_stride};
  };
  for (int64_t begin = range.begin; begin < range.end; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, range.end);
    for (int64_t event = begin; event < end;) {
      if (is_flat && event + kChecked <= end &&
          are_inside(ids_of(event).data, tables.bounds.data(), kChecked * num_tables)) {
        event += kChecked;
        continue;
      }
      for (int table = 0; table < num_tables; ++table) {
        if (!are_inside(&ids_of(event).data[table * table_stride], &tables.bounds[table], 1))
          return event * num_tables + table;
      }
      ++event;
    }
    for (const int table : tables.large) {
      for (int64_t event = begin; event < end; ++event) {
        prefetch<2>(weight.data, offset_of(weight, ids_of(event), table), dim * sizeof(Scalar));
      }
    }
    for (int64_t event = begin; event < end; ++event) {
      const Ids ids = ids_of(event);
      Scalar* target = out + event * width;
      if (is_concat) {
        for (int table = 0; table < num_tables; ++table) {
          std::memcpy(target + table * dim, row_of(weight, ids, table), dim * sizeof(Scalar));
        }
      } else {
        const Ids next = ids_of(std::min(event + 1, range.end - 1));
        is_prefetched ? sum_rows<true>(weight, ids, next, num_tables, divisor, dim, target)
                      : sum_rows<false>(weight, ids, next, num_tables, divisor, dim, target);
      }
    }
  }
  return -1;
}

template <typename Id, typename Scalar>
int64_t forward(const MultiEmbedding& call, const Weight<Scalar>& weight, Scalar* out) {
  const int64_t width = call.mode == EmbeddingMode::kConcat ? call.num_tables * call.dim : call.dim;
  const int64_t num_bytes = call.num_events * width * int64_t{sizeof(Scalar)};
  if (num_bytes >= kHugeTensor) advise_huge_pages(out, num_bytes);
  const int num_parts = parts_for(call.num_events, kGrainEvents, call.num_threads);
  const Tables<Id> tables(call, sizeof(Scalar));
  std::vector<int64_t> outside(num_parts);
#pragma omp parallel for num_threads(num_parts) schedule(static, 1) if (num_parts > 1)
  for (int part = 0; part < num_parts; ++part) {
    const Range range = split_range(call.num_events, 1, part, num_parts);
    outside[part] = call.table_stride == 1 ? look_up<Id>(call, One{}, weight, tables, range, out)
                                           : look_up<Id>(call, call.table_stride, weight, tables, range, out);
  }
  for (const int64_t position : outside) {
    if (position >= 0) return position;
  }
  return -1;
}

}  // namespace

int64_t multi_embedding_cpu(const MultiEmbedding& call, const void* weight, int64_t weight_stride, void* out) {
  return with_types(call, [&]<typename Id, typename Scalar>() {
    const int64_t num_rows = call.first_rows[call.num_tables];
    Weight<Scalar> packed{
        static_cast<const Scalar*>(weight), weight_stride, (num_rows - 1) * weight_stride + call.dim, {}};
    for (int table = 0; table < call.num_tables; ++table) {
      packed.offsets.push_back(call.first_rows[table] * weight_stride);
    }
    return forward<Id>(call, packed, static_cast<Scalar*>(out));
  });
}

}  // namespace eventkern
