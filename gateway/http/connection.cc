#include "gateway/http/connection.h"

#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gateway/http/client_socket.h"
#include "gateway/http/request_id.h"

namespace fathom {
namespace {

using Clock = std::chrono::steady_clock;

// How much of the following requests is read while one is being answered.
constexpr size_t kReadAheadBytes = 64 << 10;

// How long a client that we hang up on may go on sending before it is reset, so that it can read
// why.
constexpr std::chrono::milliseconds kLingerTimeout{1'000};
constexpr size_t kMaxLingerBytes = 16 << 20;

// The response to one request.
class Exchange : public ResponseWriter {
 public:
  struct Terms {
    std::chrono::milliseconds write_timeout{0};
    bool head_only = false;   // HEAD: the body is left out
    bool chunked = true;      // not understood by HTTP/1.0
    bool keep_alive = false;  // what the client would like
    std::string request_id;
    ResponseHeaders headers;  // of whatever is answered
  };

  Exchange(ClientSocket& socket, Terms terms) : socket_(socket), terms_(std::move(terms)) {}

  Task<> Send(Response response) override {
    if (gone() || started_) co_return;
    started_ = ended_ = true;
    Write(WholeResponse(response));
    co_await CatchUp();
  }

  void SendEvent(std::string_view payload) override {
    if (gone()) return;
    std::string bytes = StartEvents();
    AppendEvent(payload, bytes);
    Write(bytes);
  }

  void SendNamedEvents(std::string_view events) override {
    if (gone() || events.empty()) return;
    events_have_names_ = true;
    std::string bytes = StartEvents();
    AppendChunk({events}, bytes);
    Write(bytes);
  }

  void EndEvents() override {
    if (gone()) return;
    std::string bytes = StartEvents();
    AppendEndOfEvents(bytes);
    ended_ = true;
    Write(bytes);
  }

  bool is_behind() const override { return !unsent_.empty(); }

  Task<> CatchUp() override {
    while (!unsent_.empty() && !client_gone_) {
      catching_up_ = true;
      const std::string bytes = std::exchange(unsent_, {});
      const ClientSocket::Outcome outcome = co_await socket_.Write(bytes, terms_.write_timeout);
      catching_up_ = false;
      if (outcome != ClientSocket::Outcome::kOk && !client_gone_) MarkGone();
    }
  }

  bool gone() const override { return client_gone_ || cut_short_; }
  bool started() const override { return started_; }
  RequestNotes& notes() override { return notes_; }

  void SetOnGone(std::function<void()> on_gone) override {
    on_gone_ = std::move(on_gone);
    if (gone()) NotifyGone();
  }

  void MarkGone() {
    client_gone_ = true;
    NotifyGone();
  }

  // Does nothing when the response has ended already.
  void EndWith(const Response& error) {
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

  void HandlerReturned() { on_gone_ = nullptr; }
  void CloseAfterwards() { terms_.keep_alive = false; }

  bool ended() const { return ended_; }
  bool client_gone() const { return client_gone_; }
  int status() const { return status_; }
  bool keeps_alive() const { return terms_.keep_alive && ended_ && !gone(); }

 private:
  Persistence persistence() const {
    return terms_.keep_alive ? Persistence::kKeepAlive : Persistence::kClose;
  }

  void NotifyGone() {
    if (on_gone_) std::exchange(on_gone_, nullptr)();
  }

  std::string HeadWith(const Response& response, const Framing& framing) const {
    return HeadOf(response, framing, persistence(), terms_.request_id, terms_.headers);
  }

  std::string WholeResponse(const Response& response) {
    status_ = response.status;
    const Framing framing{Framing::Kind::kContentLength, response.body.size()};
    std::string bytes = HeadWith(response, framing);
    if (!terms_.head_only) bytes += response.body;
    return bytes;
  }

  // The head, if it is not out yet.
  std::string StartEvents() {
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

  void AppendChunk(std::initializer_list<std::string_view> parts, std::string& bytes) const {
    size_t size = 0;
    for (const std::string_view part : parts) size += part.size();
    if (terms_.chunked) absl::StrAppend(&bytes, absl::Hex(size), "\r\n");
    for (const std::string_view part : parts) bytes += part;
    if (terms_.chunked) bytes += "\r\n";
  }

  void AppendEvent(std::string_view payload, std::string& bytes) const {
    AppendChunk({"data: ", payload, "\n\n"}, bytes);
  }

  void AppendEndOfEvents(std::string& bytes) const {
    if (!events_have_names_) AppendEvent("[DONE]", bytes);
    if (terms_.chunked) bytes += "0\r\n\r\n";
  }

  void Write(std::string_view bytes) {
    const bool must_wait = catching_up_ || is_behind();
    if (!must_wait && socket_.WriteNow(bytes) == ClientSocket::Outcome::kClosed) return MarkGone();
    unsent_ += bytes;
  }

  ClientSocket& socket_;
  Terms terms_;
  RequestNotes notes_;
  std::function<void()> on_gone_;
  int status_ = 0;
  bool started_ = false;
  bool ended_ = false;
  bool catching_up_ = false;
  bool client_gone_ = false;
  bool events_have_names_ = false;
  bool cut_short_ = false;  // by EndWith
  std::string unsent_;      // what the kernel did not take, without what CatchUp is writing
};

class HttpConnection : public Connection {
 public:
  HttpConnection(boost::asio::ip::tcp::socket socket, std::shared_ptr<const TlsContext> tls,
                 const ConnectionEnvironment& environment)
      : environment_(environment),
        tls_(std::move(tls)),
        socket_(std::move(socket), tls_.get()),
        peer_(socket_.PeerAddress()) {}

  Task<> Run() override {
    const ClientSocket::Outcome secured =
        co_await socket_.Handshake(Clock::now() + environment_.options.head_timeout);
    if (secured != ClientSocket::Outcome::kOk) closing_ = true;
    while (!closing_) {
      const bool again = co_await ServeRequest();
      if (!again) break;
    }
    co_await Linger();
    socket_.Close();
  }

  void CloseWhenIdle() override {
    closing_ = true;
    if (exchange_ != nullptr) exchange_->CloseAfterwards();
    if (idle_) socket_.Close();
  }

  void EndWith(const Response& error) override {
    CloseWhenIdle();
    if (exchange_ != nullptr) {
      exchange_->EndWith(error);
    } else if (!idle_) {
      end_with_ = error;
    }
  }

  void Close() override {
    closing_ = true;
    waiting_since_ = std::nullopt;
    socket_.Close();
    if (exchange_ != nullptr) exchange_->MarkGone();
  }

  std::optional<Clock::time_point> waiting_since() const override { return waiting_since_; }

 private:
  // Whether another request may follow.
  Task<bool> ServeRequest() {
    RequestParser parser(environment_.options.request_limits);
    verdict_ = {};
    waiting_since_ = Clock::now();
    const bool readable = co_await ReadRequest(parser);
    if (!readable) co_return false;
    waiting_since_ = std::nullopt;

    parser.request().id = RequestIdOf(parser.request().Header("x-request-id"));
    Exchange::Terms terms;
    terms.write_timeout = environment_.options.write_timeout;
    terms.head_only = parser.request().method == "HEAD";
    terms.chunked = !parser.is_http_1_0();
    terms.keep_alive = parser.keep_alive() && parser.done() && !parser.problem() &&
                       !verdict_.refusal && !closing_ && !environment_.draining;
    terms.request_id = parser.request().id;
    terms.headers = environment_.cross_origin.HeadersFor(parser.request());
    Exchange exchange(socket_, std::move(terms));
    exchange_ = &exchange;
    const Clock::time_point start = Clock::now();
    const Router::Match match =
        environment_.router.Find(parser.request().method, parser.request().path);
    if (parser.problem()) {
      co_await exchange.Send(
          environment_.error_formatter(parser.problem()->status, parser.problem()->message));
    } else if (verdict_.refusal) {
      co_await exchange.Send(*std::move(verdict_.refusal));
    } else if (end_with_) {
      co_await exchange.Send(*end_with_);
    } else {
      co_await Dispatch(parser.request(), match, exchange);
    }
    exchange_ = nullptr;
    Report(parser.request(), match, exchange, Clock::now() - start);
    lingers_ = !exchange.client_gone();
    co_return exchange.keeps_alive() && !closing_;
  }

  std::string_view PatternOf(const HttpRequest& request) const {
    return environment_.router.Find(request.method, request.path).pattern;
  }

  // False when the client closed or there is nothing to answer; a request that must be refused is
  // in parser.problem().
  Task<bool> ReadRequest(RequestParser& parser) {
    const ServerOptions& options = environment_.options;
    enum class Phase { kIdle, kHead, kBody } phase = Phase::kIdle;
    Clock::time_point deadline = Clock::now() + options.keep_alive_timeout;
    idle_ = true;
    while (true) {
      if (!buffer_.empty()) {
        if (phase == Phase::kIdle) {
          phase = Phase::kHead;
          deadline = Clock::now() + options.head_timeout;
          idle_ = false;
        }
        buffer_.erase(0, parser.Parse(buffer_));
        if (parser.problem()) co_return true;
        if (phase == Phase::kHead && parser.head_done()) {
          // A browser asks without keys whether it may ask with them.
          if (!environment_.cross_origin.IsPreflight(parser.request())) {
            verdict_ = environment_.guard.Check(parser.request(), PatternOf(parser.request()));
          }
          if (verdict_.refusal) co_return true;
          phase = Phase::kBody;
          deadline = Clock::now() + options.body_timeout;
          if (parser.expects_continue() && !parser.done() && buffer_.empty()) {
            co_await socket_.Write("HTTP/1.1 100 Continue\r\n\r\n", options.write_timeout);
          }
        }
        if (parser.done()) co_return true;
      }
      const ClientSocket::Outcome outcome = co_await socket_.Read(buffer_, deadline);
      if (outcome == ClientSocket::Outcome::kOk) continue;
      if (outcome == ClientSocket::Outcome::kTimedOut && phase != Phase::kIdle) {
        parser.RefuseAsTimedOut();
        co_return true;
      }
      co_return false;
    }
  }

  Task<> Dispatch(const HttpRequest& request, const Router::Match& match, Exchange& exchange) {
    const CrossOriginPolicy& cross_origin = environment_.cross_origin;
    if (cross_origin.IsPreflight(request)) {
      const std::optional<std::string> refusal = cross_origin.RefusalOf(request);
      Response answer =
          refusal ? environment_.error_formatter(403, *refusal) : cross_origin.AnswerTo(request);
      co_await exchange.Send(std::move(answer));
      co_return;
    }
    if (match.handler == nullptr) {
      const int status = match.allowed_methods.empty() ? 404 : 405;
      Response response = environment_.error_formatter(status, PhraseOf(status));
      if (status == 405) response.headers.emplace_back("Allow", match.allowed_methods);
      co_await exchange.Send(std::move(response));
      co_return;
    }
    socket_.Watch(buffer_, kReadAheadBytes, [&exchange] { exchange.MarkGone(); });
    co_await match.handler->Handle(request, exchange);
    exchange.HandlerReturned();
    socket_.StopWatching();
    co_await exchange.CatchUp();
    if (!exchange.started()) {
      co_await exchange.Send(environment_.error_formatter(500, "the request was not answered"));
    }
  }

  void Report(const HttpRequest& request, const Router::Match& match, Exchange& exchange,
              Clock::duration duration) {
    RequestRecord record;
    record.id = request.id;
    record.trace_id = TraceIdOf(request.Header("traceparent"));
    record.client = peer_;
    record.caller = verdict_.caller;
    record.method = request.method;
    record.path = request.path;
    record.pattern = match.pattern;
    record.status = exchange.status();
    record.complete = exchange.ended() && !exchange.client_gone();
    record.duration = duration;
    record.notes = &exchange.notes();
    environment_.observer.OnRequestEnd(record);
  }

  // A close with unread bytes would reset the connection and may take the response with it.
  Task<> Linger() {
    if (!lingers_) co_return;
    socket_.ShutdownSend();
    const Clock::time_point deadline = Clock::now() + kLingerTimeout;
    for (size_t bytes = 0; bytes < kMaxLingerBytes;) {
      buffer_.clear();
      const ClientSocket::Outcome outcome = co_await socket_.Read(buffer_, deadline);
      if (outcome != ClientSocket::Outcome::kOk) co_return;
      bytes += buffer_.size();
    }
  }

  const ConnectionEnvironment environment_;
  const std::shared_ptr<const TlsContext> tls_;  // null: plain
  ClientSocket socket_;
  const std::string peer_;
  AccessGuard::Verdict verdict_;  // of the request at hand
  std::optional<Clock::time_point> waiting_since_ = Clock::now();
  std::string buffer_;                // received and not yet parsed
  Exchange* exchange_ = nullptr;      // while a request is being answered
  std::optional<Response> end_with_;  // for a request that is still arriving
  bool idle_ = true;                  // no byte of the next request is here
  bool closing_ = false;
  bool lingers_ = false;
};

}  // namespace

std::shared_ptr<Connection> Connection::Create(boost::asio::ip::tcp::socket socket,
                                               std::shared_ptr<const TlsContext> tls,
                                               const ConnectionEnvironment& environment) {
  return std::make_shared<HttpConnection>(std::move(socket), std::move(tls), environment);
}

}  // namespace fathom
