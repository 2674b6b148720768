// Float32 lanes, loaded from and stored to float32, bfloat16 and float16 memory, 32 columns at a time. Written with the
// compilers' vector extensions, which each clone of a multiversioned function lowers to its own registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#pragma GCC diagnostic ignored "-Wpsabi"  // every function here is inlined: no vector crosses a call

#define EVENTKERN_INLINE [[gnu::always_inline]] inline
#define EVENTKERN_INLINE_LAMBDA __attribute__((always_inline))

namespace eventkern {

inline constexpr int kLanes = 16;
inline constexpr int kColumns = 2 * kLanes;  // of a Columns

// The whole Columns that `count` columns take.
constexpr int64_t padded(int64_t count) { return (count + kColumns - 1) / kColumns * kColumns; }

using Lanes = float __attribute__((vector_size(64)));
using LaneBits = uint32_t __attribute__((vector_size(64)));

EVENTKERN_INLINE Lanes larger(Lanes left, Lanes right) { return left > right ? left : right; }

EVENTKERN_INLINE float largest_of(Lanes lanes) {
  float result = lanes[0];
  for (int i = 1; i < kLanes; ++i) result = std::max(result, lanes[i]);
  return result;
}

EVENTKERN_INLINE float total_of(Lanes lanes) {
  float result = 0.0f;
  for (int i = 0; i < kLanes; ++i) result += lanes[i];
  return result;
}

// 32 neighbouring columns. Those of 16 bits are split into even and odd ones, which needs no shuffle: what is done to
// both halves alike never sees the order.
struct Columns {
  Lanes low;
  Lanes high;
};

enum class FloatType : int { kFloat32, kBfloat16, kFloat16 };

struct Bfloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// function.operator()<Scalar>() with the C++ type of a FloatType.
template <typename Function>
auto with_float_type(FloatType type, Function function) {
  switch (type) {
    case FloatType::kBfloat16:
      return function.template operator()<Bfloat16>();
    case FloatType::kFloat16:
      return function.template operator()<Float16>();
    default:
      return function.template operator()<float>();
  }
}

EVENTKERN_INLINE LaneBits bits_of(Lanes lanes) {
  LaneBits bits;
  std::memcpy(&bits, &lanes, sizeof bits);
  return bits;
}

EVENTKERN_INLINE Lanes lanes_of(LaneBits bits) {
  Lanes lanes;
  std::memcpy(&lanes, &bits, sizeof lanes);
  return lanes;
}

EVENTKERN_INLINE LaneBits shift_signed(LaneBits bits, int count) {
  using SignedBits = int32_t __attribute__((vector_size(64)));
  return (LaneBits)((SignedBits)bits >> count);
}

// Float16 in the upper 16 bits of each lane. The shift spreads the sign over the top bits, which the mask leaves one
// of; the product by 2^112 moves the exponent from float16's bias to float32's, subnormal numbers included.
EVENTKERN_INLINE Lanes widen_float16(LaneBits words) {
  const LaneBits bits = shift_signed(words, 3) & 0x8FFFE000u;
  const LaneBits finite = bits_of(lanes_of(bits) * 0x1p112f);
  return lanes_of((bits & 0x0F800000u) == 0x0F800000u ? finite | 0x7F800000u : finite);
}

// To the lower 16 bits of each lane, to nearest, ties to even; a carry out of the mantissa is the next exponent,
// infinity included.
EVENTKERN_INLINE LaneBits narrow(Lanes lanes, Bfloat16) {
  const LaneBits bits = bits_of(lanes);
  const LaneBits rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? LaneBits{} + 0x7FC0u : rounded;
}

// To nearest, ties to even. Below 2^-14 the sum with 1/2 rounds at float16's subnormal step.
EVENTKERN_INLINE LaneBits narrow(Lanes lanes, Float16) {
  const LaneBits bits = bits_of(lanes);
  const LaneBits magnitude = bits & 0x7FFFFFFFu;
  const LaneBits normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const LaneBits subnormal = bits_of(lanes_of(magnitude) + 0.5f) - 0x3F000000u;
  LaneBits half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? LaneBits{} + 0x7C00u : half;
  half = magnitude > 0x7F800000u ? LaneBits{} + 0x7E00u : half;
  return half | ((bits >> 16) & 0x8000u);
}

EVENTKERN_INLINE Lanes load_lanes(const float* source) {
  Lanes lanes;
  std::memcpy(&lanes, source, sizeof lanes);
  return lanes;
}

EVENTKERN_INLINE void store_lanes(float* target, Lanes lanes) { std::memcpy(target, &lanes, sizeof lanes); }

EVENTKERN_INLINE Columns load(const float* source) { return {load_lanes(source), load_lanes(source + kLanes)}; }

EVENTKERN_INLINE void store(float* target, Columns columns) {
  store_lanes(target, columns.low);
  store_lanes(target + kLanes, columns.high);
}

template <typename Half>
EVENTKERN_INLINE Columns load(const Half* source) {
  LaneBits words;
  std::memcpy(&words, source, sizeof words);
  if constexpr (std::is_same_v<Half, Bfloat16>) {
    return {lanes_of(words << 16), lanes_of(words & 0xFFFF0000u)};
  } else {
    return {widen_float16(words << 16), widen_float16(words)};
  }
}

template <typename Half>
EVENTKERN_INLINE void store(Half* target, Columns columns) {
  const LaneBits words = narrow(columns.low, Half{}) | (narrow(columns.high, Half{}) << 16);
  std::memcpy(target, &words, sizeof words);
}

// The first `count` columns, fewer than kColumns; the others are zero and are not stored.
template <typename Scalar>
EVENTKERN_INLINE Columns load_some(const Scalar* source, int64_t count) {
  Scalar padded[kColumns] = {};
  std::memcpy(padded, source, count * sizeof(Scalar));
  return load(padded);
}

// The lane of a Columns, low ones first, that holds a column.
template <typename Scalar>
constexpr int lane_of(int column) {
  return std::is_same_v<Scalar, float> ? column : column / 2 + column % 2 * kLanes;
}

template <typename Scalar>
EVENTKERN_INLINE void store_some(Scalar* target, Columns columns, int64_t count) {
  Scalar padded[kColumns];
  store(padded, columns);
  std::memcpy(target, padded, count * sizeof(Scalar));
}

EVENTKERN_INLINE Columns operator+(Columns left, Columns right) {
  return {left.low + right.low, left.high + right.high};
}

EVENTKERN_INLINE Columns operator/(Columns columns, float divisor) {
  return {columns.low / divisor, columns.high / divisor};
}

}  // namespace eventkern
