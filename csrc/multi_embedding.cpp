#include "multi_embedding.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "lanes.h"
#include "pages.h"
#include "parallel.h"

namespace eventkern {
namespace {

constexpr int kBlock = 64;                      // events whose row numbers are checked and prepared at a time
constexpr int kChecked = 16;                    // events whose ids are checked together
constexpr int kAhead = 16;                      // events between a prefetch and its use
constexpr int64_t kSecondLevelCache = 1 << 20;  // bytes; a weight that fits is not prefetched
constexpr int64_t kLargeTable = 4 << 20;        // bytes beyond which a table is not kept in any cache for long
constexpr int64_t kHugeTensor = 4 << 20;        // bytes from which a tensor is worth huge pages
constexpr int64_t kGrainEvents = 256;           // fewer events than this do not pay for a second thread
constexpr int64_t kGrainBytes = 1 << 20;        // nor do fewer bytes to fill

int64_t padded(int64_t width) { return (width + kColumns - 1) / kColumns * kColumns; }

// Into the first-level cache (kLevel 3) or the second (2).
template <int kLevel>
EVENTKERN_INLINE void prefetch(const void* address, int64_t num_bytes) {
  for (int64_t byte = 0; byte < num_bytes; byte += 64) {
    __builtin_prefetch(static_cast<const char*>(address) + byte, 0, kLevel);
  }
}

// --- forward ---------------------------------------------------------------------------------------------------------

// The packed weight as the forward pass reads it.
template <typename Scalar>
struct Weight {
  const Scalar* data;
  int64_t stride;
  int64_t size;                  // elements from the first row's start to the last row's end
  std::vector<int64_t> offsets;  // of each table's first row
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

template <typename Ids, typename Scalar>
EVENTKERN_INLINE const Scalar* row_of(const Weight<Scalar>& weight, Ids ids, int table) {
  return weight.data + weight.offsets[table] + ids[table] * weight.stride;
}

// Meanwhile the same columns of the next event come into the second-level cache, where the weight does not fit it.
template <int kPairs, bool kIsPrefetched, typename Ids, typename Scalar>
EVENTKERN_INLINE void sum_columns(const Weight<Scalar>& weight, Ids ids, Ids next, int num_tables, float divisor,
                                  int64_t column, Scalar* out) {
  Columns sums[kPairs] = {};
  for (int table = 0; table < num_tables; ++table) {
    const Scalar* columns = row_of(weight, ids, table) + column;
    if constexpr (kIsPrefetched) {
      prefetch<2>(row_of(weight, next, table) + column, kPairs * kColumns * sizeof(Scalar));
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

// Events [range.begin, range.end) to their rows of out; stops at the first id outside its table and returns its
// position.
template <typename Id, typename Stride, typename Scalar>
EVENTKERN_CLONES int64_t look_up(const MultiEmbedding& call, Stride table_stride, const Weight<Scalar>& weight,
                                 Range range, Scalar* out) {
  using Ids = EventIds<Id, Stride>;
  const int num_tables = call.num_tables;
  const int64_t dim = call.dim;
  const bool is_concat = call.mode == EmbeddingMode::kConcat;
  const int64_t width = is_concat ? num_tables * dim : dim;
  const float divisor = call.mode == EmbeddingMode::kMean ? static_cast<float>(num_tables) : 1.0f;
  const bool is_prefetched = weight.size * int64_t{sizeof(Scalar)} > kSecondLevelCache;
  // Neighbouring events are checked together, against the tables' sizes one after another again and again.
  const bool is_flat = std::is_same_v<Stride, One> && call.event_stride == num_tables;
  std::vector<Unsigned<Id>> bounds(static_cast<size_t>(kChecked) * num_tables);
  std::vector<int> large_tables;
  for (int table = 0; table < num_tables; ++table) {
    const int64_t num_rows = call.first_rows[table + 1] - call.first_rows[table];
    const auto bound = static_cast<Unsigned<Id>>(std::min<int64_t>(num_rows, std::numeric_limits<Id>::max()));
    for (int i = 0; i < kChecked; ++i) bounds[i * num_tables + table] = bound;
    if (num_rows * dim * int64_t{sizeof(Scalar)} > kLargeTable) large_tables.push_back(table);
  }
  const auto ids_of = [&](int64_t event) EVENTKERN_INLINE_LAMBDA {
    return Ids{static_cast<const Id*>(call.ids) + event * call.event_stride, table_stride};
  };
  for (int64_t begin = range.begin; begin < range.end; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, range.end);
    for (int64_t event = begin; event < end;) {
      if (is_flat && event + kChecked <= end && are_inside(ids_of(event).data, bounds.data(), kChecked * num_tables)) {
        event += kChecked;
        continue;
      }
      for (int table = 0; table < num_tables; ++table) {
        if (!are_inside(&ids_of(event).data[table * table_stride], &bounds[table], 1))
          return event * num_tables + table;
      }
      ++event;
    }
    for (const int table : large_tables) {
      for (int64_t event = begin; event < end; ++event) {
        prefetch<2>(row_of(weight, ids_of(event), table), dim * sizeof(Scalar));
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
  std::vector<int64_t> outside(num_parts);
#pragma omp parallel for num_threads(num_parts) schedule(static, 1) if (num_parts > 1)
  for (int part = 0; part < num_parts; ++part) {
    const Range range = split_range(call.num_events, 1, part, num_parts);
    outside[part] = call.table_stride == 1 ? look_up<Id>(call, One{}, weight, range, out)
                                           : look_up<Id>(call, call.table_stride, weight, range, out);
  }
  for (const int64_t position : outside) {
    if (position >= 0) return position;
  }
  return -1;
}

// --- backward --------------------------------------------------------------------------------------------------------

// Some tables, and some of their columns: nobody else adds to those.
struct Task {
  std::vector<int> tables;
  int64_t column;
  int64_t width;
};

// Large tables one by one first, since they take longest and, in 16 bits, hold the most scratch; the others in as few
// groups as occupy the threads, because each group reads all of out_grad. Columns are split where tables do not
// suffice.
std::vector<Task> make_tasks(const MultiEmbedding& call, int num_threads) {
  std::vector<std::vector<int>> groups;
  std::vector<int> small;
  for (int table = 0; table < call.num_tables; ++table) {
    const int64_t num_rows = call.first_rows[table + 1] - call.first_rows[table];
    if (num_rows * call.dim * int64_t{sizeof(float)} > kLargeTable) {
      groups.push_back({table});
    } else {
      small.push_back(table);
    }
  }
  const int num_small = static_cast<int>(small.size());
  const int num_groups = std::min(num_small, groups.empty() ? num_threads : 2 * num_threads);
  for (int group = 0; group < num_groups; ++group) {
    const Range range = split_range(num_small, 1, group, num_groups);
    groups.emplace_back(small.begin() + range.begin, small.begin() + range.end);
  }
  const int64_t num_splits =
      (num_threads + static_cast<int64_t>(groups.size()) - 1) / static_cast<int64_t>(groups.size());
  const int64_t width = padded((call.dim + num_splits - 1) / num_splits);
  std::vector<Task> tasks;
  for (const std::vector<int>& tables : groups) {
    for (int64_t column = 0; column < call.dim; column += width) {
      tasks.push_back({tables, column, std::min(width, call.dim - column)});
    }
  }
  return tasks;
}

struct Free {
  void operator()(float* pointer) const { std::free(pointer); }
};

// Zeroed float32 scratch on huge pages where it is large.
std::unique_ptr<float[], Free> zeroed(int64_t count) {
  constexpr int64_t kHugePage = 2 << 20;
  const int64_t num_bytes = count * int64_t{sizeof(float)};
  const int64_t alignment = num_bytes >= kHugePage / 2 ? kHugePage : 64;
  const int64_t rounded = (num_bytes + alignment - 1) / alignment * alignment;
  auto* pointer = static_cast<float*>(std::aligned_alloc(alignment, std::max(rounded, alignment)));
  if (pointer == nullptr) throw std::bad_alloc();
  advise_huge_pages(pointer, rounded);
  std::memset(pointer, 0, num_bytes);
  return std::unique_ptr<float[], Free>(pointer);
}

// Where a table's sums lie: in the gradient itself for float32, else in scratch, with one row per id or, where the
// table is large and has more rows than there are events, one row per id that occurs.
struct Sums {
  float* data;
  int64_t num_rows;                // of the table
  std::vector<int32_t> row_of_id;  // -1: none; empty where the row is the id
  std::vector<int64_t> id_of_row;  // of rows that row_of_id numbers
  std::unique_ptr<float[], Free> scratch;
};

// What the inner loop reads of one table.
struct Target {
  int64_t id_offset;
  int64_t grad_offset;
  int64_t num_rows;
  const int32_t* row_of_id;
  float* data;
};

// What the inner loop reads of one event.
template <typename Id, typename Scalar>
struct Event {
  const Id* ids;
  const Id* next_ids;  // whose sums come into the cache meanwhile
  const Scalar* grad;
  bool is_concat;  // each table has a gradient of its own
  float divisor;
};

// Adds kPairs * kColumns columns of one event to the sums of all targets; they stay in registers from table to table.
template <int kPairs, typename Id, typename Scalar>
EVENTKERN_INLINE void add_columns(const Event<Id, Scalar>& event, const Target* targets, int num_targets,
                                  int64_t sums_stride, int64_t column) {
  Columns grad[kPairs];
  const auto load_grad = [&](const Scalar* source) EVENTKERN_INLINE_LAMBDA {
#pragma GCC unroll 2
    for (int pair = 0; pair < kPairs; ++pair) {
      const Columns columns = load(source + pair * kColumns);
      grad[pair] = event.divisor == 1.0f ? columns : columns / event.divisor;
    }
  };
  load_grad(event.grad + column);
  for (int i = 0; i < num_targets; ++i) {
    const Target& target = targets[i];
    const int64_t id = event.ids[target.id_offset];
    if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(target.num_rows)) continue;
    const int64_t row = target.row_of_id == nullptr ? id : target.row_of_id[id];
    float* sums = target.data + row * sums_stride + column;
    if (target.row_of_id == nullptr) {
      const int64_t next = event.next_ids[target.id_offset];
      prefetch<3>(target.data + next * sums_stride + column, kPairs * kColumns * sizeof(float));
    }
    if (event.is_concat) load_grad(event.grad + target.grad_offset + column);
#pragma GCC unroll 2
    for (int pair = 0; pair < kPairs; ++pair) store(sums + pair * kColumns, load(sums + pair * kColumns) + grad[pair]);
  }
}

// The last columns of an event, fewer than kColumns. Sums in scratch are padded to kColumns.
template <typename Id, typename Scalar>
EVENTKERN_INLINE void add_end(const Event<Id, Scalar>& event, const Target* targets, int num_targets,
                              int64_t sums_stride, int64_t column, int64_t count) {
  for (int i = 0; i < num_targets; ++i) {
    const Target& target = targets[i];
    const int64_t id = event.ids[target.id_offset];
    if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(target.num_rows)) continue;
    const int64_t row = target.row_of_id == nullptr ? id : target.row_of_id[id];
    float* sums = target.data + row * sums_stride + column;
    const Scalar* source = event.grad + (event.is_concat ? target.grad_offset : 0) + column;
    if constexpr (std::is_same_v<Scalar, float>) {
      for (int64_t j = 0; j < count; ++j) sums[j] += source[j] / event.divisor;
    } else {
      store(sums, load(sums) + load_some(source, count) / event.divisor);
    }
  }
}

template <typename Id, typename Scalar>
EVENTKERN_CLONES void accumulate(const MultiEmbedding& call, const Scalar* out_grad, int64_t out_grad_stride,
                                 const Task& task, const std::vector<Target>& targets, int64_t sums_stride) {
  const bool is_prefetched = targets.size() == 1 && targets[0].row_of_id == nullptr &&
                             targets[0].num_rows * task.width * int64_t{sizeof(float)} > kLargeTable;
  const Id* ids = static_cast<const Id*>(call.ids);
  Event<Id, Scalar> event{ids, ids, out_grad + task.column, call.mode == EmbeddingMode::kConcat,
                          call.mode == EmbeddingMode::kMean ? static_cast<float>(call.num_tables) : 1.0f};
  const int num_targets = static_cast<int>(targets.size());
  for (int64_t i = 0; i < call.num_events; ++i, event.ids += call.event_stride, event.grad += out_grad_stride) {
    if (is_prefetched && i + kAhead < call.num_events) {
      const int64_t id = event.ids[kAhead * call.event_stride + targets[0].id_offset];
      if (static_cast<uint64_t>(id) < static_cast<uint64_t>(targets[0].num_rows)) {
        prefetch<3>(targets[0].data + id * sums_stride, task.width * sizeof(float));
      }
    }
    event.next_ids = event.ids + (i + 1 < call.num_events ? call.event_stride : 0);
    int64_t column = 0;
    for (; column + 2 * kColumns <= task.width; column += 2 * kColumns) {
      add_columns<2>(event, targets.data(), num_targets, sums_stride, column);
    }
    if (column + kColumns <= task.width) {
      add_columns<1>(event, targets.data(), num_targets, sums_stride, column);
      column += kColumns;
    }
    if (column < task.width) {
      add_end(event, targets.data(), num_targets, sums_stride, column, task.width - column);
    }
  }
}

template <typename Scalar>
EVENTKERN_CLONES void round_rows(const Sums& sums, int64_t sums_stride, int64_t width, Scalar* grad,
                                 int64_t grad_stride) {
  const bool is_dense = sums.row_of_id.empty();
  const int64_t num_rows = is_dense ? sums.num_rows : static_cast<int64_t>(sums.id_of_row.size());
  for (int64_t row = 0; row < num_rows; ++row) {
    const float* source = sums.data + row * sums_stride;
    Scalar* rounded = grad + (is_dense ? row : sums.id_of_row[row]) * grad_stride;
    for (int64_t column = 0; column < width; column += kColumns) {
      const int64_t count = std::min<int64_t>(kColumns, width - column);
      count == kColumns ? store(rounded + column, load(source + column))
                        : store_some(rounded + column, load(source + column), count);
    }
  }
}

// Numbers the ids of a table that occur, in the order of their first events.
template <typename Id>
void number_ids(const MultiEmbedding& call, int table, Sums& sums) {
  const Id* ids = static_cast<const Id*>(call.ids) + table * call.table_stride;
  sums.row_of_id.assign(sums.num_rows, -1);
  for (int64_t event = 0; event < call.num_events; ++event) {
    const int64_t id = ids[event * call.event_stride];
    if (id < 0 || id >= sums.num_rows || sums.row_of_id[id] >= 0) continue;
    sums.row_of_id[id] = static_cast<int32_t>(sums.id_of_row.size());
    sums.id_of_row.push_back(id);
  }
}

template <typename Id, typename Scalar>
void run_task(const MultiEmbedding& call, const Scalar* out_grad, int64_t out_grad_stride, const Task& task,
              Scalar* weight_grad) {
  constexpr bool kIsFloat = std::is_same_v<Scalar, float>;
  const int64_t sums_stride = kIsFloat ? call.dim : padded(task.width);
  std::vector<Sums> sums;
  for (const int table : task.tables) {
    Sums of_table{};
    of_table.num_rows = call.first_rows[table + 1] - call.first_rows[table];
    if constexpr (kIsFloat) {
      of_table.data = weight_grad + call.first_rows[table] * call.dim + task.column;
    } else {
      const bool is_large = of_table.num_rows * sums_stride * int64_t{sizeof(float)} > kLargeTable;
      if (is_large && of_table.num_rows > call.num_events) number_ids<Id>(call, table, of_table);
      const bool is_numbered = !of_table.row_of_id.empty();
      const int64_t num_sums = is_numbered ? static_cast<int64_t>(of_table.id_of_row.size()) : of_table.num_rows;
      of_table.scratch = zeroed(num_sums * sums_stride);
      of_table.data = of_table.scratch.get();
    }
    sums.push_back(std::move(of_table));
  }
  std::vector<Target> targets;
  for (size_t i = 0; i < sums.size(); ++i) {
    const int64_t grad_offset = call.mode == EmbeddingMode::kConcat ? task.tables[i] * call.dim : 0;
    const int32_t* row_of_id = sums[i].row_of_id.empty() ? nullptr : sums[i].row_of_id.data();
    targets.push_back({task.tables[i] * call.table_stride, grad_offset, sums[i].num_rows, row_of_id, sums[i].data});
  }
  accumulate<Id>(call, out_grad, out_grad_stride, task, targets, sums_stride);
  if constexpr (!kIsFloat) {
    for (size_t i = 0; i < sums.size(); ++i) {
      Scalar* grad = weight_grad + call.first_rows[task.tables[i]] * call.dim + task.column;
      round_rows(sums[i], sums_stride, task.width, grad, call.dim);
    }
  }
}

template <typename Id, typename Scalar>
void backward(const MultiEmbedding& call, const Scalar* out_grad, int64_t out_grad_stride, Scalar* weight_grad) {
  const int64_t num_bytes = call.first_rows[call.num_tables] * call.dim * int64_t{sizeof(Scalar)};
  if (num_bytes >= kHugeTensor) advise_huge_pages(weight_grad, num_bytes);
  const int num_fillers = parts_for(num_bytes, kGrainBytes, call.num_threads);
#pragma omp parallel for num_threads(num_fillers) schedule(static, 1) if (num_fillers > 1)
  for (int part = 0; part < num_fillers; ++part) {
    const Range range = split_range(num_bytes, 4096, part, num_fillers);
    std::memset(reinterpret_cast<char*>(weight_grad) + range.begin, 0, range.end - range.begin);
  }
  const int num_workers = parts_for(call.num_events, kGrainEvents, call.num_threads);
  const std::vector<Task> tasks = make_tasks(call, num_workers);
  const int num_tasks = static_cast<int>(tasks.size());
  std::atomic<bool> is_out_of_memory = false;  // an exception may not leave a parallel region
#pragma omp parallel for num_threads(num_workers) schedule(dynamic, 1) if (num_workers > 1)
  for (int task = 0; task < num_tasks; ++task) {
    try {
      run_task<Id>(call, out_grad, out_grad_stride, tasks[task], weight_grad);
    } catch (const std::bad_alloc&) {
      is_out_of_memory = true;
    }
  }
  if (is_out_of_memory) throw std::bad_alloc();
}

// --- the types of ids and weight -------------------------------------------------------------------------------------

template <typename Function>
auto with_types(const MultiEmbedding& call, Function function) {
  return with_float_type(call.type, [&]<typename Scalar>() {
    return call.id_bytes == 4 ? function.template operator()<int32_t, Scalar>()
                              : function.template operator()<int64_t, Scalar>();
  });
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

void multi_embedding_backward_cpu(const MultiEmbedding& call, const void* out_grad, int64_t out_grad_stride,
                                  void* weight_grad) {
  with_types(call, [&]<typename Id, typename Scalar>() {
    backward<Id>(call, static_cast<const Scalar*>(out_grad), out_grad_stride, static_cast<Scalar*>(weight_grad));
  });
}

}  // namespace eventkern
