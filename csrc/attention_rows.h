// What both passes of attention share: rows of a head to and from float32 scratch, and sixteen of them turned into
// lanes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>

#include "attention.h"
#include "parallel.h"

namespace eventkern {

inline constexpr int kChunkKeys = 64;  // whose scores for a block of queries stay in the first-level cache
inline constexpr int kKeysAtOnce = 4;  // share each load of the queries
inline constexpr int kFewQueries = 3;  // at most, beyond whole blocks of 16: these take the keys in lanes instead
inline constexpr int64_t kGrainElements = 1 << 13;  // fewer products of a query and a key do not pay for a thread

// In units of ln 2, so that a power is 2^x.
inline constexpr float kLog2E = 1.44269504f;
inline constexpr float kLn2 = 0.693147181f;

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

constexpr int64_t whole_lanes(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Float32 scratch of one thread, carved into parts that begin at whole cache lines.
class Scratch {
 public:
  explicit Scratch(int64_t size) : floats_(static_cast<float*>(::operator new(size * sizeof(float), kAlignment))) {}
  float* take(int64_t size) {
    float* part = floats_.get() + taken_;
    taken_ += whole_lanes(size);
    return part;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* floats) const { ::operator delete(floats, kAlignment); }
  };
  std::unique_ptr<float, Free> floats_;
  int64_t taken_ = 0;
};

// function.operator()<kHeadDim>().
template <typename Function>
void with_head_dim(int head_dim, Function function) {
  switch (head_dim) {
    case 4:
      return function.template operator()<4>();
    case 8:
      return function.template operator()<8>();
    case 16:
      return function.template operator()<16>();
    default:
      return function.template operator()<32>();
  }
}

using LaneNumbers = int32_t __attribute__((vector_size(64)));

template <int kCount>
struct FloatsOf;

template <>
struct FloatsOf<4> {
  using Type = float __attribute__((vector_size(16)));
};

template <>
struct FloatsOf<8> {
  using Type = float __attribute__((vector_size(32)));
};

template <>
struct FloatsOf<16> {
  using Type = Lanes;
};

// As much of a row as fits in one vector.
template <int kHeadDim>
using RowPart = typename FloatsOf<std::min(kHeadDim, kLanes)>::Type;

template <int kHeadDim>
inline constexpr int kPartSize = std::min(kHeadDim, kLanes);

// Queries at the end that are taken one by one.
inline int64_t num_few(int64_t num_queries) {
  const int64_t rest = num_queries % kLanes;
  return rest <= kFewQueries ? rest : 0;
}

// Pairs of a batch entry and a head that one thread works on.
inline int parts_of(const Attention& call) {
  const int64_t pairs = call.batch_size * call.num_heads;
  const int64_t elements = call.num_queries * (call.is_causal ? call.num_queries + 1 : 2 * call.num_keys) / 2;
  const int64_t grain = std::max<int64_t>(kGrainElements / std::max<int64_t>(elements, 1), 1);
  return parts_for(pairs, grain, call.num_threads);
}

// The first row of a pair.
inline void* rows_of(const HeadRows& tensor, const Attention& call, int64_t pair) {
  const int64_t offset = pair / call.num_heads * tensor.batch_stride + pair % call.num_heads * tensor.head_stride;
  return static_cast<char*>(tensor.data) + offset * (call.type == FloatType::kFloat32 ? 4 : 2);
}

// 2^x for x <= 0 to within 1.4 ulp; below -125 it stays 2^-125. x = n + r, and 2^r is a polynomial fitted for the least
// relative error on [-1/2, 1/2] (Lawson's iteration). Adding 1.5 * 2^23 rounds to an integer and leaves it in the
// lowest bits. NaN is kept.
EVENTKERN_INLINE Lanes exp2_of_negative(Lanes x) {
  const Lanes least = Lanes{} - 125.0f;
  x = least > x ? least : x;
  const Lanes shifted = x + 12582912.0f;
  const Lanes r = x - (shifted - 12582912.0f);
  Lanes power = r * 1.32647273e-3f + 9.67151299e-3f;
  power = power * r + 5.55073358e-2f;
  power = power * r + 2.40222424e-1f;
  power = power * r + 6.93147004e-1f;
  power = power * r + 1.0f;
  return lanes_of(bits_of(power) + (bits_of(shifted) << 23));
}

EVENTKERN_INLINE LaneNumbers lane_numbers() {
  return LaneNumbers{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}

// `hidden` in the lanes before first_seen, which are those of queries that do not see a key.
EVENTKERN_INLINE Lanes hide_before(Lanes lanes, int64_t first_seen, float hidden) {
  return lane_numbers() >= static_cast<int32_t>(first_seen) ? lanes : Lanes{} + hidden;
}

// `hidden` in the lanes from first_hidden on, which are those of keys that a query does not see.
EVENTKERN_INLINE Lanes hide_from(Lanes lanes, int64_t first_hidden, float hidden) {
  return lane_numbers() < static_cast<int32_t>(first_hidden) ? lanes : Lanes{} + hidden;
}

// The even and the odd ones of 32 lanes, and the way back.
EVENTKERN_INLINE Lanes even_lanes(Lanes low, Lanes high) {
  return __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}

EVENTKERN_INLINE Lanes odd_lanes(Lanes low, Lanes high) {
  return __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

EVENTKERN_INLINE Lanes zip_low(Lanes even, Lanes odd) {
  return __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}

EVENTKERN_INLINE Lanes zip_high(Lanes even, Lanes odd) {
  return __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

// kLanes rows (kLanes, kHeadDim) to columns (kHeadDim, kLanes). Sending the even elements of it all to the first half
// and the odd ones to the second makes the lowest bit of each element's place the highest; after log2(kHeadDim) times
// the bits of the column stand above those of the row.
template <int kHeadDim>
EVENTKERN_INLINE void transpose_rows(const float* rows, float* columns) {
  if constexpr (kHeadDim > kLanes) {  // would not stay in registers
    for (int h = 0; h < kHeadDim; ++h) {
      for (int lane = 0; lane < kLanes; ++lane) columns[h * kLanes + lane] = rows[lane * kHeadDim + h];
    }
    return;
  }
  Lanes from[kHeadDim], to[kHeadDim];
#pragma GCC unroll 16
  for (int i = 0; i < kHeadDim; ++i) to[i] = load_lanes(rows + i * kLanes);
#pragma GCC unroll 8
  for (int bit = 1; bit < kHeadDim; bit *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kHeadDim; ++i) from[i] = to[i];
#pragma GCC unroll 8
    for (int i = 0; i < kHeadDim / 2; ++i) {
      to[i] = even_lanes(from[2 * i], from[2 * i + 1]);
      to[kHeadDim / 2 + i] = odd_lanes(from[2 * i], from[2 * i + 1]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kHeadDim; ++i) store_lanes(columns + i * kLanes, to[i]);
}

// The way back.
template <int kHeadDim>
EVENTKERN_INLINE void transpose_columns(const float* columns, float* rows) {
  if constexpr (kHeadDim > kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int h = 0; h < kHeadDim; ++h) rows[lane * kHeadDim + h] = columns[h * kLanes + lane];
    }
    return;
  }
  Lanes from[kHeadDim], to[kHeadDim];
#pragma GCC unroll 16
  for (int i = 0; i < kHeadDim; ++i) to[i] = load_lanes(columns + i * kLanes);
#pragma GCC unroll 8
  for (int bit = 1; bit < kHeadDim; bit *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kHeadDim; ++i) from[i] = to[i];
#pragma GCC unroll 8
    for (int i = 0; i < kHeadDim / 2; ++i) {
      to[2 * i] = zip_low(from[i], from[kHeadDim / 2 + i]);
      to[2 * i + 1] = zip_high(from[i], from[kHeadDim / 2 + i]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kHeadDim; ++i) store_lanes(rows + i * kLanes, to[i]);
}

// products[n] = the products of kKeys rows with the columns of 16 queries.
template <int kHeadDim, int kKeys>
EVENTKERN_INLINE void multiply_keys(const float* columns, const float* keys, Lanes (&products)[kKeys]) {
  for (int n = 0; n < kKeys; ++n) products[n] = Lanes{};
#pragma GCC unroll 8
  for (int h = 0; h < kHeadDim; ++h) {
    const Lanes column = load_lanes(columns + h * kLanes);
    for (int n = 0; n < kKeys; ++n) products[n] += column * keys[n * kHeadDim + h];
  }
}

// sums (kHeadDim, kLanes) += panel (num_keys, kLanes) with rows (num_keys, kHeadDim), lane by lane.
template <int kHeadDim>
EVENTKERN_INLINE void add_weighted_keys(const float* panel, int64_t num_keys, const float* rows, float* sums) {
  constexpr int kGroup = std::min(kHeadDim, kLanes);
  for (int first = 0; first < kHeadDim; first += kGroup) {
    Lanes group[kGroup];
#pragma GCC unroll 16
    for (int h = 0; h < kGroup; ++h) group[h] = load_lanes(sums + (first + h) * kLanes);
    for (int64_t j = 0; j < num_keys; ++j) {
      const Lanes weight = load_lanes(panel + j * kLanes);
#pragma GCC unroll 16
      for (int h = 0; h < kGroup; ++h) group[h] += weight * rows[j * kHeadDim + first + h];
    }
#pragma GCC unroll 16
    for (int h = 0; h < kGroup; ++h) store_lanes(sums + (first + h) * kLanes, group[h]);
  }
}

// The products of a row with 16 columns.
template <int kHeadDim>
EVENTKERN_INLINE Lanes multiply_columns(const float* columns, const float* row) {
  Lanes product{};
#pragma GCC unroll 8
  for (int h = 0; h < kHeadDim; ++h) product += load_lanes(columns + h * kLanes) * row[h];
  return product;
}

// target (kHeadDim) += weights (count) times rows (count, kHeadDim), or every stride-th of the weights.
template <int kHeadDim>
EVENTKERN_INLINE void add_weighted_rows(const float* weights, int64_t stride, int64_t count, const float* rows,
                                        float* target) {
  using Part = RowPart<kHeadDim>;
  for (int first = 0; first < kHeadDim; first += kPartSize<kHeadDim>) {
    Part even, odd{};
    std::memcpy(&even, target + first, sizeof(Part));
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) {
      Part row, next;
      std::memcpy(&row, rows + i * kHeadDim + first, sizeof(Part));
      std::memcpy(&next, rows + (i + 1) * kHeadDim + first, sizeof(Part));
      even += row * weights[i * stride];
      odd += next * weights[(i + 1) * stride];
    }
    if (i < count) {
      Part row;
      std::memcpy(&row, rows + i * kHeadDim + first, sizeof(Part));
      even += row * weights[i * stride];
    }
    even += odd;
    std::memcpy(target + first, &even, sizeof(Part));
  }
}

// One pair, contiguous float32; rows are padded to whole lanes, with rows of zeros.
struct AttendedPair {
  const float* query;  // times log2(e) / sqrt(kHeadDim)
  const float* key;
  const float* value;
  float* output;
  float* largest;
  float* inverse_sum;
  float* scores;  // of the few queries at the end
};

// One query after another, with 16 keys in lanes.
template <int kHeadDim>
EVENTKERN_INLINE void attend_few(const AttendedPair& pair, int64_t first, int64_t num_queries, int64_t num_keys,
                                 bool is_causal) {
  alignas(64) float columns[kHeadDim * kLanes];
  const int64_t width = whole_lanes(num_keys);
  for (int64_t j = 0; j < num_keys; j += kLanes) {
    for (int i = 0; i < kHeadDim; ++i) __builtin_prefetch(pair.value + j * kHeadDim + i * kLanes);
    transpose_rows<kHeadDim>(pair.key + j * kHeadDim, columns);
    for (int64_t query = first; query < num_queries; ++query) {
      const Lanes scores = multiply_columns<kHeadDim>(columns, pair.query + query * kHeadDim);
      store_lanes(pair.scores + (query - first) * width + j, scores);
    }
  }
  for (int64_t query = first; query < num_queries; ++query) {
    float* scores = pair.scores + (query - first) * width;
    const int64_t num_seen = is_causal ? query + 1 : num_keys;
    const int64_t last = (num_seen - 1) / kLanes * kLanes;
    store_lanes(scores + last, hide_from(load_lanes(scores + last), num_seen - last, -kInfinity));
    Lanes high = Lanes{} - kInfinity;
    for (int64_t j = 0; j <= last; j += kLanes) high = larger(load_lanes(scores + j), high);
    const float largest = largest_of(high);
    Lanes sum{};
    for (int64_t j = 0; j <= last; j += kLanes) {
      const Lanes powers = exp2_of_negative(load_lanes(scores + j) - largest);
      sum += powers;
      store_lanes(scores + j, powers);
    }
    float* output = pair.output + query * kHeadDim;
    const float inverse_sum = 1.0f / total_of(sum);
    std::fill_n(output, kHeadDim, 0.0f);
    add_weighted_rows<kHeadDim>(scores, 1, num_seen, pair.value, output);
    for (int h = 0; h < kHeadDim; ++h) output[h] *= inverse_sum;
    pair.largest[query] = largest;
    pair.inverse_sum[query] = inverse_sum;
  }
}

// The rows of a pair to contiguous float32, times factor.
void read_rows(const HeadRows& source, const Attention& call, int64_t pair, int64_t count, float factor, float* rows);

// The way back. Both may touch scratch to the end of the lanes that the last row ends in.
void write_rows(const float* rows, const Attention& call, int64_t pair, int64_t count, float factor,
                const HeadRows& target);

}  // namespace eventkern
