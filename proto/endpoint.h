// How the processes reach each other over gRPC: addresses and credentials.
//
// An address is "unix:/path/to.sock" or "host:port". Unix sockets and loopback addresses need
// nothing more. Any other TCP address needs mutual TLS, or an operator who says `--insecure` and
// means it. Thread-safe (pure functions).
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "grpcpp/channel.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server_builder.h"

namespace fathom {

struct TlsOptions {
  std::string certificate_file;     // PEM; this process
  std::string private_key_file;     // PEM
  std::string authority_file;       // PEM; who signs the peers
  bool allow_insecure_tcp = false;  // --insecure
};

// Largest message either way: a prompt of a million ids is 4 MB.
inline constexpr int kMaxMessageBytes = 64 << 20;

// InvalidArgument when the address is malformed or needs TLS files that were not given; NotFound
// when they cannot be read.
absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> ServerCredentialsFor(
    const std::string& address, const TlsOptions& tls);

// Clears the way for a server about to listen on `address`: removes the socket file that a dead
// process left behind. AlreadyExists when something answers there, or when the path is not a
// socket. Does nothing for TCP, where ConfigureServer keeps two servers from sharing a port.
absl::Status PrepareToListen(const std::string& address);

// What every server of ours sets: message sizes, no sharing of ports, and pings both ways, so that
// a peer that vanished or froze is noticed within ten seconds.
void ConfigureServer(grpc::ServerBuilder& builder);

// How long a peer may leave a ping unanswered, about, before its calls end with UNAVAILABLE.
inline constexpr int kPingIntervalMs = 5000;
inline constexpr int kPingTimeoutMs = 5000;

// A channel that reconnects quickly (within 200 ms) when the peer comes back, and pings it while
// there are calls. `read_ahead_bytes`: what a call may receive before it is read, about; 0: as much
// as keeps the connection busy. Errors as above.
absl::StatusOr<std::shared_ptr<grpc::Channel>> ConnectTo(const std::string& address,
                                                         const TlsOptions& tls,
                                                         int read_ahead_bytes = 0);

}  // namespace fathom
