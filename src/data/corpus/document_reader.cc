#include "data/corpus/document_reader.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <utility>

#include "base/error.h"
#include "data/quote.h"

namespace sparsek {
namespace {

// A line is checked to its end before its text is given out, unless the text is longer than this.
constexpr size_t kHeldBytes = size_t{4} << 20;

// Newlines in the first `end` bytes of a file.
int64_t count_lines(const std::string& path, int64_t end) {
  std::ifstream file(path, std::ios::binary);
  std::vector<char> buffer(size_t{1} << 18);
  int64_t lines = 0;
  while (end > 0 && file) {
    file.read(buffer.data(), std::min<int64_t>(end, static_cast<int64_t>(buffer.size())));
    lines += std::count(buffer.begin(), buffer.begin() + file.gcount(), '\n');
    end -= file.gcount();
  }
  return lines;
}

}  // namespace

DocumentReader::DocumentReader(const std::vector<InputFile>& files, const WorkUnit& unit, DocumentOptions options,
                               std::atomic<int64_t>& bytes_done, std::optional<DocumentPiece::Position> start)
    : files_(files),
      unit_(unit),
      options_(std::move(options)),
      bytes_done_(bytes_done),
      file_(start ? start->record.file : unit.first_file),
      json_(options_.field) {
  if (start) open(file_, start);
}

void DocumentReader::open(int64_t file, const std::optional<DocumentPiece::Position>& start) {
  const InputFile& input = files_[static_cast<size_t>(file)];
  const bool is_range = unit_.end >= 0;
  const int64_t begin = is_range ? unit_.begin : 0, end = is_range ? unit_.end : input.size_bytes;
  record_ = InputRecord();
  record_.file = file;
  record_.begin = begin;
  record_.end = end;
  // The byte before the range tells whether a line begins at its begin.
  const int64_t first = std::max<int64_t>(begin - 1, 0);
  source_ = std::make_unique<ByteSource>(input, begin, end, bytes_done_);
  pending_ = {};
  offset_ = begin;
  line_ = 0;
  in_document_ = false;
  has_begun_text_ = false;
  if (first < begin) {
    std::ifstream before(input.path, std::ios::binary);
    before.seekg(first);
    if (before.get() != '\n') {  // the line that goes on here belongs to the range before
      while (!bytes().empty()) {
        const size_t at = pending_.find('\n');
        take(at == pending_.npos ? pending_.size() : at + 1);
        if (at != pending_.npos) {
          ++line_;
          break;
        }
      }
    }
  }
  if (!start) return;
  record_ = start->record;
  const bool has_lines = input.format == InputFormat::kJsonLines;
  while (offset_ < start->document_offset) {
    if (bytes().empty())
      throw_data("{}: expected {} bytes, found {}; it changed", input.path, start->document_offset, offset_);
    const auto wanted = static_cast<size_t>(start->document_offset - offset_);
    const std::string_view skipped = pending_.substr(0, std::min(wanted, pending_.size()));
    if (has_lines) line_ += std::count(skipped.begin(), skipped.end(), '\n');
    take(skipped.size());
  }
  to_discard_ = start->text_bytes;
}

std::string_view DocumentReader::bytes() {
  if (pending_.empty()) pending_ = source_->next();
  return pending_;
}

void DocumentReader::take(size_t count) {
  pending_.remove_prefix(count);
  offset_ += static_cast<int64_t>(count);
}

void DocumentReader::close_file() {
  record_.sha256 = source_->sha256();
  records_.push_back(std::move(record_));
  source_ = nullptr;
  ++file_;
}

bool DocumentReader::begin_document() {
  const bool has_lines = files_[static_cast<size_t>(file_)].format == InputFormat::kJsonLines;
  if (has_lines) {
    if (unit_.end >= 0 && offset_ >= unit_.end) return false;
    static constexpr std::string_view kByteOrderMark = "\xef\xbb\xbf";
    if (bytes().empty()) return false;
    if (offset_ == 0 && pending_.starts_with(kByteOrderMark)) take(kByteOrderMark.size());
    json_.reset();
  } else if (std::exchange(has_begun_text_, true)) {
    return false;  // a file is one document
  }
  in_document_ = true;
  has_ended_ = false;
  is_certain_ = !has_lines;
  document_offset_ = offset_;
  text_bytes_ = 0;
  text_.clear();
  text_begin_ = 0;
  return true;
}

void DocumentReader::refuse_line(const std::string& problem) const {
  const std::string& path = files_[static_cast<size_t>(file_)].path;
  const int64_t before = record_.begin > 0 ? count_lines(path, record_.begin) : 0;
  throw_data("{}, line {}: {}", path, before + line_ + 1, problem);
}

void DocumentReader::end_line() {
  if (!pending_.empty()) take(1);  // the newline
  ++line_;
  has_ended_ = true;
  is_certain_ = true;
}

void DocumentReader::read_text() {
  const std::string_view found = bytes();
  if (files_[static_cast<size_t>(file_)].format == InputFormat::kText) {
    text_ += found;
    has_ended_ = found.empty();
    take(found.size());
    return;
  }
  const size_t newline = found.find('\n');
  const std::string_view piece = found.substr(0, newline);
  std::optional<std::string> problem = json_.push(piece, text_);
  const bool is_end = newline != found.npos || found.empty();
  bool is_blank = false;
  if (!problem && is_end) {
    const JsonLine::End end = json_.finish();
    problem = end.problem;
    is_blank = end.content == JsonLine::Content::kBlank;
  }
  if (problem && (!options_.skip_bad_lines || is_certain_)) refuse_line(*problem);
  if (problem) {  // the rest of the line
    while (!bytes().empty() && pending_.find('\n') == pending_.npos) take(pending_.size());
    take(std::min(pending_.find('\n'), pending_.size()));
    ++record_.skipped_lines;
  } else {
    take(piece.size());
  }
  if (!is_end && !problem) {
    is_certain_ = is_certain_ || text_.size() - text_begin_ > kHeldBytes;
    return;
  }
  end_line();
  if (problem || is_blank) in_document_ = false;
}

bool DocumentReader::next(DocumentPiece& piece) {
  while (true) {
    if (in_document_) {
      // One byte more than a piece tells that it is not the last.
      while (in_document_ && !has_ended_ && (!is_certain_ || text_.size() - text_begin_ <= kPieceBytes)) {
        if (text_begin_ > 0) text_.erase(0, std::exchange(text_begin_, 0));
        read_text();
      }
      if (!in_document_) continue;
      const size_t size = std::min(text_.size() - text_begin_, kPieceBytes);
      piece.text = std::string_view(text_).substr(text_begin_, size);
      piece.is_first = text_bytes_ == 0;
      piece.is_last = has_ended_ && text_.size() - text_begin_ == size;
      piece.position = {document_offset_, text_bytes_, record_};
      text_begin_ += size;
      text_bytes_ += static_cast<int64_t>(size);
      if (piece.is_last) {
        in_document_ = false;
        ++(text_bytes_ > 0 ? record_.documents : record_.empty_documents);
      }
      if (to_discard_ > 0 && text_bytes_ <= to_discard_) {
        if (text_bytes_ == to_discard_) to_discard_ = 0;
        continue;
      }
      return true;
    }
    if (source_ == nullptr) {
      if (file_ == unit_.end_file) return false;
      open(file_, std::nullopt);
    }
    if (!begin_document()) close_file();
  }
}

}  // namespace sparsek
