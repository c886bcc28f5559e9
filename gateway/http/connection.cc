#include "gateway/http/connection.h"

#include <optional>
#include <string>
#include <utility>

#include "gateway/http/client_socket.h"
#include "gateway/http/exchange.h"
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
    bool again = secured == ClientSocket::Outcome::kOk;
    while (again) again = co_await ServeRequest();
    co_await Linger();
    socket_.Close();
  }

  void CloseWhenIdle() override {
    closing_ = true;
    if (exchange_ != nullptr) exchange_->CloseAfterwards();
    if (idle_ && has_asked_) socket_.Close();
  }

  bool is_idle() const override { return idle_; }

  void EndWith(const Response& error) override {
    closing_ = true;
    if (exchange_ != nullptr) {
      exchange_->EndWith(error);
    } else if (idle_) {
      socket_.Close();
    } else {
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
    has_asked_ = true;

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
  bool has_asked_ = false;            // a request at least
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
