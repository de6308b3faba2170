// The documents of one unit of work, in pieces of bounded size, from any piece on.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "data/corpus/byte_source.h"
#include "data/corpus/inputs.h"
#include "data/corpus/json_line.h"

namespace sparsek {

// What became of one input file, or of one unit's range of its lines.
struct InputRecord {
  int64_t file = 0;            // index
  int64_t begin = 0, end = 0;  // bytes of the file
  int64_t documents = 0;       // with text
  int64_t empty_documents = 0;
  int64_t skipped_lines = 0;  // no JSON, or no such field
  std::string sha256;         // of bytes [begin, end) as they lie on the disk
};

struct DocumentPiece {
  // Where a reader of the same unit goes on with this piece.
  struct Position {
    int64_t document_offset = 0;  // in the file, unpacked: where the document's text or line begins
    int64_t text_bytes = 0;       // of the document's text that came before
    InputRecord record;           // of the file up to here, without the hash
  };
  std::string_view text;  // kPieceBytes, but for a document's last; valid until the next call
  bool is_first = false, is_last = false;
  Position position;
};

struct DocumentOptions {
  std::string field = "text";   // of JSON lines
  bool skip_bad_lines = false;  // count them instead of throwing
};

class DocumentReader {
 public:
  static constexpr size_t kPieceBytes = size_t{1} << 16;

  // Throws DataError naming the file, and the line where it has lines.
  DocumentReader(const std::vector<InputFile>& files, const WorkUnit& unit, DocumentOptions options,
                 std::atomic<int64_t>& bytes_done, std::optional<DocumentPiece::Position> start = {});

  bool next(DocumentPiece& piece);  // false at the end of the unit
  // The files finished since the last call.
  std::vector<InputRecord> take_records() { return std::exchange(records_, {}); }

 private:
  void open(int64_t file, const std::optional<DocumentPiece::Position>& start);
  bool begin_document();  // false at the end of the file
  void read_text();       // more of it into text_
  void end_line();
  void close_file();
  std::string_view bytes();  // those at hand; empty at the end of the file
  void take(size_t count);   // of bytes()
  [[noreturn]] void refuse_line(const std::string& problem) const;

  const std::vector<InputFile>& files_;
  WorkUnit unit_;
  DocumentOptions options_;
  std::atomic<int64_t>& bytes_done_;
  int64_t file_;  // being read, or next
  std::unique_ptr<ByteSource> source_;
  std::string_view pending_;  // bytes of the source not yet taken
  int64_t offset_ = 0;        // of pending_ in the unpacked file
  int64_t line_ = 0;          // lines begun since the unit's begin in this file
  JsonLine json_;
  InputRecord record_;
  std::vector<InputRecord> records_;

  bool has_begun_text_ = false;                   // the one document of a file without lines
  bool in_document_ = false, has_ended_ = false;  // all its text is in text_
  bool is_certain_ = false;  // its line is right as far as it will be looked at before text is given out
  int64_t document_offset_ = 0, text_bytes_ = 0;  // given out
  int64_t to_discard_ = 0;                        // text that was given out before the start
  std::string text_;                              // not given out; begins at text_begin_
  size_t text_begin_ = 0;
};

}  // namespace sparsek
