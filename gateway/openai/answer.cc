#include "gateway/openai/answer.h"

#include <chrono>
#include <utility>

#include "gateway/openai/errors.h"
#include "gateway/rpc/generation.h"

namespace fathom {
namespace {

using Clock = std::chrono::steady_clock;

double Seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

// The choices of one answer and what is measured of them.
class Progress {
 public:
  Progress(const AnswerPlan& plan, const Tokenizer* tokenizer, GatewayMetrics& metrics)
      : metrics_(metrics), num_prompts_(plan.num_prompts) {
    for (const v1::GenerateRequest& call : plan.calls) {
      choices_.push_back({Choice(tokenizer, plan.choice_options), call.prompt_token_ids_size(),
                          call.max_tokens()});
    }
  }

  ~Progress() {
    for (const State& state : choices_) {
      if (!state.choice.finished()) metrics_.OnFinished("abort");
    }
  }

  // What an event of `generation` adds to its choice.
  ChoiceDelta Take(Generation& generation, size_t index, v1::GenerateResponse response) {
    State& state = choices_[index];
    if (response.has_usage()) state.cached_tokens = response.usage().cached_tokens();
    ChoiceDelta delta = state.choice.Take(std::move(response));
    if (!delta.token_ids.empty()) ObserveTokens(state);
    if (!state.choice.finished()) return delta;
    ObserveEnd(state, delta.finish_reason);
    generation.Cancel(index);  // a stop string ended it; else it is over already
    return delta;
  }

  bool finished(size_t index) const { return choices_[index].choice.finished(); }

  TokenUsage UsageOf(size_t index) const {
    const State& state = choices_[index];
    return {state.prompt_tokens, state.choice.num_tokens(), state.cached_tokens,
            state.choice.num_reasoning_tokens()};
  }

  // A prompt counts once, however many choices it has; what the second finds is the first's.
  TokenUsage Total() const {
    TokenUsage total;
    const size_t choices_per_prompt = choices_.size() / num_prompts_;
    for (size_t i = 0; i < choices_.size(); ++i) {
      if (i % choices_per_prompt == 0) {
        total.prompt_tokens += choices_[i].prompt_tokens;
        total.cached_tokens += choices_[i].cached_tokens;
      }
      total.completion_tokens += choices_[i].choice.num_tokens();
      total.reasoning_tokens += choices_[i].choice.num_reasoning_tokens();
    }
    return total;
  }

 private:
  struct State {
    Choice choice;
    int64_t prompt_tokens;
    int64_t max_tokens;
    int64_t cached_tokens = 0;
    Clock::time_point first_token{};
    Clock::time_point last_token{};
  };

  void ObserveTokens(State& state) {
    const Clock::time_point now = Clock::now();
    if (state.last_token == Clock::time_point()) {
      state.first_token = now;
      metrics_.OnFirstToken(Seconds(now - start_));
    } else {
      metrics_.OnNextTokens(Seconds(now - state.last_token));
    }
    state.last_token = now;
  }

  void ObserveEnd(const State& state, std::string_view finish_reason) {
    // vLLM's metric knows the engine's reasons only.
    metrics_.OnFinished(finish_reason == "tool_calls" ? "stop" : finish_reason);
    metrics_.OnRequestDone({.prompt_tokens = state.prompt_tokens,
                            .generation_tokens = state.choice.num_tokens(),
                            .max_tokens = state.max_tokens,
                            .seconds = Seconds(Clock::now() - start_),
                            .decode_seconds = Seconds(state.last_token - state.first_token)});
  }

  GatewayMetrics& metrics_;
  const int num_prompts_;
  const Clock::time_point start_ = Clock::now();
  std::vector<State> choices_;
};

// A call that ended although its choice did not.
absl::Status Broken(const absl::Status& status) {
  if (!status.ok()) return status;
  return absl::InternalError("the coordinator ended the request without a finish reason");
}

void Note(const Progress& progress, ResponseWriter& writer) {
  const TokenUsage usage = progress.Total();
  writer.notes().prompt_tokens = usage.prompt_tokens;
  writer.notes().completion_tokens = usage.completion_tokens;
}

Task<> SendEventOf(const AnswerFormat& format, std::string_view event, ResponseWriter& writer) {
  return format.events_have_names() ? writer.SendNamedEvents(event) : writer.SendEvent(event);
}

Task<> AnswerWhole(Generation& generation, Progress& progress, size_t num_choices,
                   AnswerFormat& format, ResponseWriter& writer) {
  std::vector<ChoiceDelta> choices(num_choices);
  while (true) {
    std::optional<Generation::Event> event = co_await generation.Next();
    if (!event) break;
    const size_t index = event->call;
    if (event->response) {
      choices[index].Append(progress.Take(generation, index, *std::move(event->response)));
    } else {
      generation.CancelAll();
      co_await writer.Send(format.Error(Broken(event->status)));
      co_return;
    }
  }
  if (writer.gone()) co_return;
  Response response;
  response.body = format.Whole(std::move(choices), progress.Total());
  co_await writer.Send(std::move(response));
}

Task<> FailStream(const absl::Status& status, AnswerFormat& format, ResponseWriter& writer) {
  if (!writer.started()) {
    co_await writer.Send(format.Error(status));
    co_return;
  }
  const std::string event = format.ErrorEvent(status);
  co_await SendEventOf(format, event, writer);
  co_await writer.EndEvents();
}

Task<> AnswerStream(Generation& generation, Progress& progress, size_t num_choices,
                    Delivery delivery, AnswerFormat& format, ResponseWriter& writer) {
  std::vector<ChoiceDelta> pending(num_choices);  // prompt logprobs that wait for a token
  const bool continuous = delivery == Delivery::kStreamWithContinuousUsage;
  while (true) {
    std::optional<Generation::Event> event = co_await generation.Next();
    if (!event) break;
    const size_t index = event->call;
    if (!event->response) {
      generation.CancelAll();
      co_await FailStream(Broken(event->status), format, writer);
      co_return;
    }
    pending[index].Append(progress.Take(generation, index, *std::move(event->response)));
    if (pending[index].token_ids.empty() && !progress.finished(index)) continue;

    std::optional<TokenUsage> usage;
    if (!writer.started()) {
      if (continuous) {
        usage = progress.UsageOf(index);
        usage->completion_tokens = 0;
      }
      const std::vector<std::string> first_events = format.FirstEvents(usage);
      for (const std::string& first : first_events) co_await SendEventOf(format, first, writer);
    }
    if (continuous) usage = progress.UsageOf(index);
    const std::string text =
        format.Event(index, std::exchange(pending[index], ChoiceDelta()), usage);
    co_await SendEventOf(format, text, writer);
  }
  if (writer.gone()) co_return;
  if (delivery != Delivery::kStream) {
    const std::string text = format.UsageEvent(progress.Total());
    co_await SendEventOf(format, text, writer);
  }
  co_await writer.EndEvents();
}

}  // namespace

Response AnswerFormat::Error(const absl::Status& status) { return ErrorResponse(status); }

std::string AnswerFormat::ErrorEvent(const absl::Status& status) { return ErrorJson(status); }

Task<> Answer(AnswerPlan plan, CoordinatorClient& coordinator, const Tokenizer* tokenizer,
              AnswerFormat& format, GatewayMetrics& metrics, ResponseWriter& writer) {
  const absl::Status connected = co_await coordinator.Connect();
  if (!connected.ok()) {
    co_await writer.Send(format.Error(connected));
    co_return;
  }
  const GatewayMetrics::InFlight in_flight(metrics);
  Progress progress(plan, tokenizer, metrics);
  const size_t num_choices = plan.calls.size();
  Generation generation(coordinator, std::move(plan.calls));
  writer.SetOnGone([&generation] { generation.CancelAll(); });
  if (plan.delivery == Delivery::kWhole) {
    co_await AnswerWhole(generation, progress, num_choices, format, writer);
  } else {
    co_await AnswerStream(generation, progress, num_choices, plan.delivery, format, writer);
  }
  writer.SetOnGone(nullptr);
  Note(progress, writer);
}

}  // namespace fathom
