// A message as those APIs see it whose answers are lists: thoughts, text and tool calls, one after
// the other, as the model wrote them.
//
// However the answer is cut into deltas, the items come out the same. Not thread-safe.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "gateway/text/message_delta.h"

namespace fathom {

struct AnswerItem {
  using Kind = MessageRun::Kind;

  MessageRun part;
  size_t index = 0;  // among the items
  std::string text;  // thoughts, text, or a call's arguments
  std::string call_id;
  std::string name;

  Kind kind() const { return part.kind; }
};

class AnswerItems {
 public:
  // Is told what becomes of items, in order: each begins, gains pieces, and ends before the next.
  class Listener {
   public:
    virtual ~Listener() = default;
    // There is no text yet.
    virtual void OnBegin(const AnswerItem& item) = 0;
    // `piece` is the end of the item's text, and not empty.
    virtual void OnPiece(const AnswerItem& item, std::string_view piece) = 0;
    virtual void OnEnd(const AnswerItem& item) = 0;
  };

  // `listener` may be null.
  void Append(const MessageDelta& delta, Listener* listener);
  // Nothing follows: the last item ends.
  void Finish(Listener* listener);

  const std::vector<AnswerItem>& items() const { return items_; }

 private:
  std::vector<AnswerItem> items_;
};

}  // namespace fathom
