#include <cmath>

#include "attention.h"
#include "attention_rows.h"

namespace eventkern {
namespace {

// One pair, contiguous float32; rows are padded to whole lanes, with rows of zeros.
struct Pair {
  const float* query;  // times log2(e) / sqrt(kHeadDim)
  float* grad;         // of the output; times inverse_sum afterwards
  const float* output;
  const float* key;
  const float* value;
  const float* largest;
  const float* inverse_sum;
  float* query_grad;  // lacks a factor of 1 / sqrt(kHeadDim)
  float* key_grad;    // lacks a factor of ln 2
  float* value_grad;
};

// 16 queries; columns (kHeadDim, kLanes).
template <int kHeadDim>
struct Block {
  alignas(64) float query[kHeadDim * kLanes];
  alignas(64) float grad[kHeadDim * kLanes];
  alignas(64) float query_grad[kHeadDim * kLanes];
  alignas(64) float powers[kChunkKeys * kLanes];  // 2^(score - largest)
  alignas(64) float slopes[kChunkKeys * kLanes];  // derivatives of the scores
};

// Powers and slopes of kKeys keys. Query `lane` sees no key after last_seen + lane.
template <int kHeadDim, int kKeys>
EVENTKERN_INLINE void slope_keys(Block<kHeadDim>& block, const float* keys, const float* values, int64_t first,
                                 int64_t last_seen, Lanes largest, Lanes expected) {
  Lanes powers[kKeys], slopes[kKeys];
  const bool is_masked = first + kKeys - 1 > last_seen;
  multiply_keys<kHeadDim, kKeys>(block.query, keys + first * kHeadDim, powers);
  multiply_keys<kHeadDim, kKeys>(block.grad, values + first * kHeadDim, slopes);
  for (int n = 0; n < kKeys; ++n) {
    powers[n] = exp2_of_negative(powers[n] - largest);
    if (is_masked) powers[n] = hide_before(powers[n], first + n - last_seen, 0.0f);
    slopes[n] = powers[n] * (slopes[n] - expected);
    store_lanes(block.powers + (first + n) * kLanes, powers[n]);
    store_lanes(block.slopes + (first + n) * kLanes, slopes[n]);
  }
}

// sums (num_keys, kHeadDim) += panel (num_keys, kLanes) times rows (kLanes, kHeadDim).
template <int kHeadDim>
EVENTKERN_INLINE void add_weighted_queries(const float* panel, int64_t num_keys, const float* rows, float* sums) {
  using Row = RowPart<kHeadDim>;
  for (int first = 0; first < kHeadDim; first += kPartSize<kHeadDim>) {
    Row group[kLanes];
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) std::memcpy(&group[lane], rows + lane * kHeadDim + first, sizeof(Row));
    for (int64_t j = 0; j < num_keys; ++j) {
      const float* weights = panel + j * kLanes;
      float* target = sums + j * kHeadDim + first;
      Row even, odd{};
      std::memcpy(&even, target, sizeof(Row));
#pragma GCC unroll 8
      for (int lane = 0; lane < kLanes; lane += 2) {
        even += group[lane] * weights[lane];
        odd += group[lane + 1] * weights[lane + 1];
      }
      even += odd;
      std::memcpy(target, &even, sizeof(Row));
    }
  }
}

// One query after another, with 16 keys in lanes.
template <int kHeadDim>
EVENTKERN_INLINE void differentiate_few(const Pair& pair, int64_t first, int64_t num_queries, int64_t num_keys,
                                        bool is_causal) {
  alignas(64) float keys[kHeadDim * kLanes];
  alignas(64) float values[kHeadDim * kLanes];
  alignas(64) float powers[kFewQueries * kLanes];
  alignas(64) float slopes[kFewQueries * kLanes];
  float expected[kFewQueries];
  const int64_t count = num_queries - first;
  const float* query_rows = pair.query + first * kHeadDim;
  float* grad_rows = pair.grad + first * kHeadDim;
  float* query_grad = pair.query_grad + first * kHeadDim;
  for (int64_t i = 0; i < count; ++i) {
    expected[i] = 0.0f;
    for (int h = 0; h < kHeadDim; ++h) {
      grad_rows[i * kHeadDim + h] *= pair.inverse_sum[first + i];
      expected[i] += grad_rows[i * kHeadDim + h] * pair.output[(first + i) * kHeadDim + h];
    }
  }
  std::fill_n(query_grad, count * kHeadDim, 0.0f);
  for (int64_t j = 0; j < num_keys; j += kLanes) {
    transpose_rows<kHeadDim>(pair.key + j * kHeadDim, keys);
    transpose_rows<kHeadDim>(pair.value + j * kHeadDim, values);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t num_seen = is_causal ? first + i + 1 : num_keys;
      Lanes power =
          exp2_of_negative(multiply_columns<kHeadDim>(keys, query_rows + i * kHeadDim) - pair.largest[first + i]);
      if (j + kLanes > num_seen) power = hide_from(power, num_seen - j, 0.0f);
      const Lanes slope = power * (multiply_columns<kHeadDim>(values, grad_rows + i * kHeadDim) - expected[i]);
      store_lanes(powers + i * kLanes, power);
      store_lanes(slopes + i * kLanes, slope);
      add_weighted_rows<kHeadDim>(slopes + i * kLanes, 1, kLanes, pair.key + j * kHeadDim, query_grad + i * kHeadDim);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      float* key_grad = pair.key_grad + (j + lane) * kHeadDim;
      float* value_grad = pair.value_grad + (j + lane) * kHeadDim;
      add_weighted_rows<kHeadDim>(slopes + lane, kLanes, count, query_rows, key_grad);
      add_weighted_rows<kHeadDim>(powers + lane, kLanes, count, grad_rows, value_grad);
    }
  }
}

// With p = powers / sum, the derivative of a score is p * (grad . value - grad . output); 1 / sum goes into grad first.
template <int kHeadDim>
EVENTKERN_CLONES void differentiate(const Pair& pair, int64_t num_queries, int64_t num_keys, bool is_causal) {
  Block<kHeadDim> block;
  const int64_t end_of_blocks = num_queries - num_few(num_queries);
  for (int64_t query = 0; query < end_of_blocks; query += kLanes) {
    float* grad = pair.grad + query * kHeadDim;
    const float* query_rows = pair.query + query * kHeadDim;
    transpose_rows<kHeadDim>(pair.output + query * kHeadDim, block.query_grad);
    transpose_rows<kHeadDim>(grad, block.grad);
    const Lanes inverse_sum = load_lanes(pair.inverse_sum + query);
    Lanes expected{};
    for (int h = 0; h < kHeadDim; ++h) {
      const Lanes scaled = load_lanes(block.grad + h * kLanes) * inverse_sum;
      store_lanes(block.grad + h * kLanes, scaled);
      expected += scaled * load_lanes(block.query_grad + h * kLanes);
    }
    transpose_columns<kHeadDim>(block.grad, grad);
    transpose_rows<kHeadDim>(query_rows, block.query);
    std::fill_n(block.query_grad, kHeadDim * kLanes, 0.0f);
    const Lanes largest = load_lanes(pair.largest + query);
    const int64_t end = is_causal ? std::min(query + kLanes, num_keys) : num_keys;
    for (int64_t begin = 0; begin < end; begin += kChunkKeys) {
      const int64_t count = std::min<int64_t>(kChunkKeys, end - begin);
      const float* keys = pair.key + begin * kHeadDim;
      const float* values = pair.value + begin * kHeadDim;
      const int64_t last_seen = is_causal ? query - begin : count;
      int64_t j = 0;
      for (; j + kKeysAtOnce <= count; j += kKeysAtOnce) {
        slope_keys<kHeadDim, kKeysAtOnce>(block, keys, values, j, last_seen, largest, expected);
      }
      for (; j < count; ++j) {
        slope_keys<kHeadDim, 1>(block, keys, values, j, last_seen, largest, expected);
      }
      add_weighted_keys<kHeadDim>(block.slopes, count, keys, block.query_grad);
      add_weighted_queries<kHeadDim>(block.slopes, count, query_rows, pair.key_grad + begin * kHeadDim);
      add_weighted_queries<kHeadDim>(block.powers, count, grad, pair.value_grad + begin * kHeadDim);
    }
    transpose_columns<kHeadDim>(block.query_grad, pair.query_grad + query * kHeadDim);
  }
  if (end_of_blocks < num_queries) {
    differentiate_few<kHeadDim>(pair, end_of_blocks, num_queries, num_keys, is_causal);
  }
}

}  // namespace

void attention_backward_cpu(const Attention& call, const HeadRows& grad, const HeadRows& query, const HeadRows& key,
                            const HeadRows& value, const HeadRows& output, const float* statistics,
                            const HeadRows& query_grad, const HeadRows& key_grad, const HeadRows& value_grad) {
  const int num_parts = parts_of(call);
  const int64_t num_queries = call.num_queries;
  const int64_t padded_queries = whole_lanes(num_queries);
  const int64_t query_size = padded_queries * call.head_dim;
  const int64_t key_size = whole_lanes(call.num_keys) * call.head_dim;
  const float scale = 1.0f / std::sqrt(static_cast<float>(call.head_dim));
#pragma omp parallel for num_threads(num_parts) schedule(static, 1) if (num_parts > 1)
  for (int part = 0; part < num_parts; ++part) {
    Scratch scratch(4 * query_size + 4 * key_size + 2 * padded_queries);
    float* queries = scratch.take(query_size);
    float* grads = scratch.take(query_size);
    float* outputs = scratch.take(query_size);
    float* keys = scratch.take(key_size);
    float* values = scratch.take(key_size);
    float* largest = scratch.take(padded_queries);
    float* inverse_sum = scratch.take(padded_queries);
    const Pair pair{queries,
                    grads,
                    outputs,
                    keys,
                    values,
                    largest,
                    inverse_sum,
                    scratch.take(query_size),
                    scratch.take(key_size),
                    scratch.take(key_size)};
    for (float* rows : {queries, outputs}) std::fill(rows + num_queries * call.head_dim, rows + query_size, 0.0f);
    for (float* rows : {keys, values}) std::fill(rows + call.num_keys * call.head_dim, rows + key_size, 0.0f);
    for (float* lanes : {largest, inverse_sum}) std::fill(lanes + num_queries, lanes + padded_queries, 0.0f);
    const Range pairs = split_range(call.batch_size * call.num_heads, 1, part, num_parts);
    for (int64_t i = pairs.begin; i < pairs.end; ++i) {
      read_rows(query, call, i, num_queries, kLog2E * scale, queries);
      read_rows(grad, call, i, num_queries, 1.0f, grads);
      std::fill(grads + num_queries * call.head_dim, grads + query_size, 0.0f);
      read_rows(output, call, i, num_queries, 1.0f, outputs);
      read_rows(key, call, i, call.num_keys, 1.0f, keys);
      read_rows(value, call, i, call.num_keys, 1.0f, values);
      std::copy_n(statistics + 2 * i * num_queries, num_queries, largest);
      std::copy_n(statistics + (2 * i + 1) * num_queries, num_queries, inverse_sum);
      std::fill_n(pair.key_grad, key_size, 0.0f);
      std::fill_n(pair.value_grad, key_size, 0.0f);
      with_head_dim(call.head_dim,
                    [&]<int kHeadDim>() { differentiate<kHeadDim>(pair, num_queries, call.num_keys, call.is_causal); });
      write_rows(pair.query_grad, call, i, num_queries, scale, query_grad);
      write_rows(pair.key_grad, call, i, call.num_keys, kLn2, key_grad);
      write_rows(pair.value_grad, call, i, call.num_keys, 1.0f, value_grad);
    }
  }
}

}  // namespace eventkern
