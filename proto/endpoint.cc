#include "proto/endpoint.h"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"

namespace fathom {
namespace {

enum class Reach { kThisHost, kNetwork };

absl::StatusOr<Reach> ReachOf(const std::string& address) {
  if (absl::StartsWith(address, "unix:")) {
    constexpr size_t kMaxSocketPath = 107;  // sockaddr_un
    if (address.size() - 5 > kMaxSocketPath || address.size() == 5) {
      return absl::InvalidArgumentError(absl::StrCat("the socket path of '", address, "' has ",
                                                     address.size() - 5, " bytes, expected 1 to ",
                                                     kMaxSocketPath));
    }
    return Reach::kThisHost;
  }
  const size_t colon = address.rfind(':');
  if (colon == std::string::npos || colon == 0 || colon + 1 == address.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", address, "' is no address: expected unix:/path or host:port"));
  }
  uint32_t port = 0;
  if (!absl::SimpleAtoi(address.substr(colon + 1), &port) || port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", address, "' has no port: expected 0 to 65535 after the colon"));
  }
  const std::string host = address.substr(0, colon);
  const bool loopback = host == "localhost" || host == "[::1]" || absl::StartsWith(host, "127.");
  return loopback ? Reach::kThisHost : Reach::kNetwork;
}

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  if (!file) return absl::NotFoundError(absl::StrCat("cannot read '", path, "'"));
  return std::move(text).str();
}

bool HasTls(const TlsOptions& tls) {
  return !tls.certificate_file.empty() && !tls.private_key_file.empty() &&
         !tls.authority_file.empty();
}

// Whether this address is to be spoken to in the clear.
absl::StatusOr<bool> IsPlain(const std::string& address, const TlsOptions& tls) {
  ASSIGN_OR_RETURN(const Reach reach, ReachOf(address));
  if (absl::StartsWith(address, "unix:")) return true;
  if (HasTls(tls)) return false;
  if (reach == Reach::kThisHost || tls.allow_insecure_tcp) return true;
  return absl::InvalidArgumentError(absl::StrCat(
      "'", address,
      "' is reachable from other hosts: give --tls-certificate, --tls-private-key and ",
      "--tls-authority, listen on a unix socket, or say --insecure"));
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> ServerCredentialsFor(
    const std::string& address, const TlsOptions& tls) {
  ASSIGN_OR_RETURN(const bool plain, IsPlain(address, tls));
  if (plain) return grpc::InsecureServerCredentials();
  grpc::SslServerCredentialsOptions options(
      GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  ASSIGN_OR_RETURN(options.pem_root_certs, ReadFile(tls.authority_file));
  ASSIGN_OR_RETURN(std::string key, ReadFile(tls.private_key_file));
  ASSIGN_OR_RETURN(std::string certificate, ReadFile(tls.certificate_file));
  options.pem_key_cert_pairs.push_back({std::move(key), std::move(certificate)});
  return grpc::SslServerCredentials(options);
}

absl::Status PrepareToListen(const std::string& address) {
  RETURN_IF_ERROR(ReachOf(address).status());
  if (!absl::StartsWith(address, "unix:")) return absl::OkStatus();
  const std::string path = address.substr(5);
  struct stat file;
  if (lstat(path.c_str(), &file) != 0) return absl::OkStatus();  // binding says what is wrong
  if (!S_ISSOCK(file.st_mode)) {
    return absl::AlreadyExistsError(
        absl::StrCat("'", path, "' exists and is not a socket: remove it or listen elsewhere"));
  }
  sockaddr_un socket_address = {};
  socket_address.sun_family = AF_UNIX;
  std::memcpy(socket_address.sun_path, path.c_str(), path.size() + 1);
  const int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int refused =
      connect(probe, reinterpret_cast<const sockaddr*>(&socket_address), sizeof(socket_address));
  const bool is_stale = refused != 0 && errno == ECONNREFUSED;
  close(probe);
  if (!is_stale) {
    return absl::AlreadyExistsError(
        absl::StrCat("another process listens on '", address, "': stop it or listen elsewhere"));
  }
  unlink(path.c_str());
  return absl::OkStatus();
}

void ConfigureServer(grpc::ServerBuilder& builder) {
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  builder.SetMaxSendMessageSize(kMaxMessageBytes);
  // Otherwise two servers could share a port unnoticed.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kPingIntervalMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kPingTimeoutMs);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);  // no limit
  // Clients ping as often; gRPC takes that for abuse unless told.
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                             kPingIntervalMs / 2);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0);
}

absl::StatusOr<std::shared_ptr<grpc::Channel>> ConnectTo(const std::string& address,
                                                         const TlsOptions& tls,
                                                         int read_ahead_bytes) {
  ASSIGN_OR_RETURN(const bool plain, IsPlain(address, tls));
  std::shared_ptr<grpc::ChannelCredentials> credentials = grpc::InsecureChannelCredentials();
  if (!plain) {
    grpc::SslCredentialsOptions options;
    ASSIGN_OR_RETURN(options.pem_root_certs, ReadFile(tls.authority_file));
    ASSIGN_OR_RETURN(options.pem_private_key, ReadFile(tls.private_key_file));
    ASSIGN_OR_RETURN(options.pem_cert_chain, ReadFile(tls.certificate_file));
    credentials = grpc::SslCredentials(options);
  }
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  arguments.SetMaxSendMessageSize(kMaxMessageBytes);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 50);
  // How long one attempt may take, the TLS handshake with a busy host included.
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 3000);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 200);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, kPingIntervalMs);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kPingTimeoutMs);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);  // no limit
  if (read_ahead_bytes > 0) {
    arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);  // it would let the window grow
    arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, read_ahead_bytes);
  }
  return grpc::CreateCustomChannel(address, credentials, arguments);
}

}  // namespace fathom
