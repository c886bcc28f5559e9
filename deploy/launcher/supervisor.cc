#include "deploy/launcher/supervisor.h"

#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <sysexits.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"

namespace fathom {
namespace {

using std::chrono::duration_cast;
using std::chrono::milliseconds;

sigset_t StopSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGHUP);
  return signals;
}

// Whether starting it again could not help.
bool IsHopeless(int wait_status) {
  return WIFEXITED(wait_status) &&
         (WEXITSTATUS(wait_status) == EX_USAGE || WEXITSTATUS(wait_status) == EX_CONFIG);
}

double SecondsBetween(Supervisor::Clock::time_point from, Supervisor::Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

}  // namespace

struct Supervisor::Child {
  Child(ProcessSpec process_spec, RestartBackoff::Options backoff_options)
      : spec(std::move(process_spec)), backoff(backoff_options) {}

  const ProcessSpec spec;
  RestartBackoff backoff;
  std::optional<ChildProcess> process;  // while it lives
  UniqueFd output;                      // of its standard output and error, while open
  LineSplitter lines;
  std::string last_line;
  Clock::time_point started;
  std::optional<Clock::time_point> restart_at;  // while it is dead and wanted
};

Supervisor::Supervisor(Options options, std::vector<ProcessSpec> processes, HealthProbe& probe,
                       LogOutput& log, Listeners listeners)
    : options_(options), listeners_(std::move(listeners)), probe_(probe), log_(log) {
  for (ProcessSpec& spec : processes) {
    children_.push_back(std::make_unique<Child>(std::move(spec), options.backoff));
  }
  const sigset_t signals = StopSignals();
  sigprocmask(SIG_BLOCK, &signals, nullptr);
  signals_ = UniqueFd(signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK));
  CHECK(signals_.get() >= 0);
}

Supervisor::~Supervisor() = default;

int Supervisor::Run() {
  const Clock::time_point now = Clock::now();
  unhealthy_since_ = now;
  LookForHealth(now);
  for (const auto& child : children_) child->restart_at = now;
  while (!IsFinished()) {
    const Clock::time_point time = Clock::now();
    StartDue(time);
    AdvanceProbe(time);
    AdvanceStop(time);
    if (!IsFinished()) WaitForEvents();
  }
  return exit_code_;
}

void Supervisor::Start(Child& child) {
  child.restart_at.reset();
  child.started = Clock::now();
  absl::StatusOr<Pipe> pipe = MakePipe();
  absl::Status failure = pipe.status();
  if (pipe.ok()) {
    const int fd = pipe->write.get();
    absl::StatusOr<ChildProcess> process = ChildProcess::Spawn(child.spec.arguments, fd, fd);
    failure = process.status();
    if (process.ok()) {
      child.output = std::move(pipe->read);
      child.process = *std::move(process);
      return;
    }
  }
  const milliseconds delay = child.backoff.NextDelay(milliseconds(0));
  child.restart_at = child.started + delay;
  log_.Own(absl::StrCat(child.spec.name, " does not start: ", failure.message(), "; next try in ",
                        delay.count(), " ms"));
}

void Supervisor::StartDue(Clock::time_point now) {
  if (goal_ != Goal::kServe) return;
  for (const auto& child : children_) {
    if (child->restart_at.has_value() && *child->restart_at <= now) Start(*child);
  }
}

void Supervisor::ForwardOutput(Child& child) {
  const auto on_line = [&](absl::string_view line) {
    log_.FromChild(child.spec.name, line);
    child.last_line = std::string(line);
  };
  char buffer[16384];
  while (child.output.get() >= 0) {
    const ssize_t count = read(child.output.get(), buffer, sizeof(buffer));
    if (count > 0) {
      child.lines.Add(absl::string_view(buffer, count), on_line);
      continue;
    }
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && errno == EAGAIN) return;
    child.lines.Finish(on_line);
    child.output.reset();
  }
}

void Supervisor::OnExit(Child& child, int wait_status) {
  ForwardOutput(child);  // its last words
  child.output.reset();
  child.process.reset();
  const std::string what = absl::StrCat(child.spec.name, " ", DescribeExit(wait_status));
  if (goal_ == Goal::kStop) {
    if (wait_status != 0) log_.Own(what);
    return;
  }
  if (is_healthy_) {
    is_healthy_ = false;
    unhealthy_since_ = Clock::now();
  }
  LookForHealth(Clock::now());
  if (IsHopeless(wait_status)) {
    reason_ = absl::StrCat(child.spec.name, ": ", WithoutLogPrefix(child.last_line));
    log_.Own(absl::StrCat(what, ", starting it again would not help"));
    BeginStop(WEXITSTATUS(wait_status));
    return;
  }
  const milliseconds uptime = duration_cast<milliseconds>(Clock::now() - child.started);
  const milliseconds delay = child.backoff.NextDelay(uptime);
  child.restart_at = Clock::now() + delay;
  log_.Own(absl::StrFormat("%s after %.1f s; starting it again in %d ms", what,
                           uptime.count() / 1000.0, delay.count()));
}

void Supervisor::OnSignal() {
  signalfd_siginfo info;
  while (read(signals_.get(), &info, sizeof(info)) == sizeof(info)) {
    if (info.ssi_signo == SIGHUP && Reload()) continue;
    const char* name = sigabbrev_np(static_cast<int>(info.ssi_signo));
    if (goal_ == Goal::kStop) {
      log_.Own(absl::StrCat("SIG", name, " again: stopping at once"));
      HurryStop();
      continue;
    }
    log_.Own(absl::StrCat("SIG", name, ": running requests get up to ",
                          options_.drain_timeout.count(), " s to finish; again to stop at once"));
    BeginStop(0);
  }
}

// False when there is nobody to tell.
bool Supervisor::Reload() {
  bool told = false;
  for (const auto& child : children_) {
    if (!child->spec.reloads) continue;
    if (child->process.has_value()) child->process->Signal(SIGHUP);
    told = true;
  }
  return told;
}

void Supervisor::BeginStop(int exit_code) {
  goal_ = Goal::kStop;
  exit_code_ = exit_code;
  for (const auto& child : children_) child->restart_at.reset();
  if (listeners_.on_stopping) listeners_.on_stopping();
  EnterStage(0);
}

void Supervisor::EnterStage(int stage) {
  stop_stage_ = stage;
  stage_deadline_ = Clock::now() + options_.grace;
  if (stage == 0) stage_deadline_ += options_.drain_timeout;
  for (const auto& child : children_) {
    if (child->process.has_value() && child->spec.stop_stage == stage) {
      child->process->Signal(is_hurried_ ? SIGKILL : SIGTERM);
    }
  }
}

void Supervisor::HurryStop() {
  if (is_hurried_ || stop_stage_ > 0) return KillAll();
  is_hurried_ = true;
  stage_deadline_ = Clock::now() + options_.last_words;
  for (const auto& child : children_) {
    if (child->process.has_value() && child->spec.stop_stage == 0) child->process->Signal(SIGTERM);
  }
}

void Supervisor::KillAll() {
  for (const auto& child : children_) {
    if (child->process.has_value()) child->process->Signal(SIGKILL);
  }
}

void Supervisor::AdvanceStop(Clock::time_point now) {
  if (goal_ != Goal::kStop) return;
  while (!IsFinished() && !AnyAlive(stop_stage_)) EnterStage(stop_stage_ + 1);
  if (IsFinished() || now < stage_deadline_) return;
  stage_deadline_ = now + options_.grace;
  for (const auto& child : children_) {
    if (!child->process.has_value() || child->spec.stop_stage != stop_stage_) continue;
    log_.Own(absl::StrCat(child->spec.name, " did not end in time: killing it"));
    child->process->Signal(SIGKILL);
  }
}

void Supervisor::LookForHealth(Clock::time_point now) {
  next_probe_ = now;
  probe_interval_ = options_.first_probe_interval;
}

void Supervisor::AdvanceProbe(Clock::time_point now) {
  if (goal_ != Goal::kServe || is_healthy_) return;
  if (!probe_.is_running()) {
    if (now < next_probe_) return;
    probe_.Begin(now);
    return;
  }
  const std::optional<HealthProbe::Answer> answer = probe_.Continue(now);
  if (!answer.has_value()) return;
  next_probe_ = now + probe_interval_;
  probe_interval_ = std::min(probe_interval_ * 5 / 4, options_.longest_probe_interval);
  if (*answer != HealthProbe::Answer::kHealthy) return;
  // A dead child that health does not know of yet: ask again when it is back.
  for (const auto& child : children_) {
    if (!child->process.has_value()) return;
  }
  is_healthy_ = true;
  if (!was_ready_) {
    was_ready_ = true;
    if (listeners_.on_ready) listeners_.on_ready();
  } else {
    log_.Own(absl::StrFormat("serving again after %.1f s", SecondsBetween(unhealthy_since_, now)));
  }
}

bool Supervisor::AnyAlive(int stage) const {
  return std::any_of(children_.begin(), children_.end(), [&](const auto& child) {
    return child->process.has_value() && child->spec.stop_stage == stage;
  });
}

bool Supervisor::IsFinished() const {
  return goal_ == Goal::kStop && std::none_of(children_.begin(), children_.end(), [](auto& child) {
           return child->process.has_value();
         });
}

std::optional<Supervisor::Clock::time_point> Supervisor::NextDeadline() const {
  if (goal_ == Goal::kStop) return stage_deadline_;
  std::optional<Clock::time_point> next;
  const auto consider = [&](Clock::time_point time) {
    if (!next.has_value() || time < *next) next = time;
  };
  for (const auto& child : children_) {
    if (child->restart_at.has_value()) consider(*child->restart_at);
  }
  if (!is_healthy_) consider(probe_.is_running() ? probe_.deadline() : next_probe_);
  return next;
}

void Supervisor::WaitForEvents() {
  std::vector<pollfd> polled;
  const auto watch = [&](int fd, short events) {  // NOLINT: poll's type
    polled.push_back({.fd = fd, .events = events, .revents = 0});
  };
  watch(signals_.get(), POLLIN);
  watch(goal_ == Goal::kServe ? probe_.fd() : -1, probe_.events());
  for (const auto& child : children_) {
    watch(child->output.get(), POLLIN);
    watch(child->process.has_value() ? child->process->exit_fd() : -1, POLLIN);
  }
  int timeout_ms = -1;
  if (const auto deadline = NextDeadline(); deadline.has_value()) {
    const auto left = std::chrono::ceil<milliseconds>(*deadline - Clock::now());
    timeout_ms = static_cast<int>(std::clamp<int64_t>(left.count(), 0, 3'600'000));
  }
  if (poll(polled.data(), polled.size(), timeout_ms) <= 0) return;

  if (polled[0].revents != 0) OnSignal();
  for (size_t i = 0; i < children_.size(); ++i) {
    Child& child = *children_[i];
    if (polled[2 + 2 * i].revents != 0) ForwardOutput(child);
    if (polled[3 + 2 * i].revents == 0) continue;
    if (const std::optional<int> wait_status = child.process->Reap(); wait_status.has_value()) {
      OnExit(child, *wait_status);
    }
  }
}

}  // namespace fathom
