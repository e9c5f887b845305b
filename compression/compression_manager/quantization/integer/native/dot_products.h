// Sums of products by AVX-512's dot products, where AMX is not there: of four bytes at a time (VNNI),
// and of two bfloat16 numbers.
#pragma once

#include "panels.h"

// Older compilers of GNU do not know those of bfloat16.
#if defined(__AVX512F__) && (defined(__clang__) || __GNUC__ >= 10)
#define HAS_DOT_PRODUCTS
#include <immintrin.h>
#endif

namespace native {

// Rows that are multiplied at a time: with PANEL columns, half of the registers hold their sums.
constexpr int64_t DOT_ROWS = 4;

#if defined(HAS_DOT_PRODUCTS)

// The processor is asked for the instructions before these functions are called: for those of bytes or
// of bfloat16, which one function for both has to name together. Compilers choose neither by
// themselves in code that has only the intrinsics of the other.
#define DOT_PRODUCTS __attribute__((target("avx512vnni,avx512bf16")))

inline bool has_dot_products_of_bytes() {
  return __builtin_cpu_supports("avx512vnni");
}

inline bool has_dot_products_of_bfloat16() {
  return __builtin_cpu_supports("avx512bf16");
}

struct DotBytes {
  using Number = uint8_t;
  using Sum = int32_t;
  using Sums = __m512i;

  DOT_PRODUCTS static inline Sums add(Sums sums, __m512i left, __m512i right) {
    return _mm512_dpbusd_epi32(sums, left, right);
  }
};

struct DotBFloat16 {
  using Number = uint16_t;
  using Sum = float;
  using Sums = __m512;

  DOT_PRODUCTS static inline Sums add(Sums sums, __m512i left, __m512i right) {
    return _mm512_dpbf16_ps(sums, (__m512bh)left, (__m512bh)right);
  }
};

// Does what `multiply_dots` does with COUNT rows and the first WIDTH registers of columns.
template <typename Dot, int64_t COUNT, int64_t WIDTH>
DOT_PRODUCTS void multiply_dots_of(
    const typename Dot::Number* const* rows, const Taps& taps, const void* panel,
    const typename Dot::Sum* before, int64_t stride, typename Dot::Sum* sums) {
  constexpr int64_t lanes = sizeof(__m512i) / sizeof(int32_t);
  constexpr int64_t unit = sizeof(int32_t) / sizeof(typename Dot::Number);
  typename Dot::Sums own[COUNT][WIDTH];
  // Only what is unrolled is kept in registers.
#pragma GCC unroll 4
  for (int64_t i = 0; i < COUNT; ++i) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < WIDTH; ++j) {
      own[i][j] = (typename Dot::Sums)_mm512_loadu_si512(before + i * stride + j * lanes);
    }
  }
  const __m512i* right = static_cast<const __m512i*>(panel);
  for (int64_t tap = 0; tap < taps.count; ++tap) {
    const typename Dot::Number* left[COUNT];
#pragma GCC unroll 4
    for (int64_t i = 0; i < COUNT; ++i) {
      left[i] = rows[i] + taps.starts[tap];
    }
    for (int64_t term = 0; term < taps.terms; term += unit, right += PANEL / lanes) {
      __m512i columns[WIDTH];
#pragma GCC unroll 4
      for (int64_t j = 0; j < WIDTH; ++j) {
        columns[j] = _mm512_loadu_si512(right + j);
      }
#pragma GCC unroll 4
      for (int64_t i = 0; i < COUNT; ++i) {
        int32_t bits;
        std::memcpy(&bits, left[i] + term, sizeof(bits));
        const __m512i one = _mm512_set1_epi32(bits);
#pragma GCC unroll 4
        for (int64_t j = 0; j < WIDTH; ++j) {
          own[i][j] = Dot::add(own[i][j], one, columns[j]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < COUNT; ++i) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < WIDTH; ++j) {
      _mm512_storeu_si512(sums + i * PANEL + j * lanes, (__m512i)own[i][j]);
    }
  }
}

template <typename Dot, int64_t COUNT>
void multiply_dots_by_width(
    const typename Dot::Number* const* rows, const Taps& taps, const void* panel, int64_t columns,
    const typename Dot::Sum* before, int64_t stride, typename Dot::Sum* sums) {
  if (columns > 32) {
    multiply_dots_of<Dot, COUNT, 4>(rows, taps, panel, before, stride, sums);
  } else if (columns > 16) {
    multiply_dots_of<Dot, COUNT, 2>(rows, taps, panel, before, stride, sums);
  } else {
    multiply_dots_of<Dot, COUNT, 1>(rows, taps, panel, before, stride, sums);
  }
}

// Sets the sums, (count, PANEL), of up to DOT_ROWS rows and the first `columns` of a panel, and maybe
// others, to what is added to `before`, whose rows are `stride` apart: 0, if all begin with the same.
template <typename Dot>
void multiply_dots(
    int64_t count, const typename Dot::Number* const* rows, const Taps& taps, const void* panel,
    int64_t columns, const typename Dot::Sum* before, int64_t stride, typename Dot::Sum* sums) {
  const auto multiply = count == 1 ? multiply_dots_by_width<Dot, 1>
      : count == 2                 ? multiply_dots_by_width<Dot, 2>
      : count == 3                 ? multiply_dots_by_width<Dot, 3>
                                   : multiply_dots_by_width<Dot, DOT_ROWS>;
  multiply(rows, taps, panel, columns, before, stride, sums);
}

#undef DOT_PRODUCTS

#else

inline bool has_dot_products_of_bytes() {
  return false;
}

inline bool has_dot_products_of_bfloat16() {
  return false;
}

struct DotBytes {
  using Number = uint8_t;
  using Sum = int32_t;
};

struct DotBFloat16 {
  using Number = uint16_t;
  using Sum = float;
};

template <typename Dot>
void multiply_dots(
    int64_t, const typename Dot::Number* const*, const Taps&, const void*, int64_t,
    const typename Dot::Sum*, int64_t, typename Dot::Sum*) {
  throw std::logic_error("compiled without AVX-512's dot products");
}

#endif

} // namespace native
