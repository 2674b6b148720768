#include "class_draws.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "lanes.h"
#include "parallel.h"

namespace eventkern {
namespace {

constexpr int64_t kGrainClasses = 1 << 14;  // fewer logits than this do not pay for a second thread
constexpr int64_t kScanned = 16;            // logits looked at together: few have one of the k among them
constexpr int64_t kLeastColumns = 64;
constexpr int64_t kMostRanked = 256;  // values whose ranks are counted, each against all
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Candidate {
  float logit;
  int32_t number;
};

struct Scratch {
  std::vector<float> values;
  std::vector<int32_t> ranks;
  std::vector<Candidate> found;
  std::vector<Candidate> kept;
};

// The larger logit, and of equal ones the class that comes first.
bool is_before(const Candidate& left, const Candidate& right) {
  return left.logit > right.logit || (left.logit == right.logit && left.number < right.number);
}

// ranks[i] = how many of `count` values are above value i.
EVENTKERN_INLINE void count_above(const float* values, int64_t count, std::vector<int32_t>& ranks) {
  ranks.assign(count, 0);
  for (int64_t j = 0; j < count; ++j) {
    const float value = values[j];
    for (int64_t i = 0; i < count; ++i) ranks[i] += value > values[i];
  }
}

// A logit that at least k reach, and few more: the k-th largest of the largest in each of `num_columns` columns, where
// column i holds logits i, i + num_columns, ... -infinity where there are too few logits for that to be worth it.
EVENTKERN_INLINE float bound_of(const float* logits, int64_t num_classes, int64_t k, Scratch& scratch) {
  const int64_t num_columns = std::max(kLeastColumns, (3 * k + kScanned - 1) / kScanned * kScanned);
  if (num_columns > kMostRanked || num_classes < 2 * num_columns) return -kInfinity;
  scratch.values.assign(logits, logits + num_columns);
  float* const largest = scratch.values.data();
  for (int64_t start = num_columns; start < num_classes; start += num_columns) {
    const int64_t count = std::min(num_columns, num_classes - start);
    for (int64_t i = 0; i < count; ++i) {
      const float logit = logits[start + i];
      largest[i] = logit > largest[i] ? logit : largest[i];
    }
  }
  count_above(largest, num_columns, scratch.ranks);
  float bound = kInfinity;
  for (int64_t i = 0; i < num_columns; ++i) {
    bound = scratch.ranks[i] < k && largest[i] < bound ? largest[i] : bound;
  }
  return bound;
}

// Writes the k largest of the candidates, the largest first. Of few each one's rank is counted, which needs no branch.
EVENTKERN_INLINE void sort_largest(int64_t count, int64_t k, Scratch& scratch) {
  auto& [values, ranks, found, kept] = scratch;
  kept.assign(std::min(k, count), found.front());  // ranks among NaN leave places as they are
  if (count > kMostRanked) {
    std::partial_sort_copy(found.begin(), found.begin() + count, kept.begin(), kept.end(), is_before);
    return;
  }
  values.resize(count);
  for (int64_t i = 0; i < count; ++i) values[i] = found[i].logit;
  count_above(values.data(), count, ranks);
  for (int64_t j = 0; j < count; ++j) {
    const float value = values[j];
    for (int64_t i = j + 1; i < count; ++i) ranks[i] += value == values[i];
  }
  for (int64_t i = 0; i < count; ++i) {
    if (ranks[i] < k) kept[ranks[i]] = found[i];
  }
}

// Fills `kept` with the classes of the k largest logits, the largest first.
EVENTKERN_INLINE void keep_largest(const float* logits, int64_t num_classes, int64_t k, Scratch& scratch) {
  const float bound = bound_of(logits, num_classes, k, scratch);
  auto& found = scratch.found;
  found.resize(std::max<int64_t>(found.size(), num_classes));
  int64_t count = 0;
  for (int64_t start = 0; start < num_classes; start += kScanned) {
    const int64_t end = std::min(start + kScanned, num_classes);
    int num_below = 0;
    for (int64_t i = start; i < end; ++i) num_below += logits[i] < bound;
    if (num_below == end - start) continue;
    for (int64_t i = start; i < end; ++i) {
      found[count] = {logits[i], static_cast<int32_t>(i)};  // overwritten by the next one unless it counts
      count += !(logits[i] < bound);
    }
  }
  sort_largest(count, k, scratch);
}

// The first candidate at which the sum of the powers so far is above `uniform` times their sum. A float below 1 times
// the sum rounds below the sum, so there is one, unless a logit is NaN.
int32_t draw(const std::vector<Candidate>& kept, float inverse_temperature, float uniform, std::vector<float>& sums) {
  sums.resize(kept.size());
  float sum = 0.0f;
  for (size_t i = 0; i < kept.size(); ++i) {
    sum += std::exp((kept[i].logit - kept.front().logit) * inverse_temperature);
    sums[i] = sum;
  }
  const auto found = std::upper_bound(sums.begin(), sums.end() - 1, uniform * sum);
  return kept[found - sums.begin()].number;
}

EVENTKERN_CLONES void draw_range(const ClassDraws& call, Range items, int32_t* classes) {
  Scratch scratch;
  for (int64_t item = items.begin; item < items.end; ++item) {
    const int64_t row = item / call.num_heads;
    const int64_t head = item % call.num_heads;
    const int64_t left_out = call.num_left_out[head];
    const int64_t first = call.first_classes[head] + left_out;
    const int64_t num_classes = call.first_classes[head + 1] - first;
    keep_largest(call.logits + row * call.row_stride + first, num_classes, std::min(call.top_k, num_classes), scratch);
    const int32_t number = call.uniforms == nullptr
                               ? scratch.kept.front().number
                               : draw(scratch.kept, call.inverse_temperature, call.uniforms[item], scratch.values);
    classes[item] = number + static_cast<int32_t>(left_out);
  }
}

}  // namespace

void draw_classes_cpu(const ClassDraws& call, int32_t* classes) {
  const int64_t num_items = call.num_rows * call.num_heads;
  const int num_parts = parts_for(call.num_rows * call.first_classes[call.num_heads], kGrainClasses, call.num_threads);
  if (num_parts == 1) {
    draw_range(call, {0, num_items}, classes);
    return;
  }
#pragma omp parallel for num_threads(num_parts) schedule(static, 1)
  for (int part = 0; part < num_parts; ++part) {
    draw_range(call, split_range(num_items, 1, part, num_parts), classes);
  }
}

}  // namespace eventkern
