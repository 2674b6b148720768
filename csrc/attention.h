// Scaled dot-product attention of many heads on the CPU, forward and backward.
#pragma once

#include <cstdint>

#include "lanes.h"

namespace eventkern {

// (batch, head, position, head_dim); strides count elements, and that of head_dim is 1.
struct HeadRows {
  void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
};

struct Attention {
  int64_t batch_size;
  int64_t num_heads;
  int64_t num_queries;
  int64_t num_keys;  // at least 1; num_queries where is_causal
  int head_dim;      // 4, 8, 16 or 32
  bool is_causal;
  FloatType type;
  int num_threads;
};

// output = softmax(query key^T / sqrt(head_dim)) value. statistics (batch, head, 2, num_queries) are what a backward
// needs: the largest score of each query, in units of ln 2, and 1 over the sum of 2^(score - largest).
void attention_cpu(const Attention& call, const HeadRows& query, const HeadRows& key, const HeadRows& value,
                   const HeadRows& output, float* statistics);

// The gradients of query, key and value, given that of the output.
void attention_backward_cpu(const Attention& call, const HeadRows& grad, const HeadRows& query, const HeadRows& key,
                            const HeadRows& value, const HeadRows& output, const float* statistics,
                            const HeadRows& query_grad, const HeadRows& key_grad, const HeadRows& value_grad);

}  // namespace eventkern
