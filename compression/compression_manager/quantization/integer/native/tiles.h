// The kernel of processors with AMX: sums of 16 rows and 64 columns in tiles, four of whose terms
// one instruction multiplies in each of 16 places.
//
// Rows that lie evenly in memory, as those of a matrix and the places of a line of an image, are read where
// they are, others side by side.
#pragma once

#include "quads.h"

#include <ATen/cpu/Utils.h>

// Older compilers of GNU do not know these instructions.
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define HAS_TILES
#include <immintrin.h>
#endif

namespace native {

struct Tiles {
  using Number = uint8_t;
  using Sum = int32_t;
  using Packed = Quads::Packed;
  static constexpr int64_t UNIT = native::UNIT;
  static constexpr int64_t TILE_ROWS = TILE;
  static constexpr int64_t TILE_COLUMNS = PANEL;

  static bool is_fast();

  static Number number(uint8_t code, int32_t zero_point) {
    return Quads::number(code, zero_point);
  }

  static Packed pack(const int8_t* weight, int64_t columns, int64_t depth, int32_t zero_point) {
    return Quads::pack(weight, columns, depth, zero_point);
  }

  static void multiply(
      int64_t count, const Number* const* rows, const Taps& taps, const Packed& packed,
      int64_t panel, int32_t* sums);

  // While there is one, the thread's tiles have the shapes that `multiply` needs.
  class Setting;
};

#if defined(HAS_TILES)

namespace tiles {

#define TILES __attribute__((target("amx-tile,amx-int8,amx-bf16")))

// Of the eight tiles: each has TILE rows of 64 bytes.
struct alignas(64) Shapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE};
};

TILES inline void begin() {
  // Not a variable: compilers do not know that its last bytes are read.
  static const Shapes shapes;
  _tile_loadconfig(&shapes);
}

TILES inline void end() {
  _tile_release();
}

// Bytes of a row of a tile.
constexpr int64_t LINE = 64;

// Returns how many bytes the rows of a tile lie apart; 0 if that differs, or if there are fewer.
template <typename Number>
int64_t distance(int64_t count, const Number* const* rows) {
  if (count < TILE) {
    return 0;
  }
  const int64_t step = rows[1] - rows[0];
  for (int64_t i = 2; i < TILE; ++i) {
    if (rows[i] - rows[i - 1] != step) {
      return 0;
    }
  }
  return step * static_cast<int64_t>(sizeof(Number));
}

// Copies `terms` numbers of each row, with zeros behind them and in rows that there are not.
template <typename Number>
void gather(
    int64_t count, const Number* const* rows, int64_t start, int64_t terms, Number* target) {
  constexpr int64_t whole = LINE / sizeof(Number);
  const auto keep_order = [&] {
    // GNU's compiler does not know that tiles are loaded from memory: neither may what is written
    // here wait until after the load that follows, nor come before the last one.
    asm volatile("" : : "r"(target) : "memory");
  };
  keep_order();
  if (count < TILE || terms < whole) {
    std::memset(target, 0, TILE * LINE);
  }
  for (int64_t i = 0; i < count; ++i) {
    // A size that the compiler knows is copied by one instruction.
    if (terms == whole) {
      std::memcpy(target + i * whole, rows[i] + start, LINE);
    } else {
      std::memcpy(target + i * whole, rows[i] + start, terms * sizeof(Number));
    }
  }
  keep_order();
}

// Sets the sums of up to TILE rows and the first WIDTH tiles of a panel's columns.
template <int64_t WIDTH>
TILES void multiply(
    int64_t count, const uint8_t* const* rows, const Taps& taps, const int8_t* panel,
    const int32_t* before, int32_t* sums) {
  constexpr int64_t line = PANEL * UNIT;
  alignas(64) uint8_t space[TILE * AMX_TERMS];
  const int64_t step = distance(count, rows);
  // Every row begins with the same.
  _tile_loadd(0, before, 0);
  if constexpr (WIDTH > 1) {
    _tile_loadd(1, before + TILE, 0);
  }
  if constexpr (WIDTH > 2) {
    _tile_loadd(2, before + 2 * TILE, 0);
    _tile_loadd(3, before + 3 * TILE, 0);
  }
  for (int64_t tap = 0; tap < taps.count; ++tap) {
    for (int64_t term = 0; term < taps.terms; term += AMX_TERMS) {
      const int64_t start = taps.starts[tap] + term;
      const int64_t bytes = std::min(AMX_TERMS, taps.terms - term);
      if (step != 0 && bytes == AMX_TERMS) {
        _tile_loadd(4, rows[0] + start, step);
      } else {
        gather(count, rows, start, bytes, space);
        _tile_loadd(4, space, AMX_TERMS);
      }
      _tile_loadd(5, panel, line);
      _tile_dpbusd(0, 4, 5);
      if constexpr (WIDTH > 1) {
        _tile_loadd(6, panel + TILE * UNIT, line);
        _tile_dpbusd(1, 4, 6);
      }
      if constexpr (WIDTH > 2) {
        _tile_loadd(7, panel + 2 * TILE * UNIT, line);
        _tile_dpbusd(2, 4, 7);
        _tile_loadd(5, panel + 3 * TILE * UNIT, line);
        _tile_dpbusd(3, 4, 5);
      }
      panel += bytes * PANEL;
    }
  }
  constexpr int64_t row = PANEL * sizeof(int32_t);
  _tile_stored(0, sums, row);
  if constexpr (WIDTH > 1) {
    _tile_stored(1, sums + TILE, row);
  }
  if constexpr (WIDTH > 2) {
    _tile_stored(2, sums + 2 * TILE, row);
    _tile_stored(3, sums + 3 * TILE, row);
  }
}

} // namespace tiles

inline bool Tiles::is_fast() {
  static const bool there = at::cpu::init_amx();
  return there;
}

inline void Tiles::multiply(
    int64_t count, const Number* const* rows, const Taps& taps, const Packed& packed, int64_t panel,
    int32_t* sums) {
  const int64_t first = panel * PANEL;
  const int64_t columns = packed.columns - first;
  const auto multiply = columns > 2 * TILE ? tiles::multiply<4>
      : columns > TILE                     ? tiles::multiply<2>
                                           : tiles::multiply<1>;
  multiply(count, rows, taps, packed.weight.panel(panel), packed.before.get() + first, sums);
}

class Tiles::Setting {
 public:
  Setting() {
    tiles::begin();
  }
  ~Setting() {
    tiles::end();
  }
  Setting(const Setting&) = delete;
  Setting& operator=(const Setting&) = delete;
};

#else

inline bool Tiles::is_fast() {
  return false;
}

inline void Tiles::multiply(
    int64_t, const Number* const*, const Taps&, const Packed&, int64_t, int32_t*) {
  throw std::logic_error("compiled without AMX");
}

class Tiles::Setting {};

#endif

} // namespace native
