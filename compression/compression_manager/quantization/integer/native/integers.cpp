// Products of 8-bit integers, summed exactly in 32 bits and turned into real numbers in one pass.
#include "pairs.h"
#include "tiles.h"

namespace native {
namespace {

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

// The instructions by which products of integers are worth their while; null if they are not.
EXPORT const char* integer_instructions() {
  return Tiles::is_fast() ? "AMX" : Quads::is_fast() ? "VNNI" : Pairs::is_fast() ? "AVX2" : nullptr;
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
    if (Tiles::is_fast()) {
      multiply_rows<Tiles>(product);
    } else if (Quads::is_fast()) {
      multiply_rows<Quads>(product);
    } else {
      multiply_rows<Pairs>(product);
    }
  });
}
