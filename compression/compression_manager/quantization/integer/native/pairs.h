// The kernel of processors without instructions for 8-bit integers: exact sums in 32 bits of products
// of 16 bits, of which AVX2 multiplies twice as many at a time as of floats.
//
// The codes are widened to 16 bits, less the zero point, so that zeros stand for real zeros.
#pragma once

#include "blocks.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace native {
namespace pairs {

constexpr int64_t PAIR = 2;
constexpr int64_t TILE_ROWS = 6;
constexpr int64_t TILE_COLUMNS = 16;
constexpr int64_t STEP = TILE_COLUMNS * PAIR;

// Brings pairs from `begin` to `end` of a column into its panel, with zeros behind its end.
inline void pack_column(
    const int8_t* column, int64_t depth, int64_t begin, int64_t end, int8_t* target) {
  for (int64_t pair = begin; pair < end; ++pair) {
    const int8_t pairs[PAIR] = {
        column[pair * PAIR],
        pair * PAIR + 1 < depth ? column[pair * PAIR + 1] : static_cast<int8_t>(0)};
    std::memcpy(target + pair * STEP, pairs, PAIR);
  }
}

// Brings the first pairs of all columns of a panel into it; returns how many.
inline int64_t pack_whole(
    [[maybe_unused]] const int8_t* columns, [[maybe_unused]] int64_t depth,
    [[maybe_unused]] int8_t* panel) {
#if defined(__AVX2__)
  constexpr int64_t side = 8; // pairs in a register
  const int64_t whole = depth / (side * PAIR) * side;
  for (int64_t pair = 0; pair < whole; pair += side) {
    for (int64_t half = 0; half < TILE_COLUMNS; half += side) {
      __m128i rows[side];
      __m128i mixed[side];
      for (int64_t i = 0; i < side; ++i) {
        std::memcpy(rows + i, columns + (half + i) * depth + pair * PAIR, sizeof(__m128i));
      }
      for (int64_t i = 0; i < side / 2; ++i) {
        mixed[2 * i] = _mm_unpacklo_epi16(rows[i], rows[i + 4]);
        mixed[2 * i + 1] = _mm_unpackhi_epi16(rows[i], rows[i + 4]);
      }
      for (int64_t i = 0; i < side / 2; ++i) {
        rows[2 * i] = _mm_unpacklo_epi16(mixed[i], mixed[i + 4]);
        rows[2 * i + 1] = _mm_unpackhi_epi16(mixed[i], mixed[i + 4]);
      }
      for (int64_t i = 0; i < side / 2; ++i) {
        mixed[2 * i] = _mm_unpacklo_epi16(rows[i], rows[i + 4]);
        mixed[2 * i + 1] = _mm_unpackhi_epi16(rows[i], rows[i + 4]);
      }
      for (int64_t i = 0; i < side; ++i) {
        std::memcpy(panel + (pair + i) * STEP + half * PAIR, mixed + i, sizeof(__m128i));
      }
    }
  }
  return whole;
#else
  return 0;
#endif
}

// Brings a weight, (columns, depth), into panels of TILE_COLUMNS columns: pair after pair of all.
// What is missing at the end of a column or a panel becomes zero.
inline Buffer<int8_t> pack_pairs(const int8_t* weight, int64_t columns, int64_t depth) {
  const int64_t pairs = divide_up(depth, PAIR);
  const int64_t panels = divide_up(columns, TILE_COLUMNS);
  Buffer<int8_t> packed = allocate<int8_t>(panels * pairs * STEP);
  at::parallel_for(0, panels, 1 + 32768 / (pairs * STEP), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      int8_t* target = packed.get() + panel * pairs * STEP;
      const int64_t first = panel * TILE_COLUMNS;
      const int64_t count = std::min(TILE_COLUMNS, columns - first);
      if (count < TILE_COLUMNS) {
        std::memset(target, 0, pairs * STEP);
      }
      const int64_t done =
          count == TILE_COLUMNS ? pack_whole(weight + first * depth, depth, target) : 0;
      for (int64_t i = 0; i < count; ++i) {
        pack_column(weight + (first + i) * depth, depth, done, pairs, target + i * PAIR);
      }
    }
  });
  return packed;
}

#if defined(__AVX2__)

// Sets the sums of COUNT rows and a panel: (COUNT, TILE_COLUMNS).
template <int64_t COUNT>
void multiply_tile(
    const int16_t* const* rows, const Taps& taps, const int8_t* panel, int32_t* sums) {
  __m256i left[COUNT];
  __m256i right[COUNT];
  for (int64_t i = 0; i < COUNT; ++i) {
    left[i] = right[i] = _mm256_setzero_si256();
  }
  for (int64_t tap = 0; tap < taps.count; ++tap) {
    const int16_t* numbers[COUNT];
    for (int64_t i = 0; i < COUNT; ++i) {
      numbers[i] = rows[i] + taps.starts[tap];
    }
    for (int64_t term = 0; term < taps.terms; term += PAIR, panel += STEP) {
      const __m128i* codes = reinterpret_cast<const __m128i*>(panel);
      const __m256i first = _mm256_cvtepi8_epi16(_mm_load_si128(codes));
      const __m256i last = _mm256_cvtepi8_epi16(_mm_load_si128(codes + 1));
#pragma GCC unroll 6
      for (int64_t i = 0; i < COUNT; ++i) {
        int32_t bits;
        std::memcpy(&bits, numbers[i] + term, sizeof(bits));
        const __m256i pair = _mm256_set1_epi32(bits);
        left[i] = _mm256_add_epi32(left[i], _mm256_madd_epi16(pair, first));
        right[i] = _mm256_add_epi32(right[i], _mm256_madd_epi16(pair, last));
      }
    }
  }
  for (int64_t i = 0; i < COUNT; ++i) {
    __m256i* target = reinterpret_cast<__m256i*>(sums + i * TILE_COLUMNS);
    _mm256_storeu_si256(target, left[i]);
    _mm256_storeu_si256(target + 1, right[i]);
  }
}

#else

template <int64_t COUNT>
void multiply_tile(
    const int16_t* const* rows, const Taps& taps, const int8_t* panel, int32_t* sums) {
  std::fill_n(sums, COUNT * TILE_COLUMNS, 0);
  for (int64_t tap = 0; tap < taps.count; ++tap) {
    for (int64_t term = 0; term < taps.terms; ++term) {
      const int8_t* codes = panel + term / PAIR * PAIR * TILE_COLUMNS + term % PAIR;
      for (int64_t i = 0; i < COUNT; ++i) {
        for (int64_t j = 0; j < TILE_COLUMNS; ++j) {
          sums[i * TILE_COLUMNS + j] += rows[i][taps.starts[tap] + term] * codes[j * PAIR];
        }
      }
    }
    panel += taps.terms * TILE_COLUMNS;
  }
}

#endif

} // namespace pairs

struct Pairs {
  using Number = int16_t;
  using Sum = int32_t;
  static constexpr int64_t UNIT = pairs::PAIR;
  static constexpr int64_t TILE_ROWS = pairs::TILE_ROWS;
  static constexpr int64_t TILE_COLUMNS = pairs::TILE_COLUMNS;

  struct Setting {};

  struct Packed {
    Buffer<int8_t> panels;
    int64_t size; // of a panel
  };

  // Whether these products are faster than those of floats here. AVX-512 has wider instructions for
  // floats, and mostly some for 8 bits.
  static bool is_fast() {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return true;
#else
    return false;
#endif
  }

  static Number number(uint8_t code, int32_t zero_point) {
    return static_cast<Number>(code - zero_point);
  }

  static Packed pack(const int8_t* weight, int64_t columns, int64_t depth, int32_t) {
    return {
        pairs::pack_pairs(weight, columns, depth), round_up(depth, UNIT) * TILE_COLUMNS};
  }

  static void multiply(
      int64_t count, const Number* const* rows, const Taps& taps, const Packed& packed,
      int64_t panel, int32_t* sums) {
    const int8_t* codes = packed.panels.get() + panel * packed.size;
    switch (count) {
      case 1: return pairs::multiply_tile<1>(rows, taps, codes, sums);
      case 2: return pairs::multiply_tile<2>(rows, taps, codes, sums);
      case 3: return pairs::multiply_tile<3>(rows, taps, codes, sums);
      case 4: return pairs::multiply_tile<4>(rows, taps, codes, sums);
      case 5: return pairs::multiply_tile<5>(rows, taps, codes, sums);
      default: return pairs::multiply_tile<TILE_ROWS>(rows, taps, codes, sums);
    }
  }
};

} // namespace native
