// Which worker group serves a request, and where it goes on when that group is lost.
//
// A server has one group or several (--data-parallel-size), each with a StepLoop of its own. A
// request goes to the group that knows the longest beginning of its prompt (PrefixIndex), unless
// that group is loaded: it has kSlackRequests more requests than the least loaded group, and half
// as many again. Else it goes to the least loaded group; of several to the one that was chosen the
// longest ago. A group whose queue is full is passed over.
//
// When a group is lost its requests move to the others and go on with the tokens that they would
// have had (Philox is keyed by seed and position). While no group serves they wait, and so do new
// ones; they go on when a group has formed again, or end with Unavailable recovery_timeout after
// the last one was lost. From then on, and before the first group has formed, requests are refused.
//
// A request with a grammar is queued when the group is ready to obey it (GroupLoop::Prepare), there
// and wherever it goes on.
//
// A request may be what breaks the workers. One that was being computed kMaxFutileLosses times in a
// row when its group was lost, with no token in between, ends.
//
// Thread-safe, except that Start and Join are called once each, by the owner.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <stop_token>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "coordinator/block_hash.h"
#include "coordinator/engine.h"
#include "coordinator/group_loop.h"
#include "coordinator/inbox.h"
#include "coordinator/live_request.h"
#include "coordinator/metrics.h"
#include "coordinator/prefix_index.h"
#include "coordinator/request.h"
#include "coordinator/status_board.h"
#include "coordinator/step_loop.h"
#include "coordinator/token_stream.h"

namespace fathom {

// Names a request within this server, from 1.
using RequestId = uint64_t;

class GroupRouter {
 public:
  static constexpr int kSlackRequests = 8;
  static constexpr int kMaxFutileLosses = 3;
  static constexpr int kMaxLostPreparations = 3;

  using MakeLoop =
      std::function<std::unique_ptr<GroupLoop>(const StepLoop::Options& options, StatusBoard& board,
                                               Metrics& metrics, Engine::OnLost on_lost)>;
  static std::unique_ptr<GroupLoop> MakeStepLoop(const StepLoop::Options& options,
                                                 StatusBoard& board, Metrics& metrics,
                                                 Engine::OnLost on_lost);

  struct Options {
    std::string version;
    std::vector<StepLoop::Options> groups;  // at least one
    MakeLoop make_loop = MakeStepLoop;
    absl::Duration recovery_timeout = absl::Seconds(30);  // zero: nothing waits
  };

  // `metrics` are those of group 0 and outlive this. `on_serving_changed` is called whenever the
  // answer to "can steps be made?" changes, one call at a time.
  GroupRouter(Options options, Metrics& metrics,
              std::function<void(bool serving)> on_serving_changed);
  ~GroupRouter();  // stops and joins

  void Start();

  // The request's tokens go to `stream`. ResourceExhausted when the queues are full, Unavailable
  // when no steps can be made and none are expected soon. What speaks against its grammar comes
  // later, as the end of `stream`: InvalidArgument, ResourceExhausted or Unavailable.
  absl::StatusOr<RequestId> Submit(std::shared_ptr<const Request> request,
                                   std::shared_ptr<TokenStream> stream);

  // Forgets a request; its stream hears no more. Does nothing when it has ended.
  void Cancel(RequestId id);

  // As those of StepLoop. What waits for a group ends at once.
  void Drain();
  void Stop();
  void Join();

  // Of all groups together.
  v1::ServerInfo server_info() const;
  // What every group that has formed so far can take; absent until one has.
  std::optional<ModelLimits> model_limits() const;

 private:
  class Route;
  struct Group;
  static constexpr int kNowhere = -1;
  struct Place {
    int group = kNowhere;  // while no group serves
    SequenceId id = 0;     // there; 0 while its grammar is prepared
    std::vector<BlockHash> chunks;
    int num_groups_lost = 0;
    int num_futile_losses = 0;
    size_t num_tokens_when_lost = 0;
    int num_lost_preparations = 0;  // in a row
    int silent_group = kNowhere;    // that was asked for the last of them
  };
  struct Preparing {
    LiveRequest live;
    bool is_new = true;
  };
  struct Ended {
    std::shared_ptr<TokenStream> stream;
    absl::Status status;
  };

  void OnServingChanged(int group, bool serving);
  void OnLost(int group, std::vector<Inbox::Submission> unfinished);
  void OnPrepared(RequestId id, absl::Status status);
  void OnEnd(RequestId id);
  void WatchOverRecovery(std::stop_token stop);
  void EndWaiting(const absl::Status& status);
  static void Tell(const std::vector<Ended>& ended);

  // These require mutex_.
  bool is_serving() const;
  bool MayWait() const;
  std::vector<int> Ranking(const Place& place) const;  // groups that serve, best first
  bool GoOn(RequestId id, Place& place, const LiveRequest& live);
  // Puts it into preparing_ if it has a grammar, else into the group's queue.
  absl::Status Enter(RequestId id, Place& place, int group, const Preparing& request);
  absl::Status Enqueue(Place& place, int group, const Preparing& request);
  // Elsewhere or later, or its end.
  std::optional<absl::Status> GoOnSometime(RequestId id, Place& place, LiveRequest live);
  void Settle(Place& place, int group);
  void Leave(Place& place);
  static bool IsFutile(Place& place, const LiveRequest& live);

  const Options options_;
  const std::function<void(bool serving)> on_serving_changed_;
  const BlockHasher hasher_;
  std::vector<std::unique_ptr<Group>> groups_;

  mutable std::mutex mutex_;
  std::condition_variable_any changed_;
  // Guarded by mutex_, as are the groups' fields that say so. StatusBoards call in with theirs
  // locked, so none is asked under this one.
  RequestId last_id_ = 0;
  uint64_t num_choices_ = 0;
  std::unordered_map<RequestId, Place> places_;
  std::deque<std::pair<RequestId, LiveRequest>> waiting_;
  std::unordered_map<RequestId, Preparing> preparing_;
  std::optional<absl::Time> recover_until_;  // while no group serves and one is waited for
  bool is_draining_ = false;

  std::jthread watch_;
};

}  // namespace fathom
