// One GenerateMany call: the requests of one client, whose tokens go out in one message a step.
//
// What a step adds gathers, by stream, until the step has told everything (Flush) and the message
// before has been written; so a client that reads slowly costs memory in proportion to its own
// tokens and holds up nobody. Commands are read one after the other, and no further while
// kMaxUnsentEnds streams have ended without the client knowing.
//
// Owns itself until gRPC is done with it; the streams that GroupRouter holds keep it as well.
// Thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "coordinator/admission.h"
#include "coordinator/unsent_responses.h"
#include "grpcpp/support/server_callback.h"
#include "proto/generate.pb.h"

namespace fathom {

class GenerateSession final
    : public grpc::ServerBidiReactor<v1::GenerateCommand, v1::GenerateEvents> {
 public:
  static constexpr int kMaxUnsentEnds = 1024;

  // Begins to read. `admission` outlives the call.
  static std::shared_ptr<GenerateSession> Open(Admission& admission);

  // Ends the call with Unavailable as soon as none of its requests runs; those that still come are
  // refused.
  void Close();

 private:
  class Member;
  struct Stream {
    RequestId id = 0;  // 0: not queued yet
    UnsentResponses unsent;
    std::optional<absl::Status> end;
    bool is_listed = false;    // in changed_
    bool is_end_told = false;  // by a response with a finish_reason
  };

  explicit GenerateSession(Admission& admission) : admission_(admission) {}

  // Of the streams.
  void OnTokens(uint64_t number, v1::GenerateResponse response);
  void OnEnd(uint64_t number, const absl::Status& status);
  void Flush();

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

  void Apply(const v1::GenerateCommand& command);
  void Start(uint64_t number, const v1::GenerateRequest& request);
  void CancelStream(uint64_t number);
  // Nobody reads any more.
  void GiveUp(grpc::Status status);

  // These require mutex_.
  void List(uint64_t number, Stream& stream);
  void EndStream(uint64_t number, const absl::Status& status);
  void Pump();
  void FillMessage();
  bool MayRead() const;

  Admission& admission_;
  v1::GenerateCommand command_;  // being read

  std::mutex mutex_;
  // Guarded by mutex_.
  std::shared_ptr<GenerateSession> self_;
  std::unordered_map<uint64_t, Stream> streams_;
  std::vector<uint64_t> changed_;  // streams with something unsent, in order; some may be gone
  v1::GenerateEvents message_;     // being written
  int num_unsent_ends_ = 0;
  std::optional<grpc::Status> final_status_;  // set once the client says no more
  bool is_closing_ = false;
  bool is_read_paused_ = false;
  bool is_writing_ = false;
  bool is_finished_ = false;
};

}  // namespace fathom
