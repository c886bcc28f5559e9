#include "gateway/http/io_thread.h"

#include <csignal>
#include <exception>
#include <utility>

#include "boost/asio/co_spawn.hpp"
#include "boost/asio/executor_work_guard.hpp"
#include "boost/asio/io_context.hpp"
#include "boost/asio/post.hpp"
#include "boost/asio/redirect_error.hpp"
#include "boost/asio/signal_set.hpp"
#include "boost/asio/steady_timer.hpp"
#include "boost/asio/use_awaitable.hpp"
#include "spdlog/spdlog.h"

namespace fathom {

namespace asio = boost::asio;

struct IoThread::State {
  asio::io_context context{1};
  asio::executor_work_guard<asio::io_context::executor_type> work{context.get_executor()};
  asio::signal_set signals{context};
  std::function<void()> on_stop;
  std::function<void()> on_reload;

  void WaitForSignal() {
    signals.async_wait([this](boost::system::error_code error, int signal) {
      if (error) return;
      WaitForSignal();
      signal == SIGHUP ? on_reload() : on_stop();
    });
  }
};

IoThread::IoThread() : state_(std::make_unique<State>()) {}
IoThread::~IoThread() = default;

void IoThread::Run() { state_->context.run(); }

void IoThread::Stop() { state_->context.stop(); }

void IoThread::Post(std::function<void()> work) { asio::post(state_->context, std::move(work)); }

void IoThread::Spawn(Task<> task, std::function<void()> done) {
  asio::co_spawn(state_->context, std::move(task),
                 [done = std::move(done)](std::exception_ptr exception) {
                   // Ours throw nothing; memory may run out.
                   if (exception) spdlog::error("a task ended with an exception");
                   done();
                 });
}

Task<> IoThread::Sleep(std::chrono::milliseconds duration) {
  asio::steady_timer timer(state_->context, duration);
  boost::system::error_code ignored;
  co_await timer.async_wait(asio::redirect_error(asio::use_awaitable, ignored));
}

void IoThread::HandleSignals(std::function<void()> on_stop, std::function<void()> on_reload) {
  state_->on_stop = std::move(on_stop);
  state_->on_reload = std::move(on_reload);
  boost::system::error_code ignored;
  state_->signals.add(SIGTERM, ignored);
  state_->signals.add(SIGINT, ignored);
  state_->signals.add(SIGHUP, ignored);
  state_->WaitForSignal();
}

asio::io_context& IoThread::context() { return state_->context; }

}  // namespace fathom
