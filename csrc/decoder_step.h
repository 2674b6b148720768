// The layers of a decoder for the next position of each sequence, on the CPU.
#pragma once

#include <cstdint>

namespace eventkern {

// All float32. Keys and values lie as (layer, sequence, 2, head, position, head_dim).
struct DecoderStep {
  int64_t num_layers;
  int64_t batch_size;
  int64_t width;  // a multiple of 16
  int64_t num_heads;
  int head_dim;          // 4, 8, 16 or 32
  int64_t cache_size;    // positions of the caches, a multiple of 16
  int64_t position;      // of the states; its keys and values are written, those before it are read
  int64_t num_memory;    // the memory's vectors, at least 1
  int64_t memory_size;   // positions of the memory, a multiple of 16
  float epsilon;         // of the layer norms
  const float* weights;  // (num_layers, 14 width^2 + 17 width): see layer_at
  float* caches;         // beyond `position` they may hold anything
  const float* memory;   // beyond `num_memory` it may hold anything
  int num_threads;
};

// states (batch_size, width) in place. Each sequence is computed on its own: the same bits in any batch.
void decoder_step_cpu(const DecoderStep& call, float* states);

}  // namespace eventkern
