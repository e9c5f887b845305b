// Convolutions of 8-bit integers: products whose rows are places of an image.
//
// Some images at a time are widened into memory with a border of zeros, which stand for real zeros.
// Nothing is copied for the places that overlap: each reads the numbers where they are.
#include "widened.h"

namespace native {
namespace {

constexpr int64_t AXES = 3;
// Bytes of widened images at a time, unless a single one has more.
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
  int16_t zero_point;
  int64_t channels;
  Geometry geometry;

  // Numbers of a place.
  int64_t step() const {
    return round_up(channels, PAIR);
  }

  // Numbers of an image.
  int64_t length() const {
    return geometry.padded(0) * geometry.padded(1) * geometry.padded(2) * step();
  }
};

Taps taps_of(const Images& images) {
  const Geometry& its = images.geometry;
  // Neighbors on the last axis lie side by side.
  const int64_t run = its.dilation[2] == 1 ? its.kernel[2] : 1;
  Taps taps{{}, run * images.step()};
  for (int64_t i = 0; i < its.kernel[0]; ++i) {
    for (int64_t j = 0; j < its.kernel[1]; ++j) {
      for (int64_t k = 0; k < its.kernel[2]; k += run) {
        const int64_t place =
            its.place(i * its.dilation[0], j * its.dilation[1], k * its.dilation[2]);
        taps.starts.push_back(place * images.step());
      }
    }
  }
  return taps;
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

// Widens the channels of `count` places, which lie `stride` codes apart, side by side.
void widen_channels(
    const Images& images, const uint8_t* codes, int64_t stride, int64_t count, int16_t* numbers) {
  // So many that what is read of each stays in a cache, whatever the distance between them.
  constexpr int64_t together = 8;
  for (int64_t first = 0; first < images.channels; first += together) {
    const int64_t last = std::min(images.channels, first + together);
    for (int64_t place = 0; place < count; ++place) {
      for (int64_t channel = first; channel < last; ++channel) {
        numbers[place * images.step() + channel] =
            static_cast<int16_t>(codes[channel * stride + place] - images.zero_point);
      }
    }
  }
}

// Widens the line of places that `codes` has.
void widen_line(const Images& images, const uint8_t* codes, int16_t* numbers) {
  const int64_t* size = images.geometry.size;
  const int64_t channels = images.channels;
  if (!images.channels_last) {
    widen_channels(images, codes, size[0] * size[1] * size[2], size[2], numbers);
  } else if (images.step() == channels) {
    widen(codes, size[2] * channels, images.zero_point, numbers);
  } else {
    for (int64_t place = 0; place < size[2]; ++place) {
      widen(
          codes + place * channels, channels, images.zero_point, numbers + place * images.step());
    }
  }
}

// Writes the insides of `count` images from `first` on.
void widen_images(const Images& images, int64_t first, int64_t count, int16_t* numbers) {
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
      widen_line(
          images, images.codes + (first + image) * lines * length + line * stride,
          numbers + image * images.length() + place * images.step());
    }
  });
}

void convolve(
    const Images& images, int64_t count, const int8_t* weight, Output output, float* values) {
  const Taps taps = taps_of(images);
  const std::vector<int64_t> begins = beginnings(images);
  const int64_t places = static_cast<int64_t>(begins.size());
  const Buffer<int8_t> packed = pack_pairs(weight, output.columns, taps.depth());
  const int64_t bytes = images.length() * static_cast<int64_t>(sizeof(int16_t));
  const int64_t together = std::clamp<int64_t>(MOST_BYTES / bytes, 1, count);
  std::vector<int16_t> numbers(together * images.length()); // zeros
  output.stride = images.channels_last ? 1 : places;
  const int64_t step = images.channels_last ? output.columns : 1;
  const auto make_reader = [&](int64_t) {
    return [&](int64_t row, int64_t some, Rows& rows) {
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
    widen_images(images, first, number, numbers.data());
    output.rows = number * places;
    multiply_widened(output, taps, packed.get(), make_reader);
    values += output.rows * output.columns;
  }
}

} // namespace
} // namespace native

using namespace native;

// Convolves `count` images, codes (count, *size, channels), with a weight (columns, *kernel,
// channels), whose channels are rounded up to an even number, into (count, *places, columns); or
// codes (count, channels, *size) into (count, columns, *places). `geometry` has the numbers of a
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
    Images images{codes, channels_last, static_cast<int16_t>(zero_point), channels, {}};
    std::memcpy(&images.geometry, geometry, sizeof(Geometry));
    convolve(images, count, weight, Output{scale, bias, 0, columns, 1}, output);
  });
}
