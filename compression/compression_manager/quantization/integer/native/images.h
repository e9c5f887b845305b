// Images of 8-bit integers, which a convolution reads place by place.
//
// Some at a time are brought into memory with a border of what stands for real zeros. Nothing is
// copied for the places that overlap: each reads the numbers where they are.
#pragma once

#include "blocks.h"

#include <type_traits>
#include <vector>

namespace native {

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
inline int64_t places_of_tap(const Geometry& its) {
  return its.dilation[2] == 1 ? its.kernel[2] : 1;
}

// Returns where the taps begin, of which each has some neighbors on the last axis.
inline std::vector<int64_t> starts_of(const Images& images, int64_t neighbors) {
  const Geometry& its = images.geometry;
  std::vector<int64_t> starts;
  for (int64_t i = 0; i < its.kernel[0]; ++i) {
    for (int64_t j = 0; j < its.kernel[1]; ++j) {
      for (int64_t k = 0; k < its.kernel[2]; k += neighbors) {
        const int64_t place =
            its.place(i * its.dilation[0], j * its.dilation[1], k * its.dilation[2]);
        starts.push_back(place * images.step());
      }
    }
  }
  return starts;
}

// Returns where the numbers of each place of the result begin in an image.
inline std::vector<int64_t> beginnings(const Images& images) {
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

} // namespace native
