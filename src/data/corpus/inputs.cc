#include "data/corpus/inputs.h"

#include <glob.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <optional>
#include <string_view>
#include <system_error>
#include <unordered_set>

#include "base/error.h"
#include "data/quote.h"

namespace sparsek {
namespace fs = std::filesystem;
namespace {

constexpr int64_t kGzipRatio = 4;  // text is expected to be this much larger than its .gz

struct Kind {
  InputFormat format;
  bool is_gzip;
};

std::optional<Kind> kind_of(std::string_view path, const std::vector<std::string>& suffixes) {
  const bool is_gzip = path.ends_with(".gz");
  if (is_gzip) path.remove_suffix(3);
  if (path.ends_with(".jsonl")) return Kind{InputFormat::kJsonLines, is_gzip};
  const auto ends_so = [path](std::string_view suffix) { return path.ends_with(suffix); };
  if (ends_so(".txt") || ends_so(".md") || ends_so(".rst") || std::any_of(suffixes.begin(), suffixes.end(), ends_so)) {
    return Kind{InputFormat::kText, is_gzip};
  }
  return std::nullopt;
}

class Finder {
 public:
  explicit Finder(const InputOptions& options) : options_(options) {}

  void add(const std::string& path) {
    if (path.empty()) throw_data("expected the path of a file or folder, found an empty path");
    struct stat info{};
    if (::stat(path.c_str(), &info) == 0) return add_existing(path, info);
    const int error = errno;
    if (path.find_first_of("*?[") == path.npos) throw_data("{}: cannot open: {}", path, std::strerror(error));
    glob_t found{};
    const int result = ::glob(path.c_str(), GLOB_NOSORT, nullptr, &found);
    std::vector<std::string> matches(found.gl_pathv, found.gl_pathv + (result == 0 ? found.gl_pathc : 0));
    ::globfree(&found);
    if (matches.empty()) throw_data("{}: expected files that match this pattern, found none", path);
    std::sort(matches.begin(), matches.end());
    for (const std::string& match : matches) {
      if (::stat(match.c_str(), &info) != 0) throw_data("{}: cannot open: {}", match, std::strerror(errno));
      // A pattern may match what is no text, as a folder may hold it.
      if (S_ISDIR(info.st_mode) || kind_of(match, options_.suffixes)) add_existing(match, info);
    }
  }
  std::vector<InputFile> take() { return std::move(files_); }

 private:
  void add_existing(const std::string& path, const struct stat& info) {
    if (S_ISDIR(info.st_mode)) return add_folder(path);
    const std::optional<Kind> kind = kind_of(path, options_.suffixes);
    if (!kind) {
      throw_data(
          "{}: expected a file that ends in .txt, .md, .rst or .jsonl (or one of these and .gz), found {}; other "
          "endings of texts are named with --suffix",
          path, in_quotes(fs::path(path).filename().string()));
    }
    if (!S_ISREG(info.st_mode)) {
      throw_data("{}: expected a regular file, which an interrupted run can read again, found a pipe or device", path);
    }
    if (::access(path.c_str(), R_OK) != 0) throw_data("{}: cannot open: {}", path, std::strerror(errno));
    if (!seen_.insert(fs::path(path).lexically_normal().string()).second) return;
    files_.push_back({path, info.st_size, int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec,
                      kind->format, kind->is_gzip});
  }

  void add_folder(const std::string& folder) {
    std::vector<std::string> paths;
    try {
      for (auto it = fs::recursive_directory_iterator(folder); it != fs::recursive_directory_iterator(); ++it) {
        const std::string name = it->path().filename().string();
        if (name.starts_with('.')) {
          if (it->is_directory()) it.disable_recursion_pending();
        } else if (kind_of(name, options_.suffixes) && !it->is_directory()) {
          paths.push_back(it->path().string());
        }
      }
    } catch (const fs::filesystem_error& error) {
      throw_data("{}: cannot read the folder: {}", folder, error.code().message());
    }
    std::sort(paths.begin(), paths.end());
    for (const std::string& path : paths) {
      struct stat info{};
      if (::stat(path.c_str(), &info) != 0) throw_data("{}: cannot open: {}", path, std::strerror(errno));
      add_existing(path, info);
    }
  }

  const InputOptions& options_;
  std::vector<InputFile> files_;
  std::unordered_set<std::string> seen_;
};

}  // namespace

std::vector<InputFile> find_inputs(const InputOptions& options) {
  Finder finder(options);
  for (const std::string& path : options.paths) finder.add(path);
  std::vector<InputFile> files = finder.take();
  if (files.empty()) {
    throw_data("{}: expected files that end in .txt, .md, .rst or .jsonl (or one of these and .gz), found none",
               options.paths.empty() ? "the corpus" : options.paths.front());
  }
  return files;
}

std::vector<WorkUnit> plan_units(const std::vector<InputFile>& files, int64_t shard_bytes) {
  std::vector<WorkUnit> units;
  int64_t open_bytes = 0;  // of the last unit, if files may still join it
  bool is_open = false;
  for (int64_t i = 0; i < static_cast<int64_t>(files.size()); ++i) {
    const InputFile& file = files[static_cast<size_t>(i)];
    if (file.format == InputFormat::kJsonLines && !file.is_gzip && file.size_bytes > shard_bytes) {
      for (int64_t begin = 0; begin < file.size_bytes; begin += shard_bytes) {
        units.push_back({i, i + 1, begin, std::min(begin + shard_bytes, file.size_bytes)});
      }
      is_open = false;
      continue;
    }
    const int64_t text_bytes = file.is_gzip ? file.size_bytes * kGzipRatio : file.size_bytes;
    if (is_open && open_bytes + text_bytes <= shard_bytes) {
      units.back().end_file = i + 1;
      open_bytes += text_bytes;
    } else {
      units.push_back({i, i + 1});
      open_bytes = text_bytes;
      is_open = true;
    }
  }
  return units;
}

}  // namespace sparsek
