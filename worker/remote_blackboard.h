// Rank 0's blackboard as the other ranks see it: Publish and Lookup of worker.proto.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "proto/endpoint.h"
#include "worker/blackboard.h"

namespace fathom {

// Unavailable, naming the address, when rank 0 does not answer by the deadline.
absl::StatusOr<std::unique_ptr<Blackboard>> ConnectToBlackboard(const std::string& rank0_address,
                                                                const TlsOptions& tls,
                                                                uint64_t epoch,
                                                                absl::Time deadline);

// The address of this host's interface on the way to an address as of proto/endpoint.h: the one
// under which whoever listens there can reach this host. 127.0.0.1 for a unix socket.
absl::StatusOr<std::string> LocalHostTowards(const std::string& address);

}  // namespace fathom
