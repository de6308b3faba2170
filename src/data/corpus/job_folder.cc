#include "data/corpus/job_folder.h"

#include <algorithm>
#include <filesystem>
#include <system_error>

#include "base/atomic_file.h"
#include "base/error.h"
#include "base/mapped_file.h"
#include "data/json_file.h"
#include "data/quote.h"
#include "data/shards/format.h"

namespace sparsek {
namespace fs = std::filesystem;
using nlohmann::json;
using nlohmann::ordered_json;

namespace {

constexpr const char* kInputsName = "inputs.ndjson";

// Paths and names may hold bytes that are not UTF-8.
std::string dump(const ordered_json& value, int indent = -1) {
  return value.dump(indent, ' ', false, json::error_handler_t::replace) + "\n";
}

ordered_json to_json(const ShardSummary& shard, const std::string& file) {
  return {{"file", file},
          {"tokens", shard.num_tokens},
          {"documents", shard.num_documents},
          {"bytes", shard.size_bytes},
          {"sha256", shard.sha256}};
}

ordered_json to_json(const InputRecord& record) {
  return {{"file", record.file},
          {"begin", record.begin},
          {"end", record.end},
          {"documents", record.documents},
          {"empty_documents", record.empty_documents},
          {"skipped_lines", record.skipped_lines},
          {"sha256", record.sha256}};
}

InputRecord record_from(const json& value) {
  return {value.at("file"),      value.at("begin"),           value.at("end"),
          value.at("documents"), value.at("empty_documents"), value.at("skipped_lines"),
          value.at("sha256")};
}

std::string to_hex(std::string_view bytes) {
  std::string text;
  text.reserve(bytes.size() * 2);
  for (const char c : bytes) {
    static constexpr const char* kDigits = "0123456789abcdef";
    text += kDigits[static_cast<unsigned char>(c) >> 4];
    text += kDigits[static_cast<unsigned char>(c) & 15];
  }
  return text;
}

std::string from_hex(const std::string& text) {
  std::string bytes;
  for (size_t i = 0; i + 1 < text.size(); i += 2) bytes += static_cast<char>(std::stoi(text.substr(i, 2), nullptr, 16));
  return bytes;
}

// A file's content as JSON; order and values as written.
ordered_json read_ordered(const std::string& path) {
  (void)read_json_object(path);  // its checks and messages
  const MappedFile file(path);
  return ordered_json::parse(file.bytes().begin(), file.bytes().end());
}

}  // namespace

JobFolder::JobFolder(std::string path, ordered_json job)
    : path_(std::move(path)), progress_path_(path_ + "/progress"), job_(std::move(job)) {
  if (path_.empty()) throw_data("expected the path of a folder to write, found an empty path");
  lock_.emplace(path_);
  try {
    const std::string manifest = path_ + "/" + kManifestName, begun = progress_path_ + "/job.json";
    if (fs::exists(manifest)) {
      const ordered_json found = read_ordered(manifest);
      ordered_json known = found.value("job", ordered_json::object());
      job_["inputs"].erase("modified");  // what is finished does not age
      check_job(known);
      is_complete_ = true;
      fs::remove_all(progress_path_);
      return;
    }
    if (fs::exists(begun)) {
      bool has_parts = false;
      for (const auto& entry : fs::directory_iterator(progress_path_)) {
        const std::string name = entry.path().filename().string();
        has_parts = has_parts || (name != "job.json" && name.ends_with(".json"));
      }
      remove_leftovers(/*with_shards=*/!has_parts);
      if (has_parts) {
        check_job(read_ordered(begun));
        return;
      }
    } else {
      for (const auto& entry : fs::directory_iterator(path_)) {
        const std::string name = entry.path().filename().string();
        if (name == "progress" || name.starts_with('.')) continue;
        throw_data("{}: expected a new or empty folder, or one of an earlier run, found {} in it", path_,
                   in_quotes(name));
      }
    }
    fs::create_directories(progress_path_);
    write_file_atomically(begun, dump(job_, 1));
    sync_folder(path_);
  } catch (const fs::filesystem_error& problem) {
    throw WriteError(fmt::format("{}: cannot use the folder: {}", path_, problem.code().message()));
  }
}

void JobFolder::check_job(const ordered_json& found) const {
  const auto compare = [&](const ordered_json& mine, const ordered_json& theirs, const std::string& name) {
    if (mine == theirs) return;
    throw_data(
        "{}: expected shards of this run, found those of another: its {} is {}, this one's {}; give another --out, "
        "or remove that folder",
        path_, name, in_quotes(theirs.dump()), in_quotes(mine.dump()));
  };
  if (!found.is_object()) throw_data("{}: expected what an earlier run was of, found a damaged record", path_);
  for (const auto& [key, value] : job_.items()) {
    const ordered_json theirs = found.value(key, ordered_json());
    if (!value.is_object() || !theirs.is_object()) {
      compare(value, theirs, key);
      continue;
    }
    for (const auto& [inner, mine] : value.items())
      compare(mine, theirs.value(inner, ordered_json()), key + " " + inner);
  }
}

void JobFolder::remove_leftovers(bool with_shards) const {
  for (const std::string& folder : {path_, progress_path_}) {
    std::vector<fs::path> old;
    for (const auto& entry : fs::directory_iterator(folder)) {
      const std::string name = entry.path().filename().string();
      const bool is_shard = name.starts_with("shard-") && name.ends_with(".tokens");
      if (name.ends_with(AtomicFile::kSuffix) || (with_shards && is_shard)) old.push_back(entry.path());
    }
    for (const fs::path& path : old) fs::remove(path);
  }
}

std::string JobFolder::shard_path(int64_t unit, int64_t part) const {
  return fmt::format("{}/shard-{:06}-{:04}.tokens", path_, unit, part);
}

std::string JobFolder::part_path(int64_t unit, int64_t part) const {
  return fmt::format("{}/{:06}-{:04}.json", progress_path_, unit, part);
}

std::optional<UnitPart> JobFolder::find_part(int64_t unit, int64_t part) const {
  const std::string path = part_path(unit, part);
  std::error_code error;
  if (!fs::exists(path, error)) return std::nullopt;
  const json value = read_json_object(path);
  UnitPart found;
  try {
    found.text_bytes = value.at("text_bytes");
    for (const json& record : value.at("records")) found.records.push_back(record_from(record));
    if (const json& shard = value.at("shard"); !shard.is_null()) {
      found.shard = ShardSummary{shard.at("tokens"), shard.at("documents"), shard.at("bytes"), shard.at("sha256")};
    }
    if (const json& next = value.at("next"); !next.is_null()) {
      found.next = UnitPart::Next{{next.at("document_offset"), next.at("text_bytes"), record_from(next.at("record"))},
                                  from_hex(next.at("encoder"))};
    }
  } catch (const std::exception&) {  // a field that is missing, or of another type
    throw_data("{}: expected the record of a finished part, found a damaged one; remove {} and begin again", path,
               path_);
  }
  if (found.shard) {
    const auto size = fs::file_size(shard_path(unit, part), error);
    if (error || static_cast<int64_t>(size) != found.shard->size_bytes) return std::nullopt;  // made again
  }
  return found;
}

void JobFolder::add_part(int64_t unit, int64_t part, const UnitPart& value) const {
  ordered_json records = ordered_json::array(), shard, next;
  for (const InputRecord& record : value.records) records.push_back(to_json(record));
  if (value.shard) shard = to_json(*value.shard, fs::path(shard_path(unit, part)).filename().string());
  if (value.next) {
    next = {{"document_offset", value.next->position.document_offset},
            {"text_bytes", value.next->position.text_bytes},
            {"record", to_json(value.next->position.record)},
            {"encoder", to_hex(value.next->encoder)}};
  }
  write_file_atomically(
      part_path(unit, part),
      dump({{"shard", shard}, {"text_bytes", value.text_bytes}, {"records", records}, {"next", next}}));
}

TokenizeTotals JobFolder::finish(const std::vector<InputFile>& files, int64_t num_units) {
  TokenizeTotals totals;
  totals.input_files = static_cast<int64_t>(files.size());
  for (const InputFile& file : files) totals.input_bytes += file.size_bytes;
  ordered_json shards = ordered_json::array();
  AtomicFile inputs(path_ + "/" + kInputsName);
  Sha256 inputs_hash;
  for (int64_t unit = 0; unit < num_units; ++unit) {
    for (int64_t part = 0;; ++part) {
      const std::optional<UnitPart> found = find_part(unit, part);
      if (!found) throw_data("{}: expected part {} of unit {}, found none; run the command again", path_, part, unit);
      totals.text_bytes += found->text_bytes;
      if (found->shard) {
        shards.push_back(to_json(*found->shard, fs::path(shard_path(unit, part)).filename().string()));
        totals.tokens += found->shard->num_tokens;
        totals.shards += 1;
      }
      for (const InputRecord& record : found->records) {
        const InputFile& file = files.at(static_cast<size_t>(record.file));
        ordered_json line{{"path", file.path}, {"bytes", file.size_bytes}};
        if (record.begin > 0 || record.end != file.size_bytes) {
          line["begin"] = record.begin;
          line["end"] = record.end;
        }
        line.update({{"documents", record.documents},
                     {"empty_documents", record.empty_documents},
                     {"skipped_lines", record.skipped_lines},
                     {"sha256", record.sha256}});
        const std::string text = dump(line);
        inputs.write(text);
        inputs_hash.update(text);
        totals.documents += record.documents;
        totals.empty_documents += record.empty_documents;
        totals.skipped_lines += record.skipped_lines;
      }
      if (!found->next) break;
    }
  }
  if (totals.documents == 0) {
    fs::remove_all(progress_path_);
    throw_data(
        "{}: expected at least one document with text, found none in {} files ({} empty documents, {} lines skipped)",
        files.front().path, files.size(), totals.empty_documents, totals.skipped_lines);
  }
  inputs.commit();
  ordered_json job = job_;
  job["inputs"].erase("modified");
  const ordered_json manifest{{"format", kManifestFormat},
                              {"tokens", totals.tokens},
                              {"documents", totals.documents},
                              {"empty_documents", totals.empty_documents},
                              {"skipped_lines", totals.skipped_lines},
                              {"text_bytes", totals.text_bytes},
                              {"job", job},
                              {"inputs", {{"file", kInputsName}, {"sha256", inputs_hash.hex()}}},
                              {"shards", shards}};
  write_file_atomically(path_ + "/" + kManifestName, dump(manifest, 1));
  fs::remove_all(progress_path_);
  return totals;
}

TokenizeTotals JobFolder::complete_totals() const {
  const std::string path = path_ + "/" + kManifestName;
  const json manifest = read_json_object(path);
  try {
    TokenizeTotals totals;
    totals.tokens = manifest.at("tokens");
    totals.documents = manifest.at("documents");
    totals.empty_documents = manifest.at("empty_documents");
    totals.skipped_lines = manifest.at("skipped_lines");
    totals.text_bytes = manifest.at("text_bytes");
    totals.shards = static_cast<int64_t>(manifest.at("shards").size());
    totals.input_files = manifest.at("job").at("inputs").at("files");
    totals.input_bytes = manifest.at("job").at("inputs").at("bytes");
    return totals;
  } catch (const json::exception&) {  // a field that is missing, or of another type
    throw_data("{}: expected the manifest of token shards, found a damaged one", path);
  }
}

}  // namespace sparsek
