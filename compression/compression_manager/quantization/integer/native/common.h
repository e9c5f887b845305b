// What the passes share: exported names, threads, and bits of floats and of masks.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace native {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "masks are packed for little endian");

// Elements whose bits make one word of a mask.
constexpr int64_t GROUP = 64;
// A thread takes whole blocks, so that no two write into one cache line of a mask.
constexpr int64_t BLOCK = 64 * 8 * GROUP;

inline int64_t divide_up(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

// Calls body(begin, end) on several threads; each begin is a multiple of BLOCK.
template <typename Body>
void for_elements(int64_t size, const Body& body) {
  at::parallel_for(0, divide_up(size, BLOCK), 1, [&](int64_t first, int64_t last) {
    body(first * BLOCK, std::min(last * BLOCK, size));
  });
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// The upper half of a float32, rounded half to even: a bfloat16.
inline uint16_t round_to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

inline void store(float value, float* target) {
  *target = value;
}

inline void store(float value, uint16_t* target) {
  *target = round_to_bfloat16(value);
}

// Packs the flags (0 or 1) of up to GROUP elements into divide_up(count, 8) bytes of a mask.
inline uint64_t pack_flags(const uint8_t* flags, int64_t count, uint8_t* mask) {
  uint64_t word = 0;
  for (int64_t byte = 0; byte < GROUP / 8; ++byte) {
    uint64_t eight;
    std::memcpy(&eight, flags + 8 * byte, sizeof(eight));
    // Each 1 of the factor moves one flag to its place among the highest eight bits.
    word |= (eight * 0x0102040810204080u >> 56) << (8 * byte);
  }
  std::memcpy(mask, &word, divide_up(count, 8));
  return word;
}

// Reads the bits of up to GROUP elements.
inline uint64_t load_mask(const uint8_t* mask, int64_t count) {
  uint64_t word = 0;
  std::memcpy(&word, mask, divide_up(count, 8));
  return word;
}

// output = input where the bit is 1, else +0 (whatever the input is, so that NaN goes too).
inline void keep_where(uint64_t word, const float* input, float* output, int64_t count) {
  // Shifts of 32 bits need half the vector registers that shifts of 64 bits would.
  const uint32_t halves[2] = {static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32)};
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t begin = 32 * half;
    const int64_t length = std::clamp<int64_t>(count - begin, 0, 32);
    for (int64_t i = 0; i < length; ++i) {
      const uint32_t keep = 0u - (halves[half] >> i & 1u);
      output[begin + i] = to_float(to_bits(input[begin + i]) & keep);
    }
  }
}

} // namespace native
