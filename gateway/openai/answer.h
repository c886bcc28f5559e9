// From generate calls to the response: runs the calls of one request and writes what they give,
// whole or as a stream of events, in the words of an API.
//
// A stream's head is held back until there is something to stream, so that what fails before has
// its true HTTP status. A client that goes away ends the calls; a choice that meets a stop string
// ends its own.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gateway/http/background_threads.h"
#include "gateway/http/handler.h"
#include "gateway/http/task.h"
#include "gateway/openai/choice.h"
#include "gateway/openai/metrics.h"
#include "gateway/rpc/coordinator_client.h"
#include "gateway/text/tokenizer.h"

namespace fathom {

struct TokenUsage {
  int64_t prompt_tokens = 0;
  int64_t completion_tokens = 0;
  int64_t cached_tokens = 0;     // of the prompt: found, not computed
  int64_t reasoning_tokens = 0;  // of the completion
};

// The words of an API. What it calls an event is the event's payload; or, of an API whose events
// have names, whole events (AppendNamedEvent), as many as it takes, perhaps none.
class AnswerFormat {
 public:
  virtual ~AnswerFormat() = default;

  virtual bool events_have_names() const { return false; }

  // The body of a response that is not streamed; one element for each choice. Perhaps on
  // another thread than the rest, which waits.
  virtual std::string Whole(std::vector<ChoiceDelta> choices, const TokenUsage& usage) = 0;

  // Events that precede all others. `usage`, here and below: what the event is to say of it.
  virtual std::vector<std::string> FirstEvents(const std::optional<TokenUsage>& usage) = 0;

  // The event for what a choice gained. `first`: it is that choice's first.
  virtual std::string Event(size_t choice, const ChoiceDelta& delta,
                            const std::optional<TokenUsage>& usage) = 0;

  // The event after all others, when the client asked for it.
  virtual std::string UsageEvent(const TokenUsage& usage) = 0;

  // What went wrong, as a response and as the last event of a stream.
  virtual Response Error(const absl::Status& status);
  virtual std::string ErrorEvent(const absl::Status& status);
};

enum class Delivery { kWhole, kStream, kStreamWithUsage, kStreamWithContinuousUsage };

struct AnswerPlan {
  std::vector<v1::GenerateRequest> calls;  // one for each choice
  int num_prompts = 1;                     // the choices of a prompt follow each other
  ChoiceOptions choice_options;
  Delivery delivery = Delivery::kWhole;
  std::string grammar_param;  // the field to name when the calls' grammar is refused
};

// All references must outlive the task; `tokenizer` may be null.
Task<> Answer(AnswerPlan plan, CoordinatorClient& coordinator, const Tokenizer* tokenizer,
              AnswerFormat& format, BackgroundThreads& text_threads, GatewayMetrics& metrics,
              ResponseWriter& writer);

}  // namespace fathom
