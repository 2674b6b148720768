// Records of CSV text by RFC 4180, a block of text at a time: the wanted fields of each, and where the rules are
// broken.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace eventkern {

// What a field is in the text, without the quotes around it.
struct CsvField {
  const char* begin;
  const char* end;
  int64_t number;     // in the record, from 0
  int64_t line;       // on which it begins
  int64_t last_line;  // on which it ends: another one where a quoted field holds line ends
  bool has_doubled_quotes;
};

enum class CsvFault {
  kNumFields,    // another number of fields than the header has
  kNeverClosed,  // a quote opens a field, and none closes it
  kAfterQuote,   // the quote that closes a field stands before neither a comma nor a line end
  kSwallowed,    // a quoted field holds a line that reads as a record of its own
};

struct CsvMistake {
  CsvFault fault;
  int64_t row;         // good records before it, of this block
  int64_t line;        // of the record (kNumFields), else of the quote that opens
  int64_t number;      // how many fields (kNumFields), else which field the quote opens, from 0
  int64_t other_line;  // of the closing quote (kAfterQuote), of the line that reads as a record (kSwallowed)
};

// The wanted fields of one column, one after the other: field i is text[offsets[i], offsets[i + 1]).
struct CsvColumn {
  std::vector<int32_t> offsets{0};
  std::string text;
};

// A quote is special where a field begins; anywhere else in a field that did not begin with one it is text. Lines end
// with \n, \r\n or \r, and blank ones hold no record. After a broken quote reading goes on at the next line.
class CsvReader {
 public:
  // A quote that nothing closes within `most_bytes` counts as never closed.
  explicit CsvReader(int64_t most_bytes) : most_bytes_(most_bytes) {}

  // Each reads from the beginning of a block and returns how much of it was passed: a record that the block does not
  // hold to its end is left over, unless the block is the last. read_header passes the first record alone.
  int64_t read_header(std::string_view block, bool is_last);
  int64_t read(std::string_view block, bool is_last);

  // The fields that read() delivers; the field of the time tells a record from text that has as many commas.
  void select(const std::vector<int64_t>& wanted, int64_t time_field);

  const std::vector<std::string>& header() const { return header_; }
  const std::vector<CsvColumn>& columns() const { return columns_; }
  const std::vector<int64_t>& lines() const { return lines_; }  // where each record begins, from 1
  const std::vector<CsvMistake>& mistakes() const { return mistakes_; }
  int64_t next_line() const { return line_; }

 private:
  const char* read_record(const char* begin, const char* end, bool is_last, bool is_header);
  const char* after_quote(CsvFault fault, const CsvField& field, int64_t other_line, const char* end, bool is_last);
  std::optional<std::pair<CsvField, int64_t>> swallowed_line(const char* begin, const char* end) const;
  void keep_record();

  int64_t most_bytes_;
  int64_t line_ = 1;
  int64_t width_ = 0;
  int64_t time_field_ = 0;
  std::vector<int64_t> wanted_;
  std::vector<std::string> header_;
  std::vector<CsvField> fields_;  // of the record that is read
  std::vector<CsvColumn> columns_;
  std::vector<int64_t> lines_;
  std::vector<CsvMistake> mistakes_;
};

}  // namespace eventkern
