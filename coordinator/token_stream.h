// Where the tokens of one request go. Implemented by what serves clients, called by Engine.
//
// OnTokens any number of times, then OnEnd once; nothing after that but Flush. Never blocks: what a
// slow client has not read is kept by the implementation. Implementations are thread-safe.
#pragma once

#include "absl/status/status.h"
#include "proto/generate.pb.h"

namespace fathom {

class TokenStream {
 public:
  virtual ~TokenStream() = default;

  // What one step added.
  virtual void OnTokens(v1::GenerateResponse response) = 0;

  // The end. When `status` is OK the last OnTokens carried finish_reason and usage.
  virtual void OnEnd(const absl::Status& status) = 0;

  // A step's news of all streams have been told: time to send. Streams that share a connection
  // share a message.
  virtual void Flush() = 0;
};

}  // namespace fathom
