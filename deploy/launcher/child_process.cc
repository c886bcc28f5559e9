#include "deploy/launcher/child_process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace fathom {
namespace {

absl::Status SystemError(const char* call) { return absl::ErrnoToStatus(errno, call); }

// Everything between fork and exec: async-signal-safe calls only. Returns errno.
int BecomeProgram(char* const* argv, pid_t parent, int stdout_fd, int stderr_fd) {
  // The signal comes when the parent *thread* ends; it may have ended before we asked.
  if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0) return errno;
  if (getppid() != parent) return ESRCH;
  setpgid(0, 0);
  const int empty = open("/dev/null", O_RDONLY);
  if (empty < 0 || dup2(empty, STDIN_FILENO) < 0) return errno;
  if (dup2(stdout_fd, STDOUT_FILENO) < 0 || dup2(stderr_fd, STDERR_FILENO) < 0) return errno;
  signal(SIGPIPE, SIG_DFL);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  execv(argv[0], argv);
  return errno;
}

// Appends what can be read now. False at the end of the stream.
bool ReadAvailable(int fd, std::string& text) {
  char buffer[4096];
  const ssize_t count = read(fd, buffer, sizeof(buffer));
  if (count > 0) text.append(buffer, count);
  return count > 0 || (count < 0 && (errno == EAGAIN || errno == EINTR));
}

}  // namespace

absl::StatusOr<Pipe> MakePipe() {
  int fds[2];
  if (pipe2(fds, O_CLOEXEC) != 0) return SystemError("pipe2");
  Pipe pipe{UniqueFd(fds[0]), UniqueFd(fds[1])};
  if (fcntl(fds[0], F_SETFL, O_NONBLOCK) != 0) return SystemError("fcntl");
  return pipe;
}

absl::StatusOr<ChildProcess> ChildProcess::Spawn(const std::vector<std::string>& arguments,
                                                 int stdout_fd, int stderr_fd) {
  CHECK(!arguments.empty());
  std::vector<char*> argv;
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);

  // The child reports a failed exec through this pipe, which a successful one closes.
  int report[2];
  if (pipe2(report, O_CLOEXEC) != 0) return SystemError("pipe2");
  UniqueFd report_read(report[0]);
  UniqueFd report_write(report[1]);
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid < 0) return SystemError("fork");
  if (pid == 0) {
    const int error = BecomeProgram(argv.data(), parent, stdout_fd, stderr_fd);
    (void)!write(report[1], &error, sizeof(error));
    _exit(127);
  }
  report_write.reset();
  int error = 0;
  ssize_t count;
  do {
    count = read(report_read.get(), &error, sizeof(error));
  } while (count < 0 && errno == EINTR);
  if (count == sizeof(error)) {
    waitpid(pid, nullptr, 0);
    return absl::ErrnoToStatus(error, absl::StrCat("cannot run ", arguments[0]));
  }
  const int exit_fd = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
  if (exit_fd < 0) {
    const absl::Status status = SystemError("pidfd_open");  // Linux before 5.3
    kill(pid, SIGKILL);
    waitpid(pid, nullptr, 0);
    return status;
  }
  return ChildProcess(pid, UniqueFd(exit_fd));
}

void ChildProcess::Signal(int signal) const {
  syscall(SYS_pidfd_send_signal, exit_fd_.get(), signal, nullptr, 0);
}

std::optional<int> ChildProcess::Reap() {
  int wait_status = 0;
  const pid_t reaped = waitpid(pid_, &wait_status, WNOHANG);
  CHECK(reaped >= 0) << "process " << pid_ << " was reaped twice";
  if (reaped == 0) return std::nullopt;
  return wait_status;
}

std::string DescribeExit(int wait_status) {
  if (WIFEXITED(wait_status)) return absl::StrCat("exited with ", WEXITSTATUS(wait_status));
  const int signal = WTERMSIG(wait_status);
  const char* name = sigabbrev_np(signal);
  return absl::StrCat("was killed by ", name == nullptr ? "signal " : "SIG",
                      name == nullptr ? absl::StrCat(signal) : name, " (", strsignal(signal), ")");
}

absl::StatusOr<FinishedProcess> RunToEnd(const std::vector<std::string>& arguments) {
  ASSIGN_OR_RETURN(Pipe output, MakePipe());
  ASSIGN_OR_RETURN(Pipe errors, MakePipe());
  ASSIGN_OR_RETURN(ChildProcess child,
                   ChildProcess::Spawn(arguments, output.write.get(), errors.write.get()));
  output.write.reset();
  errors.write.reset();
  FinishedProcess finished;
  pollfd polled[] = {{.fd = output.read.get(), .events = POLLIN, .revents = 0},
                     {.fd = errors.read.get(), .events = POLLIN, .revents = 0}};
  std::string* const texts[] = {&finished.output, &finished.errors};
  while (polled[0].fd >= 0 || polled[1].fd >= 0) {
    poll(polled, 2, -1);
    for (int i = 0; i < 2; ++i) {
      if (polled[i].fd < 0 || polled[i].revents == 0) continue;
      if (!ReadAvailable(polled[i].fd, *texts[i])) polled[i].fd = -1;
    }
  }
  while (waitpid(child.pid(), &finished.wait_status, 0) < 0 && errno == EINTR) {
  }
  return finished;
}

}  // namespace fathom
