// The output folder of a tokenize run while it runs: what was begun, which parts of which units are finished, and the
// manifest at the end. Everything is written under another name and renamed, so that at any moment the folder says
// what is so.
//
//   progress/job.json          what the run is of: inputs, options, tokenizer
//   progress/000012-0003.json  that part 3 of unit 12 is finished, and where part 4 begins
//   shard-000012-0003.tokens   its tokens (no file for a part without documents)
//   inputs.ndjson, manifest.json   at the end, when progress/ goes
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "base/folder_lock.h"
#include "data/corpus/document_reader.h"
#include "data/corpus/inputs.h"
#include "data/corpus/tokenize.h"
#include "data/shards/writer.h"

namespace sparsek {

// A finished part of a unit: one shard.
struct UnitPart {
  // Where the next part begins.
  struct Next {
    DocumentPiece::Position position;
    std::string encoder;  // Encoder::save()
  };
  std::optional<ShardSummary> shard;  // none: no documents
  int64_t text_bytes = 0;
  std::vector<InputRecord> records;  // of files that ended in this part
  std::optional<Next> next;          // none: the unit is finished
};

class JobFolder {
 public:
  // `job` is compared with that of an earlier run. Throws DataError saying what differs, or that the folder holds
  // something else, or is in use.
  JobFolder(std::string path, nlohmann::ordered_json job);

  bool is_complete() const { return is_complete_; }
  TokenizeTotals complete_totals() const;  // from the manifest
  std::string shard_path(int64_t unit, int64_t part) const;
  // Part `part` of unit `unit`, if it is finished and its shard is there.
  std::optional<UnitPart> find_part(int64_t unit, int64_t part) const;
  void add_part(int64_t unit, int64_t part, const UnitPart& value) const;
  // Writes inputs.ndjson and the manifest from the parts of all units, and removes what only a run needs. Throws
  // DataError when there is no document.
  TokenizeTotals finish(const std::vector<InputFile>& files, int64_t num_units);

 private:
  std::string part_path(int64_t unit, int64_t part) const;
  void check_job(const nlohmann::ordered_json& found) const;
  void remove_leftovers(bool with_shards) const;

  std::string path_, progress_path_;
  nlohmann::ordered_json job_;
  std::optional<FolderLock> lock_;
  bool is_complete_ = false;
};

}  // namespace sparsek
