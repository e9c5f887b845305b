// How the gradient of a convolution's input is a few convolutions.
//
// A place of the input was read by some taps of the kernel only, those that are as far from it as a
// multiple of the stride. The places that were read by the same taps make a phase, which is a
// convolution of its own, with these taps; so no zeros are multiplied that a stride would put
// between the places.
#pragma once

#include "images.h"

namespace native {

// Along an axis, the taps and the places of the input that are `rest` beyond multiples of the
// stride.
struct AxisPhase {
  std::vector<int64_t> taps; // from the last to the first, which reads the furthest place
  std::vector<int64_t> back; // for each tap, how many places of the output before the first it is
  std::vector<int64_t> places; // of the input
  std::vector<int64_t> first; // for each of them, the place of the output that the tap `rest` read
};

// How an axis of the output's gradient lies in memory: with zeros before and behind it.
struct Axis {
  int64_t size; // of the input
  int64_t kernel;
  int64_t stride;
  int64_t padding;
  int64_t dilation;
  int64_t places; // of the output

  int64_t before() const {
    return std::max<int64_t>(dilation * (kernel - 1) / stride - padding / stride, 0);
  }

  int64_t behind() const {
    return std::max<int64_t>((size - 1 + padding) / stride - (places - 1), 0);
  }

  int64_t padded() const {
    return before() + places + behind();
  }

  AxisPhase phase(int64_t rest) const {
    AxisPhase phase;
    for (int64_t tap = kernel - 1; tap >= 0; --tap) {
      if (tap * dilation % stride == rest) {
        phase.taps.push_back(tap);
        phase.back.push_back(tap * dilation / stride);
      }
    }
    for (int64_t place = 0; place < size; ++place) {
      if ((place + padding) % stride == rest) {
        phase.places.push_back(place);
        phase.first.push_back((place + padding) / stride);
      }
    }
    return phase;
  }
};

} // namespace native
