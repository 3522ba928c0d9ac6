#ifdef FIRSTLM_ARM
#include <sys/auxv.h>
#endif

#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace firstlm {

extern const Kernels kernels_portable;
#ifdef FIRSTLM_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const LinearKernels linear_int8_avx512_vnni, linear_int4_avx512_vnni;
extern const LinearKernels linear_bf16_avx512_bf16;
extern void (*const attend_bf16_avx512_bf16)(const AttentionSplit& split);
#endif
#ifdef FIRSTLM_ARM
extern const Kernels kernels_neon;
#endif

#ifdef FIRSTLM_X86
namespace {

LinearKernels& linear(Kernels& table, Precision precision) {
  return table.linear[static_cast<int>(precision)];
}

Kernels make_avx512_vnni() {
  Kernels table = kernels_avx512;
  table.isa = "avx512_vnni";
  linear(table, Precision::kInt8) = linear_int8_avx512_vnni;
  linear(table, Precision::kInt4) = linear_int4_avx512_vnni;
  return table;
}

Kernels make_avx512_bf16() {
  Kernels table = make_avx512_vnni();
  table.isa = "avx512_bf16";
  linear(table, Precision::kBFloat16) = linear_bf16_avx512_bf16;
  table.attend[static_cast<int>(DType::kBFloat16)] = attend_bf16_avx512_bf16;
  return table;
}

}  // namespace
#endif

const std::vector<const Kernels*>& available_kernels() {
  static const std::vector<const Kernels*> tables = [] {
    std::vector<const Kernels*> found{&kernels_portable};
#ifdef FIRSTLM_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      found.push_back(&kernels_avx2);
    }
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      found.push_back(&kernels_avx512);
      if (__builtin_cpu_supports("avx512vnni")) {
        static const Kernels avx512_vnni = make_avx512_vnni();
        found.push_back(&avx512_vnni);
        if (__builtin_cpu_supports("avx512bf16")) {
          static const Kernels avx512_bf16 = make_avx512_bf16();
          found.push_back(&avx512_bf16);
        }
      }
    }
#endif
#ifdef FIRSTLM_ARM
    // Every Armv8 has NEON; its dot products of bytes came with 8.2, and Linux tells.
    constexpr unsigned long kHasDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
    if (getauxval(AT_HWCAP) & kHasDotProduct) found.push_back(&kernels_neon);
#endif
    return found;
  }();
  return tables;
}

const Kernels& find_kernels(const std::string& isa) {
  if (isa.empty()) return *available_kernels().back();
  std::string names;
  for (const Kernels* table : available_kernels()) {
    if (isa == table->isa) return *table;
    names += names.empty() ? table->isa : std::string(", ") + table->isa;
  }
  throw std::invalid_argument("FIRSTLM_ISA is '" + isa + "'; this machine and build have " + names);
}

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const char* isa = std::getenv("FIRSTLM_ISA");
    return find_kernels(isa ? isa : "");
  }();
  return chosen;
}

}  // namespace firstlm
