#include "worker/remote_blackboard.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "grpcpp/client_context.h"
#include "proto/status.h"
#include "proto/worker.grpc.pb.h"

namespace fathom {
namespace {

constexpr absl::Duration kPublishTimeout = absl::Seconds(10);

absl::Status FromRank0(const grpc::Status& status, const std::string& address) {
  const absl::Status same = FromGrpc(status);
  return absl::Status(same.code(), absl::StrCat("rank 0 at ", address, ": ", same.message()));
}

class RemoteBlackboard final : public Blackboard {
 public:
  RemoteBlackboard(std::string address, const std::shared_ptr<grpc::Channel>& channel,
                   uint64_t epoch)
      : address_(std::move(address)), stub_(v1::Worker::NewStub(channel)), epoch_(epoch) {}

  absl::Status Publish(const std::string& key, const std::string& value) override {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + kPublishTimeout));
    v1::PublishRequest request;
    request.set_epoch(epoch_);
    request.set_key(key);
    request.set_value(value);
    v1::PublishResponse response;
    return FromRank0(stub_->Publish(&context, request, &response), address_);
  }

  absl::StatusOr<std::string> Lookup(const std::string& key, absl::Time deadline) override {
    grpc::ClientContext context;
    context.set_wait_for_ready(true);
    context.set_deadline(absl::ToChronoTime(deadline));
    v1::LookupRequest request;
    request.set_epoch(epoch_);
    request.set_key(key);
    v1::LookupResponse response;
    RETURN_IF_ERROR(FromRank0(stub_->Lookup(&context, request, &response), address_));
    return std::move(*response.mutable_value());
  }

 private:
  const std::string address_;
  const std::unique_ptr<v1::Worker::Stub> stub_;
  const uint64_t epoch_;
};

std::string WithoutBrackets(const std::string& host) {
  return std::string(absl::StripSuffix(absl::StripPrefix(host, "["), "]"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Blackboard>> ConnectToBlackboard(const std::string& rank0_address,
                                                                const TlsOptions& tls,
                                                                uint64_t epoch,
                                                                absl::Time deadline) {
  ASSIGN_OR_RETURN(const std::shared_ptr<grpc::Channel> channel, ConnectTo(rank0_address, tls));
  if (!channel->WaitForConnected(absl::ToChronoTime(deadline))) {
    return absl::UnavailableError(
        absl::StrCat("rank 0 cannot be reached at ", rank0_address, " from here"));
  }
  return std::make_unique<RemoteBlackboard>(rank0_address, channel, epoch);
}

absl::StatusOr<std::string> LocalHostTowards(const std::string& address) {
  if (absl::StartsWith(address, "unix:")) return "127.0.0.1";
  const size_t colon = address.rfind(':');
  if (colon == std::string::npos) {
    return absl::InvalidArgumentError(absl::StrCat("'", address, "' is no address"));
  }
  addrinfo hints = {};
  hints.ai_socktype = SOCK_DGRAM;
  addrinfo* found = nullptr;
  const int error = getaddrinfo(WithoutBrackets(address.substr(0, colon)).c_str(),
                                address.substr(colon + 1).c_str(), &hints, &found);
  if (error != 0) {
    return absl::UnavailableError(
        absl::StrCat("cannot resolve '", address, "': ", gai_strerror(error)));
  }
  // Connecting a datagram socket sends nothing; it only picks the way.
  absl::StatusOr<std::string> host =
      absl::UnavailableError(absl::StrCat("no interface leads to '", address, "'"));
  for (const addrinfo* way = found; way != nullptr && !host.ok(); way = way->ai_next) {
    const int descriptor = socket(way->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (descriptor < 0) continue;
    sockaddr_storage local = {};
    socklen_t length = sizeof local;
    char text[NI_MAXHOST];
    if (connect(descriptor, way->ai_addr, way->ai_addrlen) == 0 &&
        getsockname(descriptor, reinterpret_cast<sockaddr*>(&local), &length) == 0 &&
        getnameinfo(reinterpret_cast<sockaddr*>(&local), length, text, sizeof text, nullptr, 0,
                    NI_NUMERICHOST) == 0) {
      host = std::string(text);
    }
    close(descriptor);
  }
  freeaddrinfo(found);
  return host;
}

}  // namespace fathom
