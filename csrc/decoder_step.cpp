#include "decoder_step.h"

#include <algorithm>
#include <cmath>

#include "attention_rows.h"

namespace eventkern {
namespace {

constexpr int64_t kSequencesAtOnce = 4;  // share each load of the weights

struct Norm {
  const float* scale;
  const float* shift;
};

struct Linear {
  const float* weight;  // (inputs, outputs), so that outputs stand in lanes
  const float* bias;
};

struct Layer {
  Norm attention_norm;
  Linear query_key_value, attention_out;
  Norm cross_attention_norm;
  Linear query, cross_attention_out;
  Norm feed_forward_norm;
  Linear widen, narrow;
};

Layer layer_at(const float* next, int64_t width) {
  const auto take = [&next](int64_t size) {
    const float* part = next;
    next += size;
    return part;
  };
  const auto norm = [&] { return Norm{take(width), take(width)}; };
  const auto linear = [&](int64_t inputs, int64_t outputs) { return Linear{take(inputs * outputs), take(outputs)}; };
  return {norm(), linear(width, 3 * width), linear(width, width),    norm(), linear(width, width), linear(width, width),
          norm(), linear(width, 4 * width), linear(4 * width, width)};
}

// Of one thread, each for as many sequences as are taken at once.
struct Buffers {
  float* normed;    // (width)
  float* packed;    // (3 width): query, key and value
  float* attended;  // (width)
  float* hidden;    // (4 width)
  float* scores;    // of one query and one head
};

EVENTKERN_INLINE void normalise(const float* states, Norm norm, int64_t width, float epsilon, float* normed) {
  Lanes sum{};
  for (int64_t i = 0; i < width; i += kLanes) sum += load_lanes(states + i);
  const float mean = total_of(sum) / width;
  Lanes squares{};
  for (int64_t i = 0; i < width; i += kLanes) {
    const Lanes centred = load_lanes(states + i) - mean;
    squares += centred * centred;
  }
  const float factor = 1.0f / std::sqrt(total_of(squares) / width + epsilon);
  for (int64_t i = 0; i < width; i += kLanes) {
    const Lanes centred = load_lanes(states + i) - mean;
    store_lanes(normed + i, centred * factor * load_lanes(norm.scale + i) + load_lanes(norm.shift + i));
  }
}

// kVectors * kLanes outputs of kRows rows from `first` on; kAdds: added to what is there.
template <int kRows, int kVectors, bool kAdds>
EVENTKERN_INLINE void multiply_some(const float* inputs, Linear linear, int64_t num_inputs, int64_t num_outputs,
                                    int64_t first, float* outputs) {
  Lanes sums[kRows][kVectors];
  for (int row = 0; row < kRows; ++row) {
    for (int v = 0; v < kVectors; ++v) sums[row][v] = load_lanes(linear.bias + first + v * kLanes);
  }
  for (int64_t i = 0; i < num_inputs; ++i) {
    Lanes weights[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      weights[v] = load_lanes(linear.weight + i * num_outputs + first + v * kLanes);
    }
    for (int row = 0; row < kRows; ++row) {
      const float input = inputs[row * num_inputs + i];
      for (int v = 0; v < kVectors; ++v) sums[row][v] += weights[v] * input;
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int v = 0; v < kVectors; ++v) {
      float* target = outputs + row * num_outputs + first + v * kLanes;
      store_lanes(target, kAdds ? load_lanes(target) + sums[row][v] : sums[row][v]);
    }
  }
}

// inputs (kRows, num_inputs) to outputs (kRows, num_outputs).
template <int kRows, bool kAdds = false>
EVENTKERN_INLINE void multiply(const float* inputs, Linear linear, int64_t num_inputs, int64_t num_outputs,
                               float* outputs) {
  constexpr int kVectors = kRows == 1 ? 4 : 2;
  int64_t first = 0;
  for (; first + kVectors * kLanes <= num_outputs; first += kVectors * kLanes) {
    multiply_some<kRows, kVectors, kAdds>(inputs, linear, num_inputs, num_outputs, first, outputs);
  }
  for (; first < num_outputs; first += kLanes) {
    multiply_some<kRows, 1, kAdds>(inputs, linear, num_inputs, num_outputs, first, outputs);
  }
}

// x Phi(x) = max(x, 0) - |x| / 2 erfc(|x| / sqrt(2)), with erfc to within 1.5e-7: Abramowitz and Stegun, 1964, 7.1.26.
EVENTKERN_INLINE Lanes gelu(Lanes x) {
  const Lanes positive = x > 0.0f ? x : Lanes{};
  const Lanes magnitude = x > 0.0f ? x : -x;
  const Lanes t = 1.0f / (magnitude * (0.3275911f * 0.707106781f) + 1.0f);
  Lanes tail = t * 1.061405429f - 1.453152027f;
  tail = tail * t + 1.421413741f;
  tail = tail * t - 0.284496736f;
  tail = tail * t + 0.254829592f;
  tail *= t * exp2_of_negative(x * x * (-0.5f * kLog2E));
  return positive - magnitude * tail * 0.5f;
}

// Attention of one query over the keys and values (2, head, size, head_dim) of its sequence.
template <int kHeadDim>
EVENTKERN_INLINE void attend_from(const float* query, const float* keys_and_values, int64_t num_heads, int64_t size,
                                  int64_t num_keys, float* scores, float* attended) {
  const float scale = kLog2E / std::sqrt(static_cast<float>(kHeadDim));
  for (int64_t head = 0; head < num_heads; ++head) {
    float scaled[kHeadDim];
    for (int h = 0; h < kHeadDim; ++h) scaled[h] = query[head * kHeadDim + h] * scale;
    float largest, inverse_sum;
    const float* keys = keys_and_values + head * size * kHeadDim;
    const AttendedPair pair{
        scaled, keys, keys + num_heads * size * kHeadDim, attended + head * kHeadDim, &largest, &inverse_sum, scores};
    attend_few<kHeadDim>(pair, 0, 1, num_keys, false);
  }
}

template <int kHeadDim, int kRows>
EVENTKERN_INLINE void step_some(const DecoderStep& call, const Layer& layer, int64_t layer_number, int64_t sequence,
                                const Buffers& buffers, float* states) {
  const int64_t width = call.width;
  const auto normalise_all = [&](Norm norm) EVENTKERN_INLINE_LAMBDA {
    for (int row = 0; row < kRows; ++row) {
      normalise(states + row * width, norm, width, call.epsilon, buffers.normed + row * width);
    }
  };
  const int64_t pair = layer_number * call.batch_size + sequence;

  normalise_all(layer.attention_norm);
  multiply<kRows>(buffers.normed, layer.query_key_value, width, 3 * width, buffers.packed);
  for (int row = 0; row < kRows; ++row) {
    const float* packed = buffers.packed + row * 3 * width;
    float* cache = call.caches + (pair + row) * 2 * width * call.cache_size;
    for (int64_t head = 0; head < 2 * call.num_heads; ++head) {
      std::copy_n(packed + width + head * kHeadDim, kHeadDim,
                  cache + (head * call.cache_size + call.position) * kHeadDim);
    }
    attend_from<kHeadDim>(packed, cache, call.num_heads, call.cache_size, call.position + 1, buffers.scores,
                          buffers.attended + row * width);
  }
  multiply<kRows, true>(buffers.attended, layer.attention_out, width, width, states);

  normalise_all(layer.cross_attention_norm);
  multiply<kRows>(buffers.normed, layer.query, width, width, buffers.packed);
  for (int row = 0; row < kRows; ++row) {
    attend_from<kHeadDim>(buffers.packed + row * width, call.memory + (pair + row) * 2 * width * call.memory_size,
                          call.num_heads, call.memory_size, call.num_memory, buffers.scores,
                          buffers.attended + row * width);
  }
  multiply<kRows, true>(buffers.attended, layer.cross_attention_out, width, width, states);

  normalise_all(layer.feed_forward_norm);
  multiply<kRows>(buffers.normed, layer.widen, width, 4 * width, buffers.hidden);
  for (int64_t i = 0; i < kRows * 4 * width; i += kLanes) {
    store_lanes(buffers.hidden + i, gelu(load_lanes(buffers.hidden + i)));
  }
  multiply<kRows, true>(buffers.hidden, layer.narrow, 4 * width, width, states);
}

// Layer by layer, so that a layer's weights serve all sequences from a near cache.
template <int kHeadDim>
EVENTKERN_CLONES void step_range(const DecoderStep& call, Range sequences, const Buffers& buffers, float* states) {
  for (int64_t number = 0; number < call.num_layers; ++number) {
    const Layer layer = layer_at(call.weights + number * (14 * call.width + 17) * call.width, call.width);
    int64_t i = sequences.begin;
    for (; i + kSequencesAtOnce <= sequences.end; i += kSequencesAtOnce) {
      step_some<kHeadDim, kSequencesAtOnce>(call, layer, number, i, buffers, states + i * call.width);
    }
    for (; i < sequences.end; ++i) {
      step_some<kHeadDim, 1>(call, layer, number, i, buffers, states + i * call.width);
    }
  }
}

}  // namespace

void decoder_step_cpu(const DecoderStep& call, float* states) {
  const int num_parts = parts_for(call.batch_size, 1, call.num_threads);
#pragma omp parallel for num_threads(num_parts) schedule(static, 1) if (num_parts > 1)
  for (int part = 0; part < num_parts; ++part) {
    const int64_t size = kSequencesAtOnce * call.width;
    const int64_t num_scores = std::max(call.cache_size, call.memory_size);
    Scratch scratch(9 * size + num_scores);
    const Buffers buffers{scratch.take(size), scratch.take(3 * size), scratch.take(size), scratch.take(4 * size),
                          scratch.take(num_scores)};
    const Range sequences = split_range(call.batch_size, 1, part, num_parts);
    with_head_dim(call.head_dim, [&]<int kHeadDim>() { step_range<kHeadDim>(call, sequences, buffers, states); });
  }
}

}  // namespace eventkern
