// What products share: memory, the panels that a right factor is packed into, and transposition.
#pragma once

#include "common.h"

#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

namespace native {

namespace cpublas = at::native::cpublas;

// Columns of a panel: the width for which oneDNN's kernels are made.
constexpr int64_t PANEL = 64;
// Rows that are transposed at a time, and columns.
constexpr int64_t TILE = 16;

inline int64_t round_up(int64_t value, int64_t to) {
  return divide_up(value, to) * to;
}

// A row of a product is the sum over a few runs of numbers: a row of a matrix is one run, and a place of
// an image has one for each row of the convolution's kernel. This is where they begin, from the row's
// first number on.
struct Taps {
  const int64_t* starts;
  int64_t count;
  int64_t terms; // of a tap, a multiple of what one instruction multiplies and adds

  int64_t depth() const {
    return count * terms;
  }
};

// The taps of a matrix.
inline Taps one_tap(int64_t terms) {
  static const int64_t start = 0;
  return {&start, 1, terms};
}

struct Free {
  void operator()(void* memory) const {
    std::free(memory);
  }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

// Returns memory that begins with a line of the cache, as rows of tiles had better do.
template <typename T>
Buffer<T> allocate(int64_t count) {
  void* memory = std::aligned_alloc(64, round_up(count * sizeof(T), 64));
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  return Buffer<T>(static_cast<T*>(memory));
}

template <typename T>
Buffer<T> allocate_filled(int64_t count, T value) {
  Buffer<T> buffer = allocate<T>(count);
  std::fill_n(buffer.get(), count, value);
  return buffer;
}

// Transposes TILE x TILE units of 32 bits; rows lie `from` and `to` units apart.
inline void transpose_tile(const float* source, int64_t from, float* target, int64_t to) {
  at::vec::transpose_mxn<float, TILE, TILE>(source, from, target, to);
}

// Runs `body`; returns what went wrong, valid until the next call in the thread, or null.
template <typename Body>
const char* problem_of(const Body& body) {
  static thread_local std::string problem;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
}

} // namespace native
