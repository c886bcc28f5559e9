// The one thread on which the gateway's coroutines run, and what they need of it.
//
// All state of the gateway belongs to that thread; others reach it with Post. This is where Asio's
// event loop lives.
#pragma once

#include <chrono>
#include <functional>
#include <memory>

#include "gateway/http/task.h"

namespace boost::asio {
class io_context;
}

namespace fathom {

class IoThread {
 public:
  IoThread();
  // What is suspended is dropped, so everything that coroutines refer to must outlive this.
  ~IoThread();
  IoThread(const IoThread&) = delete;
  IoThread& operator=(const IoThread&) = delete;

  // The calling thread becomes the I/O thread until Stop.
  void Run();

  // Thread-safe.
  void Stop();

  // Runs `work` on the I/O thread, in the order of the calls. Thread-safe.
  void Post(std::function<void()> work);

  // Starts `task`; calls `done` when it has ended.
  void Spawn(Task<> task, std::function<void()> done);

  Task<> Sleep(std::chrono::milliseconds duration);

  // Calls `on_stop` at every SIGTERM and SIGINT, `on_reload` at every SIGHUP.
  void HandleSignals(std::function<void()> on_stop, std::function<void()> on_reload);

  // For this folder.
  boost::asio::io_context& context();

 private:
  struct State;
  const std::unique_ptr<State> state_;
};

}  // namespace fathom
