#include "gateway/http/server.h"

#include <functional>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "boost/asio/io_context.hpp"
#include "boost/asio/ip/tcp.hpp"
#include "boost/asio/redirect_error.hpp"
#include "boost/asio/use_awaitable.hpp"
#include "gateway/http/connection.h"
#include "spdlog/spdlog.h"

namespace fathom {
namespace {

namespace asio = boost::asio;
using boost::system::error_code;
using tcp = asio::ip::tcp;

constexpr int kListenBacklog = 4096;
constexpr std::chrono::milliseconds kAcceptRetryDelay{100};
constexpr std::chrono::milliseconds kIdlePollInterval{10};

}  // namespace

struct Server::State {
  State(ServerOptions options, IoThread& io_thread, const Router& router, AccessGuard& guard,
        RequestObserver& observer, ErrorFormatter error_formatter)
      : options(std::move(options)),
        io_thread(io_thread),
        error_formatter(std::move(error_formatter)),
        cross_origin(this->options.cross_origin),
        environment{this->options,         router,  guard, cross_origin, observer,
                    this->error_formatter, draining},
        acceptor(io_thread.context()) {}

  const ServerOptions options;
  IoThread& io_thread;
  const ErrorFormatter error_formatter;
  const CrossOriginPolicy cross_origin;
  bool draining = false;
  const ConnectionEnvironment environment;
  tcp::acceptor acceptor;
  std::shared_ptr<const TlsContext> tls;  // null: plain HTTP
  absl::flat_hash_set<std::shared_ptr<Connection>> connections;
  std::vector<std::weak_ptr<Connection>> to_finish;  // those with a request when draining began

  static Task<> AcceptAll(std::shared_ptr<State> state);
  static void Serve(std::shared_ptr<State> state, tcp::socket socket);
  bool EvictLongestWaiting();
  void TurnAway(tcp::socket socket) const;
  void StopAccepting();
  Task<> WaitUntilZero(std::function<size_t()> count, std::chrono::milliseconds timeout);
};

Task<> Server::State::AcceptAll(std::shared_ptr<State> state) {
  while (state->acceptor.is_open()) {
    tcp::socket socket(state->io_thread.context());
    error_code error;
    co_await state->acceptor.async_accept(socket, asio::redirect_error(asio::use_awaitable, error));
    if (error == asio::error::operation_aborted || !state->acceptor.is_open()) break;
    if (error) {  // out of file descriptors, usually: wait for some to be closed
      spdlog::warn("cannot accept a connection: {}", error.message());
      co_await state->io_thread.Sleep(kAcceptRetryDelay);
    } else if (state->connections.size() >= state->options.max_connections &&
               !state->EvictLongestWaiting()) {
      state->TurnAway(std::move(socket));
    } else {
      Serve(state, std::move(socket));
    }
  }
}

void Server::State::Serve(std::shared_ptr<State> state, tcp::socket socket) {
  std::shared_ptr<Connection> connection =
      Connection::Create(std::move(socket), state->tls, state->environment);
  state->connections.insert(connection);
  IoThread& io_thread = state->io_thread;
  // What is called at the end keeps the connection alive until its coroutine is gone.
  io_thread.Spawn(connection->Run(), [state = std::move(state), connection] {
    connection->Close();
    state->connections.erase(connection);
  });
}

// Makes room at the cost of whom it hurts least, which is also whoever holds connections open
// without asking for anything.
bool Server::State::EvictLongestWaiting() {
  std::shared_ptr<Connection> longest;
  for (const std::shared_ptr<Connection>& connection : connections) {
    const auto since = connection->waiting_since();
    if (since && (longest == nullptr || *since < *longest->waiting_since())) longest = connection;
  }
  if (longest == nullptr) return false;
  longest->Close();
  return true;
}

void Server::State::TurnAway(tcp::socket socket) const {
  const Response response = error_formatter(
      503, absl::StrCat("the server has ", options.max_connections, " connections, its limit"));
  const Framing framing{Framing::Kind::kContentLength, response.body.size()};
  const std::string bytes = HeadOf(response, framing, Persistence::kClose, "", {}) + response.body;
  error_code ignored;  // it fits an empty socket buffer; if not, the client sees a plain close
  socket.non_blocking(true, ignored);
  socket.write_some(asio::buffer(bytes), ignored);
  socket.shutdown(tcp::socket::shutdown_send, ignored);
}

void Server::State::StopAccepting() {
  error_code ignored;
  acceptor.close(ignored);
}

Task<> Server::State::WaitUntilZero(std::function<size_t()> count,
                                    std::chrono::milliseconds timeout) {
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  while (count() > 0 && std::chrono::steady_clock::now() < deadline) {
    co_await io_thread.Sleep(kIdlePollInterval);
  }
}

Server::Server(ServerOptions options, IoThread& io_thread, const Router& router, AccessGuard& guard,
               RequestObserver& observer, ErrorFormatter error_formatter)
    : state_(std::make_shared<State>(std::move(options), io_thread, router, guard, observer,
                                     std::move(error_formatter))) {}

Server::~Server() { CloseAll(); }

absl::Status Server::ReloadTls() {
  if (!state_->options.https.enabled()) return absl::OkStatus();
  ASSIGN_OR_RETURN(state_->tls, TlsContext::Load(state_->options.https));
  return absl::OkStatus();
}

absl::Status Server::Start() {
  const ServerOptions& options = state_->options;
  RETURN_IF_ERROR(CrossOriginPolicy::Check(options.cross_origin));
  RETURN_IF_ERROR(ReloadTls());
  error_code error;
  tcp::resolver resolver(state_->io_thread.context());
  const auto endpoints =
      resolver.resolve(options.host, absl::StrCat(options.port), tcp::resolver::passive, error);
  if (error || endpoints.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--host '", options.host, "' is no address of this machine: ", error.message()));
  }
  const tcp::endpoint endpoint = endpoints.begin()->endpoint();
  tcp::acceptor& acceptor = state_->acceptor;
  if (!error) acceptor.open(endpoint.protocol(), error);
  if (!error) acceptor.set_option(tcp::acceptor::reuse_address(true), error);
  if (!error) acceptor.bind(endpoint, error);
  if (!error) acceptor.listen(kListenBacklog, error);
  if (error == asio::error::address_in_use) {
    return absl::AlreadyExistsError(absl::StrCat("port ", options.port, " of ", options.host,
                                                 " is in use: stop what listens there or choose "
                                                 "another with --port"));
  }
  if (error) {
    return absl::UnavailableError(absl::StrCat("cannot listen on port ", options.port, " of ",
                                               options.host, ": ", error.message()));
  }
  state_->io_thread.Spawn(State::AcceptAll(state_), [] {});
  return absl::OkStatus();
}

uint16_t Server::port() const {
  error_code error;
  const tcp::endpoint endpoint = state_->acceptor.local_endpoint(error);
  return error ? state_->options.port : endpoint.port();
}

void Server::Drain() {
  state_->draining = true;
  for (const std::shared_ptr<Connection>& connection : state_->connections) {
    if (!connection->is_idle()) state_->to_finish.push_back(connection);
    connection->CloseWhenIdle();
  }
}

Task<> Server::WaitUntilDrained(std::chrono::milliseconds timeout) {
  const auto count = [this] {
    std::erase_if(state_->to_finish, [](const auto& connection) { return connection.expired(); });
    return state_->to_finish.size();
  };
  return state_->WaitUntilZero(count, timeout);
}

Task<> Server::WaitUntilClosed(std::chrono::milliseconds timeout) {
  return state_->WaitUntilZero([this] { return state_->connections.size(); }, timeout);
}

void Server::EndAll(std::string_view why) {
  state_->StopAccepting();
  const Response error = state_->error_formatter(503, why);
  for (const std::shared_ptr<Connection>& connection : state_->connections) {
    connection->EndWith(error);
  }
}

void Server::CloseAll() {
  state_->StopAccepting();
  for (const std::shared_ptr<Connection>& connection : state_->connections) connection->Close();
}

size_t Server::num_connections() const { return state_->connections.size(); }

}  // namespace fathom
