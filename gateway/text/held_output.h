// Output that stop strings hold back: text and markers in order, until it is known how much of
// their text may be shown.
//
// Not thread-safe.
#pragma once

#include <deque>
#include <optional>
#include <string>
#include <string_view>

#include "gateway/text/message_delta.h"
#include "gateway/text/output_markers.h"
#include "gateway/text/output_parser.h"

namespace fathom {

class HeldOutput {
 public:
  void AddText(std::string_view text);
  // `text`: of the marker, possibly "".
  void AddMarker(Marker marker, std::string_view text);

  // The next `num_bytes` of the text may be shown: they go to `parser`, and so does each marker
  // with the last byte of its text.
  void Release(size_t num_bytes, OutputParser& parser, MessageDelta& delta);

 private:
  struct Piece {
    std::optional<Marker> marker;
    std::string text;
  };

  std::deque<Piece> pieces_;
  size_t num_shown_ = 0;  // bytes of the first piece, a marker
};

}  // namespace fathom
