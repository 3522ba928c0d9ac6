// Reading memory and nothing else: what kernels that are bound by it are compared with.
#pragma once

#include <cstdint>

namespace firstlm {

// Reads `bytes` of `data` once, on up to `threads` threads; returns the exclusive or of its 8-byte
// words (of its last bytes, filled up with zeros), so that no read can be left out.
uint64_t read_all(const void* data, int64_t bytes, int threads);

}  // namespace firstlm
