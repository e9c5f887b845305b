// The kernels of bfloat16 numbers on processors with AMX: sums of 32 rows and 32 columns in four
// tiles, so that each tile that is loaded is multiplied twice.
#pragma once

#include "pieces.h"
#include "tiles.h"

namespace native {

// Terms in 32 bits.
constexpr int64_t PAIR = 2;
// Of a tile, 32 bits each.
constexpr int64_t TILE_SIZE = TILE * TILE;

// Returns where a column of a row is in a panel of PANEL columns. TILE rows of all of them come
// before the next rows, tile by tile, because a tile that lies together is loaded faster.
inline int64_t place_of(int64_t column, int64_t row) {
  return row / TILE * TILE * PANEL + column / TILE * TILE_SIZE + row % TILE * TILE + column % TILE;
}

// A weight in panels of pairs; zeros where nothing was written.
struct PackedPairs {
  PackedPairs() = default;
  PackedPairs(int64_t its_columns, int64_t its_depth)
      : panels(allocate_filled<uint32_t>(round_up(its_columns, PANEL) * its_depth / PAIR, 0)),
        columns(its_columns),
        depth(its_depth) {}

  const uint32_t* panel(int64_t index) const {
    return panels.get() + index * PANEL * depth / PAIR;
  }

  uint32_t* row(int64_t column, int64_t row) {
    return panels.get() + column / PANEL * PANEL * depth / PAIR + place_of(column % PANEL, row);
  }

  Buffer<uint32_t> panels;
  int64_t columns = 0;
  int64_t depth = 0; // each run of terms is rounded up to a multiple of TERMS
};

struct FloatTiles {
  using Number = uint16_t;
  using Sum = float;
  using Packed = PackedPairs;
  using Setting = Tiles::Setting;
  static constexpr int64_t TILE_ROWS = 2 * TILE;
  static constexpr int64_t TILE_COLUMNS = PANEL;

  static bool is_fast() {
    return Tiles::is_fast() && cpublas::could_pack(at::kBFloat16);
  }

  static void multiply(
      int64_t count, const Number* const* rows, const Taps& taps, const Packed& packed,
      int64_t panel, float* sums);

  // Adds to the sums of one or two tiles of rows and a panel, which lie as in `place_of`, the
  // product of `length` tiles of each row, which follow one another, and as many of the panel.
  static void add(
      int64_t height, int64_t columns, int64_t length, const Number* left, int64_t distance,
      const uint32_t* panel, float* sums);
};

#if defined(HAS_TILES)

namespace tiles {

// Where a tile is loaded from.
struct Place {
  const void* first;
  int64_t line; // bytes to the next row
};

// Returns where terms of rows are that lie `step` bytes apart; gathers them in `space` if need be.
// That is slow: what was just written can be loaded as a tile only when all before is done.
inline Place find_rows(
    int64_t count, const uint16_t* const* rows, int64_t step, int64_t start, int64_t terms,
    uint16_t* space) {
  if (step != 0 && terms == TERMS) {
    return {rows[0] + start, step};
  }
  gather(count, rows, start, terms, space);
  return {space, LINE};
}

// Sets the sums of up to HEIGHT tiles of rows and WIDTH tiles of a panel's columns.
template <int64_t HEIGHT, int64_t WIDTH>
TILES void multiply_floats(
    int64_t count, const uint16_t* const* rows, const Taps& taps, const uint32_t* panel,
    float* sums) {
  alignas(64) uint16_t upper[TILE * TERMS];
  alignas(64) uint16_t lower[TILE * TERMS];
  const int64_t upper_step = distance(count, rows);
  const int64_t lower_step = HEIGHT > 1 ? distance(count - TILE, rows + TILE) : 0;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t tap = 0; tap < taps.count; ++tap) {
    for (int64_t term = 0; term < taps.terms; term += TERMS, panel += TILE * PANEL) {
      const int64_t start = taps.starts[tap] + term;
      const int64_t terms = std::min(TERMS, taps.terms - term);
      const Place above = find_rows(std::min(TILE, count), rows, upper_step, start, terms, upper);
      _tile_loadd(4, above.first, above.line);
      _tile_loadd(6, panel, LINE);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (WIDTH > 1) {
        _tile_loadd(7, panel + TILE_SIZE, LINE);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (HEIGHT > 1) {
        const Place below =
            find_rows(count - TILE, rows + TILE, lower_step, start, terms, lower);
        _tile_loadd(5, below.first, below.line);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (WIDTH > 1) {
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
  }
  constexpr int64_t row = PANEL * sizeof(float);
  _tile_stored(0, sums, row);
  if constexpr (WIDTH > 1) {
    _tile_stored(1, sums + TILE, row);
  }
  if constexpr (HEIGHT > 1) {
    _tile_stored(2, sums + TILE * PANEL, row);
    if constexpr (WIDTH > 1) {
      _tile_stored(3, sums + TILE * PANEL + TILE, row);
    }
  }
}

// Does what `FloatTiles::add` does with HEIGHT tiles of rows and WIDTH of columns.
template <int64_t HEIGHT, int64_t WIDTH>
TILES void add_floats(
    int64_t length, const uint16_t* left, int64_t distance, const uint32_t* panel, float* sums) {
  constexpr int64_t below = TILE * PANEL;
  _tile_loadd(0, sums, LINE);
  if constexpr (WIDTH > 1) {
    _tile_loadd(1, sums + TILE_SIZE, LINE);
  }
  if constexpr (HEIGHT > 1) {
    _tile_loadd(2, sums + below, LINE);
    if constexpr (WIDTH > 1) {
      _tile_loadd(3, sums + below + TILE_SIZE, LINE);
    }
  }
  for (int64_t i = 0; i < length; ++i, left += TILE * TERMS, panel += TILE * PANEL) {
    _tile_loadd(4, left, LINE);
    _tile_loadd(6, panel, LINE);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (WIDTH > 1) {
      _tile_loadd(7, panel + TILE_SIZE, LINE);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (HEIGHT > 1) {
      _tile_loadd(5, left + distance, LINE);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (WIDTH > 1) {
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums, LINE);
  if constexpr (WIDTH > 1) {
    _tile_stored(1, sums + TILE_SIZE, LINE);
  }
  if constexpr (HEIGHT > 1) {
    _tile_stored(2, sums + below, LINE);
    if constexpr (WIDTH > 1) {
      _tile_stored(3, sums + below + TILE_SIZE, LINE);
    }
  }
}

} // namespace tiles

inline void FloatTiles::multiply(
    int64_t count, const Number* const* rows, const Taps& taps, const Packed& packed, int64_t panel,
    float* sums) {
  const int64_t columns = std::min(PANEL, packed.columns - panel * PANEL);
  for (int64_t column = 0; column < columns; column += 2 * TILE) {
    const bool wide = columns - column > TILE;
    const auto multiply = count > TILE
        ? (wide ? tiles::multiply_floats<2, 2> : tiles::multiply_floats<2, 1>)
        : (wide ? tiles::multiply_floats<1, 2> : tiles::multiply_floats<1, 1>);
    multiply(count, rows, taps, packed.panel(panel) + place_of(column, 0), sums + column);
  }
}

inline void FloatTiles::add(
    int64_t height, int64_t columns, int64_t length, const Number* left, int64_t distance,
    const uint32_t* panel, float* sums) {
  // GNU's compiler does not know that tiles are loaded from memory.
  asm volatile("" : : "r"(panel) : "memory");
  for (int64_t column = 0; column < columns; column += 2 * TILE) {
    const bool wide = columns - column > TILE;
    const auto add = height > 1 ? (wide ? tiles::add_floats<2, 2> : tiles::add_floats<2, 1>)
                                : (wide ? tiles::add_floats<1, 2> : tiles::add_floats<1, 1>);
    add(length, left, distance, panel + place_of(column, 0), sums + place_of(column, 0));
  }
}

#else

inline void FloatTiles::multiply(
    int64_t, const Number* const*, const Taps&, const Packed&, int64_t, float*) {
  throw std::logic_error("compiled without AMX");
}

inline void FloatTiles::add(
    int64_t, int64_t, int64_t, const Number*, int64_t, const uint32_t*, float*) {
  throw std::logic_error("compiled without AMX");
}

#endif

} // namespace native
