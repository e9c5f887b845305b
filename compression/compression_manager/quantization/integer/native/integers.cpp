// Products of 8-bit integers, summed exactly in 32 bits and turned into real numbers in one pass.
//
// With AMX each thread takes blocks of rows of the codes, which are read where they are, and multiplies a
// block by one panel of the weight after the other into a tile of integers, which becomes floats while
// it is in the cache.
#include "pairs.h"
#include "quads.h"

namespace native {
namespace {

// Terms that one call of a kernel sums up, and rows of a block.
constexpr int64_t DEPTH = 512;
constexpr int64_t MOST_ROWS = 256;
static_assert(DEPTH % AMX_TERMS == 0);

struct Product {
  const uint8_t* codes; // (rows, depth)
  const int8_t* weight; // (columns, depth)
  int32_t zero_point;
  const float* scale; // (columns)
  const float* bias; // (columns), or null
  int64_t rows;
  int64_t columns;
  int64_t depth;
  float* output; // (rows, columns)
};

bool has_amx() {
#ifdef CPUBLAS_BRGEMM_U8I8I32
  // The kernels for unsigned codes need AMX, although those of signed ones would do without.
  return cpublas::could_pack(at::kByte);
#else
  return false;
#endif
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

// Writes a row of sums, of which each is `shift` too large modulo 2^32, as real numbers.
void write_shifted(
    const int32_t* __restrict sums, const uint32_t* __restrict shift,
    const float* __restrict scale, const float* __restrict bias, int64_t width,
    float* __restrict values) {
  int32_t exact[PANEL];
  for (int64_t i = 0; i < PANEL; ++i) {
    // Unsigned, so that what two sums exceed 32 bits by cancels.
    exact[i] = static_cast<int32_t>(static_cast<uint32_t>(sums[i]) - shift[i]);
  }
  write_row(exact, scale, bias, width, values);
}

// Writes the sums of a block and a panel as real numbers.
void write(
    const Product& product, const uint32_t* row_sums, const int32_t* sums, int64_t row,
    int64_t count, int64_t first) {
  const int64_t width = std::min(PANEL, product.columns - first);
  uint32_t shift[PANEL];
  for (int64_t i = 0; i < PANEL; ++i) {
    shift[i] = static_cast<uint32_t>(product.zero_point) * row_sums[first + i];
  }
  const float* bias = product.bias == nullptr ? nullptr : product.bias + first;
  float* output = product.output + row * product.columns + first;
  for (int64_t j = 0; j < count; ++j, sums += PANEL, output += product.columns) {
    write_shifted(sums, shift, product.scale + first, bias, width, output);
  }
}

// Copies the terms from `k` on of a block's rows, with zeros behind them: there, the panels hold
// anything.
void copy_rest(const Product& product, int64_t row, int64_t count, int64_t k, uint8_t* rest) {
  const int64_t bytes = product.depth - k;
  for (int64_t i = 0; i < count; ++i, rest += AMX_TERMS) {
    std::memcpy(rest, product.codes + (row + i) * product.depth + k, bytes);
    std::memset(rest + bytes, 0, AMX_TERMS - bytes);
  }
}

void multiply_tiles(const Product& product) {
  const PackedBytes packed = pack_bytes(product.weight, product.columns, product.depth);
  const int64_t block = rows_of_block(product.rows, MOST_ROWS);
  const int64_t whole = product.depth / AMX_TERMS * AMX_TERMS;
  at::parallel_for(0, divide_up(product.rows, block), 1, [&](int64_t begin, int64_t end) {
    Buffer<int32_t> sums = allocate<int32_t>(block * PANEL);
    Buffer<uint8_t> rest = allocate<uint8_t>(block * AMX_TERMS);
    for (int64_t row = begin * block; row < std::min(end * block, product.rows); row += block) {
      const int64_t count = std::min(block, product.rows - row);
      const uint8_t* codes = product.codes + row * product.depth;
      copy_rest(product, row, count, whole, rest.get());
      for (int64_t first = 0; first < product.columns; first += PANEL) {
        const int8_t* panel = packed.panel(first / PANEL);
        for (int64_t k = 0; k < whole; k += DEPTH) {
          multiply_panel(
              count, std::min(DEPTH, whole - k), codes + k, product.depth, panel + k * PANEL,
              sums.get(), k > 0);
        }
        if (whole < product.depth) {
          multiply_panel(
              count, AMX_TERMS, rest.get(), AMX_TERMS, panel + whole * PANEL, sums.get(), whole > 0);
        }
        write(product, packed.row_sums.get(), sums.get(), row, count, first);
      }
    }
    cpublas::brgemm_release();
  });
}

// Sets the numbers of a row: its codes themselves, or what becomes of them in `space`.
template <typename Kernel>
const typename Kernel::Number* read_row(
    const Product& product, const uint8_t* codes, typename Kernel::Number* space) {
  if constexpr (std::is_same_v<typename Kernel::Number, uint8_t>) {
    if (product.depth % Kernel::UNIT == 0) {
      return codes;
    }
  }
  const int64_t padded = round_up(product.depth, Kernel::UNIT);
  std::fill(space + product.depth, space + padded, static_cast<typename Kernel::Number>(0));
  read_codes<Kernel>(codes, product.depth, product.zero_point, space);
  return space;
}

// Without AMX.
template <typename Kernel>
void multiply_rows(const Product& product) {
  using Number = typename Kernel::Number;
  const int64_t padded = round_up(product.depth, Kernel::UNIT);
  const Output output{product.scale, product.bias, product.rows, product.columns, 1};
  const auto make_reader = [&](int64_t block) {
    return [&, space = allocate<Number>(block * padded)](
               int64_t row, int64_t count, Rows<Number>& rows) {
      for (int64_t i = 0; i < count; ++i) {
        rows.numbers[i] = read_row<Kernel>(
            product, product.codes + (row + i) * product.depth, space.get() + i * padded);
        rows.values[i] = product.output + (row + i) * product.columns;
      }
    };
  };
  const auto packed =
      Kernel::pack(product.weight, product.columns, product.depth, product.zero_point);
  multiply_blocks<Kernel>(output, one_tap(padded), packed, make_reader);
}

} // namespace
} // namespace native

using namespace native;

// The instructions by which `multiply_integers`, or `convolve_integers`, is worth its while; null if it
// is not.
EXPORT const char* integer_instructions(bool convolves) {
  if (!convolves && has_amx()) {
    return "AMX";
  }
  return Quads::is_fast() ? "VNNI" : Pairs::is_fast() ? "AVX2" : nullptr;
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
        codes, weight, zero_point, scale, bias, rows, columns, depth, output};
    if (has_amx()) {
      multiply_tiles(product);
    } else {
      Quads::is_fast() ? multiply_rows<Quads>(product) : multiply_rows<Pairs>(product);
    }
  });
}
