// Convolutions of 8-bit integers: products whose rows are places of an image.
//
// Some images at a time are brought into memory with a border of what stands for real zeros. Nothing is
// copied for the places that overlap: each reads the numbers where they are.
#include "pairs.h"
#include "tiles.h"

#include <vector>

namespace native {
namespace {

constexpr int64_t AXES = 3;
// Bytes of such images at a time, unless a single one has more.
constexpr int64_t MOST_BYTES = 1 << 20;

// Fewer axes than three have ones in front.
struct Geometry {
  int64_t size[AXES];
  int64_t kernel[AXES];
  int64_t stride[AXES];
  int64_t padding[AXES];
  int64_t dilation[AXES];

  int64_t padded(int64_t axis) const {
    return size[axis] + 2 * padding[axis];
  }

  int64_t places(int64_t axis) const {
    return (padded(axis) - dilation[axis] * (kernel[axis] - 1) - 1) / stride[axis] + 1;
  }

  // The number of a place in a padded image.
  int64_t place(int64_t first, int64_t second, int64_t third) const {
    return (first * padded(1) + second) * padded(2) + third;
  }
};

struct Images {
  const uint8_t* codes; // (images, *size, channels), or (images, channels, *size)
  bool channels_last;
  int32_t zero_point;
  int64_t channels;
  Geometry geometry;
  int64_t unit; // of the kernel

  // Numbers of a place.
  int64_t step() const {
    return round_up(channels, unit);
  }

  // Numbers of an image.
  int64_t length() const {
    return geometry.padded(0) * geometry.padded(1) * geometry.padded(2) * step();
  }
};

// Places of the kernel that lie side by side: neighbors on the last axis.
int64_t places_of_tap(const Geometry& its) {
  return its.dilation[2] == 1 ? its.kernel[2] : 1;
}

// Returns where the taps begin.
std::vector<int64_t> starts_of(const Images& images) {
  const Geometry& its = images.geometry;
  std::vector<int64_t> starts;
  for (int64_t i = 0; i < its.kernel[0]; ++i) {
    for (int64_t j = 0; j < its.kernel[1]; ++j) {
      for (int64_t k = 0; k < its.kernel[2]; k += places_of_tap(its)) {
        const int64_t place =
            its.place(i * its.dilation[0], j * its.dilation[1], k * its.dilation[2]);
        starts.push_back(place * images.step());
      }
    }
  }
  return starts;
}

// Returns where the numbers of each place of the result begin in an image.
std::vector<int64_t> beginnings(const Images& images) {
  const Geometry& its = images.geometry;
  std::vector<int64_t> begins;
  for (int64_t i = 0; i < its.places(0); ++i) {
    for (int64_t j = 0; j < its.places(1); ++j) {
      for (int64_t k = 0; k < its.places(2); ++k) {
        const int64_t place = its.place(i * its.stride[0], j * its.stride[1], k * its.stride[2]);
        begins.push_back(place * images.step());
      }
    }
  }
  return begins;
}

// Reads the channels of `count` places, which lie `stride` codes apart, side by side: a unit of them,
// which has 32 bits, of all places before the next.
template <typename Kernel>
void read_channels(
    const Images& images, const uint8_t* codes, int64_t stride, int64_t count,
    typename Kernel::Number* numbers) {
  using Bits = std::make_unsigned_t<typename Kernel::Number>;
  constexpr int64_t width = 32 / Kernel::UNIT;
  for (int64_t first = 0; first < images.channels; first += Kernel::UNIT) {
    const int64_t some = std::min(Kernel::UNIT, images.channels - first);
    const uint8_t* source = codes + first * stride;
    for (int64_t place = 0; place < count; ++place) {
      uint32_t unit = 0;
      for (int64_t i = 0; i < Kernel::UNIT; ++i) {
        const uint8_t code = source[std::min(i, some - 1) * stride + place];
        unit |= static_cast<uint32_t>(static_cast<Bits>(
                    Kernel::number(code, images.zero_point)))
            << (i * width);
      }
      std::memcpy(numbers + place * images.step() + first, &unit, sizeof(unit));
    }
  }
}

// Reads the line of places that `codes` has.
template <typename Kernel>
void read_line(const Images& images, const uint8_t* codes, typename Kernel::Number* numbers) {
  const int64_t* size = images.geometry.size;
  const int64_t channels = images.channels;
  if (!images.channels_last) {
    read_channels<Kernel>(images, codes, size[0] * size[1] * size[2], size[2], numbers);
  } else if (images.step() == channels) {
    read_codes<Kernel>(codes, size[2] * channels, images.zero_point, numbers);
  } else {
    for (int64_t place = 0; place < size[2]; ++place) {
      read_codes<Kernel>(
          codes + place * channels, channels, images.zero_point, numbers + place * images.step());
    }
  }
}

// Reads `count` images from `first` on.
template <typename Kernel>
void read_images(
    const Images& images, int64_t first, int64_t count, typename Kernel::Number* numbers) {
  const Geometry& its = images.geometry;
  const int64_t lines = its.size[0] * its.size[1];
  const int64_t length = its.size[2] * images.channels;
  const int64_t stride = images.channels_last ? length : its.size[2];
  at::parallel_for(0, count * lines, 1 + 16384 / length, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t image = index / lines;
      const int64_t line = index % lines;
      const int64_t place = its.place(
          line / its.size[1] + its.padding[0], line % its.size[1] + its.padding[1], its.padding[2]);
      read_line<Kernel>(
          images, images.codes + (first + image) * lines * length + line * stride,
          numbers + image * images.length() + place * images.step());
    }
  });
}

template <typename Kernel>
void convolve(
    Images images, int64_t count, const int8_t* weight, Output output, float* values) {
  using Number = typename Kernel::Number;
  images.unit = Kernel::UNIT;
  const std::vector<int64_t> starts = starts_of(images);
  const Taps taps{
      starts.data(), static_cast<int64_t>(starts.size()),
      places_of_tap(images.geometry) * images.step()};
  const std::vector<int64_t> begins = beginnings(images);
  const int64_t places = static_cast<int64_t>(begins.size());
  const auto packed = Kernel::pack(weight, output.columns, taps.depth(), images.zero_point);
  const int64_t bytes = images.length() * static_cast<int64_t>(sizeof(Number));
  const int64_t together = std::clamp<int64_t>(MOST_BYTES / bytes, 1, count);
  const auto code = static_cast<uint8_t>(images.zero_point);
  std::vector<Number> numbers(
      together * images.length(), Kernel::number(code, images.zero_point));
  output.stride = images.channels_last ? 1 : places;
  const int64_t step = images.channels_last ? output.columns : 1;
  const auto make_reader = [&](int64_t) {
    return [&](int64_t row, int64_t some, Rows<Number>& rows) {
      int64_t image = row / places;
      int64_t place = row % places;
      for (int64_t i = 0; i < some; ++i) {
        rows.numbers[i] = numbers.data() + image * images.length() + begins[place];
        rows.values[i] = values + image * places * output.columns + place * step;
        if (++place == places) {
          place = 0;
          ++image;
        }
      }
    };
  };
  for (int64_t first = 0; first < count; first += together) {
    const int64_t number = std::min(together, count - first);
    read_images<Kernel>(images, first, number, numbers.data());
    output.rows = number * places;
    multiply_blocks<Kernel>(output, taps, packed, make_reader);
    values += output.rows * output.columns;
  }
}

} // namespace
} // namespace native

using namespace native;

// Returns what `convolve_integers` wants the channels of a weight to be a multiple of.
EXPORT int64_t channels_unit() {
  return Quads::is_fast() ? Quads::UNIT : Pairs::UNIT;
}

// Convolves `count` images, codes (count, *size, channels), into (count, *places, columns); or codes
// (count, channels, *size) into (count, columns, *places). The weight is (columns, *kernel, channels),
// the channels being rounded up to a multiple of `channels_unit`. `geometry` has the numbers of a
// Geometry. Returns what went wrong, or null; no size is 0.
EXPORT const char* convolve_integers(
    const uint8_t* codes,
    bool channels_last,
    const int8_t* weight,
    int32_t zero_point,
    const float* scale,
    const float* bias,
    int64_t count,
    int64_t channels,
    int64_t columns,
    const int64_t* geometry,
    float* output) {
  return problem_of([&] {
    Images images{codes, channels_last, zero_point, channels, {}, 0};
    std::memcpy(&images.geometry, geometry, sizeof(Geometry));
    const Output to{scale, bias, 0, columns, 1};
    if (Tiles::is_fast()) {
      convolve<Tiles>(images, count, weight, to, output);
    } else if (Quads::is_fast()) {
      convolve<Quads>(images, count, weight, to, output);
    } else {
      convolve<Pairs>(images, count, weight, to, output);
    }
  });
}
