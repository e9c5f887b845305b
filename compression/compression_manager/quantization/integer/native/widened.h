// Products of 8-bit integers on processors without instructions for them: exact sums in 32 bits of
// products of 16 bits, of which AVX2 multiplies twice as many at a time as of floats.
//
// The codes are widened to 16 bits, less the zero point, so that zeros stand for real zeros. A row of
// the product is the sum over a few runs of such numbers ("taps"): a row of a matrix is one run, and
// a place of an image has one for each row of the convolution's kernel.
#pragma once

#include "panels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <vector>

namespace native {

// Rows and columns of the product that are computed at a time, as many as registers hold.
constexpr int64_t TILE_ROWS = 6;
constexpr int64_t TILE_COLUMNS = 16;
// Terms of a column that lie side by side, because one instruction multiplies and adds them.
constexpr int64_t PAIR = 2;
// Rows of which the widened codes stay in a cache while all columns go by.
constexpr int64_t MOST_BLOCK_ROWS = 48;

// Whether these products are faster than those of floats here. AVX-512 has wider instructions for
// floats, and mostly some for 8 bits, which torch uses.
inline bool widened_is_fast() {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return true;
#else
  return false;
#endif
}

// Where the numbers of one row of the product lie, from its first one on.
struct Taps {
  std::vector<int64_t> starts;
  int64_t terms; // of a tap, a multiple of PAIR

  int64_t depth() const {
    return static_cast<int64_t>(starts.size()) * terms;
  }
};

// What becomes of the sums. Each is rounded to float32, multiplied by the column's scale, and added
// to its bias, if there is one.
struct Output {
  const float* scale; // (columns)
  const float* bias; // (columns), or null
  int64_t rows;
  int64_t columns;
  int64_t stride; // from a column to the next
};

// A block of rows: where their numbers lie, and where their values go.
struct Rows {
  const int16_t* numbers[MOST_BLOCK_ROWS];
  float* values[MOST_BLOCK_ROWS];
};

inline void widen(const uint8_t* codes, int64_t count, int16_t zero_point, int16_t* numbers) {
  for (int64_t i = 0; i < count; ++i) {
    numbers[i] = static_cast<int16_t>(codes[i] - zero_point);
  }
}

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
  for (const int64_t start : taps.starts) {
    const int16_t* numbers[COUNT];
    for (int64_t i = 0; i < COUNT; ++i) {
      numbers[i] = rows[i] + start;
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
  for (const int64_t start : taps.starts) {
    for (int64_t term = 0; term < taps.terms; ++term) {
      const int8_t* codes = panel + term / PAIR * PAIR * TILE_COLUMNS + term % PAIR;
      for (int64_t i = 0; i < COUNT; ++i) {
        for (int64_t j = 0; j < TILE_COLUMNS; ++j) {
          sums[i * TILE_COLUMNS + j] += rows[i][start + term] * codes[j * PAIR];
        }
      }
    }
    panel += taps.terms * TILE_COLUMNS;
  }
}

#endif

// Sets the sums of `count` rows, up to TILE_ROWS.
inline void multiply_some(
    int64_t count, const int16_t* const* rows, const Taps& taps, const int8_t* panel,
    int32_t* sums) {
  switch (count) {
    case 1: return multiply_tile<1>(rows, taps, panel, sums);
    case 2: return multiply_tile<2>(rows, taps, panel, sums);
    case 3: return multiply_tile<3>(rows, taps, panel, sums);
    case 4: return multiply_tile<4>(rows, taps, panel, sums);
    case 5: return multiply_tile<5>(rows, taps, panel, sums);
    default: return multiply_tile<TILE_ROWS>(rows, taps, panel, sums);
  }
}

inline void write_row(
    const int32_t* __restrict sums, const float* __restrict scale, const float* __restrict bias,
    int64_t width, float* __restrict values) {
  if (bias == nullptr) {
    for (int64_t i = 0; i < width; ++i) {
      values[i] = static_cast<float>(sums[i]) * scale[i];
    }
  } else {
    for (int64_t i = 0; i < width; ++i) {
      values[i] = static_cast<float>(sums[i]) * scale[i] + bias[i];
    }
  }
}

// Writes `count` rows of a panel whose sums are known; one after the other where the values of a row
// lie together, else one column after the other.
inline void write_panel(
    const Output& output, const Rows& rows, int64_t count, int64_t column, const int32_t* sums) {
  const int64_t width = std::min(TILE_COLUMNS, output.columns - column);
  const float* scale = output.scale + column;
  const float* bias = output.bias == nullptr ? nullptr : output.bias + column;
  const bool together = output.stride == 1;
  float values[MOST_BLOCK_ROWS * TILE_COLUMNS];
  for (int64_t i = 0; i < count; ++i) {
    float* target = together ? rows.values[i] + column : values + i * TILE_COLUMNS;
    write_row(sums + i * TILE_COLUMNS, scale, bias, width, target);
  }
  for (int64_t j = 0; !together && j < width; ++j) {
    for (int64_t i = 0; i < count; ++i) {
      rows.values[i][(column + j) * output.stride] = values[i * TILE_COLUMNS + j];
    }
  }
}

// Computes the output. `make_reader(block)` returns what a thread calls to read up to `block` rows,
// as `read(row, count, rows)`: the numbers stay until its next call.
template <typename MakeReader>
void multiply_widened(
    const Output& output, const Taps& taps, const int8_t* packed, const MakeReader& make_reader) {
  const int64_t threads = at::get_num_threads();
  const int64_t panel_size = taps.depth() * TILE_COLUMNS;
  const int64_t panels = divide_up(output.columns, TILE_COLUMNS);
  // Blocks of equal size, as many for each thread; where rows are few, threads share the columns.
  const int64_t least = divide_up(output.rows, MOST_BLOCK_ROWS);
  const int64_t share = divide_up(output.rows, round_up(least, threads));
  const int64_t block = round_up(share, TILE_ROWS);
  const int64_t blocks = divide_up(output.rows, block);
  const int64_t parts = std::min(panels, divide_up(threads, blocks));
  at::parallel_for(0, blocks * parts, 1, [&](int64_t begin, int64_t end) {
    auto read = make_reader(block);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = index / parts * block;
      const int64_t count = std::min(block, output.rows - row);
      Rows rows;
      read(row, count, rows);
      const int64_t part = index % parts;
      for (int64_t panel = part * panels / parts; panel < (part + 1) * panels / parts; ++panel) {
        int32_t sums[MOST_BLOCK_ROWS * TILE_COLUMNS];
        for (int64_t i = 0; i < count; i += TILE_ROWS) {
          multiply_some(
              std::min(TILE_ROWS, count - i), rows.numbers + i, taps, packed + panel * panel_size,
              sums + i * TILE_COLUMNS);
        }
        write_panel(output, rows, count, panel * TILE_COLUMNS, sums);
      }
    }
  });
}

} // namespace native
