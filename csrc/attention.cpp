#include "attention.h"

#include <cmath>

#include "attention_rows.h"

namespace eventkern {
namespace {

// panel (num_keys, kLanes) = the scores of 16 queries; the largest of them and `high`. Query `lane` sees no key after
// last_seen + lane.
template <int kHeadDim, int kKeys>
EVENTKERN_INLINE Lanes score_keys(const float* columns, const float* keys, int64_t first, int64_t last_seen,
                                  float* panel, Lanes high) {
  Lanes scores[kKeys];
  const bool is_masked = first + kKeys - 1 > last_seen;
  multiply_keys<kHeadDim, kKeys>(columns, keys + first * kHeadDim, scores);
  for (int n = 0; n < kKeys; ++n) {
    if (is_masked) scores[n] = hide_before(scores[n], first + n - last_seen, -kInfinity);
    high = larger(scores[n], high);
    store_lanes(panel + n * kLanes, scores[n]);
  }
  return high;
}

// Keys in chunks whose scores stay in cache; what earlier chunks summed is rescaled where a larger score appears.
template <int kHeadDim>
EVENTKERN_CLONES void attend(const AttendedPair& pair, int64_t num_queries, int64_t num_keys, bool is_causal) {
  alignas(64) float panel[kChunkKeys * kLanes];
  alignas(64) float columns[kHeadDim * kLanes];
  alignas(64) float sums[kHeadDim * kLanes];
  const int64_t end_of_blocks = num_queries - num_few(num_queries);
  for (int64_t query = 0; query < end_of_blocks; query += kLanes) {
    transpose_rows<kHeadDim>(pair.query + query * kHeadDim, columns);
    std::fill_n(sums, kHeadDim * kLanes, 0.0f);
    Lanes high = Lanes{} - kInfinity;
    Lanes sum{};
    const int64_t end = is_causal ? std::min(query + kLanes, num_keys) : num_keys;
    for (int64_t begin = 0; begin < end; begin += kChunkKeys) {
      const int64_t count = std::min<int64_t>(kChunkKeys, end - begin);
      const float* keys = pair.key + begin * kHeadDim;
      const int64_t last_seen = is_causal ? query - begin : count;
      Lanes chunk_high = high;
      int64_t j = 0;
      for (; j + kKeysAtOnce <= count; j += kKeysAtOnce) {
        chunk_high = score_keys<kHeadDim, kKeysAtOnce>(columns, keys, j, last_seen, panel + j * kLanes, chunk_high);
      }
      for (; j < count; ++j) {
        chunk_high = score_keys<kHeadDim, 1>(columns, keys, j, last_seen, panel + j * kLanes, chunk_high);
      }
      const Lanes factor = exp2_of_negative(high - chunk_high);
      high = chunk_high;
      sum *= factor;
      for (int h = 0; h < kHeadDim; ++h) store_lanes(sums + h * kLanes, load_lanes(sums + h * kLanes) * factor);
      for (j = 0; j < count; ++j) {
        Lanes power = exp2_of_negative(load_lanes(panel + j * kLanes) - high);
        if (j > last_seen) power = hide_before(power, j - last_seen, 0.0f);
        sum += power;
        store_lanes(panel + j * kLanes, power);
      }
      add_weighted_keys<kHeadDim>(panel, count, pair.value + begin * kHeadDim, sums);
    }
    const Lanes inverse_sum = 1.0f / sum;
    for (int h = 0; h < kHeadDim; ++h) store_lanes(sums + h * kLanes, load_lanes(sums + h * kLanes) * inverse_sum);
    transpose_columns<kHeadDim>(sums, pair.output + query * kHeadDim);
    store_lanes(pair.largest + query, high);
    store_lanes(pair.inverse_sum + query, inverse_sum);
  }
  if (end_of_blocks < num_queries) attend_few<kHeadDim>(pair, end_of_blocks, num_queries, num_keys, is_causal);
}

}  // namespace

void attention_cpu(const Attention& call, const HeadRows& query, const HeadRows& key, const HeadRows& value,
                   const HeadRows& output, float* statistics) {
  const int num_parts = parts_of(call);
  const int64_t num_queries = call.num_queries;
  const int64_t padded_queries = whole_lanes(num_queries);
  const int64_t query_size = padded_queries * call.head_dim;
  const int64_t padded_keys = whole_lanes(call.num_keys);
  const int64_t key_size = padded_keys * call.head_dim;
  const float scale = kLog2E / std::sqrt(static_cast<float>(call.head_dim));
#pragma omp parallel for num_threads(num_parts) schedule(static, 1) if (num_parts > 1)
  for (int part = 0; part < num_parts; ++part) {
    Scratch scratch(2 * (query_size + key_size + padded_queries) + num_few(num_queries) * padded_keys);
    float* queries = scratch.take(query_size);
    float* keys = scratch.take(key_size);
    float* values = scratch.take(key_size);
    const AttendedPair pair{queries,
                            keys,
                            values,
                            scratch.take(query_size),
                            scratch.take(padded_queries),
                            scratch.take(padded_queries),
                            scratch.take(num_few(num_queries) * padded_keys)};
    std::fill(queries + num_queries * call.head_dim, queries + query_size, 0.0f);
    for (float* rows : {keys, values}) std::fill(rows + call.num_keys * call.head_dim, rows + key_size, 0.0f);
    const Range pairs = split_range(call.batch_size * call.num_heads, 1, part, num_parts);
    for (int64_t i = pairs.begin; i < pairs.end; ++i) {
      read_rows(query, call, i, num_queries, scale, queries);
      read_rows(key, call, i, call.num_keys, 1.0f, keys);
      read_rows(value, call, i, call.num_keys, 1.0f, values);
      with_head_dim(call.head_dim,
                    [&]<int kHeadDim>() { attend<kHeadDim>(pair, num_queries, call.num_keys, call.is_causal); });
      write_rows(pair.output, call, i, num_queries, 1.0f, output);
      std::copy_n(pair.largest, num_queries, statistics + 2 * i * num_queries);
      std::copy_n(pair.inverse_sum, num_queries, statistics + (2 * i + 1) * num_queries);
    }
  }
}

}  // namespace eventkern
