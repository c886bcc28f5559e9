// The gateway's GenerateMany call, over which all its requests go to the coordinator.
//
// It is opened with the first request, and again with the first one after it broke; then every
// request that was on it fails with the call's status. The next message is read when the one before
// has been dealt with: what a busy gateway does not get to gathers in the coordinator.
//
// Used on the I/O thread alone.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "gateway/http/io_thread.h"
#include "gateway/rpc/outstanding.h"
#include "proto/generate.grpc.pb.h"

namespace fathom {

class GenerateLink {
 public:
  // Of one request. OnResponse may call the link, OnFailure must not.
  class Reader {
   public:
    virtual ~Reader() = default;
    // The one with a finish_reason is the last. It may be moved from.
    virtual void OnResponse(v1::GenerateResponse& response) = 0;
    // The request ended without one.
    virtual void OnFailure(const absl::Status& status) = 0;
  };

  // All references outlive this; `outstanding` counts the calls that gRPC has not let go of.
  GenerateLink(v1::Generate::Stub& stub, IoThread& io_thread, Outstanding& outstanding);
  // Cancels the call. The I/O thread may have ended.
  ~GenerateLink();
  GenerateLink(const GenerateLink&) = delete;
  GenerateLink& operator=(const GenerateLink&) = delete;

  // A number for the request. `reader` lives until its last event, or until one of those below.
  uint64_t Start(v1::GenerateRequest request, Reader& reader);
  // The coordinator stops working on it, and the reader hears no more. Does nothing after the last
  // event.
  void Cancel(uint64_t stream);
  // The reader hears no more.
  void Forget(uint64_t stream);

 private:
  class Call;

  // A slice of the message's events from `begin` on; returns its end.
  int Take(v1::GenerateEvents& events, int begin);
  void TakeOther(v1::StreamEvent& event);
  void Deliver(uint64_t stream, v1::GenerateResponse& response);
  void Fail(uint64_t stream, const absl::Status& status);
  void OnCallEnded(const absl::Status& status);

  v1::Generate::Stub& stub_;
  IoThread& io_thread_;
  Outstanding& outstanding_;
  std::shared_ptr<Call> call_;  // null: none is open
  absl::flat_hash_map<uint64_t, Reader*> readers_;
  v1::GenerateResponse plain_response_;  // of one token; kept for its memory
  uint64_t last_stream_ = 0;
};

}  // namespace fathom
