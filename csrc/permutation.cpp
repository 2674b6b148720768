#include "permutation.h"

#include <cstddef>
#include <cstring>

#include "lanes.h"
#include "parallel.h"

namespace eventkern {
namespace {

constexpr int kVectors = 4;                // permuted side by side, to hide the latency of a round
constexpr int kGroup = kVectors * kLanes;  // values in them
constexpr int kBlock = 2048;               // positions between two walks, 16 KiB of output and as much of walkers
constexpr int64_t kGrain = 1 << 17;        // fewer positions than this, 0.2 ms of work, do not pay for a second thread
constexpr int kSlotBits = 16;  // a walker is one word: a value, which has 48 bits, above its slot in the block

using WideLanes = uint64_t __attribute__((vector_size(64)));

// Values as halves in 32-bit lanes: lane 2i holds value i of 16, and lane 2i + 1 value i + 8. The 64-bit lane of such a
// pair is then split and joined by shifts and masks, with no shuffle.
struct Halves {
  LaneBits high;
  LaneBits low;
};

// As `LaneBits{} + value`, which gcc builds lane by lane where a vector takes two registers.
EVENTKERN_INLINE LaneBits in_all_lanes(uint32_t value) {
  uint32_t values[kLanes];
  for (uint32_t& lane : values) lane = value;
  LaneBits lanes;
  std::memcpy(&lanes, values, sizeof lanes);
  return lanes;
}

struct Network {
  LaneBits keys[kFeistelRounds];
  int high_bits;
  int low_bits;
};

EVENTKERN_INLINE Network network_of(const Permutation& permutation) {
  Network network;
  for (int round = 0; round < kFeistelRounds; ++round) network.keys[round] = in_all_lanes(permutation.keys[round]);
  network.high_bits = permutation.high_bits;
  network.low_bits = permutation.low_bits;
  return network;
}

EVENTKERN_INLINE Halves load_walkers(const uint64_t* source, int low_bits) {
  WideLanes first, second;
  std::memcpy(&first, source, sizeof first);
  std::memcpy(&second, source + kLanes / 2, sizeof second);
  first >>= kSlotBits;
  second >>= kSlotBits;
  const uint64_t mask = (uint64_t{1} << low_bits) - 1;
  return {(LaneBits)(first >> low_bits | second >> low_bits << 32), (LaneBits)((first & mask) | (second & mask) << 32)};
}

EVENTKERN_INLINE void store_halves(uint64_t* target, const Halves& halves, int low_bits) {
  const WideLanes high = (WideLanes)halves.high;
  const WideLanes low = (WideLanes)halves.low;
  const WideLanes first = (high & 0xFFFFFFFFu) << low_bits | (low & 0xFFFFFFFFu);
  const WideLanes second = high >> 32 << low_bits | low >> 32;
  std::memcpy(target, &first, sizeof first);
  std::memcpy(target + kLanes / 2, &second, sizeof second);
}

// The halves of 16 positions from `position` on. The carry out of the low half may leave the domain, in lanes past n
// alone, which nobody reads.
EVENTKERN_INLINE Halves halves_from(uint64_t position, int low_bits) {
  const LaneBits steps = {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15};
  const uint32_t mask = (1u << low_bits) - 1;
  const LaneBits low = in_all_lanes(static_cast<uint32_t>(position) & mask) + steps;
  return {in_all_lanes(static_cast<uint32_t>(position >> low_bits)) + (low >> low_bits), low & in_all_lanes(mask)};
}

EVENTKERN_INLINE void permute_domain(const Network& network, Halves (&halves)[kVectors]) {
#pragma GCC unroll 8
  for (int round = 0; round < kFeistelRounds; round += 2) {
    for (auto& [high, low] : halves) feistel_round(high, low, network.keys[round], network.high_bits);
    for (auto& [high, low] : halves) feistel_round(low, high, network.keys[round + 1], network.low_bits);
  }
}

EVENTKERN_INLINE void permute_positions(const Network& network, uint64_t position, uint64_t* values) {
  Halves halves[kVectors];
  for (int i = 0; i < kVectors; ++i) halves[i] = halves_from(position + i * kLanes, network.low_bits);
  permute_domain(network, halves);
  for (int i = 0; i < kVectors; ++i) store_halves(values + i * kLanes, halves[i], network.low_bits);
}

EVENTKERN_INLINE void permute_walkers(const Network& network, uint64_t* walkers) {
  Halves halves[kVectors];
  for (int i = 0; i < kVectors; ++i) halves[i] = load_walkers(walkers + i * kLanes, network.low_bits);
  permute_domain(network, halves);
  uint64_t values[kGroup];
  for (int i = 0; i < kVectors; ++i) store_halves(values + i * kLanes, halves[i], network.low_bits);
  for (int i = 0; i < kGroup; ++i) walkers[i] = values[i] << kSlotBits | (walkers[i] & ((1 << kSlotBits) - 1));
}

// The values outside [0, n) walk on together as a compacted vector, so that the walk is vector code too.
EVENTKERN_CLONES void permute_range(const Permutation& permutation, int64_t start, int64_t count, uint64_t* out) {
  const uint64_t n = permutation.n;
  const Network network = network_of(permutation);
  const bool is_whole_domain = n == uint64_t{1} << (permutation.high_bits + permutation.low_bits);
  const uint64_t first_outside = n << kSlotBits;
  uint64_t walkers[kBlock + kGroup];
  for (int64_t block = 0; block < count; block += kBlock) {
    const int size = static_cast<int>(std::min<int64_t>(kBlock, count - block));
    const int whole = size / kGroup * kGroup;
    uint64_t* values = out + block;
    for (int i = 0; i < whole; i += kGroup) permute_positions(network, start + block + i, values + i);
    if (whole < size) {
      uint64_t last[kGroup];
      permute_positions(network, start + block + whole, last);
      std::memcpy(values + whole, last, (size - whole) * sizeof *last);
    }
    if (is_whole_domain) continue;
    int64_t num_walkers = 0;
#pragma GCC unroll 8
    for (int i = 0; i < size; ++i) {
      const uint64_t value = values[i];
      walkers[num_walkers] = value << kSlotBits | i;
      num_walkers += value >= n;
    }
    while (num_walkers > 0) {
      std::memset(walkers + num_walkers, 0, kGroup * sizeof *walkers);
      for (int64_t i = 0; i < num_walkers; i += kGroup) permute_walkers(network, walkers + i);
      int64_t num_outside = 0;
#pragma GCC unroll 8
      for (int64_t i = 0; i < num_walkers; ++i) {
        const uint64_t walker = walkers[i];
        values[walker & ((1 << kSlotBits) - 1)] = walker >> kSlotBits;
        walkers[num_outside] = walker;
        num_outside += walker >= first_outside;
      }
      num_walkers = num_outside;
    }
  }
}

}  // namespace

void permutation_cpu(const Permutation& permutation, int64_t start, int64_t count, int64_t* out, int num_threads) {
  uint64_t* values = reinterpret_cast<uint64_t*>(out);
  const int64_t grains = (count + kGrain - 1) / kGrain;
  const int num_parts = static_cast<int>(std::clamp<int64_t>(grains, 1, allowed_threads(num_threads)));
  if (num_parts == 1) {
    permute_range(permutation, start, count, values);
    return;
  }
#pragma omp parallel for num_threads(num_parts) schedule(static, 1)
  for (int part = 0; part < num_parts; ++part) {
    const Range range = split_range(count, kBlock, part, num_parts);
    permute_range(permutation, start + range.begin, range.end - range.begin, values + range.begin);
  }
}

}  // namespace eventkern
