// The chunked transfer coding, decoded strictly as it arrives.
//
// Lines end with CR LF and nothing else; chunk extensions and trailers are read and dropped, within
// a limit. (Boost.Beast 1.74 asserts on some malformed chunks, so a client could stop the server.)
// Not thread-safe. Source: RFC 9112 §7.1.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace fathom {

class ChunkedBody {
 public:
  enum class State { kNeedsMore, kDone, kMalformed, kTooLarge };

  explicit ChunkedBody(size_t max_bytes) : max_bytes_(max_bytes) {}

  // Takes bytes from the front of `bytes`, appends what they hold to `body`, and returns how many
  // it took: all of them, unless the state is no longer kNeedsMore.
  size_t Parse(std::string_view bytes, std::string& body);

  State state() const { return state_; }

 private:
  enum class Part { kSize, kExtension, kData, kDataEnd, kTrailer };

  void TakeByte(char byte);
  void TakeSizeByte(char byte);
  void EndLine();

  const size_t max_bytes_;
  State state_ = State::kNeedsMore;
  Part part_ = Part::kSize;
  bool after_cr_ = false;      // the last byte of a line was CR
  size_t line_bytes_ = 0;      // of the current size line, or of all trailers
  bool line_is_empty_ = true;  // of the trailers: nothing before its CR LF yet
  int num_digits_ = 0;
  uint64_t chunk_bytes_ = 0;  // of the current chunk that are still to come
  size_t body_bytes_ = 0;
};

}  // namespace fathom
