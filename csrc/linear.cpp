#include "linear.h"

namespace firstlm {
namespace {

const LinearKernels& linear_kernels(const Kernels& kernels, Precision precision) {
  return kernels.linear[static_cast<int>(precision)];
}

}  // namespace

int64_t input_bytes(const Kernels& kernels, Precision precision, int64_t M, int64_t K) {
  return M * linear_kernels(kernels, precision).token_bytes(K);
}

void prepare_input(const Kernels& kernels, Precision precision, const float* x, int64_t stride_M,
                   int64_t M, int64_t K, int64_t first, int64_t last, std::byte* to) {
  linear_kernels(kernels, precision).prepare({x, stride_M, M, K, first, last, to});
}

void multiply(const Kernels& kernels, const PackedMatrix& matrix, const std::byte* input, int64_t M,
              int64_t first, int64_t last, float* y, int64_t stride_y) {
  linear_kernels(kernels, matrix.precision).multiply({matrix, input, M, first, last, y, stride_y});
}

}  // namespace firstlm
