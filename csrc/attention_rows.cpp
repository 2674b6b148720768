#include "attention_rows.h"

#include <type_traits>

namespace eventkern {
namespace {

using Words = uint16_t __attribute__((vector_size(32)));

EVENTKERN_INLINE Lanes widen(LaneBits words, Bfloat16) { return lanes_of(words << 16); }

EVENTKERN_INLINE Lanes widen(LaneBits words, Float16) { return widen_float16(words << 16); }

template <typename Scalar, int kHeadDim>
EVENTKERN_CLONES void read(const Scalar* source, int64_t row_stride, int64_t count, float factor, float* rows) {
  if constexpr (std::is_same_v<Scalar, float>) {
    for (int64_t row = 0; row < count; ++row) {
      for (int h = 0; h < kHeadDim; ++h) rows[row * kHeadDim + h] = source[row * row_stride + h] * factor;
    }
  } else {
    constexpr int kRows = std::max(kLanes / kHeadDim, 1);  // of one load
    constexpr int kWidth = std::min(kLanes, kHeadDim);
    for (int64_t row = 0; row < count; row += kRows) {
      const int64_t num_rows = std::min<int64_t>(kRows, count - row);
      for (int first = 0; first < kHeadDim; first += kWidth) {
        Words words{};
        for (int i = 0; i < num_rows; ++i) {
          std::memcpy(reinterpret_cast<char*>(&words) + i * kWidth * sizeof(Scalar),
                      source + (row + i) * row_stride + first, kWidth * sizeof(Scalar));
        }
        const Lanes lanes = widen(__builtin_convertvector(words, LaneBits), Scalar{});
        store_lanes(rows + row * kHeadDim + first, lanes * factor);
      }
    }
  }
}

template <typename Scalar, int kHeadDim>
EVENTKERN_CLONES void write(const float* rows, int64_t count, float factor, Scalar* target, int64_t row_stride) {
  if constexpr (std::is_same_v<Scalar, float>) {
    for (int64_t row = 0; row < count; ++row) {
      for (int h = 0; h < kHeadDim; ++h) target[row * row_stride + h] = rows[row * kHeadDim + h] * factor;
    }
  } else {
    constexpr int kRows = std::max(kLanes / kHeadDim, 1);
    constexpr int kWidth = std::min(kLanes, kHeadDim);
    for (int64_t row = 0; row < count; row += kRows) {
      const int64_t num_rows = std::min<int64_t>(kRows, count - row);
      for (int first = 0; first < kHeadDim; first += kWidth) {
        const Lanes lanes = load_lanes(rows + row * kHeadDim + first) * factor;
        const Words words = __builtin_convertvector(narrow(lanes, Scalar{}), Words);
        for (int i = 0; i < num_rows; ++i) {
          std::memcpy(static_cast<void*>(target + (row + i) * row_stride + first),
                      reinterpret_cast<const char*>(&words) + i * kWidth * sizeof(Scalar), kWidth * sizeof(Scalar));
        }
      }
    }
  }
}

}  // namespace

void read_rows(const HeadRows& source, const Attention& call, int64_t pair, int64_t count, float factor, float* rows) {
  const void* first = rows_of(source, call, pair);
  with_float_type(call.type, [&]<typename Scalar>() {
    with_head_dim(call.head_dim, [&]<int kHeadDim>() {
      read<Scalar, kHeadDim>(static_cast<const Scalar*>(first), source.row_stride, count, factor, rows);
    });
  });
}

void write_rows(const float* rows, const Attention& call, int64_t pair, int64_t count, float factor,
                const HeadRows& target) {
  void* first = rows_of(target, call, pair);
  with_float_type(call.type, [&]<typename Scalar>() {
    with_head_dim(call.head_dim, [&]<int kHeadDim>() {
      write<Scalar, kHeadDim>(rows, count, factor, static_cast<Scalar*>(first), target.row_stride);
    });
  });
}

}  // namespace eventkern
