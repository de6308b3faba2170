// Any bytes as a GGUF file: either a DataError, or metadata, tensors and a tokenizer that can all be read.
#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "base/error.h"
#include "data/gguf.h"
#include "data/tokenizer.h"

namespace sparsek {
namespace {

template <class Action>
void allow_data_error(const Action& action) {
  try {
    action();
  } catch (const DataError&) {
  }
}

uint64_t checksum = 0;  // keeps the reads

void read_everything(std::span<const uint8_t> bytes) {
  const GgufFile file = GgufFile::from_bytes(bytes, "fuzz");
  for (const WeightView& tensor : file.tensors()) {
    for (const uint8_t byte : tensor.bytes) checksum += byte;
    if (tensor.num_elements() / layout(tensor.type).block_elements * layout(tensor.type).block_bytes !=
        static_cast<int64_t>(tensor.bytes.size())) {
      std::abort();
    }
    if (file.find_tensor(tensor.name) != &tensor) std::abort();
  }
  for (const std::string_view key : file.keys()) {
    allow_data_error([&] { checksum += static_cast<uint64_t>(file.get_int(key)); });
    allow_data_error([&] { checksum += file.get_float(key) > 0; });
    allow_data_error([&] { checksum += file.get_bool(key); });
    allow_data_error([&] { checksum += file.get_string(key).size(); });
    allow_data_error([&] {
      for (const std::string_view text : file.get_strings(key)) {
        checksum += static_cast<uint64_t>(std::count(text.begin(), text.end(), 'a'));
      }
    });
    allow_data_error([&] { checksum += file.get_ints(key).size(); });
    allow_data_error([&] { checksum += file.get_floats(key).size(); });
  }
  const Tokenizer tokenizer = Tokenizer::from_gguf(file);
  const auto ids = tokenizer.encode("The cat's 123  <|im_start|>\n\xff\xf0\x9f\x98\x80", SpecialTokens::kParse);
  checksum += tokenizer.decode(ids).size();
}

}  // namespace
}  // namespace sparsek

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  sparsek::allow_data_error([&] { sparsek::read_everything({data, size}); });
  return 0;
}
