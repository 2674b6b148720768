#include "multi_head_cross_entropy.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.h"

namespace eventkern {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kSummedRows = 16;         // summed on their own first: a long sum one by one rounds too often
constexpr int64_t kGrainClasses = 1 << 14;  // fewer logits than this do not pay for a second thread

// e^x for x <= 0 to within 0.7 ulp; 0 below -87.3, where the result would be subnormal. x = n ln 2 + r, and e^r is a
// polynomial of degree 6 fitted for the least relative error on [-ln 2 / 2, ln 2 / 2] (Lawson's iteration). Adding 1.5
// * 2^23 rounds to an integer and leaves it in the lowest bits. NaN is not kept.
EVENTKERN_INLINE Lanes exp_of_negative(Lanes x) {
  const Lanes shifted = x * 1.44269504f + 12582912.0f;
  const Lanes n = shifted - 12582912.0f;
  Lanes r = x - n * 0.693145752f;
  r = r - n * 1.42860682e-6f;
  Lanes tail = r * 1.38145837e-3f + 8.36872403e-3f;
  tail = tail * r + 4.16683890e-2f;
  tail = tail * r + 1.66665211e-1f;
  tail = tail * r + 4.99999940e-1f;
  const Lanes power = tail * (r * r) + r + 1.0f;
  const Lanes scaled = lanes_of(bits_of(power) + (bits_of(shifted) << 23));
  return x >= -87.3f ? scaled : Lanes{};
}

EVENTKERN_INLINE float exp_of_negative(float x) { return exp_of_negative(Lanes{} + x)[0]; }

EVENTKERN_INLINE float value_of(float scalar) { return scalar; }

EVENTKERN_INLINE float value_of(Bfloat16 scalar) { return std::bit_cast<float>(uint32_t{scalar.bits} << 16); }

EVENTKERN_INLINE float value_of(Float16 scalar) { return widen_float16(LaneBits{} + (uint32_t{scalar.bits} << 16))[0]; }

// One head of one row. Its float32 logits lie in scratch, which is padded to whole Columns.
struct Head {
  float largest;  // of the logits
  float sum;      // of the logits; NaN where one is NaN
  float exp_sum;  // of e^(logit - largest), which scratch then holds
  float target;   // logit of the target
};

template <typename Scalar>
EVENTKERN_INLINE Head reduce(const Scalar* logits, const Scalar* bias, int64_t num_classes, int64_t target,
                             float* scratch) {
  Lanes high = Lanes{} - kInfinity;
  Lanes sum{};
  const int64_t whole = num_classes / kColumns * kColumns;
  for (int64_t column = 0; column < whole; column += kColumns) {
    Columns columns = load(logits + column);
    if (bias != nullptr) columns = columns + load(bias + column);
    store(scratch + column, columns);
    high = larger(high, larger(columns.low, columns.high));
    sum += columns.low + columns.high;
  }
  Head head{largest_of(high), total_of(sum), 0.0f, 0.0f};
  if (whole < num_classes) {
    const int count = static_cast<int>(num_classes - whole);
    Columns columns = load_some(logits + whole, count);
    if (bias != nullptr) columns = columns + load_some(bias + whole, count);
    float* end = scratch + whole;
    store(end, columns);
    for (int i = 0; i < kColumns; ++i) {
      float& value = end[lane_of<Scalar>(i)];
      if (i >= count) {
        value = -kInfinity;
      } else {
        head.largest = std::max(head.largest, value);
        head.sum += value;
      }
    }
  }
  head.target = value_of(logits[target]) + (bias != nullptr ? value_of(bias[target]) : 0.0f);
  Lanes exp_sum{};
  for (int64_t column = 0; column < num_classes; column += kColumns) {
    const Columns columns = load(scratch + column);
    const Columns powers{exp_of_negative(columns.low - head.largest), exp_of_negative(columns.high - head.largest)};
    store(scratch + column, powers);
    exp_sum += powers.low + powers.high;
  }
  head.exp_sum = total_of(exp_sum);
  return head;
}

// gradient = powers * factor - offset, and at the target less still.
template <typename Scalar>
EVENTKERN_INLINE void write_gradient(const float* powers, int64_t num_classes, float factor, float offset,
                                     Scalar* gradient) {
  for (int64_t column = 0; column < num_classes; column += kColumns) {
    const Columns columns = load(powers + column);
    const Columns result{columns.low * factor - offset, columns.high * factor - offset};
    const int64_t count = num_classes - column;
    count >= kColumns ? store(gradient + column, result) : store_some(gradient + column, result, count);
  }
}

template <typename Scalar>
EVENTKERN_INLINE void store_one(Scalar* target, float value) {
  store_some(target, Columns{Lanes{} + value, Lanes{} + value}, 1);
}

template <typename Id, typename Scalar>
EVENTKERN_CLONES void cross_entropy_of_rows(const Targets& targets, const CrossEntropy& call, Range rows,
                                            float* scratch) {
  const int64_t num_classes = targets.first_classes[targets.num_heads];
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    Scalar* row_logits = static_cast<Scalar*>(call.logits) + row * num_classes;
    const Id* row_targets = static_cast<const Id*>(targets.data) + row * targets.row_stride;
    for (int h = 0; h < targets.num_heads; ++h) {
      const int64_t first = targets.first_classes[h];
      const int64_t size = targets.first_classes[h + 1] - first;
      Scalar* logits = row_logits + first;
      float& loss = call.losses[row * call.losses_row_stride + h];
      const int64_t target = row_targets[h * targets.head_stride];
      // count_targets() refuses targets outside their head; one that was overwritten since then adds nothing.
      if (target == targets.ignore_index || static_cast<uint64_t>(target) >= static_cast<uint64_t>(size)) {
        loss = 0.0f;
        if (call.scales != nullptr) std::memset(static_cast<void*>(logits), 0, size * sizeof(Scalar));
        continue;
      }
      const Scalar* bias = call.bias != nullptr ? static_cast<const Scalar*>(call.bias) + first : nullptr;
      const Head head = reduce(logits, bias, size, target, scratch);
      const float log_exp_sum = std::isnan(head.sum) ? head.sum : std::log(head.exp_sum);
      const float log_sum_exp = head.largest + log_exp_sum;
      const float smoothing = call.label_smoothing;
      // Differences of logits first: what they have in common would cost the loss its digits.
      loss = log_exp_sum + (1.0f - smoothing) * (head.largest - head.target);
      if (smoothing != 0.0f) loss += smoothing * (head.largest - head.sum / static_cast<float>(size));
      if (call.z_loss != 0.0f) loss += call.z_loss * log_sum_exp * log_sum_exp;
      if (call.scales == nullptr) continue;
      // The whole derivative is formed in float32 and rounded once.
      const float scale = call.scales[row * call.scales_row_stride + h];
      const float factor = scale * (1.0f + 2.0f * call.z_loss * log_sum_exp) / head.exp_sum;
      const float offset = scale * smoothing / static_cast<float>(size);
      const float power = exp_of_negative(head.target - head.largest);
      write_gradient(scratch, size, factor, offset, logits);
      store_one(logits + target, power * factor - offset - scale * (1.0f - smoothing));
    }
  }
}

template <typename Id>
int64_t count(const Targets& targets, int64_t* counts) {
  for (int64_t row = 0; row < targets.num_rows; ++row) {
    const Id* row_targets = static_cast<const Id*>(targets.data) + row * targets.row_stride;
    for (int h = 0; h < targets.num_heads; ++h) {
      const int64_t target = row_targets[h * targets.head_stride];
      if (target == targets.ignore_index) continue;
      if (target < 0 || target >= targets.first_classes[h + 1] - targets.first_classes[h]) {
        return row * targets.num_heads + h;
      }
      ++counts[h];
    }
  }
  return -1;
}

template <typename Scalar>
EVENTKERN_CLONES void add_rows(const Scalar* matrix, int64_t num_rows, int64_t num_columns, Range columns,
                               float* sums) {
  for (int64_t column = columns.begin; column < columns.end; column += kColumns) {
    const int64_t count = std::min<int64_t>(kColumns, columns.end - column);
    Columns sum{};
    for (int64_t first = 0; first < num_rows; first += kSummedRows) {
      Columns part{};
      for (int64_t row = first; row < std::min(first + kSummedRows, num_rows); ++row) {
        const Scalar* source = matrix + row * num_columns + column;
        part = part + (count == kColumns ? load(source) : load_some(source, count));
      }
      sum = sum + part;
    }
    float lanes[kColumns];
    store(lanes, sum);
    for (int i = 0; i < count; ++i) sums[column + i] += lanes[lane_of<Scalar>(i)];
  }
}

}  // namespace

int64_t count_targets(const Targets& targets, int64_t* counts) {
  return targets.num_bytes == 4 ? count<int32_t>(targets, counts) : count<int64_t>(targets, counts);
}

void cross_entropy_cpu(const Targets& targets, const CrossEntropy& call, double* totals) {
  const int64_t num_logits = targets.num_rows * targets.first_classes[targets.num_heads];
  const int num_parts = parts_for(num_logits, kGrainClasses, call.num_threads);
  int64_t scratch_size = 0;  // of the widest head; parts do not share a Columns
  for (int h = 0; h < targets.num_heads; ++h) {
    scratch_size = std::max(scratch_size, padded(targets.first_classes[h + 1] - targets.first_classes[h]) + kColumns);
  }
  std::vector<float> scratch(num_parts * scratch_size);
  with_float_type(call.type, [&]<typename Scalar>() {
#pragma omp parallel for num_threads(num_parts) schedule(static, 1) if (num_parts > 1)
    for (int part = 0; part < num_parts; ++part) {
      const Range rows = split_range(targets.num_rows, 1, part, num_parts);
      float* part_scratch = scratch.data() + part * scratch_size;
      targets.num_bytes == 4 ? cross_entropy_of_rows<int32_t, Scalar>(targets, call, rows, part_scratch)
                             : cross_entropy_of_rows<int64_t, Scalar>(targets, call, rows, part_scratch);
    }
  });
  for (int64_t row = 0; row < targets.num_rows; ++row) {
    for (int h = 0; h < targets.num_heads; ++h) totals[h] += call.losses[row * call.losses_row_stride + h];
  }
}

void add_rows_cpu(const void* matrix, FloatType type, int64_t num_rows, int64_t num_columns, float* sums,
                  int num_threads) {
  const int num_parts = parts_for(num_rows * num_columns, kGrainClasses, num_threads);
  with_float_type(type, [&]<typename Scalar>() {
#pragma omp parallel for num_threads(num_parts) schedule(static, 1) if (num_parts > 1)
    for (int part = 0; part < num_parts; ++part) {
      const Range columns = split_range(num_columns, kColumns, part, num_parts);
      add_rows(static_cast<const Scalar*>(matrix), num_rows, num_columns, columns, sums);
    }
  });
}

}  // namespace eventkern
