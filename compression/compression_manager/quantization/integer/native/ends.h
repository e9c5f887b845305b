// The smallest and the largest of many numbers, found by several threads.
#pragma once

#include "common.h"

#include <limits>
#include <mutex>

namespace native {

// Integers in the order of the floats that they stand for; NaN lies beyond the infinities. Loops that
// compare floats themselves are not vectorized, because of NaN.
inline int32_t to_key(float value) {
  const int32_t bits = static_cast<int32_t>(to_bits(value));
  return bits ^ (bits >> 31 & 0x7fffffff);
}

inline float from_key(int32_t key) {
  return to_float(static_cast<uint32_t>(key ^ (key >> 31 & 0x7fffffff)));
}

// The smallest and the largest of some numbers, as keys.
struct Ends {
  int32_t low = std::numeric_limits<int32_t>::max();
  int32_t high = std::numeric_limits<int32_t>::min();

  void include(const Ends& other) {
    low = std::min(low, other.low);
    high = std::max(high, other.high);
  }

  // In variables of its own, or compilers would do all of it one by one.
  void include(const float* __restrict values, int64_t count) {
    int32_t least = low;
    int32_t most = high;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t key = to_key(values[i]);
      least = key < least ? key : least;
      most = key > most ? key : most;
    }
    low = least;
    high = most;
  }

  // Writes both, or NaN twice if one of the numbers is NaN.
  void write(float* ends) const {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    const bool has_nan = low < to_key(-infinity) || high > to_key(infinity);
    ends[0] = has_nan ? std::numeric_limits<float>::quiet_NaN() : from_key(low);
    ends[1] = has_nan ? std::numeric_limits<float>::quiet_NaN() : from_key(high);
  }
};

// Calls body(begin, end, ends) as `for_elements` does, with ends of each thread's own; returns those of all.
template <typename Body>
Ends with_ends(int64_t size, const Body& body) {
  Ends all;
  std::mutex turn;
  for_elements(size, [&](int64_t begin, int64_t end) {
    Ends own;
    body(begin, end, own);
    const std::lock_guard<std::mutex> guard(turn);
    all.include(own);
  });
  return all;
}

} // namespace native
