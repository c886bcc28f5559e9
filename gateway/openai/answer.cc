#include "gateway/openai/answer.h"

#include <chrono>
#include <utility>

#include "gateway/openai/errors.h"
#include "gateway/rpc/generation.h"
#include "proto/grammar_fault.h"

namespace fathom {
namespace {

using Clock = std::chrono::steady_clock;

double Seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

// The choices of one answer and what is measured of them.
class Progress {
 public:
  Progress(const AnswerPlan& plan, const Tokenizer* tokenizer, GatewayMetrics& metrics)
      : metrics_(metrics), num_prompts_(plan.num_prompts), grammar_param_(plan.grammar_param) {
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
  ChoiceDelta Take(Generation& generation, const Generation::Event& event) {
    State& state = choices_[event.call];
    v1::GenerateResponse& response = *event.response;
    if (response.has_usage()) state.cached_tokens = response.usage().cached_tokens();
    ChoiceDelta delta = state.choice.Take(std::move(response));
    if (!delta.token_ids.empty()) ObserveTokens(state);
    if (!state.choice.finished()) return delta;
    ObserveEnd(state, delta.finish_reason);
    generation.Cancel(event.call);  // a stop string ended it; else it is over already
    return delta;
  }

  // Of a call that ended although its choice did not.
  absl::Status FailureOf(const Generation::Event& event) const {
    if (event.status.ok()) {
      return absl::InternalError("the coordinator ended the request without a finish reason");
    }
    if (!IsOfGrammar(event.status)) return event.status;
    return InvalidParameter(grammar_param_, std::string(event.status.message()));
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
      metrics_.OnFirstToken(now, Seconds(now - start_));
    } else {
      metrics_.OnNextTokens(now, Seconds(now - state.last_token));
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
  const std::string grammar_param_;
  const Clock::time_point start_ = Clock::now();
  std::vector<State> choices_;
};

void Note(const Progress& progress, ResponseWriter& writer) {
  const TokenUsage usage = progress.Total();
  writer.notes().prompt_tokens = usage.prompt_tokens;
  writer.notes().completion_tokens = usage.completion_tokens;
}

// About: what makes an answer large is what is said of its tokens.
size_t BytesToWrite(const std::vector<ChoiceDelta>& choices) {
  constexpr size_t kBytesOfToken = 64;
  size_t num_tokens = 0;
  for (const ChoiceDelta& choice : choices) {
    num_tokens += choice.token_ids.size();
    for (const auto* logprobs : {&choice.logprobs, &choice.prompt_logprobs}) {
      for (const v1::TokenLogprobs& token : *logprobs) num_tokens += 1 + token.top_token_ids_size();
    }
  }
  return kBytesOfToken * num_tokens;
}

Task<> AnswerWhole(Generation& generation, Progress& progress, size_t num_choices,
                   AnswerFormat& format, BackgroundThreads& text_threads, ResponseWriter& writer) {
  std::vector<ChoiceDelta> choices(num_choices);
  absl::Status failure;
  co_await generation.Listen([&](const Generation::Event& event) {
    if (event.response != nullptr) {
      choices[event.call].Append(progress.Take(generation, event));
    } else {
      failure = progress.FailureOf(event);
      generation.CancelAll();
    }
    return true;
  });
  if (writer.gone()) co_return;
  if (!failure.ok()) {
    co_await writer.Send(format.Error(failure));
    co_return;
  }
  Response response;
  const size_t num_bytes = BytesToWrite(choices);
  const auto write = [&] { response.body = format.Whole(std::move(choices), progress.Total()); };
  co_await text_threads.RunIfMuch(num_bytes, write);
  co_await writer.Send(std::move(response));
}

// What a generation gives, as the events of a stream.
class AnswerEvents {
 public:
  AnswerEvents(size_t num_choices, Delivery delivery, AnswerFormat& format, ResponseWriter& writer)
      : is_continuous_(delivery == Delivery::kStreamWithContinuousUsage),
        format_(format),
        writer_(writer),
        pending_(num_choices) {}

  void Add(const Progress& progress, size_t choice, ChoiceDelta delta) {
    ChoiceDelta& pending = pending_[choice];
    if (delta.token_ids.empty() && !progress.finished(choice)) {
      pending.Append(std::move(delta));
      return;
    }
    if (!pending.prompt_logprobs.empty()) {
      pending.Append(std::move(delta));
      delta = std::exchange(pending, ChoiceDelta());
    }
    std::optional<TokenUsage> usage;
    if (is_continuous_) usage = progress.UsageOf(choice);
    if (!writer_.started()) SendFirst(usage);
    Send(format_.Event(choice, delta, usage));
  }

  void Send(std::string_view event) {
    format_.events_have_names() ? writer_.SendNamedEvents(event) : writer_.SendEvent(event);
  }

 private:
  void SendFirst(std::optional<TokenUsage> usage) {
    if (usage) usage->completion_tokens = 0;
    for (const std::string& event : format_.FirstEvents(usage)) Send(event);
  }

  const bool is_continuous_;
  AnswerFormat& format_;
  ResponseWriter& writer_;
  std::vector<ChoiceDelta> pending_;  // prompt logprobs that wait for a token
};

Task<> AnswerStream(Generation& generation, Progress& progress, size_t num_choices,
                    Delivery delivery, AnswerFormat& format, ResponseWriter& writer) {
  AnswerEvents events(num_choices, delivery, format, writer);
  absl::Status failure;
  const auto add = [&](const Generation::Event& event) {
    if (event.response != nullptr) {
      events.Add(progress, event.call, progress.Take(generation, event));
    } else {
      failure = progress.FailureOf(event);
      generation.CancelAll();
    }
    return !writer.is_behind();
  };
  while (!generation.is_over()) {
    co_await generation.Listen(add);
    co_await writer.CatchUp();
  }
  if (writer.gone()) co_return;
  if (!failure.ok() && !writer.started()) {
    co_await writer.Send(format.Error(failure));
    co_return;
  }
  if (!failure.ok()) {
    events.Send(format.ErrorEvent(failure));
  } else if (delivery != Delivery::kStream) {
    events.Send(format.UsageEvent(progress.Total()));
  }
  writer.EndEvents();
}

}  // namespace

Response AnswerFormat::Error(const absl::Status& status) { return ErrorResponse(status); }

std::string AnswerFormat::ErrorEvent(const absl::Status& status) { return ErrorJson(status); }

Task<> Answer(AnswerPlan plan, CoordinatorClient& coordinator, const Tokenizer* tokenizer,
              AnswerFormat& format, BackgroundThreads& text_threads, GatewayMetrics& metrics,
              ResponseWriter& writer) {
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
    co_await AnswerWhole(generation, progress, num_choices, format, text_threads, writer);
  } else {
    co_await AnswerStream(generation, progress, num_choices, plan.delivery, format, writer);
  }
  writer.SetOnGone(nullptr);
  Note(progress, writer);
}

}  // namespace fathom
