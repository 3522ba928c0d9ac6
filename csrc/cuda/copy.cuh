// Copies as wide as addresses and distances allow.
#pragma once

#include <cstdint>

#include "span.cuh"

namespace firstlm::cuda {

// 16 bytes of anything.
struct alignas(kAccessBytes) Unit16 {
  uint64_t halves[2];
};

// What all addresses and distances of a piece of work are multiples of.
class Alignment {
 public:
  Alignment& address(const void* pointer) { return add(reinterpret_cast<uintptr_t>(pointer)); }
  Alignment& distance(int64_t bytes) { return add(static_cast<uintptr_t>(bytes)); }

  bool is_multiple_of(uintptr_t bytes) const { return bits_ % bytes == 0; }
  bool fits_packs() const { return is_multiple_of(kAccessBytes); }

 private:
  Alignment& add(uintptr_t number) {
    bits_ |= number;
    return *this;
  }

  uintptr_t bits_ = 0;
};

// Calls body with a value of the widest unit that such memory can be copied in.
template <class Body>
void with_copy_unit(const Alignment& alignment, const Body& body) {
  if (alignment.is_multiple_of(16)) return body(Unit16{});
  if (alignment.is_multiple_of(8)) return body(uint64_t{});
  if (alignment.is_multiple_of(4)) return body(uint32_t{});
  if (alignment.is_multiple_of(2)) return body(uint16_t{});
  body(uint8_t{});
}

}  // namespace firstlm::cuda
