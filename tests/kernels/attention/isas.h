// The instruction sets that this processor can be made to use.
#pragma once
#include <vector>

#include "kernels/cpu/simd/dispatch.h"

namespace sparsek::test {

inline std::vector<cpu::Isa> isas() {
  std::vector<cpu::Isa> all;
  for (cpu::Isa isa : {cpu::Isa::kPortable, cpu::Isa::kAvx2, cpu::Isa::kAvx512}) {
    if (static_cast<int>(isa) <= static_cast<int>(cpu::best_isa())) all.push_back(isa);
  }
  return all;
}

}  // namespace sparsek::test
