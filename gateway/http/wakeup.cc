#include "gateway/http/wakeup.h"

#include <utility>

#include "boost/asio/io_context.hpp"
#include "boost/asio/redirect_error.hpp"
#include "boost/asio/steady_timer.hpp"
#include "boost/asio/use_awaitable.hpp"

namespace fathom {

namespace asio = boost::asio;

struct Wakeup::Timer {
  asio::steady_timer timer;
};

Wakeup::Wakeup(IoThread& io_thread)
    : timer_(new Timer{
          asio::steady_timer(io_thread.context(), asio::steady_timer::time_point::max())}) {}

Wakeup::~Wakeup() = default;

void Wakeup::Notify() {
  notified_ = true;
  timer_->timer.cancel();
}

Task<> Wakeup::Wait() {
  if (!notified_) {
    boost::system::error_code cancelled;
    co_await timer_->timer.async_wait(asio::redirect_error(asio::use_awaitable, cancelled));
  }
  notified_ = false;
}

}  // namespace fathom
