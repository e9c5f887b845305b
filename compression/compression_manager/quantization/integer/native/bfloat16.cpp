// Products of float32 with integers, as bfloat16 products that are summed in float32.
//
// The integers are packed once, into panels of 64 columns in which the two rows that one
// instruction multiplies lie side by side. Each thread then takes blocks of rows of the left
// factor, turns one block after the other into bfloat16 pieces, and multiplies it by all panels.
#include "common.h"

#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <string>

namespace native {
namespace {

namespace cpublas = at::native::cpublas;

// Columns of a panel: the width for which oneDNN's kernels are made.
constexpr int64_t PANEL = 64;
// Terms that one call of a kernel sums up: 64 KiB of a panel.
constexpr int64_t DEPTH = 512;
// Terms for which a block of rows is converted at a time.
constexpr int64_t SPAN = 4 * DEPTH;
// The instructions take 32 terms at a time; what is missing at the end is filled with zeros.
constexpr int64_t TERMS = 32;
// Rows that are transposed at a time, and columns.
constexpr int64_t TILE = 16;
// Bytes that the pieces of a block of rows may take: about half of a core's second-level cache.
constexpr int64_t BLOCK_BYTES = 1 << 20;
constexpr int64_t MOST_ROWS = 256;
constexpr int64_t FEWEST_ROWS = 32;

int64_t round_up(int64_t value, int64_t to) {
  return divide_up(value, to) * to;
}

struct Free {
  void operator()(void* memory) const {
    std::free(memory);
  }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

template <typename T>
Buffer<T> allocate(int64_t count) {
  void* memory = std::aligned_alloc(64, round_up(count * sizeof(T), 64));
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  return Buffer<T>(static_cast<T*>(memory));
}

struct Product {
  const float* left; // (rows, depth), or (depth, rows) if transposed
  bool transposed;
  int64_t rows;
  int64_t columns;
  int64_t depth;
  float* output; // (rows, columns)

  int64_t padded_depth() const {
    return round_up(depth, TERMS);
  }
};

// Integers of up to eight bits have no more than the upper half of a float32, a bfloat16.
inline uint32_t pair(int32_t even, int32_t odd) {
  return to_bits(static_cast<float>(even)) >> 16 | to_bits(static_cast<float>(odd));
}

// Packs rows `begin` to `end` (even) of one panel: (end - begin) / 2 rows of PANEL pairs.
template <typename Code>
void pack_rows(
    const Code* codes, const Product& product, int32_t zero_point, int64_t panel, int64_t begin,
    int64_t end, uint32_t* packed) {
  const int64_t first = panel * PANEL;
  const int64_t count = std::min(PANEL, product.columns - first);
  Code nothing[PANEL];
  std::fill_n(nothing, PANEL, static_cast<Code>(zero_point));
  const auto row = [&](int64_t k) {
    return k < product.depth ? codes + k * product.columns + first : nothing;
  };
  for (int64_t k = begin; k < end; k += 2, packed += PANEL) {
    const Code* even = row(k);
    const Code* odd = row(k + 1);
    for (int64_t i = 0; i < count; ++i) {
      packed[i] = pair(even[i] - zero_point, odd[i] - zero_point);
    }
    std::fill(packed + count, packed + PANEL, 0u);
  }
}

// Returns panel after panel, each of padded_depth() / 2 rows of PANEL pairs.
template <typename Code>
Buffer<uint32_t> pack(const Code* codes, const Product& product, int32_t zero_point) {
  const int64_t panels = divide_up(product.columns, PANEL);
  const int64_t depth = product.padded_depth();
  const int64_t parts = divide_up(depth, DEPTH);
  Buffer<uint32_t> packed = allocate<uint32_t>(panels * depth / 2 * PANEL);
  at::parallel_for(0, panels * parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      const int64_t panel = index % panels;
      const int64_t begin = index / panels * DEPTH;
      uint32_t* target = packed.get() + (panel * depth + begin) / 2 * PANEL;
      pack_rows(
          codes, product, zero_point, panel, begin, std::min(begin + DEPTH, depth), target);
    }
  });
  return packed;
}

// Writes a row as `Pieces` rows of bfloat16, `stride` apart, whose sum it is.
template <int Pieces>
void split_row(const float* row, int64_t count, uint16_t* pieces, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = to_bits(row[i]);
    if (Pieces == 1) {
      const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
      pieces[i] = static_cast<uint16_t>(row[i] == row[i] ? rounded : 0x7fc0u);
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

// Writes left[k.., row..] as `count` (up to TILE) rows of length `length`, DEPTH apart.
void transpose(
    const Product& product, int64_t row, int64_t count, int64_t k, int64_t length, float* rows) {
  const float* source = product.left + k * product.rows + row;
  int64_t done = 0;
  if (count == TILE) {
    for (; done + TILE <= length; done += TILE) {
      at::vec::transpose_mxn<float, TILE, TILE>(
          source + done * product.rows, product.rows, rows + done, DEPTH);
    }
  }
  for (; done < length; ++done) {
    for (int64_t i = 0; i < count; ++i) {
      rows[i * DEPTH + done] = source[done * product.rows + i];
    }
  }
}

// Writes the pieces of a block, piece after piece, each of `count` rows that are DEPTH apart.
template <int Pieces>
void convert(const Product& product, int64_t row, int64_t count, int64_t k, uint16_t* pieces) {
  const int64_t length = std::min(DEPTH, product.depth - k);
  const int64_t padded = round_up(length, TERMS);
  const int64_t stride = count * DEPTH;
  alignas(64) float scratch[TILE * DEPTH];
  for (int64_t first = 0; first < count; first += TILE) {
    const int64_t tile = std::min(TILE, count - first);
    const float* source = product.left + (row + first) * product.depth + k;
    int64_t distance = product.depth;
    if (product.transposed) {
      transpose(product, row + first, tile, k, length, scratch);
      source = scratch;
      distance = DEPTH;
    }
    for (int64_t i = 0; i < tile; ++i) {
      uint16_t* target = pieces + (first + i) * DEPTH;
      split_row<Pieces>(source + i * distance, length, target, stride);
      for (int64_t piece = 0; piece < Pieces; ++piece) {
        std::fill(target + piece * stride + length, target + piece * stride + padded, 0);
      }
    }
  }
}

// Adds to `output` (or sets it) the product of `rows` rows of pieces and a panel.
void multiply_panel_plainly(
    int64_t rows, int64_t columns, int64_t depth, const uint16_t* left, const uint32_t* panel,
    float* output, int64_t stride, bool add) {
  for (int64_t row = 0; row < rows; ++row, left += DEPTH, output += stride) {
    float sums[PANEL] = {};
    for (int64_t k = 0; k < depth; k += 2) {
      const float even = to_float(static_cast<uint32_t>(left[k]) << 16);
      const float odd = to_float(static_cast<uint32_t>(left[k + 1]) << 16);
      const uint32_t* pairs = panel + k / 2 * PANEL;
      for (int64_t i = 0; i < PANEL; ++i) {
        sums[i] += even * to_float(pairs[i] << 16) + odd * to_float(pairs[i] & 0xffff0000u);
      }
    }
    for (int64_t i = 0; i < columns; ++i) {
      output[i] = add ? output[i] + sums[i] : sums[i];
    }
  }
}

void multiply_panel(
    bool fast, int64_t rows, int64_t columns, int64_t depth, const uint16_t* left,
    const uint32_t* panel, float* output, int64_t stride, bool add) {
  if (!fast) {
    multiply_panel_plainly(rows, columns, depth, left, panel, output, stride, add);
    return;
  }
  cpublas::brgemm(
      rows, columns, depth, DEPTH, PANEL, stride, add,
      reinterpret_cast<const at::BFloat16*>(left), reinterpret_cast<const at::BFloat16*>(panel),
      output);
}

// Multiplies `count` rows, of which `pieces` has the terms from `k` to `end`, by all panels.
template <int Pieces>
void multiply_rows(
    const Product& product, bool fast, const uint32_t* packed, const uint16_t* pieces, int64_t row,
    int64_t count, int64_t k, int64_t end) {
  for (int64_t first = 0; first < product.columns; first += PANEL) {
    const int64_t width = std::min(PANEL, product.columns - first);
    float* output = product.output + row * product.columns + first;
    for (int64_t begin = k; begin < end; begin += DEPTH) {
      const int64_t depth = std::min(DEPTH, product.padded_depth() - begin);
      const uint32_t* panel = packed + (first / PANEL * product.padded_depth() + begin) / 2 * PANEL;
      const uint16_t* block = pieces + (begin - k) / DEPTH * Pieces * count * DEPTH;
      for (int64_t piece = 0; piece < Pieces; ++piece) {
        multiply_panel(
            fast, count, width, depth, block + piece * count * DEPTH, panel, output,
            product.columns, begin > 0 || piece > 0);
      }
    }
  }
}

template <int Pieces>
int64_t rows_of_block(const Product& product) {
  const int64_t row_bytes = std::min(round_up(product.depth, DEPTH), SPAN) * Pieces * 2;
  const int64_t share = divide_up(product.rows, at::get_num_threads());
  const int64_t rows = std::min(BLOCK_BYTES / row_bytes, round_up(share, FEWEST_ROWS));
  return std::clamp(rows / FEWEST_ROWS * FEWEST_ROWS, FEWEST_ROWS, MOST_ROWS);
}

template <int Pieces>
void multiply(const Product& product, const uint32_t* packed) {
  const bool fast = cpublas::could_pack(at::kBFloat16);
  const int64_t block = rows_of_block<Pieces>(product);
  const int64_t span = std::min(round_up(product.depth, DEPTH), SPAN);
  at::parallel_for(0, divide_up(product.rows, block), 1, [&](int64_t first, int64_t last) {
    Buffer<uint16_t> pieces = allocate<uint16_t>(span * Pieces * block);
    for (int64_t row = first * block; row < std::min(last * block, product.rows); row += block) {
      const int64_t count = std::min(block, product.rows - row);
      for (int64_t k = 0; k < product.depth; k += span) {
        const int64_t end = std::min(k + span, product.depth);
        for (int64_t begin = k; begin < end; begin += DEPTH) {
          convert<Pieces>(product, row, count, begin, pieces.get() + (begin - k) * Pieces * count);
        }
        multiply_rows<Pieces>(product, fast, packed, pieces.get(), row, count, k, end);
      }
    }
    if (fast) {
      cpublas::brgemm_release();
    }
  });
}

} // namespace
} // namespace native

using namespace native;

// Whether the processor has AMX and torch may use it, so that `multiply_codes` is worth its while.
EXPORT bool supports_bfloat16() {
  return at::native::cpublas::could_pack(at::kBFloat16);
}

// Returns what went wrong, or null. `pieces` is 1 or 3; no size is 0.
EXPORT const char* multiply_codes(
    const float* left,
    bool transposed,
    const void* right,
    bool has_sign,
    int32_t zero_point,
    int64_t rows,
    int64_t columns,
    int64_t depth,
    int32_t pieces,
    float* output) {
  static thread_local std::string problem;
  try {
    const Product product{left, transposed, rows, columns, depth, output};
    const Buffer<uint32_t> packed = has_sign
        ? pack(static_cast<const int8_t*>(right), product, zero_point)
        : pack(static_cast<const uint8_t*>(right), product, zero_point);
    pieces == 1 ? multiply<1>(product, packed.get()) : multiply<3>(product, packed.get());
    return nullptr;
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
}
