// The gradient of a convolution's input: products whose rows are places of the output's gradient,
// and whose columns are the input's channels.
//
// Some images at a time, the gradient is scaled, rounded and brought into memory with zeros around
// it. Each phase of the convolution is then multiplied by its taps.
#include "bfloat16_tiles.h"
#include "phases.h"

namespace native {
namespace {

struct Gradient {
  const float* values; // (images, *places, channels), of the output
  const float* scale; // (channels), of the weight
  int64_t channels;
  int64_t step; // numbers of a place in a padded image: the channels, rounded up
  const int8_t* weight; // (channels, *kernel, columns)
  int64_t columns; // channels of the input
  bool channels_last; // whether those of the result are
  Axis axes[AXES];

  int64_t size() const {
    return axes[0].size * axes[1].size * axes[2].size;
  }

  int64_t places() const {
    return axes[0].places * axes[1].places * axes[2].places;
  }

  int64_t taps() const {
    return axes[0].kernel * axes[1].kernel * axes[2].kernel;
  }

  // Numbers of a padded image.
  int64_t length() const {
    return axes[0].padded() * axes[1].padded() * axes[2].padded() * step;
  }

  // From a padded image's first number to that of one of its places.
  int64_t distance(int64_t first, int64_t second, int64_t third) const {
    return ((first * axes[1].padded() + second) * axes[2].padded() + third) * step;
  }
};

Gradient make_gradient(
    const float* values, const float* scale, const int8_t* weight, const Geometry& geometry) {
  Gradient gradient{values, scale, 0, 0, weight, 0, false, {}};
  for (int64_t i = 0; i < AXES; ++i) {
    gradient.axes[i] = {
        geometry.size[i],    geometry.kernel[i],   geometry.stride[i],
        geometry.padding[i], geometry.dilation[i], geometry.places(i)};
  }
  return gradient;
}

// Bytes of padded images for each thread at a time: they stay in a cache while they are multiplied.
constexpr int64_t BYTES_OF_THREAD = 1 << 18;

struct Phase {
  std::vector<int64_t> starts; // of the taps, from the first number that a place of the input reads
  int64_t terms; // of a tap, or of some that are read as one
  PackedPairs packed;
  std::vector<int64_t> begins; // for each place of the input, that number in a padded image
  std::vector<int64_t> places; // the places
  int64_t width; // places that lie evenly in memory

  // Terms of a run, and zeros behind them.
  int64_t padded() const {
    return round_up(terms, TERMS);
  }

  int64_t depth() const {
    return static_cast<int64_t>(starts.size()) * padded();
  }

  // Whether whole tiles can be loaded from where the gradient is.
  bool is_even() const {
    return width % TILE == 0 && terms == padded();
  }
};

// Packs a row of pairs of each panel: two channels of the output, or one and zeros.
void pack_channels(
    const Gradient& its, int64_t tap, int64_t channel, int64_t row, PackedPairs& packed) {
  const int64_t distance = its.taps() * its.columns;
  const int8_t* even = its.weight + channel * distance + tap * its.columns;
  const bool is_paired = channel + 1 < its.channels;
  const int8_t* odd = even + (is_paired ? distance : 0);
  for (int64_t column = 0; column < its.columns; column += TILE) {
    const int64_t count = std::min(TILE, its.columns - column);
    uint32_t* target = packed.row(column, row);
    for (int64_t i = 0; i < count; ++i) {
      target[i] = pair(even[column + i], is_paired ? odd[column + i] : 0);
    }
  }
}

// Packs the channels of some taps, `together` of which make a run.
PackedPairs pack_taps(const Gradient& its, const std::vector<int64_t>& taps, int64_t together) {
  const int64_t count = static_cast<int64_t>(taps.size());
  const int64_t run = round_up(together * its.step, TERMS);
  PackedPairs packed(its.columns, divide_up(count, together) * run);
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tap = begin; tap < end; ++tap) {
      const int64_t first = tap / together * run + tap % together * its.step;
      for (int64_t channel = 0; channel < its.channels; channel += PAIR) {
        pack_channels(its, taps[tap], channel, (first + channel) / PAIR, packed);
      }
    }
  });
  return packed;
}

Phase make_phase(
    const Gradient& its, const AxisPhase& first, const AxisPhase& second, const AxisPhase& third) {
  Phase phase;
  std::vector<int64_t> taps;
  // Taps whose places are neighbors on the last axis are read as one.
  const int64_t count = static_cast<int64_t>(third.taps.size());
  const bool are_neighbors = count > 0 && third.back.front() - third.back.back() == count - 1;
  const int64_t together = are_neighbors ? count : 1;
  for (size_t i = 0; i < first.taps.size(); ++i) {
    for (size_t j = 0; j < second.taps.size(); ++j) {
      for (size_t k = 0; k < third.taps.size(); ++k) {
        if (k % together == 0) {
          phase.starts.push_back(-its.distance(first.back[i], second.back[j], third.back[k]));
        }
        taps.push_back(
            (first.taps[i] * its.axes[1].kernel + second.taps[j]) * its.axes[2].kernel +
            third.taps[k]);
      }
    }
  }
  phase.terms = together * its.step;
  phase.packed = pack_taps(its, taps, together);
  phase.width = static_cast<int64_t>(third.places.size());
  for (size_t i = 0; i < first.places.size(); ++i) {
    for (size_t j = 0; j < second.places.size(); ++j) {
      for (size_t k = 0; k < third.places.size(); ++k) {
        phase.begins.push_back(its.distance(
            its.axes[0].before() + first.first[i], its.axes[1].before() + second.first[j],
            its.axes[2].before() + third.first[k]));
        phase.places.push_back(
            (first.places[i] * its.axes[1].size + second.places[j]) * its.axes[2].size +
            third.places[k]);
      }
    }
  }
  return phase;
}

std::vector<Phase> make_phases(const Gradient& its) {
  std::vector<Phase> phases;
  for (int64_t i = 0; i < its.axes[0].stride; ++i) {
    for (int64_t j = 0; j < its.axes[1].stride; ++j) {
      for (int64_t k = 0; k < its.axes[2].stride; ++k) {
        phases.push_back(
            make_phase(its, its.axes[0].phase(i), its.axes[1].phase(j), its.axes[2].phase(k)));
      }
    }
  }
  return phases;
}

// Reads the gradient of `count` images from `first` on.
void read_gradient(const Gradient& its, int64_t first, int64_t count, uint16_t* numbers) {
  const Axis* axes = its.axes;
  const int64_t lines = axes[0].places * axes[1].places;
  const int64_t length = axes[2].places * its.channels;
  at::parallel_for(0, count * lines, 1 + 16384 / length, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t line = index % lines;
      const float* source = its.values + (first * lines + index) * length;
      uint16_t* target = numbers + index / lines * its.length() +
          its.distance(
              axes[0].before() + line / axes[1].places, axes[1].before() + line % axes[1].places,
              axes[2].before());
      for (int64_t place = 0; place < axes[2].places; ++place) {
        for (int64_t i = 0; i < its.channels; ++i) {
          target[i] = round_to_bfloat16(source[i] * its.scale[i]);
        }
        source += its.channels;
        target += its.step;
      }
    }
  });
}

// Sets where the numbers of some places of a phase begin, and where their values go.
void find_places(
    const Gradient& its, const Phase& phase, const uint16_t* numbers, float* values, int64_t row,
    int64_t count, Rows<uint16_t>& rows) {
  const int64_t places = static_cast<int64_t>(phase.places.size());
  const int64_t step = its.channels_last ? its.columns : 1;
  int64_t image = row / places;
  int64_t place = row % places;
  for (int64_t i = 0; i < count; ++i) {
    rows.numbers[i] = numbers + image * its.length() + phase.begins[place];
    rows.values[i] = values + image * its.size() * its.columns + phase.places[place] * step;
    if (++place == places) {
      place = 0;
      ++image;
    }
  }
}

// Copies what a place reads: its runs one after the other.
void copy_runs(const Phase& phase, const uint16_t* numbers, uint16_t* target) {
  for (const int64_t start : phase.starts) {
    std::memcpy(target, numbers + start, phase.terms * sizeof(uint16_t));
    target += phase.padded();
  }
}

// Computes the places of a phase of `count` images. Where they do not lie evenly, what each place
// reads is copied side by side once, for all columns.
void multiply_phase(
    const Gradient& its, const Phase& phase, int64_t count, const uint16_t* numbers,
    float* values) {
  const int64_t places = count * static_cast<int64_t>(phase.places.size());
  const Output output{nullptr, nullptr, places, its.columns, its.channels_last ? 1 : its.size()};
  if (phase.is_even()) {
    const Taps taps{
        phase.starts.data(), static_cast<int64_t>(phase.starts.size()), phase.terms};
    multiply_blocks<FloatTiles>(output, taps, phase.packed, [&](int64_t) {
      return [&](int64_t row, int64_t some, Rows<uint16_t>& rows) {
        find_places(its, phase, numbers, values, row, some, rows);
      };
    });
    return;
  }
  // Rows that lay a multiple of the cache's pages apart would evict each other.
  const int64_t step = phase.depth() + TERMS;
  multiply_blocks<FloatTiles>(output, one_tap(phase.depth()), phase.packed, [&](int64_t block) {
    return [&, space = allocate_filled<uint16_t>(block * step, 0)](
               int64_t row, int64_t some, Rows<uint16_t>& rows) {
      find_places(its, phase, numbers, values, row, some, rows);
      for (int64_t i = 0; i < some; ++i) {
        copy_runs(phase, rows.numbers[i], space.get() + i * step);
        rows.numbers[i] = space.get() + i * step;
      }
    };
  });
}

void multiply_images(const Gradient& its, int64_t count, float* output) {
  const std::vector<Phase> phases = make_phases(its);
  const int64_t bytes = its.length() * static_cast<int64_t>(sizeof(uint16_t));
  const int64_t together = std::clamp<int64_t>(
      BYTES_OF_THREAD * at::get_num_threads() / bytes, 1, count);
  const auto numbers = allocate_filled<uint16_t>(together * its.length(), 0);
  for (int64_t first = 0; first < count; first += together) {
    const int64_t number = std::min(together, count - first);
    read_gradient(its, first, number, numbers.get());
    for (const Phase& phase : phases) {
      if (!phase.places.empty()) {
        multiply_phase(
            its, phase, number, numbers.get(), output + first * its.size() * its.columns);
      }
    }
  }
}

} // namespace
} // namespace native

using namespace native;

// Whether the gradients of convolutions are worth their while.
EXPORT bool has_convolution_gradients() {
  return FloatTiles::is_fast();
}

// Writes the gradient of `count` images, (count, *size, columns) or (count, columns, *size).
// `values`, of the output, are (count, *places, channels), and multiplied by the scale of their
// channel; the weight is (channels, *kernel, columns). `geometry` has the numbers of a Geometry.
// Returns what went wrong, or null; no size is 0.
EXPORT const char* convolution_input_gradient(
    const float* values,
    const float* scale,
    const int8_t* weight,
    int64_t count,
    int64_t channels,
    int64_t columns,
    const int64_t* geometry,
    bool channels_last,
    float* output) {
  return problem_of([&] {
    Geometry numbers;
    std::memcpy(&numbers, geometry, sizeof(Geometry));
    Gradient gradient = make_gradient(values, scale, weight, numbers);
    gradient.channels = channels;
    gradient.step = round_up(channels, PAIR);
    gradient.columns = columns;
    gradient.channels_last = channels_last;
    multiply_images(gradient, count, output);
  });
}
