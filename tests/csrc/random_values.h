// Normally distributed elements of any type that the core knows.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "dtype.h"

namespace firstlm {

template <class T>
std::vector<T> random_values(int64_t n, int seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<T> values(n);
  for (T& value : values) narrow(static_cast<Accumulator<T>>(normal(random)), &value);
  return values;
}

}  // namespace firstlm
