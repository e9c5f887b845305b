// Products of float32 with integers, as bfloat16 products that are summed in float32.
//
// The integers are packed once, into panels of 64 columns in which the two rows that one
// instruction multiplies lie side by side. Each thread then takes blocks of rows of the left
// factor, turns one block after the other into bfloat16 pieces, and multiplies it by all panels.
#include "dot_products.h"
#include "pieces.h"

namespace native {
namespace {

// Terms for which a block of rows is converted at a time.
constexpr int64_t SPAN = 2048;
// Bytes that the pieces of a block of rows may take: about half of a core's second-level cache.
constexpr int64_t BLOCK_BYTES = 1 << 20;
constexpr int64_t MOST_ROWS = 256;
static_assert(SPAN % DEPTH == 0);

// Packs a part of a right factor: some rows of some neighboring panels. One row of all of them is
// taken before the next, because what lies side by side is fast to read.
template <typename Code>
void pack_part(
    const Code* codes, const Product& product, int32_t zero_point, int64_t first, int64_t last,
    int64_t begin, int64_t end, uint32_t* packed) {
  Code nothing[PANEL];
  std::fill_n(nothing, PANEL, static_cast<Code>(zero_point));
  for (int64_t k = begin; k < end; k += 2) {
    for (int64_t column = first; column < last; column += PANEL) {
      const int64_t count = std::min(PANEL, product.columns - column);
      const auto row = [&](int64_t index) {
        return index < product.depth ? codes + index * product.columns + column : nothing;
      };
      const Code* even = row(k);
      const Code* odd = row(k + 1);
      uint32_t* target = packed + (column * product.padded_depth() + k * PANEL) / 2;
      for (int64_t i = 0; i < count; ++i) {
        target[i] = pair(even[i] - zero_point, odd[i] - zero_point);
      }
      std::fill(target + count, target + PANEL, 0u);
    }
  }
}

// Returns panel after panel, each of padded_depth() / 2 rows of PANEL pairs.
template <typename Code>
Buffer<uint32_t> pack(const Code* codes, const Product& product, int32_t zero_point) {
  constexpr int64_t width = 4 * PANEL;
  constexpr int64_t height = 128;
  const int64_t columns = round_up(product.columns, PANEL);
  const int64_t depth = product.padded_depth();
  const int64_t across = divide_up(columns, width);
  Buffer<uint32_t> packed = allocate<uint32_t>(columns * depth / 2);
  at::parallel_for(0, across * divide_up(depth, height), 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t column = index % across * width;
      const int64_t k = index / across * height;
      pack_part(
          codes, product, zero_point, column, std::min(column + width, columns), k,
          std::min(k + height, depth), packed.get());
    }
  });
  return packed;
}

// Adds to `sums` (or sets them) the product of `rows` rows of pieces and a panel.
void multiply_panel_plainly(
    int64_t rows, int64_t depth, const uint16_t* left, const uint32_t* panel, float* sums,
    bool add) {
  for (int64_t row = 0; row < rows; ++row, left += DEPTH, sums += PANEL) {
    float own[PANEL] = {};
    for (int64_t k = 0; k < depth; k += 2) {
      const float even = to_float(static_cast<uint32_t>(left[k]) << 16);
      const float odd = to_float(static_cast<uint32_t>(left[k + 1]) << 16);
      const uint32_t* pairs = panel + k / 2 * PANEL;
      for (int64_t i = 0; i < PANEL; ++i) {
        own[i] += even * to_float(pairs[i] << 16) + odd * to_float(pairs[i] & 0xffff0000u);
      }
    }
    for (int64_t i = 0; i < PANEL; ++i) {
      sums[i] = add ? sums[i] + own[i] : own[i];
    }
  }
}

void multiply_panel_by_dots(
    int64_t rows, int64_t depth, const uint16_t* left, const uint32_t* panel, float* sums,
    bool add) {
  static const float nothing[PANEL] = {};
  for (int64_t row = 0; row < rows; row += DOT_ROWS, sums += DOT_ROWS * PANEL) {
    const int64_t count = std::min(DOT_ROWS, rows - row);
    const uint16_t* some[DOT_ROWS];
    for (int64_t i = 0; i < count; ++i) {
      some[i] = left + (row + i) * DEPTH;
    }
    multiply_dots<DotBFloat16>(
        count, some, one_tap(depth), panel, PANEL, add ? sums : nothing, add ? PANEL : 0, sums);
  }
}

bool has_amx() {
  return cpublas::could_pack(at::kBFloat16);
}

template <int Pieces>
void multiply_panel(
    bool amx, int64_t rows, int64_t depth, const uint16_t* left, const uint32_t* panel,
    float* sums, bool add) {
  if (amx) {
    cpublas::brgemm(
        rows, PANEL, depth, DEPTH, PANEL, PANEL, add, reinterpret_cast<const at::BFloat16*>(left),
        reinterpret_cast<const at::BFloat16*>(panel), sums);
  } else if (Pieces == 1 && has_dot_products_of_bfloat16()) {
    // One piece only: sums of three are three times as long, and these instructions round twice as
    // often as plain loops, so that the error would exceed that of float32.
    multiply_panel_by_dots(rows, depth, left, panel, sums, add);
  } else {
    multiply_panel_plainly(rows, depth, left, panel, sums, add);
  }
}

// Writes the sums of a tile, or adds them, and multiplies what is then final by `factor`.
void write(
    const float* sums, int64_t rows, int64_t columns, float* output, int64_t stride, bool add,
    float factor) {
  for (int64_t row = 0; row < rows; ++row, sums += PANEL, output += stride) {
    for (int64_t i = 0; i < columns; ++i) {
      output[i] = (add ? output[i] + sums[i] : sums[i]) * factor;
    }
  }
}

// Multiplies `count` rows, of which `pieces` has the terms from `k` to `end`, by all panels.
template <int Pieces>
void multiply_rows(
    const Product& product, bool amx, const uint32_t* packed, const uint16_t* pieces, float* sums,
    int64_t row, int64_t count, int64_t k, int64_t end) {
  for (int64_t first = 0; first < product.columns; first += PANEL) {
    // Apart from the output, whose rows may lie so far apart that they evict each other.
    for (int64_t begin = k; begin < end; begin += DEPTH) {
      const int64_t depth = std::min(DEPTH, product.padded_depth() - begin);
      const uint32_t* panel = packed + (first * product.padded_depth() + begin * PANEL) / 2;
      const uint16_t* block = pieces + (begin - k) * Pieces * count;
      for (int64_t piece = 0; piece < Pieces; ++piece) {
        multiply_panel<Pieces>(
            amx, count, depth, block + piece * count * DEPTH, panel, sums,
            begin > k || piece > 0);
      }
    }
    write(
        sums, count, std::min(PANEL, product.columns - first),
        product.output + row * product.columns + first, product.columns, k > 0,
        end == product.depth ? product.factor : 1.0f);
  }
}

// The rows of a block: `most`, or fewer where threads would have nothing to do.
int64_t rows_of_block(int64_t rows, int64_t most) {
  constexpr int64_t fewest = 32;
  const int64_t share = round_up(divide_up(rows, at::get_num_threads()), fewest);
  return std::max(fewest, std::min(most, share) / fewest * fewest);
}

template <int Pieces>
void multiply(const Product& product, const uint32_t* packed) {
  const bool amx = has_amx();
  const int64_t span = std::min(round_up(product.depth, DEPTH), SPAN);
  const int64_t block = rows_of_block(
      product.rows, std::min<int64_t>(MOST_ROWS, BLOCK_BYTES / (span * Pieces * 2)));
  at::parallel_for(0, divide_up(product.rows, block), 1, [&](int64_t first, int64_t last) {
    Buffer<uint16_t> pieces = allocate<uint16_t>(span * Pieces * block);
    Buffer<float> sums = allocate<float>(block * PANEL);
    for (int64_t row = first * block; row < std::min(last * block, product.rows); row += block) {
      const int64_t count = std::min(block, product.rows - row);
      for (int64_t k = 0; k < product.depth; k += span) {
        const int64_t end = std::min(k + span, product.depth);
        for (int64_t begin = k; begin < end; begin += DEPTH) {
          convert<Pieces>(product, row, count, begin, pieces.get() + (begin - k) * Pieces * count);
        }
        multiply_rows<Pieces>(
            product, amx, packed, pieces.get(), sums.get(), row, count, k, end);
      }
    }
    if (amx) {
      cpublas::brgemm_release();
    }
  });
}

} // namespace
} // namespace native

using namespace native;

// The most pieces that `multiply_codes` multiplies faster than one product of float32 takes: 3 with AMX,
// if torch may use it; 1 with AVX-512's dot products, which take half of that time; else 0.
EXPORT int32_t most_pieces() {
  return has_amx() ? 3 : has_dot_products_of_bfloat16() ? 1 : 0;
}

// Returns what went wrong, or null. `pieces` is 1 or 3; no size is 0; `scale` may be null.
EXPORT const char* multiply_codes(
    const float* left,
    bool transposed,
    const float* scale,
    float factor,
    const void* right,
    bool has_sign,
    int32_t zero_point,
    int64_t rows,
    int64_t columns,
    int64_t depth,
    int32_t pieces,
    float* output) {
  return problem_of([&] {
    const Product product{left, transposed, scale, factor, rows, columns, depth, output};
    const Buffer<uint32_t> packed = has_sign
        ? pack(static_cast<const int8_t*>(right), product, zero_point)
        : pack(static_cast<const uint8_t*>(right), product, zero_point);
    pieces == 1 ? multiply<1>(product, packed.get()) : multiply<3>(product, packed.get());
  });
}
