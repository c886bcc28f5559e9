#include "gateway/text/held_output.h"

namespace fathom {

void HeldOutput::AddText(std::string_view text) {
  if (!text.empty()) pieces_.push_back({std::nullopt, std::string(text)});
}

void HeldOutput::AddMarker(Marker marker, std::string_view text) {
  pieces_.push_back({marker, std::string(text)});
}

void HeldOutput::Release(size_t num_bytes, OutputParser& parser, MessageDelta& delta) {
  num_shown_ += num_bytes;
  while (!pieces_.empty()) {
    Piece& piece = pieces_.front();
    if (piece.text.size() > num_shown_) {
      if (piece.marker.has_value()) return;
      parser.PushText(std::string_view(piece.text).substr(0, num_shown_), delta);
      piece.text.erase(0, num_shown_);
      num_shown_ = 0;
      return;
    }
    num_shown_ -= piece.text.size();
    if (piece.marker.has_value()) {
      parser.PushMarker(*piece.marker, piece.text, delta);
    } else {
      parser.PushText(piece.text, delta);
    }
    pieces_.pop_front();
  }
}

}  // namespace fathom
