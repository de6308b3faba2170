#include "kernels/cpu/simd/dispatch.h"

#include <atomic>
#include <stdexcept>
#include <string>

namespace sparsek::cpu {
namespace {

Isa detect() {
  __builtin_cpu_init();
  // Everything that the files are compiled for (SPARSEK_ISA_AVX2_FLAGS): a hypervisor may hide any of it.
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  if (!has_avx2) return Isa::kPortable;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16")) {
    return Isa::kAvx512;
  }
  return Isa::kAvx2;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa active_isa() {
  return chosen().load(std::memory_order_relaxed);
}

void force_isa(Isa isa) {
  if (static_cast<int>(isa) > static_cast<int>(best_isa())) {
    throw std::invalid_argument(std::string("this processor has no ") + name(isa) + " (its best is " +
                                name(best_isa()) + ")");
  }
  chosen().store(isa, std::memory_order_relaxed);
}

const char* name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kPortable:
      return "portable";
  }
  return "?";
}

}  // namespace sparsek::cpu
