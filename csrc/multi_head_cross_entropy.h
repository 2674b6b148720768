// The cross-entropy of H heads on a block of logits, on the CPU: losses, and the gradient in place of the logits.
#pragma once

#include <cstdint>

#include "lanes.h"

namespace eventkern {

// Labels of rows: (num_rows, num_heads). Strides count elements.
struct Targets {
  const void* data;
  int num_bytes;  // of one: 4 or 8
  int64_t row_stride;
  int64_t head_stride;
  int64_t num_rows;
  int num_heads;
  const int64_t* first_classes;  // num_heads + 1; head h owns classes [first_classes[h], first_classes[h + 1])
  int64_t ignore_index;
};

// Counts each head's targets that are not ignored. Returns the first position row * num_heads + head whose target is
// neither ignored nor a class of its head; -1 where there is none.
int64_t count_targets(const Targets& targets, int64_t* counts);

// With logits l (+ bias) of one row and head: loss = lse - (1 - label_smoothing) * l[target] - label_smoothing *
// mean(l) + z_loss * lse^2, and the gradient is `scale` times its derivative; both 0 where the target is ignored.
struct CrossEntropy {
  void* logits;      // (num_rows, all classes), contiguous
  const void* bias;  // of the logits' type, or null
  FloatType type;
  float label_smoothing;
  float z_loss;
  const float* scales;  // [row * scales_row_stride + head]; null where only losses are asked for
  int64_t scales_row_stride;
  float* losses;  // [row * losses_row_stride + head]
  int64_t losses_row_stride;
  int num_threads;
};

// Writes losses, adds them to each head's total in the order of the rows, and puts the gradient in place of the logits.
void cross_entropy_cpu(const Targets& targets, const CrossEntropy& call, double* totals);

// sums[c] += the sum over rows of matrix (num_rows, num_columns), in the order of the rows.
void add_rows_cpu(const void* matrix, FloatType type, int64_t num_rows, int64_t num_columns, float* sums,
                  int num_threads);

}  // namespace eventkern
