// Asks rank 0 of a group whether it can obey a grammar, before a request that wants it is queued.
//
// Compiling may take a second, and why a grammar is refused is the client's to hear at once; so it
// happens ahead of the queue and beside the steps. A few calls are under way at a time, so that a
// worker has a thread for each; the others wait here, first come, first served.
//
// Thread-safe.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_set>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "proto/endpoint.h"
#include "proto/worker.grpc.pb.h"

namespace fathom {

class GrammarGate {
 public:
  struct Options {
    std::string address;  // of rank 0
    TlsOptions tls;
    size_t max_calls = 8;                         // at a time
    absl::Duration max_wait = absl::Seconds(10);  // for a turn
    absl::Duration timeout = absl::Seconds(30);   // of a call; the worker's own limits come first
  };
  using Done = std::function<void(const absl::Status& status)>;

  explicit GrammarGate(Options options);
  ~GrammarGate();  // closes, and waits for the last `done`

  // Calls `done` once, later and from another thread: OK; InvalidArgument when the grammar is
  // refused, and why; ResourceExhausted: too many others; Unavailable: the worker is not there;
  // Aborted: it is, and cannot now. An error, those of ConnectTo or Unavailable after Close: `done`
  // is never called.
  absl::Status Prepare(const v1::Grammar& grammar, Done done);

  // Ends what is under way; what waits ends before this returns.
  void Close();
  // Waits until nothing is under way.
  void Join();

 private:
  struct Call;

  // These two require mutex_.
  absl::Status Connect();
  void StartNext(std::vector<std::unique_ptr<Call>>& too_late);
  void OnAnswer(Call* call, const grpc::Status& status);

  const Options options_;

  std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_.
  std::unique_ptr<v1::Worker::Stub> stub_;  // null until it is needed
  std::deque<std::unique_ptr<Call>> waiting_;
  std::unordered_set<Call*> calls_;  // under way
  int num_answering_ = 0;            // that were, and still tell others
  bool is_closed_ = false;
};

}  // namespace fathom
