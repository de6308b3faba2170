// Any text as a tokenizer.json: either a DataError, or a tokenizer that encodes and decodes.
#include <cstdint>
#include <cstdlib>
#include <string>

#include "base/error.h"
#include "data/chat_template.h"
#include "data/tokenizer.h"

namespace sparsek {
namespace {

void use(std::string_view json) {
  const Tokenizer tokenizer = Tokenizer::from_json(json, "", "fuzz");
  for (const auto special : {SpecialTokens::kAsText, SpecialTokens::kParse}) {
    const auto ids = tokenizer.encode("The cat's 123  <|im_start|>\n\xff\xf0\x9f\x98\x80 e\u0301", special);
    for (const TokenId id : ids) {
      if (id < 0 || id >= tokenizer.vocab_size()) std::abort();
    }
    tokenizer.decode(ids);
  }
}

}  // namespace
}  // namespace sparsek

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    sparsek::use(text);
  } catch (const sparsek::DataError&) {
  }
  try {
    sparsek::ChatTemplate::recognise(text, "fuzz").render({});
  } catch (const sparsek::DataError&) {
  }
  return 0;
}
