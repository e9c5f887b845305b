// Passes that treat each element by itself, in the order of memory.
#include "ends.h"

#include <atomic>
#include <cmath>

namespace native {
namespace {

struct Range {
  float inverse_scale;
  float zero_point;
  float quant_min;
  float quant_max;
};

// The integer before it is clamped.
inline float round_level(float value, const Range& range) {
  return std::nearbyint(value * range.inverse_scale) + range.zero_point;
}

inline float clamp_level(float level, const Range& range) {
  const float above = level > range.quant_min ? level : range.quant_min;
  return above < range.quant_max ? above : range.quant_max;
}

// Writes codes; returns whether any was clipped. The range is a copy, and pointers are restrict,
// because the compiler takes stores of bytes for stores to anything.
template <typename Code>
inline bool quantize_group(
    const float* __restrict input, int64_t count, const Range range, Code* __restrict codes) {
  uint32_t clipped = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float level = round_level(input[i], range);
    const float code = clamp_level(level, range);
    codes[i] = static_cast<Code>(static_cast<int32_t>(code));
    clipped |= level == code ? 0u : 1u;
  }
  return clipped != 0;
}

// Writes the bits of up to GROUP elements.
inline void mark_group(
    const float* __restrict input, int64_t count, const Range range, uint8_t* mask) {
  uint8_t flags[GROUP] = {};
  for (int64_t i = 0; i < count; ++i) {
    const float level = round_level(input[i], range);
    flags[i] = level != clamp_level(level, range);
  }
  pack_flags(flags, count, mask);
}

// Most groups have no clipped element, so that the slower narrowing to bits is done only for those
// that have.
template <typename Code>
inline void quantize_and_mark(
    const float* input, int64_t count, const Range range, Code* codes, uint8_t* mask) {
  if (quantize_group(input, count, range, codes)) {
    mark_group(input, count, range, mask);
  } else {
    std::memset(mask, 0, divide_up(count, 8));
  }
}

template <typename Code>
void quantize(const float* input, int64_t size, Range range, Code* codes, uint8_t* mask) {
  for_elements(size, [&](int64_t begin, int64_t end) {
    if (mask == nullptr) {
      quantize_group(input + begin, end - begin, range, codes + begin);
      return;
    }
    int64_t i = begin;
    for (; i + GROUP <= end; i += GROUP) {
      quantize_and_mark(input + i, GROUP, range, codes + i, mask + i / 8);
    }
    if (i < end) {
      quantize_and_mark(input + i, end - i, range, codes + i, mask + i / 8);
    }
  });
}

// Writes codes; returns whether all elements are finite: the exponent of others has no zero.
template <typename Code>
inline bool quantize_finite_run(
    const float* __restrict input, int64_t count, const Range range, Code* __restrict codes) {
  constexpr uint32_t exponent = 0x7f800000u;
  uint32_t other = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float code = clamp_level(round_level(input[i], range), range);
    codes[i] = static_cast<Code>(static_cast<int32_t>(code));
    other |= (to_bits(input[i]) & exponent) == exponent ? 1u : 0u;
  }
  return other == 0;
}

template <typename Code>
bool quantize_finite(const float* input, int64_t size, Range range, Code* codes) {
  std::atomic<bool> is_finite{true};
  for_elements(size, [&](int64_t begin, int64_t end) {
    if (!quantize_finite_run(input + begin, end - begin, range, codes + begin)) {
      is_finite = false;
    }
  });
  return is_finite;
}

template <typename Code, typename Value>
void dequantize(
    const Code* __restrict codes, int64_t size, float scale, int32_t zero_point,
    Value* __restrict output) {
  for_elements(size, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      store(static_cast<float>(codes[i] - zero_point) * scale, output + i);
    }
  });
}

template <typename Value>
void dequantize(
    const void* codes, int64_t size, bool has_sign, float scale, int32_t zero_point,
    Value* output) {
  has_sign ? dequantize(static_cast<const int8_t*>(codes), size, scale, zero_point, output)
           : dequantize(static_cast<const uint8_t*>(codes), size, scale, zero_point, output);
}

template <typename Code>
void add_dequantized(
    const float* __restrict addend, const Code* __restrict codes, int64_t size, float scale,
    int32_t zero_point, float* __restrict output) {
  for_elements(size, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      output[i] = addend[i] + static_cast<float>(codes[i] - zero_point) * scale;
    }
  });
}

inline void relu_group(
    const float* __restrict input, int64_t count, float* __restrict output, uint8_t* mask,
    Ends& ends) {
  uint8_t flags[GROUP] = {};
  for (int64_t i = 0; i < count; ++i) {
    const bool positive = !(input[i] <= 0.0f);
    flags[i] = positive;
    output[i] = positive ? input[i] : 0.0f;
  }
  pack_flags(flags, count, mask);
  ends.include(output, count);
}

} // namespace
} // namespace native

using namespace native;

// `mask` may be null if no element can be clipped.
EXPORT void quantize_elements(
    const float* input,
    int64_t size,
    float inverse_scale,
    float zero_point,
    float quant_min,
    float quant_max,
    bool has_sign,
    void* codes,
    uint8_t* mask) {
  const Range range{inverse_scale, zero_point, quant_min, quant_max};
  has_sign ? quantize(input, size, range, static_cast<int8_t*>(codes), mask)
           : quantize(input, size, range, static_cast<uint8_t*>(codes), mask);
}

// Returns whether all elements are finite; else the codes are of no use.
EXPORT bool quantize_finite_elements(
    const float* input,
    int64_t size,
    float inverse_scale,
    float zero_point,
    float quant_min,
    float quant_max,
    bool has_sign,
    void* codes) {
  const Range range{inverse_scale, zero_point, quant_min, quant_max};
  return has_sign ? quantize_finite(input, size, range, static_cast<int8_t*>(codes))
                  : quantize_finite(input, size, range, static_cast<uint8_t*>(codes));
}

// Writes float32, or bfloat16 if `half`.
EXPORT void dequantize_elements(
    const void* codes, int64_t size, bool has_sign, float scale, int32_t zero_point, bool half,
    void* output) {
  half ? dequantize(codes, size, has_sign, scale, zero_point, static_cast<uint16_t*>(output))
       : dequantize(codes, size, has_sign, scale, zero_point, static_cast<float*>(output));
}

EXPORT void add_dequantized_elements(
    const float* addend, const void* codes, int64_t size, bool has_sign, float scale,
    int32_t zero_point, float* output) {
  has_sign
      ? add_dequantized(
            addend, static_cast<const int8_t*>(codes), size, scale, zero_point, output)
      : add_dequantized(
            addend, static_cast<const uint8_t*>(codes), size, scale, zero_point, output);
}

EXPORT void clear_marked(float* values, int64_t size, const uint8_t* mask) {
  for_elements(size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += GROUP) {
      const int64_t count = std::min(GROUP, end - i);
      const uint64_t marked = load_mask(mask + i / 8, count);
      // Most groups have none, and memory that does not change need not be written.
      if (marked != 0) {
        keep_where(~marked, values + i, values + i, count);
      }
    }
  });
}

// Sets `ends` to the smallest and the largest element, or both to NaN if one is.
EXPORT void find_ends(const float* input, int64_t size, float* ends) {
  const auto include = [&](int64_t begin, int64_t end, Ends& own) {
    own.include(input + begin, end - begin);
  };
  with_ends(size, include).write(ends);
}

// Sets `ends` as `find_ends` does, of the output.
EXPORT void relu_elements(
    const float* input, int64_t size, float* output, uint8_t* mask, float* ends) {
  const auto relu = [&](int64_t begin, int64_t end, Ends& own) {
    int64_t i = begin;
    for (; i + GROUP <= end; i += GROUP) {
      relu_group(input + i, GROUP, output + i, mask + i / 8, own);
    }
    if (i < end) {
      relu_group(input + i, end - i, output + i, mask + i / 8, own);
    }
  };
  with_ends(size, relu).write(ends);
}

EXPORT void keep_marked(const float* input, int64_t size, const uint8_t* mask, float* output) {
  for_elements(size, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + GROUP <= end; i += GROUP) {
      keep_where(load_mask(mask + i / 8, GROUP), input + i, output + i, GROUP);
    }
    if (i < end) {
      keep_where(load_mask(mask + i / 8, end - i), input + i, output + i, end - i);
    }
  });
}
