// Which files a corpus is, and how the work on them is cut into units.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace sparsek {

enum class InputFormat { kText, kJsonLines };  // a file is a document; a line is one

struct InputFile {
  std::string path;
  int64_t size_bytes = 0;  // on the disk
  int64_t modified_ns = 0;
  InputFormat format = InputFormat::kText;
  bool is_gzip = false;
};

struct InputOptions {
  std::vector<std::string> paths;     // files, folders (with what is in them), and patterns such as "data/*.txt"
  std::vector<std::string> suffixes;  // endings read as text beside .txt, .md and .rst, as ".py"
};

// In the order of `paths`; what a folder or a pattern holds is ordered by the bytes of its path, so that machine and
// locale do not matter. A file named twice is read once. In folders, other endings and names that begin with a dot are
// left out. Throws DataError for what is not there, cannot be read, or has an ending nobody knows.
std::vector<InputFile> find_inputs(const InputOptions& options);

// What one thread works on, and the begin of a new shard: files in order, or the lines of one file that begin in
// [begin, end). Depends on the files' sizes alone.
struct WorkUnit {
  int64_t first_file, end_file;  // indices, the second excluded
  int64_t begin = 0, end = -1;   // bytes of the one file; end -1: whole files
};
std::vector<WorkUnit> plan_units(const std::vector<InputFile>& files, int64_t shard_bytes);

}  // namespace sparsek
