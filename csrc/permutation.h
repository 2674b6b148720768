// A keyed pseudo-random bijection of [0, n): an alternating Feistel network on the smallest power-of-two domain that
// holds n, with cycle-walking for the values that fall outside. One definition for host and device (nvcc:
// --expt-relaxed-constexpr).
//
// Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002 (cycle-walking); Luby and Rackoff, SIAM J.
// Comput. 17(2), 1988 (Feistel rounds); splitmix64 after Steele, Lea and Flood, OOPSLA 2014; a quadratic as
// the round function: Rivest et al., "The RC6 Block Cipher", 1998.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

namespace eventkern {

inline constexpr int kFeistelRounds = 8;
// Twice its square, by which a round's output bends from one half to the next, is 0.19 of 2^32, near no simple
// fraction. For the usual 0x9E3779B1 it is 0.9992: that quadratic hardly bends, and shows through 6 rounds.
inline constexpr uint32_t kFeistelMultiplier = 0xD168AAADu;
inline constexpr int kMinDomainBits = 8;                          // halves of fewer than 4 bits mix too slowly
inline constexpr int64_t kMaxPermutationSize = int64_t{1} << 48;  // halves of 24 bits, and 16 bits to carry a slot in

struct Permutation {
  uint64_t n;
  int high_bits;  // low_bits is high_bits or high_bits + 1
  int low_bits;
  uint32_t keys[kFeistelRounds];
};

constexpr uint64_t splitmix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// Seed, epoch and part are hashed one inside the other: added, (seed 1, epoch 0) and (seed 0, epoch 1) would share an
// order. An epoch has as many independent orders as parts are asked for.
constexpr Permutation make_permutation(uint64_t n, uint64_t seed, uint64_t epoch, uint64_t part) {
  Permutation permutation{};
  permutation.n = n;
  const int domain_bits = std::max(static_cast<int>(std::bit_width(n - 1)), kMinDomainBits);
  permutation.high_bits = domain_bits / 2;
  permutation.low_bits = domain_bits - permutation.high_bits;
  uint64_t state = splitmix64(splitmix64(splitmix64(splitmix64(n) ^ seed) ^ epoch) ^ part);
  for (int round = 0; round < kFeistelRounds; ++round) {
    state = splitmix64(state);
    permutation.keys[round] = static_cast<uint32_t>(state >> 32);
  }
  return permutation;
}

// One half changes by the upper bits, those that every lower bit reaches, of a quadratic in the other. That takes two
// multiply-adds, a shift and an exclusive or; on a GPU it is the latter two that an index costs. Half is one half, or a
// vector of halves, which goes by reference because no vector may cross a call.
template <typename Half>
[[gnu::always_inline]] constexpr void feistel_round(Half& changed, const Half& half, const Half& key, int bits) {
  const Half mixed = half * kFeistelMultiplier + key;
  changed ^= (mixed * mixed + mixed) >> (32 - bits);
}

// One pass through the network: a bijection of [0, 2^(high_bits + low_bits)).
constexpr uint64_t permute_domain(const Permutation& permutation, uint64_t value) {
  uint32_t high = static_cast<uint32_t>(value >> permutation.low_bits);
  uint32_t low = static_cast<uint32_t>(value) & ((1u << permutation.low_bits) - 1);
  for (int round = 0; round < kFeistelRounds; round += 2) {
    feistel_round(high, low, permutation.keys[round], permutation.high_bits);
    feistel_round(low, high, permutation.keys[round + 1], permutation.low_bits);
  }
  return (static_cast<uint64_t>(high) << permutation.low_bits) | low;
}

constexpr uint64_t permute(const Permutation& permutation, uint64_t position) {
  uint64_t value = permute_domain(permutation, position);
  while (value >= permutation.n) value = permute_domain(permutation, value);
  return value;
}

void permutation_cpu(const Permutation& permutation, int64_t start, int64_t count, int64_t* out, int num_threads);
void permutation_cuda(const Permutation& permutation, int64_t start, int64_t count, int64_t* out, int device,
                      void* stream);

}  // namespace eventkern
