// Any bytes as a safetensors file: either a DataError, or tensors whose bytes can be read.
#include <cstdint>
#include <cstdlib>

#include "base/error.h"
#include "data/safetensors.h"

namespace sparsek {
namespace {

uint64_t checksum = 0;  // keeps the reads

void read_everything(std::span<const uint8_t> bytes) {
  const SafetensorsFile file = SafetensorsFile::from_bytes(bytes, "fuzz");
  for (const SafetensorsEntry& entry : file.entries()) {
    for (const uint8_t byte : entry.bytes) checksum += byte;
    if (file.find(entry.name) != &entry) std::abort();
    try {
      const WeightView weight = file.weight(entry.name);
      if (weight.num_elements() * layout(weight.type).block_bytes != static_cast<int64_t>(weight.bytes.size())) {
        std::abort();
      }
    } catch (const DataError&) {
    }
  }
}

}  // namespace
}  // namespace sparsek

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    sparsek::read_everything({data, size});
  } catch (const sparsek::DataError&) {
  }
  return 0;
}
