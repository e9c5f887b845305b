// The gradient of a convolution's weight: products of the output's gradient, transposed, and of the
// numbers that each of its places read.
//
// Some images at a time, the gradient is rounded and transposed once. Each thread then takes panels
// of columns, which are channels of the input at places of the kernel, packs what the columns read,
// some places after the other, and adds up in sums that no other thread has.
#include "bfloat16_tiles.h"
#include "images.h"

namespace native {
namespace {

// Places that are packed at a time: a panel of them stays in the first-level cache.
constexpr int64_t MOST_PLACES = 128;

// Bytes of padded images for each thread at a time: they stay in a cache while they are multiplied.
// More where the sums are larger, which have to be read and written each time.
constexpr int64_t BYTES_OF_THREAD = 1 << 18;

// What a code becomes: a bfloat16 number, which is exact.
template <typename Code>
struct Exact {
  using Number = uint16_t;
  static constexpr int64_t UNIT = PAIR;

  static Number number(uint8_t code, int32_t zero_point) {
    return static_cast<Number>(pair(static_cast<Code>(code) - zero_point, 0));
  }
};

// Columns of a tile that are neighboring channels of one tap.
struct Run {
  int64_t target; // where the first is in the first row of a panel
  int64_t count;
  int64_t start; // of the first, from the first number that a place of the output reads
};

struct Weight {
  Images images;
  const float* gradient; // (images, *places, rows)
  int64_t rows; // channels of the output
  int64_t columns; // taps times channels of the input
  float factor; // of the result
  std::vector<int64_t> starts; // of the taps
  std::vector<int64_t> begins; // of the places in an image
  int64_t parts; // of the rows, where there are more threads than panels

  int64_t panels() const {
    return divide_up(columns, PANEL);
  }

  int64_t row_tiles() const {
    return divide_up(rows, TILE);
  }

  // Sums of a panel.
  int64_t panel_sums() const {
    return row_tiles() * TILE * PANEL;
  }

  int64_t places() const {
    return static_cast<int64_t>(begins.size());
  }

  std::vector<Run> runs(int64_t first) const {
    std::vector<Run> runs;
    const int64_t end = std::min(first + PANEL, columns);
    for (int64_t column = first; column < end; column += runs.back().count) {
      const int64_t channel = column % images.channels;
      runs.push_back(
          {place_of(column - first, 0),
           std::min({images.channels - channel, end - column, TILE - column % TILE}),
           starts[column / images.channels] + channel});
    }
    return runs;
  }
};

inline void interleave(
    const uint16_t* __restrict even, const uint16_t* __restrict odd, int64_t count,
    uint32_t* __restrict pairs) {
  for (int64_t i = 0; i < count; ++i) {
    pairs[i] = static_cast<uint32_t>(odd[i]) << 16 | even[i];
  }
}

// Packs what `depth` places read, which begin at `places`.
void pack_places(
    const std::vector<Run>& runs, const uint16_t* numbers, const int64_t* places, int64_t depth,
    uint32_t* panel) {
  for (int64_t k = 0; k < depth; k += PAIR) {
    const uint16_t* even = numbers + places[k];
    const uint16_t* odd = numbers + places[k + 1];
    uint32_t* target = panel + place_of(0, k / PAIR);
    for (const Run& run : runs) {
      // A size that the compiler knows needs no loop.
      if (run.count == TILE) {
        interleave(even + run.start, odd + run.start, TILE, target + run.target);
      } else {
        interleave(even + run.start, odd + run.start, run.count, target + run.target);
      }
    }
  }
}

// Rounds and transposes the gradient of `depth` places, in tiles of TILE rows and TERMS places: all
// places of some rows before the next rows.
void convert_gradient(const Weight& its, const float* gradient, int64_t depth, uint16_t* tiles) {
  const Product product{gradient, true, nullptr, 1.0f, its.rows, 0, depth, nullptr};
  const int64_t length = round_up(depth, TERMS);
  at::parallel_for(0, length / TERMS, 1, [&](int64_t begin, int64_t end) {
    alignas(64) float rows[TILE * TERMS];
    for (int64_t k = begin * TERMS; k < end * TERMS; k += TERMS) {
      for (int64_t row = 0; row < its.rows; row += TILE) {
        transpose(
            product, row, std::min(TILE, its.rows - row), k, std::min(TERMS, depth - k), rows);
        split_row<1>(rows, TILE * TERMS, tiles + row * length + k * TILE, 0);
      }
    }
  });
}

// Returns where the numbers of the places of some images begin, and as many more of the first as
// the last places lack of a whole number of tiles; they are multiplied by zeros.
std::vector<int64_t> places_of(const Weight& its, int64_t images) {
  std::vector<int64_t> places;
  for (int64_t image = 0; image < images; ++image) {
    for (const int64_t begin : its.begins) {
      places.push_back(image * its.images.length() + begin);
    }
  }
  places.resize(round_up(static_cast<int64_t>(places.size()), TERMS), its.begins[0]);
  return places;
}

// Adds to the sums of all panels what `depth` places contribute.
void multiply_places(
    const Weight& its, const uint16_t* tiles, const uint16_t* numbers,
    const std::vector<int64_t>& places, int64_t depth, float* sums) {
  const int64_t length = round_up(depth, TERMS);
  at::parallel_for(0, its.panels() * its.parts, 1, [&](int64_t begin, int64_t end) {
    const FloatTiles::Setting setting;
    const auto panel = allocate_filled<uint32_t>(MOST_PLACES / PAIR * PANEL, 0);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t number = index / its.parts;
      const int64_t part = index % its.parts;
      const int64_t first = part * its.row_tiles() / its.parts;
      const int64_t last = (part + 1) * its.row_tiles() / its.parts;
      const std::vector<Run> runs = its.runs(number * PANEL);
      const int64_t columns = std::min(PANEL, its.columns - number * PANEL);
      for (int64_t k = 0; k < length; k += MOST_PLACES) {
        const int64_t terms = std::min(MOST_PLACES, length - k);
        pack_places(runs, numbers, places.data() + k, terms, panel.get());
        for (int64_t row = first; row < last; row += 2) {
          FloatTiles::add(
              std::min<int64_t>(2, last - row), columns, terms / TERMS,
              tiles + (row * length + k) * TILE, length * TILE, panel.get(),
              sums + number * its.panel_sums() + row * TILE * PANEL);
        }
      }
    }
  });
}

// Multiplies the sums by the factor, and brings each row together.
void write_sums(const Weight& its, const float* sums, float* output) {
  at::parallel_for(0, its.rows, 1 + 16384 / its.columns, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t column = 0; column < its.columns; column += TILE) {
        const float* source = sums + column / PANEL * its.panel_sums() +
            row / TILE * TILE * PANEL + place_of(column % PANEL, row % TILE);
        float* target = output + row * its.columns + column;
        const int64_t width = std::min(TILE, its.columns - column);
        for (int64_t i = 0; i < width; ++i) {
          target[i] = source[i] * its.factor;
        }
      }
    }
  });
}

template <typename Code>
void multiply_images(const Weight& its, int64_t count, float* output) {
  using Number = typename Exact<Code>::Number;
  const int64_t places = its.places();
  const int64_t bytes = std::max(its.images.length(), places * its.rows) * sizeof(Number);
  const int64_t sums_bytes = its.panels() * its.panel_sums() * sizeof(float);
  const int64_t most = std::max(BYTES_OF_THREAD * at::get_num_threads(), sums_bytes);
  const int64_t together = std::clamp<int64_t>(most / bytes, 1, count);
  const auto numbers = allocate_filled<Number>(together * its.images.length(), 0);
  const std::vector<int64_t> begins = places_of(its, together);
  const Buffer<uint16_t> tiles =
      allocate<uint16_t>(round_up(together * places, TERMS) * its.row_tiles() * TILE);
  const auto sums = allocate_filled<float>(its.panels() * its.panel_sums(), 0.0f);
  for (int64_t first = 0; first < count; first += together) {
    const int64_t number = std::min(together, count - first);
    read_images<Exact<Code>>(its.images, first, number, numbers.get());
    convert_gradient(
        its, its.gradient + first * places * its.rows, number * places, tiles.get());
    multiply_places(its, tiles.get(), numbers.get(), begins, number * places, sums.get());
  }
  write_sums(its, sums.get(), output);
}

} // namespace
} // namespace native

using namespace native;

// Writes (rows, *kernel, channels), the gradient, (count, *places, rows), times the codes less zero
// point that each place read, times `factor`. Codes and `geometry` are those of
// `convolve_integers`, the codes signed if `has_sign`. Returns what went wrong, or null; no size
// is 0.
EXPORT const char* convolution_weight_gradient(
    const float* gradient,
    const void* codes,
    bool has_sign,
    bool channels_last,
    int32_t zero_point,
    float factor,
    int64_t count,
    int64_t channels,
    int64_t rows,
    const int64_t* geometry,
    float* output) {
  return problem_of([&] {
    Images images{
        static_cast<const uint8_t*>(codes), channels_last, zero_point, channels, {},
        Exact<uint8_t>::UNIT};
    std::memcpy(&images.geometry, geometry, sizeof(Geometry));
    Weight weight{images, gradient, rows, 0, factor, starts_of(images, 1), beginnings(images), 1};
    weight.columns = static_cast<int64_t>(weight.starts.size()) * channels;
    weight.parts = std::min<int64_t>(
        divide_up(rows, 2 * TILE), divide_up(at::get_num_threads(), weight.panels()));
    has_sign ? multiply_images<int8_t>(weight, count, output)
             : multiply_images<uint8_t>(weight, count, output);
  });
}
