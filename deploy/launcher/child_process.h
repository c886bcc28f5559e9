// A child process that cannot outlive us, and whose end can be waited for with poll.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "base/unique_fd.h"

namespace fathom {

struct Pipe {
  UniqueFd read;   // does not block
  UniqueFd write;  // blocks
};
absl::StatusOr<Pipe> MakePipe();

// Not thread-safe. The kernel kills the child when the thread that spawned it ends, however it
// ends.
class ChildProcess {
 public:
  // Runs arguments[0] (a path) with the rest in a process group of its own, so that Ctrl-C on the
  // terminal reaches only us. Signals are unblocked in it, its standard input is empty. NotFound
  // or the like when it cannot be executed.
  static absl::StatusOr<ChildProcess> Spawn(const std::vector<std::string>& arguments,
                                            int stdout_fd, int stderr_fd);

  ChildProcess(ChildProcess&&) = default;
  ChildProcess& operator=(ChildProcess&&) = default;

  pid_t pid() const { return pid_; }
  int exit_fd() const { return exit_fd_.get(); }  // readable once it has ended

  void Signal(int signal) const;

  // Its wait status once it has ended; call it before the object goes, or a zombie stays.
  std::optional<int> Reap();

 private:
  ChildProcess(pid_t pid, UniqueFd exit_fd) : pid_(pid), exit_fd_(std::move(exit_fd)) {}

  pid_t pid_;
  UniqueFd exit_fd_;  // a pidfd
};

// "exited with 1", "was killed by SIGSEGV (Segmentation fault)".
std::string DescribeExit(int wait_status);

struct FinishedProcess {
  int wait_status = 0;
  std::string output;  // of standard output
  std::string errors;  // of standard error
};

// Runs it to its end.
absl::StatusOr<FinishedProcess> RunToEnd(const std::vector<std::string>& arguments);

}  // namespace fathom
