#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "memory.h"
#include "multi_embedding.h"
#include "parallel.h"

namespace eventkern {
namespace {

constexpr int kAhead = 16;                // events between a prefetch and its use
constexpr int64_t kGrainBytes = 1 << 20;  // fewer bytes than this to fill do not pay for a second thread

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

// The sums that an id of the target is added to; null where the id lies outside the table.
EVENTKERN_INLINE float* sums_of(const Target& target, int64_t id, int64_t sums_stride) {
  if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(target.num_rows)) return nullptr;
  return target.data + (target.row_of_id == nullptr ? id : target.row_of_id[id]) * sums_stride;
}

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
    float* sums = sums_of(target, event.ids[target.id_offset], sums_stride);
    if (sums == nullptr) continue;
    sums += column;
    if (target.row_of_id == nullptr) {
      const int64_t next = event.next_ids[target.id_offset];
      prefetch<3>(target.data, static_cast<uint64_t>(next) * sums_stride + column, kPairs * kColumns * sizeof(float));
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
    float* sums = sums_of(target, event.ids[target.id_offset], sums_stride);
    if (sums == nullptr) continue;
    sums += column;
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
        prefetch<3>(targets[0].data, id * sums_stride, task.width * sizeof(float));
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

}  // namespace

void multi_embedding_backward_cpu(const MultiEmbedding& call, const void* out_grad, int64_t out_grad_stride,
                                  void* weight_grad) {
  with_types(call, [&]<typename Id, typename Scalar>() {
    backward<Id>(call, static_cast<const Scalar*>(out_grad), out_grad_stride, static_cast<Scalar*>(weight_grad));
  });
}

}  // namespace eventkern
