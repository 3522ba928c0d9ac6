#include "packing.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "../team.h"
#include "checks.h"

namespace firstlm {
namespace {

using at::Tensor;

constexpr int64_t kAlignment = 64;
constexpr int64_t kHugePage = 2 << 20;

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

Tensor empty_aligned(int64_t nbytes) {
  TORCH_CHECK_VALUE(nbytes >= 0, "nbytes is ", nbytes, "; expected 0 or more");
  if (nbytes == 0) return at::empty({0}, at::kByte);
  // Memory from mmap begins with a small page: a huge page more leaves room to begin with a huge
  // one.
  const int64_t mapped = nbytes + kHugePage;
  void* base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  const auto address = reinterpret_cast<uintptr_t>(base);
  void* data = reinterpret_cast<void*>((address + kHugePage - 1) / kHugePage * kHugePage);
#ifdef MADV_HUGEPAGE
  madvise(data, nbytes, MADV_HUGEPAGE);
#endif
  return at::from_blob(data, {nbytes}, [base, mapped](void*) { munmap(base, mapped); }, at::kByte);
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
  const Tensor packed = out ? *out : empty_aligned(shape.bytes());
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
  Tensor packed = empty_aligned(packed_columns_bytes(values, N, R));
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

void read_into(const std::string& path, int64_t offset, const Tensor& target, int num_threads) {
  TORCH_CHECK_VALUE(target.device().is_cpu() && target.is_contiguous(),
                    "target must be contiguous and on the CPU");
  TORCH_CHECK_VALUE(offset >= 0, "offset is ", offset, "; expected 0 or more");
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) throw std::system_error(errno, std::generic_category(), path);
  const auto nbytes = static_cast<int64_t>(target.nbytes());
  auto* to = static_cast<char*>(target.mutable_data_ptr());
  std::atomic<int> failure = 0;
  std::atomic<bool> ended = false;
  Team(num_threads).run([&](Share share) {
    auto [at, last] = share.of(nbytes);
    while (at < last && failure == 0) {
      const ssize_t got = pread(file, to + at, last - at, offset + at);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) failure = errno;
      if (got == 0) ended = true;
      if (got <= 0) return;
      at += got;
    }
  });
  close(file);
  if (failure != 0) throw std::system_error(failure, std::generic_category(), path);
  TORCH_CHECK_VALUE(!ended, path, " ends before byte ", offset + nbytes);
}

}  // namespace firstlm
