// The left factor of a bfloat16 product, block by block in bfloat16: rounded, or as three pieces
// whose sum it is.
#pragma once

#include "panels.h"

namespace native {

// Terms that one call of a kernel sums up.
constexpr int64_t DEPTH = 512;
// The instructions take 32 terms at a time; what is missing at the end is filled with zeros.
constexpr int64_t TERMS = 32;
static_assert(DEPTH % TERMS == 0);

// Of a float32 factor and one of integers.
struct Product {
  const float* left; // (rows, depth), or (depth, rows) if transposed
  bool transposed;
  const float* scale; // (depth), of the columns of a left factor that is not transposed; or null
  float factor; // of the result
  int64_t rows;
  int64_t columns;
  int64_t depth;
  float* output; // (rows, columns)

  int64_t padded_depth() const {
    return round_up(depth, TERMS);
  }
};

// Integers of up to eight bits, also less a zero point, have no more than the upper half of a
// float32, a bfloat16.
inline uint32_t pair(int32_t even, int32_t odd) {
  return to_bits(static_cast<float>(even)) >> 16 | to_bits(static_cast<float>(odd));
}

// Writes a row as `Pieces` rows of bfloat16, `stride` apart, whose sum it is.
template <int Pieces>
inline void split_row(const float* row, int64_t count, uint16_t* pieces, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = to_bits(row[i]);
    if (Pieces == 1) {
      pieces[i] = round_to_bfloat16(row[i]);
      continue;
    }
    // Cut off, not rounded, so that the largest floats do not become infinite. Eight digits at a
    // time, three pieces hold all 24. An infinity has no rest, where inf - inf would be NaN.
    const float first = to_float(bits & 0xffff0000u);
    const float rest = first == row[i] ? 0.0f : row[i] - first;
    const float second = to_float(to_bits(rest) & 0xffff0000u);
    const float third = rest - second;
    pieces[i] = static_cast<uint16_t>(bits >> 16);
    pieces[i + stride] = static_cast<uint16_t>(to_bits(rest) >> 16);
    pieces[i + 2 * stride] = static_cast<uint16_t>(to_bits(third) >> 16);
  }
}

// Writes the pieces of `count` rows, of which `length` terms are there and `padded` wanted.
template <int Pieces>
inline void convert_rows(
    const Product& product, int64_t row, int64_t count, int64_t k, int64_t length, int64_t padded,
    uint16_t* pieces) {
  const int64_t stride = count * DEPTH;
  alignas(64) float scaled[DEPTH];
  for (int64_t i = 0; i < count; ++i, pieces += DEPTH) {
    const float* source = product.left + (row + i) * product.depth + k;
    if (product.scale != nullptr) {
      for (int64_t j = 0; j < length; ++j) {
        scaled[j] = source[j] * product.scale[k + j];
      }
      source = scaled;
    }
    split_row<Pieces>(source, length, pieces, stride);
    for (int64_t piece = 0; piece < Pieces; ++piece) {
      std::fill(pieces + piece * stride + length, pieces + piece * stride + padded, 0);
    }
  }
}

// Writes left[k.., row..] as TILE rows of TERMS terms; what is not there is 0.
inline void transpose(
    const Product& product, int64_t row, int64_t count, int64_t k, int64_t length, float* rows) {
  const float* source = product.left + k * product.rows + row;
  if (count == TILE && length == TERMS) {
    for (int64_t done = 0; done < TERMS; done += TILE) {
      transpose_tile(source + done * product.rows, product.rows, rows + done, TERMS);
    }
    return;
  }
  std::fill_n(rows, TILE * TERMS, 0.0f);
  for (int64_t j = 0; j < length; ++j) {
    for (int64_t i = 0; i < count; ++i) {
      rows[i * TERMS + j] = source[j * product.rows + i];
    }
  }
}

// Does what `convert_rows` does with columns. All of a block's columns are taken before the next
// terms, because what lies side by side is fast to read, and what lies far apart is not.
template <int Pieces>
inline void convert_columns(
    const Product& product, int64_t row, int64_t count, int64_t k, int64_t length, int64_t padded,
    uint16_t* pieces) {
  alignas(64) float rows[TILE * TERMS];
  for (int64_t done = 0; done < padded; done += TERMS) {
    for (int64_t first = 0; first < count; first += TILE) {
      const int64_t tile = std::min(TILE, count - first);
      transpose(product, row + first, tile, k + done, std::min(TERMS, length - done), rows);
      for (int64_t i = 0; i < tile; ++i) {
        split_row<Pieces>(
            rows + i * TERMS, TERMS, pieces + (first + i) * DEPTH + done, count * DEPTH);
      }
    }
  }
}

// Writes the pieces of a block, piece after piece, each of `count` rows that are DEPTH apart.
template <int Pieces>
inline void convert(const Product& product, int64_t row, int64_t count, int64_t k, uint16_t* pieces) {
  const int64_t length = std::min(DEPTH, product.depth - k);
  const int64_t padded = round_up(length, TERMS);
  if (product.transposed) {
    convert_columns<Pieces>(product, row, count, k, length, padded, pieces);
  } else {
    convert_rows<Pieces>(product, row, count, k, length, padded, pieces);
  }
}

} // namespace native
