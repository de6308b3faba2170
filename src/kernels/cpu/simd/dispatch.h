// Which instruction set the CPU kernels run on, decided once from the processor and overridable by tests.
//
// A kernel `foo.simd.cc` is compiled three times, each time inside namespace sparsek::cpu::SPARSEK_ISA, and its plain
// `foo.cc` picks one:
//     using Kernel = void (*)(const FooParams&);
//     static constexpr PerIsa<Kernel> kKernels{&portable::foo, &avx2::foo, &avx512::foo};
//     void foo(const FooParams& params) { kKernels.active()(params); }
#pragma once

namespace sparsek::cpu {

enum class Isa { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };  // kAvx512: F, BW, VL, DQ, VBMI, VNNI and BF16

// The best set this processor has, or the one forced.
Isa active_isa();
// The best set this processor has.
Isa best_isa();
// Test hook: every later kernel call uses `isa`. Throws std::invalid_argument when the processor lacks it.
void force_isa(Isa isa);
const char* name(Isa isa);

template <class Function>
struct PerIsa {
  Function portable;
  Function avx2;
  Function avx512;
  Function active() const {
    switch (active_isa()) {
      case Isa::kAvx512:
        return avx512;
      case Isa::kAvx2:
        return avx2;
      default:
        return portable;
    }
  }
};

}  // namespace sparsek::cpu
