// The kernel of processors with AVX-512 VNNI but without AMX. The codes stay as they are: what the zero
// point adds to the sums of a column is the same for all rows, and is taken off before they begin.
#pragma once

#include "bytes.h"
#include "dot_products.h"

namespace native {

struct Quads {
  using Number = uint8_t;
  using Sum = int32_t;
  static constexpr int64_t UNIT = native::UNIT;
  static constexpr int64_t TILE_ROWS = DOT_ROWS;
  static constexpr int64_t TILE_COLUMNS = PANEL;

  struct Setting {};

  struct Packed {
    PackedBytes weight;
    Buffer<int32_t> before; // what the sums of each column begin with
    int64_t columns;
  };

  static bool is_fast() {
    return has_dot_products_of_bytes();
  }

  static Number number(uint8_t code, int32_t) {
    return code;
  }

  static Packed pack(const int8_t* weight, int64_t columns, int64_t depth, int32_t zero_point) {
    const int64_t width = round_up(columns, PANEL);
    Packed packed{pack_bytes(weight, columns, depth), allocate<int32_t>(width), columns};
    for (int64_t i = 0; i < width; ++i) {
      // Unsigned, so that what two sums exceed 32 bits by cancels.
      const uint32_t shift = static_cast<uint32_t>(zero_point) * packed.weight.row_sums[i];
      packed.before[i] = static_cast<int32_t>(0u - shift);
    }
    return packed;
  }

  static void multiply(
      int64_t count, const Number* const* rows, const Taps& taps, const Packed& packed,
      int64_t panel, int32_t* sums) {
    const int64_t first = panel * PANEL;
    multiply_dots<DotBytes>(
        count, rows, taps, packed.weight.panel(panel), packed.columns - first,
        packed.before.get() + first, 0, sums);
  }
};

} // namespace native
