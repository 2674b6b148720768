// Draws of one class of every head from the k of the largest logits, on the CPU.
#pragma once

#include <cstdint>

namespace eventkern {

struct ClassDraws {
  const float* logits;  // (num_rows, row_stride): those of all heads, one head after another
  int64_t row_stride;
  int64_t num_rows;
  int num_heads;
  const int64_t* first_classes;  // num_heads + 1; head h owns logits [first_classes[h], first_classes[h + 1])
  const int64_t* num_left_out;   // num_heads: classes of each head, from its first on, that are never drawn
  const float* uniforms;         // (num_rows, num_heads) in [0, 1); null: the class of the largest logit
  float inverse_temperature;
  int64_t top_k;  // at least 1
  int num_threads;
};

// classes (num_rows, num_heads): each is drawn with a probability in proportion to e^(logit / temperature).
void draw_classes_cpu(const ClassDraws& call, int32_t* classes);

}  // namespace eventkern
