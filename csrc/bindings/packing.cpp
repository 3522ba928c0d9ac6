#include "packing.h"

#include <ATen/ops/empty.h>

#include <stdexcept>

#include "../team.h"
#include "checks.h"

namespace firstlm {
namespace {

using at::Tensor;

constexpr int64_t kAlignment = 64;

PackedMatrix shape_of(Precision precision, int64_t N, int64_t K) {
  TORCH_CHECK_VALUE(N > 0 && K > 0, "a matrix is [", N, ", ", K, "]; expected positive sizes");
  return {precision, N, K, nullptr};
}

void check_bytes(const std::string& name, const Tensor& packed, int64_t nbytes) {
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kByte, name, " is ", packed.scalar_type(),
                   "; expected packed weights, uint8");
  TORCH_CHECK_VALUE(packed.device().is_cpu() && packed.is_contiguous() && packed.numel() == nbytes,
                    name, " has shape ", packed.sizes(), "; expected ", nbytes,
                    " contiguous bytes on the CPU");
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % kAlignment == 0, name,
                    " does not begin at a multiple of ", kAlignment, " bytes");
}

}  // namespace

Precision parse_precision(const std::string& name) {
  if (name == "float32") return Precision::kFloat32;
  if (name == "bfloat16") return Precision::kBFloat16;
  if (name == "int8") return Precision::kInt8;
  if (name == "int4") return Precision::kInt4;
  TORCH_CHECK_VALUE(false, "precision is '", name,
                    "'; expected 'float32', 'bfloat16', 'int8' or 'int4'");
}

int64_t packed_bytes(const std::string& precision, int64_t N, int64_t K) {
  return shape_of(parse_precision(precision), N, K).bytes();
}

Tensor pack(const Tensor& weights, const std::string& precision, int num_threads,
            const std::optional<Tensor>& out) {
  TORCH_CHECK_VALUE(weights.dim() == 2, "weights have shape ", weights.sizes(),
                    "; expected [N, K]");
  TORCH_CHECK_VALUE(weights.device().is_cpu(), "weights are on ", weights.device(),
                    "; expected the CPU");
  const DType dtype = parse_dtype("weights", weights.scalar_type());
  const PackedMatrix shape = shape_of(parse_precision(precision), weights.size(0), weights.size(1));
  const Tensor dense = with_dense_elements(weights);
  const Tensor packed = out ? *out : at::empty({shape.bytes()}, at::kByte);
  check_bytes("out", packed, shape.bytes());
  auto* to = static_cast<std::byte*>(packed.mutable_data_ptr());
  Team(num_threads).run([&](Share share) {
    const auto [first, last] = share.of(shape.panels());
    pack_panels(shape, dtype, dense.const_data_ptr(), dense.stride(0), first, last, to);
  });
  return packed;
}

Tensor unpack(const Tensor& packed, const std::string& precision, int64_t N, int64_t K) {
  const PackedMatrix matrix = packed_matrix("packed", packed, parse_precision(precision), N, K);
  Tensor weights = at::empty({N, K}, at::kFloat);
  auto* to = weights.mutable_data_ptr<float>();
  for (int64_t n = 0; n < N; ++n) unpack_row(matrix, n, to + n * K);
  return weights;
}

PackedMatrix packed_matrix(const std::string& name, const Tensor& packed, Precision precision,
                           int64_t N, int64_t K) {
  PackedMatrix matrix = shape_of(precision, N, K);
  check_bytes(name, packed, matrix.bytes());
  matrix.data = static_cast<const std::byte*>(packed.const_data_ptr());
  return matrix;
}

Tensor pack_columns(const Tensor& B) {
  TORCH_CHECK_VALUE(B.dim() == 2 && B.size(1) % 2 == 0, "B has shape ", B.sizes(),
                    "; expected [N, R], R even");
  TORCH_CHECK_TYPE(B.scalar_type() == at::kFloat && B.device().is_cpu(), "B is ", B.scalar_type(),
                   " on ", B.device(), "; expected float32 on the CPU");
  const Tensor dense = B.contiguous();
  const auto* values = dense.const_data_ptr<float>();
  const int64_t N = B.size(0), R = B.size(1);
  Tensor packed = at::empty({packed_columns_bytes(values, N, R)}, at::kByte);
  firstlm::pack_columns(values, N, R, static_cast<std::byte*>(packed.mutable_data_ptr()));
  return packed;
}

LowRank packed_low_rank(const std::string& name, const Tensor& A, const Tensor& B,
                        const PackedMatrix& beside) {
  const Precision precision =
      beside.precision == Precision::kFloat32 ? Precision::kFloat32 : Precision::kBFloat16;
  const int64_t panel = shape_of(precision, kPanelRows, beside.K).bytes();
  const int64_t R = static_cast<int64_t>(A.nbytes()) / panel * kPanelRows;
  TORCH_CHECK_VALUE(R > 0, name, ".lora_A has ", A.nbytes(), " bytes; expected a multiple of ",
                    panel);
  const auto bytes = static_cast<int64_t>(B.nbytes());
  check_bytes(name + ".lora_B", B, bytes);
  const auto* data = static_cast<const std::byte*>(B.const_data_ptr());
  try {
    return {.A = packed_matrix(name + ".lora_A", A, precision, R, beside.K),
            .B = packed_columns(data, bytes, beside.N, R)};
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, name, ".lora_B ", error.what());
  }
}

}  // namespace firstlm
