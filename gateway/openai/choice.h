// One choice of an answer while it is generated: token ids in, text out, or what a chat's message
// gains.
//
// Tokens are looked at one by one, so what comes out does not depend on how the coordinator cut
// its stream into messages. Not thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "gateway/text/detokenizer.h"
#include "gateway/text/held_output.h"
#include "gateway/text/message_delta.h"
#include "gateway/text/output_markers.h"
#include "gateway/text/output_parser.h"
#include "gateway/text/stop_matcher.h"
#include "gateway/text/tokenizer.h"
#include "proto/generate.pb.h"

namespace fathom {

// What ended a choice before its length did: nothing in particular (end of sequence), a stop
// string, or a stop token of the client's.
using StopReason = std::variant<std::monostate, std::string, uint32_t>;

// What a choice has gained.
struct ChoiceDelta {
  std::string text;      // without a parser
  MessageDelta message;  // with one
  std::vector<uint32_t> token_ids;
  std::vector<v1::TokenLogprobs> logprobs;         // parallel to token_ids, if asked for
  std::vector<v1::TokenLogprobs> prompt_logprobs;  // from the second token on, if asked for
  std::string_view finish_reason;  // "" while it goes on; "stop", "length", "tool_calls"
  StopReason stop_reason;

  // Appends `next`, which follows this.
  void Append(ChoiceDelta next);
};

struct ChoiceOptions {
  DetokenizerOptions detokenizer = {};
  std::vector<std::string> stop;
  StopString stop_string = StopString::kLeaveOut;
  uint32_t min_tokens = 0;  // stop strings before are not seen
  // Takes the output apart; `markers` must outlive the choice. Absent: it is text.
  std::optional<OutputParserOptions> parser = {};
  const OutputMarkers* markers = nullptr;
  bool ends_as_call = true;  // finish_reason: "tool_calls" where tools are called
};

class Choice {
 public:
  // `tokenizer` may be null: there is no text then, and no stop string may be given. It must
  // outlive this.
  Choice(const Tokenizer* tokenizer, ChoiceOptions options);

  // What `response` adds. Nothing any more once finished().
  ChoiceDelta Take(v1::GenerateResponse&& response);

  // By the coordinator, or by a stop string: then its call is to be cancelled.
  bool finished() const { return finished_; }

  uint32_t num_tokens() const { return num_tokens_; }
  // Of these, what was thought, with the token that ended the thoughts.
  uint32_t num_reasoning_tokens() const { return num_reasoning_tokens_; }

 private:
  // The text that the token lets out goes into `delta`.
  void PushToken(uint32_t token_id, ChoiceDelta& delta);
  // The text that was held back; the choice ends without a stop string.
  void Flush(ChoiceDelta& delta);
  void EndWith(std::string_view finish_reason, StopReason stop_reason, ChoiceDelta& delta);
  // `text` may be shown.
  void Show(const std::string& text, ChoiceDelta& delta);
  // What stop strings let out of `text`.
  std::string PastStops(std::string_view text);

  const ChoiceOptions options_;
  std::optional<StreamingDetokenizer> detokenizer_;
  StopMatcher stop_matcher_;
  std::unique_ptr<OutputParser> parser_;
  HeldOutput held_;  // with a parser
  uint32_t num_tokens_ = 0;
  uint32_t num_reasoning_tokens_ = 0;
  bool finished_ = false;
};

}  // namespace fathom
