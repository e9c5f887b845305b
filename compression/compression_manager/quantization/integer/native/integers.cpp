// Products of 8-bit integers, summed exactly in 32 bits and turned into real numbers in one pass.
//
// With AMX the weight is packed into panels of 64 columns in which the four terms that one instruction
// multiplies lie side by side. Each thread takes blocks of rows of the codes, which are read where
// they are, and multiplies a block by one panel after the other into a tile of integers, which
// becomes floats while it is in the cache.
#include "widened.h"

namespace native {
namespace {

// Terms that one call of a kernel sums up, and rows of a block.
constexpr int64_t DEPTH = 512;
constexpr int64_t MOST_ROWS = 256;
// The instructions take 64 terms at a time; codes that are missing at the end become zeros.
constexpr int64_t TERMS = 64;
// Terms in 32 bits.
constexpr int64_t UNIT = 4;
static_assert(DEPTH % TERMS == 0);

struct Product {
  const uint8_t* codes; // (rows, depth)
  const int8_t* weight; // (columns, depth)
  uint32_t zero_point;
  const float* scale; // (columns)
  const float* bias; // (columns), or null
  int64_t rows;
  int64_t columns;
  int64_t depth;
  float* output; // (rows, columns)

  int64_t padded_depth() const {
    return round_up(depth, TERMS);
  }
};

struct Packed {
  Buffer<int8_t> panels; // each of padded_depth() / UNIT rows of PANEL units
  Buffer<uint32_t> row_sums; // of the weight, modulo 2^32; as many as the panels have columns
};

bool has_amx() {
#ifdef CPUBLAS_BRGEMM_U8I8I32
  // The kernels for unsigned codes need AMX, although those of signed ones would do without.
  return cpublas::could_pack(at::kByte);
#else
  return false;
#endif
}

// Packs TILE rows of the weight, which are columns of the product, into a part of a panel.
void pack_tile(const Product& product, int64_t column, int8_t* panel) {
  const int64_t count = std::clamp<int64_t>(product.columns - column, 0, TILE);
  alignas(64) float source[TILE * TILE] = {};
  alignas(64) float target[TILE * TILE];
  for (int64_t k = 0; k < product.depth; k += TERMS, panel += TERMS * PANEL) {
    const int64_t bytes = std::min(TERMS, product.depth - k);
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(source + i * TILE, product.weight + (column + i) * product.depth + k, bytes);
    }
    transpose_tile(source, TILE, target, TILE);
    for (int64_t unit = 0; unit < TERMS / UNIT; ++unit) {
      std::memcpy(panel + unit * PANEL * UNIT, target + unit * TILE, TILE * UNIT);
    }
  }
}

uint32_t sum(const int8_t* row, int64_t count) {
  int32_t total = 0;
  for (int64_t k = 0; k < count; ++k) {
    total += row[k];
  }
  return static_cast<uint32_t>(total);
}

Packed pack(const Product& product) {
  const int64_t columns = round_up(product.columns, PANEL);
  Packed packed{
      allocate<int8_t>(columns * product.padded_depth()), allocate<uint32_t>(columns)};
  at::parallel_for(0, columns / TILE, 1, [&](int64_t first, int64_t last) {
    for (int64_t column = first * TILE; column < last * TILE; column += TILE) {
      const int64_t panel = column / PANEL * PANEL;
      pack_tile(
          product, column,
          packed.panels.get() + panel * product.padded_depth() + (column - panel) * UNIT);
      for (int64_t i = column; i < column + TILE; ++i) {
        packed.row_sums[i] =
            i < product.columns ? sum(product.weight + i * product.depth, product.depth) : 0;
      }
    }
  });
  return packed;
}

// Adds to `sums` (or sets them) the product of `rows` rows of codes and a panel.
void multiply_panel(
    int64_t rows, int64_t depth, const uint8_t* codes, int64_t stride, const int8_t* panel,
    int32_t* sums, bool add) {
#ifdef CPUBLAS_BRGEMM_U8I8I32
  cpublas::brgemm(
      rows, PANEL, depth, stride, PANEL, PANEL, add, codes,
      reinterpret_cast<const signed char*>(panel), sums);
#else
  throw std::logic_error("this version of torch has no product of 8-bit integers");
#endif
}

// Writes the sums of a block and a panel as real numbers.
void write(
    const Product& product, const uint32_t* row_sums, const int32_t* sums, int64_t row,
    int64_t count, int64_t first) {
  const int64_t width = std::min(PANEL, product.columns - first);
  uint32_t shift[PANEL];
  for (int64_t i = 0; i < PANEL; ++i) {
    shift[i] = product.zero_point * row_sums[first + i];
  }
  const float* scale = product.scale + first;
  const float* bias = product.bias == nullptr ? nullptr : product.bias + first;
  float* __restrict output = product.output + row * product.columns + first;
  for (int64_t j = 0; j < count; ++j, sums += PANEL, output += product.columns) {
    // Unsigned, so that what two sums exceed 32 bits by cancels.
    const auto value = [&](int64_t i) {
      return static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(sums[i]) - shift[i])) *
          scale[i];
    };
    if (bias == nullptr) {
      for (int64_t i = 0; i < width; ++i) {
        output[i] = value(i);
      }
    } else {
      for (int64_t i = 0; i < width; ++i) {
        output[i] = value(i) + bias[i];
      }
    }
  }
}

// Copies the terms from `k` on of a block's rows, with zeros behind them: there, the panels hold
// anything.
void copy_rest(const Product& product, int64_t row, int64_t count, int64_t k, uint8_t* rest) {
  const int64_t bytes = product.depth - k;
  for (int64_t i = 0; i < count; ++i, rest += TERMS) {
    std::memcpy(rest, product.codes + (row + i) * product.depth + k, bytes);
    std::memset(rest + bytes, 0, TERMS - bytes);
  }
}

void multiply_tiles(const Product& product, const Packed& packed) {
  const int64_t block = rows_of_block(product.rows, MOST_ROWS);
  const int64_t whole = product.depth / TERMS * TERMS;
  at::parallel_for(0, divide_up(product.rows, block), 1, [&](int64_t begin, int64_t end) {
    Buffer<int32_t> sums = allocate<int32_t>(block * PANEL);
    Buffer<uint8_t> rest = allocate<uint8_t>(block * TERMS);
    for (int64_t row = begin * block; row < std::min(end * block, product.rows); row += block) {
      const int64_t count = std::min(block, product.rows - row);
      const uint8_t* codes = product.codes + row * product.depth;
      copy_rest(product, row, count, whole, rest.get());
      for (int64_t first = 0; first < product.columns; first += PANEL) {
        const int8_t* panel = packed.panels.get() + first * product.padded_depth();
        for (int64_t k = 0; k < whole; k += DEPTH) {
          multiply_panel(
              count, std::min(DEPTH, whole - k), codes + k, product.depth, panel + k * PANEL,
              sums.get(), k > 0);
        }
        if (whole < product.depth) {
          multiply_panel(
              count, TERMS, rest.get(), TERMS, panel + whole * PANEL, sums.get(), whole > 0);
        }
        write(product, packed.row_sums.get(), sums.get(), row, count, first);
      }
    }
    cpublas::brgemm_release();
  });
}

// Without AMX.
void multiply_rows(const Product& product) {
  const int64_t padded = round_up(product.depth, PAIR);
  const Output output{product.scale, product.bias, product.rows, product.columns, 1};
  const auto make_reader = [&](int64_t block) {
    return [&, numbers = allocate<int16_t>(block * padded)](
               int64_t row, int64_t count, Rows& rows) mutable {
      for (int64_t i = 0; i < count; ++i) {
        int16_t* target = numbers.get() + i * padded;
        target[padded - 1] = 0; // which no code is for if the depth is odd
        widen(
            product.codes + (row + i) * product.depth, product.depth,
            static_cast<int16_t>(product.zero_point), target);
        rows.numbers[i] = target;
        rows.values[i] = product.output + (row + i) * product.columns;
      }
    };
  };
  const Buffer<int8_t> packed = pack_pairs(product.weight, product.columns, product.depth);
  multiply_widened(output, Taps{{0}, padded}, packed.get(), make_reader);
}

} // namespace
} // namespace native

using namespace native;

// Whether `multiply_integers` uses AMX.
EXPORT bool multiplies_with_amx() {
  return has_amx();
}

// Whether `multiply_integers` is worth its while.
EXPORT bool supports_integers() {
  return has_amx() || widened_is_fast();
}

// Returns what went wrong, or null. `bias` may be null; no size is 0, and no true sum of
// (code - zero_point) * weight exceeds 32 bits.
EXPORT const char* multiply_integers(
    const uint8_t* codes,
    const int8_t* weight,
    int32_t zero_point,
    const float* scale,
    const float* bias,
    int64_t rows,
    int64_t columns,
    int64_t depth,
    float* output) {
  return problem_of([&] {
    const Product product{
        codes, weight, static_cast<uint32_t>(zero_point), scale, bias, rows, columns, depth,
        output};
    has_amx() ? multiply_tiles(product, pack(product)) : multiply_rows(product);
  });
}
