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
// socket. Does nothing for TCP, where the server must set GRPC_ARG_ALLOW_REUSEPORT to 0, or two
// servers could share a port unnoticed.
absl::Status PrepareToListen(const std::string& address);

// A channel that reconnects quickly (within 200 ms) when the peer comes back. Errors as above.
absl::StatusOr<std::shared_ptr<grpc::Channel>> ConnectTo(const std::string& address,
                                                         const TlsOptions& tls);

}  // namespace fathom
