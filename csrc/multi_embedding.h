// The multi-category embedding on the CPU: C lookups in one packed weight per event, summed, averaged or concatenated.
#pragma once

#include <cstdint>

#include "lanes.h"

namespace eventkern {

enum class EmbeddingMode : int { kSum, kMean, kConcat };

// What forward and backward share. Strides count elements; the packed weight's row first_rows[c] is table c's first.
struct MultiEmbedding {
  const void* ids;  // (num_events, num_tables)
  int id_bytes;     // 4 or 8
  int64_t event_stride;
  int64_t table_stride;
  int64_t num_events;
  int num_tables;
  const int64_t* first_rows;  // num_tables + 1, the last one the number of all rows
  int64_t dim;
  EmbeddingMode mode;
  FloatType type;
  int num_threads;
};

// out (num_events, dim), or (num_events, num_tables * dim) for kConcat. Returns the first position event * num_tables +
// table whose id lies outside its table, and then out holds nothing of use; -1 where all ids are inside. No row of the
// weight is read for an id before that id is checked.
int64_t multi_embedding_cpu(const MultiEmbedding& call, const void* weight, int64_t weight_stride, void* out);

// weight_grad (first_rows[num_tables], dim), contiguous, written in full, from out_grad with rows of out_grad_stride.
// Every element is one float32 sum in the order of the events, whatever the number of threads. Ids outside their table
// add nothing.
void multi_embedding_backward_cpu(const MultiEmbedding& call, const void* out_grad, int64_t out_grad_stride,
                                  void* weight_grad);

inline constexpr int64_t kLargeTable = 4 << 20;  // bytes beyond which a table is not kept in any cache for long
inline constexpr int64_t kGrainEvents = 256;     // fewer events than this do not pay for a second thread

// function.operator()<Id, Scalar>() with the C++ types of a call's ids and weight.
template <typename Function>
auto with_types(const MultiEmbedding& call, Function function) {
  return with_float_type(call.type, [&]<typename Scalar>() {
    return call.id_bytes == 4 ? function.template operator()<int32_t, Scalar>()
                              : function.template operator()<int64_t, Scalar>();
  });
}

}  // namespace eventkern
