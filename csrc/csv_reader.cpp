#include "csv_reader.h"

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>

namespace eventkern {
namespace {

enum class Stop { kComma, kLineEnd, kMissing, kNeverClosed, kAfterQuote };  // kMissing: the block ends before

constexpr std::array<bool, 256> table_of(std::string_view special) {
  std::array<bool, 256> is_special{};
  for (const char c : special) is_special[static_cast<unsigned char>(c)] = true;
  return is_special;
}

constexpr std::array<bool, 256> kEndsPlain = table_of(",\n\r");
constexpr std::array<bool, 256> kStandsOut = table_of("\"\n\r");
constexpr std::array<bool, 256> kEndsLine = table_of("\n\r");

bool is_line_end(char c) { return c == '\n' || c == '\r'; }

const char* find(const char* begin, const char* end, const std::array<bool, 256>& table) {
  while (begin < end && !table[static_cast<unsigned char>(*begin)]) ++begin;
  return begin;
}

// After the line end at `at`; null where a \n may follow that the block does not hold yet.
const char* after_line_end(const char* at, const char* end, bool is_last) {
  if (*at == '\n') return at + 1;
  if (at + 1 == end) return is_last ? end : nullptr;
  return at + (at[1] == '\n' ? 2 : 1);
}

// What follows a field that ends at `at`.
Stop stop_at(const char*& at, const char* end, bool is_last) {
  if (at == end) return is_last ? Stop::kLineEnd : Stop::kMissing;
  if (*at == ',') {
    ++at;
    return Stop::kComma;
  }
  if (!is_line_end(*at)) return Stop::kAfterQuote;
  at = after_line_end(at, end, is_last);
  return at == nullptr ? Stop::kMissing : Stop::kLineEnd;
}

// Reads the field at `at`, whose line is `field.line`, and moves on behind what ends it.
Stop read_field(const char*& at, const char* end, bool is_last, bool is_too_long, CsvField& field) {
  if (at == end && !is_last) return Stop::kMissing;
  if (at == end || *at != '"') {
    field.begin = at;
    field.end = at = find(at, end, kEndsPlain);
    return stop_at(at, end, is_last);
  }
  field.begin = ++at;
  for (;;) {
    at = find(at, end, kStandsOut);
    if (at == end) return is_last || is_too_long ? Stop::kNeverClosed : Stop::kMissing;
    if (*at != '"') {
      at = after_line_end(at, end, is_last);
      if (at == nullptr) return Stop::kMissing;
      ++field.last_line;
    } else if (at + 1 < end && at[1] == '"') {
      field.has_doubled_quotes = true;
      at += 2;
    } else {
      field.end = at++;
      return stop_at(at, end, is_last);
    }
  }
}

// Whether text begins as every ISO 8601 time does: 2024-01-31.
bool begins_as_time(const char* begin, const char* end) {
  constexpr std::string_view kForm = "dddd-dd-dd";
  while (begin < end && (*begin == ' ' || *begin == '\t')) ++begin;
  if (end - begin < static_cast<int64_t>(kForm.size())) return false;
  return std::equal(kForm.begin(), kForm.end(), begin,
                    [](char form, char c) { return form == 'd' ? '0' <= c && c <= '9' : c == form; });
}

// Adds a field's value to a text, each doubled quote as one.
void append(const CsvField& field, std::string& text) {
  if (!field.has_doubled_quotes) {
    text.append(field.begin, field.end);
    return;
  }
  for (const char* at = field.begin; at < field.end; ++at) {
    text.push_back(*at);
    at += *at == '"';
  }
}

}  // namespace

void CsvReader::select(const std::vector<int64_t>& wanted, int64_t time_field) {
  const auto is_field = [&](int64_t field) { return 0 <= field && field < width_; };
  if (!is_field(time_field) || !std::all_of(wanted.begin(), wanted.end(), is_field)) {
    throw std::invalid_argument("a wanted field is outside the header, which has " + std::to_string(width_));
  }
  wanted_ = wanted;
  columns_.assign(wanted.size(), CsvColumn{});
  time_field_ = time_field;
}

int64_t CsvReader::read_header(std::string_view block, bool is_last) {
  mistakes_.clear();
  const char *at = block.data(), *const end = at + block.size();
  while (at != nullptr && at < end && header_.empty() && mistakes_.empty()) {
    const char* const next = read_record(at, end, is_last, true);
    if (next == nullptr) break;
    at = next;
  }
  return at - block.data();
}

int64_t CsvReader::read(std::string_view block, bool is_last) {
  if (block.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    throw std::invalid_argument("a block has " + std::to_string(block.size()) + " bytes; give less than 2 GiB");
  }
  lines_.clear();
  mistakes_.clear();
  for (CsvColumn& column : columns_) {  // their memory serves every block
    column.offsets.resize(1);
    column.text.clear();
  }
  const char *at = block.data(), *const end = at + block.size();
  while (at < end) {
    const char* const next = read_record(at, end, is_last, false);
    if (next == nullptr) break;
    at = next;
  }
  return at - block.data();
}

// Returns where reading goes on; null where the record goes on behind the block.
const char* CsvReader::read_record(const char* begin, const char* end, bool is_last, bool is_header) {
  if (is_line_end(*begin)) {
    const char* const next = after_line_end(begin, end, is_last);
    line_ += next != nullptr;
    return next;
  }
  const bool is_too_long = end - begin >= most_bytes_;
  const char* at = begin;
  int64_t last_line = line_;
  Stop stop;
  fields_.clear();
  do {
    const auto number = static_cast<int64_t>(fields_.size());
    CsvField& field = fields_.emplace_back(CsvField{at, at, number, last_line, last_line, false});
    stop = read_field(at, end, is_last, is_too_long, field);
    last_line = field.last_line;
    if (stop == Stop::kMissing) return nullptr;
    if (stop == Stop::kNeverClosed) return after_quote(CsvFault::kNeverClosed, field, last_line, end, is_last);
    if (stop == Stop::kAfterQuote) return after_quote(CsvFault::kAfterQuote, field, last_line, end, is_last);
  } while (stop == Stop::kComma);
  const auto num_fields = static_cast<int64_t>(fields_.size());
  if (is_header) {
    width_ = num_fields;
    for (const CsvField& field : fields_) append(field, header_.emplace_back());
  } else {
    if (last_line > line_) {
      if (const auto found = swallowed_line(begin, at)) {
        return after_quote(CsvFault::kSwallowed, found->first, found->second, end, is_last);
      }
    }
    if (num_fields == width_) {
      keep_record();
    } else {
      mistakes_.push_back({CsvFault::kNumFields, static_cast<int64_t>(lines_.size()), line_, num_fields, 0});
    }
  }
  line_ = last_line + 1;
  return at;
}

// A field's quote is a mistake: reading goes on behind the line on which it opens.
const char* CsvReader::after_quote(CsvFault fault, const CsvField& field, int64_t other_line, const char* end,
                                   bool is_last) {
  const char* next = find(field.begin, end, kEndsLine);
  if (next < end) {
    next = after_line_end(next, end, is_last);
  } else if (!is_last) {
    next = nullptr;
  }
  if (next == nullptr) return nullptr;
  mistakes_.push_back({fault, static_cast<int64_t>(lines_.size()), field.line, field.number, other_line});
  line_ = field.line + 1;
  return next;
}

// A line of the record that, its quotes taken for text, has as many fields as the header and a time where the time
// belongs, inside a quoted field of several lines: that field, and the line.
std::optional<std::pair<CsvField, int64_t>> CsvReader::swallowed_line(const char* begin, const char* end) const {
  int64_t line = line_;
  for (const char* at = begin; at < end; ++line) {
    const char* const line_end = find(at, end, kEndsLine);
    const char* time = nullptr;
    int64_t num_fields = 0;
    for (const char* next = at;; ++next) {
      if (num_fields++ == time_field_) time = next;
      next = std::find(next, line_end, ',');
      if (next == line_end) break;
    }
    if (num_fields == width_ && begins_as_time(time, line_end)) {
      for (const CsvField& field : fields_) {
        if (field.last_line > field.line && field.begin < time && time < field.end) return std::pair(field, line);
      }
    }
    at = line_end == end ? end : after_line_end(line_end, end, true);
  }
  return std::nullopt;
}

void CsvReader::keep_record() {
  lines_.push_back(line_);
  for (size_t column = 0; column < wanted_.size(); ++column) {
    std::string& text = columns_[column].text;
    append(fields_[wanted_[column]], text);
    columns_[column].offsets.push_back(static_cast<int32_t>(text.size()));
  }
}

}  // namespace eventkern
