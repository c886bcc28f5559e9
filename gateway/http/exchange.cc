#include "gateway/http/exchange.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace fathom {

Task<> Exchange::Send(Response response) {
  if (gone() || started_) co_return;
  started_ = ended_ = true;
  Write(WholeResponse(response));
  co_await CatchUp();
}

void Exchange::SendEvent(std::string_view payload) {
  if (gone()) return;
  std::string bytes = StartEvents();
  AppendEvent(payload, bytes);
  Write(bytes);
}

void Exchange::SendNamedEvents(std::string_view events) {
  if (gone() || events.empty()) return;
  events_have_names_ = true;
  std::string bytes = StartEvents();
  AppendChunk({events}, bytes);
  Write(bytes);
}

void Exchange::EndEvents() {
  if (gone()) return;
  std::string bytes = StartEvents();
  AppendEndOfEvents(bytes);
  ended_ = true;
  Write(bytes);
}

Task<> Exchange::CatchUp() {
  while (!unsent_.empty() && !client_gone_) {
    catching_up_ = true;
    const std::string bytes = std::exchange(unsent_, {});
    const ClientSocket::Outcome outcome = co_await socket_.Write(bytes, terms_.write_timeout);
    catching_up_ = false;
    if (outcome != ClientSocket::Outcome::kOk && !client_gone_) MarkGone();
  }
}

void Exchange::SetOnGone(std::function<void()> on_gone) {
  on_gone_ = std::move(on_gone);
  if (gone()) NotifyGone();
}

void Exchange::MarkGone() {
  client_gone_ = true;
  NotifyGone();
}

void Exchange::EndWith(const Response& error) {
  CloseAfterwards();
  if (gone() || ended_) return;
  std::string last_words;
  if (started_) {
    if (events_have_names_) {
      std::string event;
      AppendNamedEvent("error", error.body, event);
      AppendChunk({event}, last_words);
    } else {
      AppendEvent(error.body, last_words);
    }
    AppendEndOfEvents(last_words);
  } else {
    last_words = WholeResponse(error);
  }
  started_ = ended_ = cut_short_ = true;
  Write(last_words);
  NotifyGone();
}

void Exchange::NotifyGone() {
  if (on_gone_) std::exchange(on_gone_, nullptr)();
}

std::string Exchange::HeadWith(const Response& response, const Framing& framing) const {
  return HeadOf(response, framing, persistence(), terms_.request_id, terms_.headers);
}

std::string Exchange::WholeResponse(const Response& response) {
  status_ = response.status;
  const Framing framing{Framing::Kind::kContentLength, response.body.size()};
  std::string bytes = HeadWith(response, framing);
  if (!terms_.head_only) bytes += response.body;
  return bytes;
}

std::string Exchange::StartEvents() {
  if (started_) return {};
  started_ = true;
  status_ = 200;
  Response response;
  response.content_type = "text/event-stream; charset=utf-8";
  response.headers = {{"Cache-Control", "no-cache"}, {"X-Accel-Buffering", "no"}};
  if (!terms_.chunked) terms_.keep_alive = false;
  Framing framing;
  framing.kind = terms_.chunked ? Framing::Kind::kChunked : Framing::Kind::kUntilClose;
  return HeadWith(response, framing);
}

void Exchange::AppendChunk(std::initializer_list<std::string_view> parts,
                           std::string& bytes) const {
  size_t size = 0;
  for (const std::string_view part : parts) size += part.size();
  if (terms_.chunked) absl::StrAppend(&bytes, absl::Hex(size), "\r\n");
  for (const std::string_view part : parts) bytes += part;
  if (terms_.chunked) bytes += "\r\n";
}

void Exchange::AppendEvent(std::string_view payload, std::string& bytes) const {
  AppendChunk({"data: ", payload, "\n\n"}, bytes);
}

void Exchange::AppendEndOfEvents(std::string& bytes) const {
  if (!events_have_names_) AppendEvent("[DONE]", bytes);
  if (terms_.chunked) bytes += "0\r\n\r\n";
}

void Exchange::Write(std::string_view bytes) {
  const bool must_wait = catching_up_ || is_behind();
  if (!must_wait && socket_.WriteNow(bytes) == ClientSocket::Outcome::kClosed) return MarkGone();
  unsent_ += bytes;
}

}  // namespace fathom
