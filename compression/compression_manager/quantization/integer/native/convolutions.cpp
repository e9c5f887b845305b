// Convolutions of 8-bit integers: products whose rows are places of an image.
#include "images.h"
#include "pairs.h"
#include "tiles.h"

namespace native {
namespace {

template <typename Kernel>
void convolve(
    Images images, int64_t count, const int8_t* weight, Output output, float* values) {
  using Number = typename Kernel::Number;
  images.unit = Kernel::UNIT;
  const std::vector<int64_t> starts = starts_of(images, places_of_tap(images.geometry));
  const Taps taps{
      starts.data(), static_cast<int64_t>(starts.size()),
      places_of_tap(images.geometry) * images.step()};
  const std::vector<int64_t> begins = beginnings(images);
  const int64_t places = static_cast<int64_t>(begins.size());
  const auto packed = Kernel::pack(weight, output.columns, taps.depth(), images.zero_point);
  const int64_t bytes = images.length() * static_cast<int64_t>(sizeof(Number));
  const int64_t together = std::clamp<int64_t>(MOST_BYTES / bytes, 1, count);
  const auto code = static_cast<uint8_t>(images.zero_point);
  const auto numbers = allocate_filled<Number>(
      together * images.length(), Kernel::number(code, images.zero_point));
  output.stride = images.channels_last ? 1 : places;
  const int64_t step = images.channels_last ? output.columns : 1;
  const auto make_reader = [&](int64_t) {
    return [&](int64_t row, int64_t some, Rows<Number>& rows) {
      int64_t image = row / places;
      int64_t place = row % places;
      for (int64_t i = 0; i < some; ++i) {
        rows.numbers[i] = numbers.get() + image * images.length() + begins[place];
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
    read_images<Kernel>(images, first, number, numbers.get());
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
  return Tiles::is_fast() ? Tiles::UNIT : Quads::is_fast() ? Quads::UNIT : Pairs::UNIT;
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
