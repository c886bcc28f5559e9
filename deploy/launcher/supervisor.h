// Starts the processes, restarts what dies, and ends them all in order.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "deploy/launcher/child_process.h"
#include "deploy/launcher/health_probe.h"
#include "deploy/launcher/log_output.h"
#include "deploy/launcher/process_plan.h"
#include "deploy/launcher/restart_backoff.h"

namespace fathom {

// One thread, one poll: on the ends and the output of children, on signals, on the health probe.
//
// SIGHUP goes on to the processes that read files again then; when there are none it is one more
// signal to stop. SIGTERM and SIGINT drain: the processes of stop stage 0 are told to end, when
// they have ended those of stage 1, and so on; a stage that takes too long is killed. A second
// signal tells stage 0 to end at once, so that clients hear of it, and kills the rest; a third
// kills everything. A child that ends with EX_USAGE or EX_CONFIG would do so again: it is not
// restarted, everything is stopped, and its exit code becomes ours.
class Supervisor {
 public:
  using Clock = std::chrono::steady_clock;
  struct Options {
    RestartBackoff::Options backoff = {};
    std::chrono::seconds drain_timeout{30};  // of stage 0; the children keep to it too
    // Health is asked for until it is good: often at first, then less so.
    std::chrono::milliseconds first_probe_interval{20};
    std::chrono::milliseconds longest_probe_interval{1000};
    std::chrono::seconds grace{5};               // beyond what a stage should need
    std::chrono::milliseconds last_words{1000};  // of stage 0 after the second signal
  };
  // Called from Run.
  struct Listeners {
    std::function<void()> on_ready;     // healthy for the first time
    std::function<void()> on_stopping;  // the drain begins
  };

  // `log` and `probe` outlive it. Blocks the signals above in this thread.
  Supervisor(Options options, std::vector<ProcessSpec> processes, HealthProbe& probe,
             LogOutput& log, Listeners listeners);
  ~Supervisor();

  // Runs until everything has ended. Returns the exit code for the launcher: 0 after a signal.
  int Run();

  // Why a child could not go on, after Run; empty after a signal.
  const std::string& reason() const { return reason_; }

 private:
  struct Child;
  enum class Goal { kServe, kStop };

  void Start(Child& child);
  void ForwardOutput(Child& child);
  void OnExit(Child& child, int wait_status);
  void OnSignal();
  bool Reload();
  void BeginStop(int exit_code);
  void EnterStage(int stage);
  void HurryStop();
  void KillAll();
  void AdvanceStop(Clock::time_point now);
  void LookForHealth(Clock::time_point now);
  void AdvanceProbe(Clock::time_point now);
  void StartDue(Clock::time_point now);
  bool AnyAlive(int stage) const;
  bool IsFinished() const;
  void WaitForEvents();
  std::optional<Clock::time_point> NextDeadline() const;

  const Options options_;
  const Listeners listeners_;
  HealthProbe& probe_;
  LogOutput& log_;
  std::vector<std::unique_ptr<Child>> children_;
  UniqueFd signals_;

  Goal goal_ = Goal::kServe;
  int exit_code_ = 0;
  std::string reason_;
  int stop_stage_ = 0;
  bool is_hurried_ = false;  // by a second signal
  Clock::time_point stage_deadline_;

  bool is_healthy_ = false;
  bool was_ready_ = false;
  Clock::time_point unhealthy_since_;
  Clock::time_point next_probe_;
  std::chrono::milliseconds probe_interval_{0};
};

}  // namespace fathom
