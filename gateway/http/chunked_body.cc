#include "gateway/http/chunked_body.h"

#include <algorithm>

namespace fathom {
namespace {

constexpr size_t kMaxLineBytes = 1 << 10;     // of a chunk's size and extensions
constexpr size_t kMaxTrailerBytes = 4 << 10;  // of all trailers
constexpr int kMaxDigits = 15;                // no 64-bit number overflows

int SizeDigit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

}  // namespace

size_t ChunkedBody::Parse(std::string_view bytes, std::string& body) {
  size_t taken = 0;
  while (taken < bytes.size() && state_ == State::kNeedsMore) {
    if (part_ == Part::kData) {
      const size_t count = std::min<uint64_t>(chunk_bytes_, bytes.size() - taken);
      body.append(bytes.substr(taken, count));
      taken += count;
      chunk_bytes_ -= count;
      if (chunk_bytes_ == 0) part_ = Part::kDataEnd;
    } else {
      TakeByte(bytes[taken++]);
    }
  }
  return taken;
}

void ChunkedBody::TakeByte(char byte) {
  const size_t max_line_bytes = part_ == Part::kTrailer ? kMaxTrailerBytes : kMaxLineBytes;
  if (++line_bytes_ > max_line_bytes || (byte == '\n') != after_cr_) {
    state_ = State::kMalformed;
    return;
  }
  if (byte == '\n') {
    after_cr_ = false;
    EndLine();
  } else if (byte == '\r') {
    after_cr_ = true;
  } else {
    switch (part_) {
      case Part::kSize:
        TakeSizeByte(byte);
        break;
      case Part::kExtension:
        break;
      case Part::kTrailer:
        line_is_empty_ = false;
        break;
      default:  // data is followed by CR LF
        state_ = State::kMalformed;
    }
  }
}

void ChunkedBody::TakeSizeByte(char byte) {
  const int digit = SizeDigit(byte);
  if (digit >= 0 && num_digits_ < kMaxDigits) {
    chunk_bytes_ = chunk_bytes_ << 4 | static_cast<uint64_t>(digit);
    ++num_digits_;
  } else if (num_digits_ > 0 && byte == ';') {
    part_ = Part::kExtension;
  } else {
    state_ = State::kMalformed;
  }
}

void ChunkedBody::EndLine() {
  switch (part_) {
    case Part::kSize:
    case Part::kExtension:
      if (num_digits_ == 0) {
        state_ = State::kMalformed;
      } else if (chunk_bytes_ == 0) {
        part_ = Part::kTrailer;
      } else if (chunk_bytes_ > max_bytes_ - body_bytes_) {
        state_ = State::kTooLarge;
      } else {
        body_bytes_ += chunk_bytes_;
        part_ = Part::kData;
      }
      num_digits_ = 0;
      line_bytes_ = 0;
      break;
    case Part::kDataEnd:
      part_ = Part::kSize;
      line_bytes_ = 0;
      break;
    case Part::kTrailer:
      if (line_is_empty_) state_ = State::kDone;
      line_is_empty_ = true;
      break;
    case Part::kData:
      break;  // has no lines
  }
}

}  // namespace fathom
