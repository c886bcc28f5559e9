// Task<T>: what a coroutine of the gateway returns. All of them run on the one I/O thread unless a
// function says otherwise, so nothing they share needs a lock.
#pragma once

#include <utility>  // Boost 1.74 forgets it (std::exchange)

#include "boost/asio/awaitable.hpp"

namespace fathom {

template <typename T = void>
using Task = boost::asio::awaitable<T>;

}  // namespace fathom
