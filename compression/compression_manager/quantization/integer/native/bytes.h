// A weight of 8-bit integers in panels of 64 columns, in which the four terms that one instruction of
// AMX or VNNI multiplies lie side by side.
#pragma once

#include "panels.h"

namespace native {

// AMX takes so many terms at a time; those that are missing at the end of a column are anything.
constexpr int64_t AMX_TERMS = 64;
// Terms in 32 bits.
constexpr int64_t UNIT = 4;

struct PackedBytes {
  Buffer<int8_t> panels; // each of depth / UNIT rows of PANEL units
  Buffer<uint32_t> row_sums; // of the weight, modulo 2^32; as many as the panels have columns
  int64_t depth; // a multiple of AMX_TERMS

  const int8_t* panel(int64_t index) const {
    return panels.get() + index * PANEL * depth;
  }
};

// Packs TILE rows of the weight, which are columns of the product, into a part of a panel.
inline void pack_tile(
    const int8_t* weight, int64_t columns, int64_t depth, int64_t column, int8_t* panel) {
  const int64_t count = std::clamp<int64_t>(columns - column, 0, TILE);
  alignas(64) float source[TILE * TILE] = {};
  alignas(64) float target[TILE * TILE];
  for (int64_t k = 0; k < depth; k += AMX_TERMS, panel += AMX_TERMS * PANEL) {
    const int64_t bytes = std::min(AMX_TERMS, depth - k);
    for (int64_t i = 0; i < count; ++i) {
      const int8_t* row = weight + (column + i) * depth + k;
      // A size that the compiler knows is copied by one instruction.
      if (bytes == AMX_TERMS) {
        std::memcpy(source + i * TILE, row, AMX_TERMS);
      } else {
        std::memcpy(source + i * TILE, row, bytes);
      }
    }
    transpose_tile(source, TILE, target, TILE);
    for (int64_t unit = 0; unit < AMX_TERMS / UNIT; ++unit) {
      std::memcpy(panel + unit * PANEL * UNIT, target + unit * TILE, TILE * UNIT);
    }
  }
}

inline uint32_t sum_row(const int8_t* row, int64_t count) {
  int32_t total = 0;
  for (int64_t k = 0; k < count; ++k) {
    total += row[k];
  }
  return static_cast<uint32_t>(total);
}

inline PackedBytes pack_bytes(const int8_t* weight, int64_t columns, int64_t depth) {
  const int64_t width = round_up(columns, PANEL);
  const int64_t height = round_up(depth, AMX_TERMS);
  // AMX reads as many terms as it can, beyond the end as well.
  PackedBytes packed{
      allocate<int8_t>(width * height + PANEL * AMX_TERMS), allocate<uint32_t>(width), height};
  at::parallel_for(0, width / TILE, 1, [&](int64_t first, int64_t last) {
    for (int64_t column = first * TILE; column < last * TILE; column += TILE) {
      const int64_t panel = column / PANEL * PANEL;
      pack_tile(
          weight, columns, depth, column,
          packed.panels.get() + panel * height + (column - panel) * UNIT);
      for (int64_t i = column; i < column + TILE; ++i) {
        packed.row_sums[i] =
            i < columns ? sum_row(weight + i * depth, depth) : 0;
      }
    }
  });
  return packed;
}

} // namespace native
