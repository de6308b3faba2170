// Where a command computes.
#pragma once
#include <c10/core/Device.h>

#include <string>

namespace sparsek::cli {

// "cpu", "cuda" or "cuda:N". Throws UsageError saying what is missing and what to do: another text, a torch without
// CUDA, no such GPU, a program built without the CUDA kernels.
at::Device open_device(const std::string& text);

}  // namespace sparsek::cli
