#include "gateway/openai/answer_items.h"

#include "base/check.h"

namespace fathom {
namespace {

using Kind = MessageRun::Kind;

// What the runs of a delta are made of, one after the other.
class RunReader {
 public:
  explicit RunReader(const MessageDelta& delta) : delta_(delta) {}

  struct Piece {
    std::string_view text;
    const ToolCallDelta* call = nullptr;
  };

  Piece Next(const MessageRun& run) {
    if (run.kind == Kind::kReasoning) return {Take(delta_.reasoning, run, reasoning_read_)};
    if (run.kind == Kind::kContent) return {Take(delta_.content, run, content_read_)};
    // A call is one run: all that is written before its end belongs to its arguments.
    CHECK(calls_read_ < delta_.tool_calls.size());
    const ToolCallDelta& call = delta_.tool_calls[calls_read_++];
    CHECK(call.index == run.call && call.arguments.size() == run.num_bytes);
    return {call.arguments, &call};
  }

 private:
  static std::string_view Take(const std::string& text, const MessageRun& run, size_t& read) {
    const std::string_view taken = std::string_view(text).substr(read, run.num_bytes);
    read += run.num_bytes;
    return taken;
  }

  const MessageDelta& delta_;
  size_t reasoning_read_ = 0;
  size_t content_read_ = 0;
  size_t calls_read_ = 0;
};

}  // namespace

void AnswerItems::Append(const MessageDelta& delta, Listener* listener) {
  RunReader reader(delta);
  for (const MessageRun& run : delta.runs) {
    const RunReader::Piece piece = reader.Next(run);
    if (items_.empty() || !items_.back().part.IsOfSamePart(run)) {
      Finish(listener);
      AnswerItem& item = items_.emplace_back();
      item.part = run;
      item.index = items_.size() - 1;
      if (piece.call != nullptr) {
        item.call_id = piece.call->id;
        item.name = piece.call->name;
      }
      if (listener != nullptr) listener->OnBegin(item);
    }
    AnswerItem& item = items_.back();
    item.text += piece.text;
    if (listener != nullptr && !piece.text.empty()) listener->OnPiece(item, piece.text);
  }
}

void AnswerItems::Finish(Listener* listener) {
  if (listener != nullptr && !items_.empty()) listener->OnEnd(items_.back());
}

}  // namespace fathom
