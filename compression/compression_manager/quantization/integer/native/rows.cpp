// Passes with one scale for each row.
#include "common.h"

#include <cmath>
#include <limits>

namespace native {
namespace {

constexpr float LARGEST_CODE = 127.0f;
// Rows that one thread takes at least have about this many elements.
constexpr int64_t GRAIN = 32768;

int64_t rows_per_thread(int64_t columns) {
  return std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, columns));
}

// The largest magnitude of a row; NaN if an element is not finite.
float largest_magnitude(const float* row, int64_t columns) {
  // Without their sign, floats are ordered as their bits are, and infinity and NaN come last.
  int32_t largest = 0;
  for (int64_t i = 0; i < columns; ++i) {
    largest = std::max(largest, static_cast<int32_t>(to_bits(row[i]) & 0x7fffffffu));
  }
  const float magnitude = to_float(static_cast<uint32_t>(largest));
  return std::isfinite(magnitude) ? magnitude : std::numeric_limits<float>::quiet_NaN();
}

// The float32 operations of compute_qparams, in the same order; comparisons let NaN through.
float symmetric_scale(float magnitude) {
  constexpr float smallest = std::numeric_limits<float>::epsilon();
  constexpr double largest_level =
      static_cast<double>(std::numeric_limits<float>::max()) * (1.0 - 1.0 / (1 << 22));
  constexpr float largest = static_cast<float>(largest_level / LARGEST_CODE);
  const float scale = magnitude / LARGEST_CODE;
  return scale < smallest ? smallest : scale > largest ? largest : scale;
}

// No clamp: the scale is that of the row's largest element, which is 127 steps away from zero.
void quantize_row(
    const float* __restrict row, int64_t columns, float inverse_scale, int8_t* __restrict codes) {
  for (int64_t i = 0; i < columns; ++i) {
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(std::nearbyint(row[i] * inverse_scale)));
  }
}

template <typename Value>
void dequantize_row(
    const int8_t* __restrict codes, int64_t count, float scale, Value* __restrict output) {
  for (int64_t i = 0; i < count; ++i) {
    store(static_cast<float>(codes[i]) * scale, output + i);
  }
}

template <typename Value>
void dequantize(
    const int8_t* codes, int64_t runs, int64_t run, int64_t rows, const float* scales,
    Value* output) {
  at::parallel_for(0, runs, rows_per_thread(run), [=](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      dequantize_row(codes + index * run, run, scales[index % rows], output + index * run);
    }
  });
}

} // namespace
} // namespace native

using namespace native;

// `numbers`, which the codes stand for, may be null.
EXPORT void quantize_rows(
    const float* weight, int64_t rows, int64_t columns, int8_t* codes, float* scales,
    float* numbers) {
  at::parallel_for(0, rows, rows_per_thread(columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* values = weight + row * columns;
      const float scale = scales[row] = symmetric_scale(largest_magnitude(values, columns));
      if (std::isnan(scale)) {
        std::memset(codes + row * columns, 0, columns);
      } else {
        quantize_row(values, columns, 1.0f / scale, codes + row * columns);
      }
      if (numbers != nullptr) {
        dequantize_row(codes + row * columns, columns, scale, numbers + row * columns);
      }
    }
  });
}

// The elements of a row lie in runs of `run`; the runs of all rows alternate in memory. Writes
// float32, or bfloat16 if `half`.
EXPORT void dequantize_rows(
    const int8_t* codes, int64_t runs, int64_t run, int64_t rows, const float* scales, bool half,
    void* output) {
  half ? dequantize(codes, runs, run, rows, scales, static_cast<uint16_t*>(output))
       : dequantize(codes, runs, run, rows, scales, static_cast<float*>(output));
}
