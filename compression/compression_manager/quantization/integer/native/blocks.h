// Products whose rows lie anywhere in memory, computed block by block.
//
// What the numbers are, and how they are multiplied, is up to the type `Kernel`: Pairs, Quads or
// Tiles for integers, FloatTiles for bfloat16.
//
//   is_fast()                          whether the processor has the instructions
//   Number, number(code, zero_point)   what a code becomes, where codes are multiplied
//   Sum                                int32_t or float
//   UNIT                               terms that one instruction multiplies and adds: 32 bits
//   TILE_ROWS, TILE_COLUMNS            what is computed at a time, as much as registers hold
//   Packed, pack(...)                  a weight, (columns, depth), in the order in which it is read
//   multiply(...)                      sets the sums of a tile
//   Setting                            what a thread has while it multiplies
#pragma once

#include "panels.h"

namespace native {

// Rows of which the numbers stay in a cache while all columns go by.
constexpr int64_t MOST_BLOCK_ROWS = 48;

// What becomes of the sums. Each is rounded to float32, multiplied by the column's scale, and added
// to its bias, if there are such.
struct Output {
  const float* scale; // (columns), or null, then without a bias
  const float* bias; // (columns), or null
  int64_t rows;
  int64_t columns;
  int64_t stride; // from a column to the next
};

// A block of rows: where their numbers lie, and where their values go.
template <typename Number>
struct Rows {
  const Number* numbers[MOST_BLOCK_ROWS];
  float* values[MOST_BLOCK_ROWS];
};

template <typename Kernel>
void read_codes(
    const uint8_t* codes, int64_t count, int32_t zero_point, typename Kernel::Number* numbers) {
  for (int64_t i = 0; i < count; ++i) {
    numbers[i] = Kernel::number(codes[i], zero_point);
  }
}

template <typename Sum>
void write_row(
    const Sum* __restrict sums, const float* __restrict scale, const float* __restrict bias,
    int64_t width, float* __restrict values) {
  if (scale == nullptr) {
    for (int64_t i = 0; i < width; ++i) {
      values[i] = static_cast<float>(sums[i]);
    }
  } else if (bias == nullptr) {
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
template <int64_t WIDTH, typename Sum>
void write_panel(
    const Output& output, float* const* rows, int64_t count, int64_t column, const Sum* sums) {
  const int64_t width = std::min(WIDTH, output.columns - column);
  const float* scale = output.scale == nullptr ? nullptr : output.scale + column;
  const float* bias = output.bias == nullptr ? nullptr : output.bias + column;
  const bool together = output.stride == 1;
  float values[MOST_BLOCK_ROWS * WIDTH];
  for (int64_t i = 0; i < count; ++i) {
    float* target = together ? rows[i] + column : values + i * WIDTH;
    write_row(sums + i * WIDTH, scale, bias, width, target);
  }
  for (int64_t j = 0; !together && j < width; ++j) {
    for (int64_t i = 0; i < count; ++i) {
      rows[i][(column + j) * output.stride] = values[i * WIDTH + j];
    }
  }
}

// Computes the output. `make_reader(block)` returns what a thread calls to read up to `block` rows,
// as `read(row, count, rows)`: the numbers stay until its next call.
template <typename Kernel, typename MakeReader>
void multiply_blocks(
    const Output& output, const Taps& taps, const typename Kernel::Packed& packed,
    const MakeReader& make_reader) {
  using Sum = typename Kernel::Sum;
  constexpr int64_t height = Kernel::TILE_ROWS;
  constexpr int64_t width = Kernel::TILE_COLUMNS;
  constexpr int64_t most = MOST_BLOCK_ROWS / height * height;
  static_assert(most > 0, "a block of rows has no more than that");
  const int64_t threads = at::get_num_threads();
  const int64_t panels = divide_up(output.columns, width);
  // Blocks of equal size, as many for each thread; where rows are few, threads share the columns.
  const int64_t least = divide_up(output.rows, most);
  const int64_t share = divide_up(output.rows, round_up(least, threads));
  const int64_t block = round_up(share, height);
  const int64_t blocks = divide_up(output.rows, block);
  const int64_t parts = std::min(panels, divide_up(threads, blocks));
  at::parallel_for(0, blocks * parts, 1, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const typename Kernel::Setting setting;
    auto read = make_reader(block);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = index / parts * block;
      const int64_t count = std::min(block, output.rows - row);
      Rows<typename Kernel::Number> rows;
      read(row, count, rows);
      const int64_t part = index % parts;
      for (int64_t panel = part * panels / parts; panel < (part + 1) * panels / parts; ++panel) {
        alignas(64) Sum sums[MOST_BLOCK_ROWS * width];
        for (int64_t i = 0; i < count; i += height) {
          Kernel::multiply(
              std::min(height, count - i), rows.numbers + i, taps, packed, panel, sums + i * width);
        }
        write_panel<width>(output, rows.values, count, panel * width, sums);
      }
    }
  });
}

} // namespace native
