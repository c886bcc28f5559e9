#include "worker/gloo_communicator.h"

#include <gloo/transport/context.h>
#include <gloo/transport/tcp/device.h>
#include <gloo/transport/unbound_buffer.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <exception>
#include <functional>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "worker/rank_order_sum.h"

namespace fathom {
namespace {

using Transfer = std::unique_ptr<gloo::transport::UnboundBuffer>;

// Up to here everybody sends all to all; beyond, slices go to their ranks and sums come back.
constexpr int64_t kLargestDirectBytes = 32 << 10;
constexpr int64_t kChunkBytes = 8 << 20;  // bounds the memory for what the others send
constexpr absl::Duration kLookupInterval = absl::Milliseconds(200);

// Gloo's exceptions as a status. "lost rank 3: …" when one rank is to blame.
absl::Status Guarded(const std::string& what, const std::function<void()>& body) {
  try {
    body();
    return absl::OkStatus();
  } catch (const std::exception& error) {
    const std::string message = absl::StrCat(what, ": ", error.what());
    if (absl::StrContains(message, "imed out") || absl::StrContains(message, "imeout")) {
      return absl::DeadlineExceededError(message);
    }
    return absl::UnavailableError(message);
  }
}

class GlooCommunicator final : public GroupCommunicator {
 public:
  explicit GlooCommunicator(const GlooCommunicatorOptions& options) : options_(options) {
    CHECK(options.rank >= 0 && options.rank < options.world_size);
  }
  ~GlooCommunicator() override { Abort(); }

  absl::Status Connect(Blackboard& blackboard, absl::Time deadline) override;

  int rank() const override { return options_.rank; }
  int world_size() const override { return options_.world_size; }
  absl::Status AllReduceSum(const Tensor& tensor) override;
  absl::Status GatherToRank0(const Tensor& part, const Tensor& whole) override;
  absl::Status BroadcastFromRank0(void* bytes, int64_t num_bytes) override;
  void Abort() override;

 private:
  // Bytes on their way to or from one rank.
  struct Piece {
    int peer;
    void* data;
    int64_t num_bytes;
  };

  absl::Status CreatePairs(absl::Time deadline);
  absl::Status PublishAddresses(Blackboard& blackboard);
  absl::StatusOr<std::string> LookupAddresses(Blackboard& blackboard, int peer,
                                              absl::Time deadline);
  absl::Status ReduceWhole(char* data, DType dtype, int64_t count);
  absl::Status ReduceSlices(char* data, DType dtype, int64_t count);
  // All pieces at once; returns when all have come and gone.
  absl::Status Exchange(const std::vector<Piece>& outgoing, const std::vector<Piece>& incoming);
  absl::Status Await(std::vector<Transfer>& sends, std::vector<Transfer>& receives,
                     const std::vector<Piece>& outgoing, const std::vector<Piece>& incoming);

  // Closes the connections, which the other ranks notice at once.
  void Leave() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  std::string Self() const { return absl::StrCat("rank ", options_.rank); }
  absl::Status AbortedHere() const {
    return absl::AbortedError(absl::StrCat(Self(), " was told to stop"));
  }

  const GlooCommunicatorOptions options_;
  std::shared_ptr<gloo::transport::Device> device_;
  uint64_t num_exchanges_ = 0;  // names each exchange on the wire
  std::vector<char> scratch_;   // what the others sent

  std::atomic<bool> aborted_ = false;
  absl::Mutex mutex_;
  std::shared_ptr<gloo::transport::Context> context_ ABSL_GUARDED_BY(mutex_);
  // What the caller of a collective waits for, for Abort to interrupt.
  std::vector<gloo::transport::UnboundBuffer*> waiting_ ABSL_GUARDED_BY(mutex_);
};

absl::Status GlooCommunicator::Connect(Blackboard& blackboard, absl::Time deadline) {
  RETURN_IF_ERROR(CreatePairs(deadline));
  RETURN_IF_ERROR(PublishAddresses(blackboard));
  std::shared_ptr<gloo::transport::Context> context;
  {
    absl::MutexLock lock(&mutex_);
    context = context_;
  }
  for (int peer = 0; peer < options_.world_size; ++peer) {
    if (peer == options_.rank) continue;
    ASSIGN_OR_RETURN(const std::string addresses, LookupAddresses(blackboard, peer, deadline));
    if (addresses.empty() || addresses.size() % options_.world_size != 0) {
      return absl::InternalError(absl::StrCat("rank ", peer, " published no addresses"));
    }
    const size_t address_bytes = addresses.size() / options_.world_size;
    const char* begin = addresses.data() + options_.rank * address_bytes;
    const std::vector<char> address(begin, begin + address_bytes);
    const absl::Status status = Guarded(absl::StrCat(Self(), " could not connect with rank ", peer),
                                        [&] { context->getPair(peer)->connect(address); });
    if (aborted_) return AbortedHere();
    RETURN_IF_ERROR(status);
  }
  // Who has connected knows only of its own connections; this meeting stands for all.
  std::vector<char> hello(options_.world_size);
  std::vector<Piece> outgoing, incoming;
  for (int peer = 0; peer < options_.world_size; ++peer) {
    if (peer == options_.rank) continue;
    outgoing.push_back({peer, &hello[options_.rank], 1});
    incoming.push_back({peer, &hello[peer], 1});
  }
  return Exchange(outgoing, incoming);
}

absl::Status GlooCommunicator::CreatePairs(absl::Time deadline) {
  // Gloo waits for a connection five times as long as it is told.
  const absl::Duration wait = std::max(absl::Milliseconds(1), (deadline - absl::Now()) / 5);
  return Guarded(absl::StrCat(Self(), " cannot listen on '", options_.host, "'"), [&] {
    gloo::transport::tcp::attr attributes(options_.host.c_str());
    device_ = gloo::transport::tcp::CreateDevice(attributes);
    std::shared_ptr<gloo::transport::Context> context =
        device_->createContext(options_.rank, options_.world_size);
    context->setTimeout(absl::ToChronoMilliseconds(wait));
    for (int peer = 0; peer < options_.world_size; ++peer) {
      if (peer != options_.rank) context->createPair(peer);
    }
    absl::MutexLock lock(&mutex_);
    context_ = std::move(context);
  });
}

// One address per peer, as Gloo's pairs each listen for themselves; our own place is left blank.
absl::Status GlooCommunicator::PublishAddresses(Blackboard& blackboard) {
  absl::MutexLock lock(&mutex_);
  std::vector<std::vector<char>> addresses(options_.world_size);
  size_t address_bytes = 0;
  for (int peer = 0; peer < options_.world_size; ++peer) {
    if (peer != options_.rank) addresses[peer] = context_->getPair(peer)->address().bytes();
    address_bytes = std::max(address_bytes, addresses[peer].size());
  }
  std::string value;
  for (std::vector<char>& address : addresses) {
    address.resize(address_bytes);
    value.append(address.begin(), address.end());
  }
  return blackboard.Publish(absl::StrCat("gloo addresses of rank ", options_.rank), value);
}

absl::StatusOr<std::string> GlooCommunicator::LookupAddresses(Blackboard& blackboard, int peer,
                                                              absl::Time deadline) {
  const std::string key = absl::StrCat("gloo addresses of rank ", peer);
  while (true) {
    if (aborted_) return AbortedHere();
    absl::StatusOr<std::string> value =
        blackboard.Lookup(key, std::min(deadline, absl::Now() + kLookupInterval));
    if (value.ok() || !absl::IsDeadlineExceeded(value.status())) return value;
    if (absl::Now() >= deadline) {
      return absl::DeadlineExceededError(absl::StrCat("rank ", peer, " did not come in time"));
    }
  }
}

void GlooCommunicator::Abort() {
  aborted_ = true;
  absl::MutexLock lock(&mutex_);
  for (gloo::transport::UnboundBuffer* buffer : waiting_) {
    buffer->abortWaitRecv();
    buffer->abortWaitSend();
  }
  Leave();
}

void GlooCommunicator::Leave() {
  if (context_ == nullptr) return;
  for (int peer = 0; peer < options_.world_size; ++peer) {
    if (peer == options_.rank) continue;
    const absl::Status ignored = Guarded("closing", [&] { context_->getPair(peer)->close(); });
  }
}

absl::Status GlooCommunicator::AllReduceSum(const Tensor& tensor) {
  CHECK(tensor.dense()) << tensor.DebugString();
  const int64_t element_bytes = SizeOf(tensor.dtype());
  const int64_t most = kChunkBytes / element_bytes;
  const int64_t total = tensor.num_elements();
  for (int64_t begin = 0; begin < total; begin += most) {
    const int64_t count = std::min(most, total - begin);
    char* data = static_cast<char*>(tensor.raw()) + begin * element_bytes;
    if (count * element_bytes <= kLargestDirectBytes) {
      RETURN_IF_ERROR(ReduceWhole(data, tensor.dtype(), count));
    } else {
      RETURN_IF_ERROR(ReduceSlices(data, tensor.dtype(), count));
    }
  }
  return absl::OkStatus();
}

absl::Status GlooCommunicator::ReduceWhole(char* data, DType dtype, int64_t count) {
  const int64_t num_bytes = count * SizeOf(dtype);
  scratch_.resize(std::max<size_t>(scratch_.size(), num_bytes * options_.world_size));
  std::vector<Piece> outgoing, incoming;
  std::vector<const void*> parts(options_.world_size, data);
  for (int peer = 0; peer < options_.world_size; ++peer) {
    if (peer == options_.rank) continue;
    parts[peer] = &scratch_[peer * num_bytes];
    outgoing.push_back({peer, data, num_bytes});
    incoming.push_back({peer, &scratch_[peer * num_bytes], num_bytes});
  }
  RETURN_IF_ERROR(Exchange(outgoing, incoming));
  SumInRankOrder(parts, dtype, count, data);
  return absl::OkStatus();
}

absl::Status GlooCommunicator::ReduceSlices(char* data, DType dtype, int64_t count) {
  const int world_size = options_.world_size;
  const int64_t element_bytes = SizeOf(dtype);
  const int64_t slice = (count + world_size - 1) / world_size;
  const auto piece_of = [&](int rank) {
    const int64_t begin = std::min(count, rank * slice);
    const int64_t end = std::min(count, begin + slice);
    return Piece{rank, data + begin * element_bytes, (end - begin) * element_bytes};
  };
  const Piece own = piece_of(options_.rank);
  scratch_.resize(std::max<size_t>(scratch_.size(), slice * element_bytes * world_size));

  // Every rank gets what all have of its slice, sums it, and gives it to all.
  std::vector<Piece> outgoing, incoming, sums_outgoing, sums_incoming;
  std::vector<const void*> parts(world_size, own.data);
  for (int peer = 0; peer < world_size; ++peer) {
    if (peer == options_.rank) continue;
    char* part = &scratch_[peer * slice * element_bytes];
    parts[peer] = part;
    outgoing.push_back(piece_of(peer));
    incoming.push_back({peer, part, own.num_bytes});
    sums_outgoing.push_back({peer, own.data, own.num_bytes});
    sums_incoming.push_back(piece_of(peer));
  }
  RETURN_IF_ERROR(Exchange(outgoing, incoming));
  SumInRankOrder(parts, dtype, own.num_bytes / element_bytes, own.data);
  return Exchange(sums_outgoing, sums_incoming);
}

absl::Status GlooCommunicator::GatherToRank0(const Tensor& part, const Tensor& whole) {
  CHECK(part.dense()) << part.DebugString();
  const int64_t part_bytes = part.num_bytes();
  if (part_bytes == 0) return absl::OkStatus();
  if (options_.rank != 0) return Exchange({{0, part.raw(), part_bytes}}, {});
  CHECK(whole.dense()) << whole.DebugString();
  CHECK_EQ(whole.num_bytes(), part_bytes * options_.world_size);
  std::vector<Piece> incoming;
  for (int peer = 1; peer < options_.world_size; ++peer) {
    incoming.push_back({peer, static_cast<char*>(whole.raw()) + peer * part_bytes, part_bytes});
  }
  RETURN_IF_ERROR(Exchange({}, incoming));
  if (part.raw() != whole.raw()) std::memcpy(whole.raw(), part.raw(), part_bytes);
  return absl::OkStatus();
}

absl::Status GlooCommunicator::BroadcastFromRank0(void* bytes, int64_t num_bytes) {
  if (num_bytes == 0) return absl::OkStatus();
  if (options_.rank != 0) return Exchange({}, {{0, bytes, num_bytes}});
  std::vector<Piece> outgoing;
  for (int peer = 1; peer < options_.world_size; ++peer) {
    outgoing.push_back({peer, bytes, num_bytes});
  }
  return Exchange(outgoing, {});
}

absl::Status GlooCommunicator::Exchange(const std::vector<Piece>& outgoing,
                                        const std::vector<Piece>& incoming) {
  const uint64_t slot = num_exchanges_++;
  std::vector<Transfer> sends, receives;
  const absl::Status started = Guarded(absl::StrCat(Self(), " cannot reach the others"), [&] {
    absl::MutexLock lock(&mutex_);
    if (aborted_) return;
    CHECK(context_ != nullptr) << "not connected";
    for (const Piece& piece : incoming) {
      receives.push_back(context_->createUnboundBuffer(piece.data, piece.num_bytes));
      waiting_.push_back(receives.back().get());
    }
    for (const Piece& piece : outgoing) {
      sends.push_back(context_->createUnboundBuffer(piece.data, piece.num_bytes));
      waiting_.push_back(sends.back().get());
    }
    for (size_t i = 0; i < incoming.size(); ++i) receives[i]->recv(incoming[i].peer, slot);
    for (size_t i = 0; i < outgoing.size(); ++i) sends[i]->send(outgoing[i].peer, slot);
  });
  const absl::Status ended =
      started.ok() && !aborted_ ? Await(sends, receives, outgoing, incoming) : started;
  absl::MutexLock lock(&mutex_);
  waiting_.clear();
  if (!ended.ok()) Leave();
  return aborted_ ? AbortedHere() : ended;
}

absl::Status GlooCommunicator::Await(std::vector<Transfer>& sends, std::vector<Transfer>& receives,
                                     const std::vector<Piece>& outgoing,
                                     const std::vector<Piece>& incoming) {
  const absl::Time deadline = absl::Now() + options_.timeout;
  const auto left = [&] {
    return absl::ToChronoMilliseconds(std::max(absl::Milliseconds(1), deadline - absl::Now()));
  };
  for (size_t i = 0; i < receives.size() && !aborted_; ++i) {
    RETURN_IF_ERROR(Guarded(absl::StrCat(Self(), " lost rank ", incoming[i].peer),
                            [&] { receives[i]->waitRecv(left()); }));
  }
  for (size_t i = 0; i < sends.size() && !aborted_; ++i) {
    RETURN_IF_ERROR(Guarded(absl::StrCat(Self(), " lost rank ", outgoing[i].peer),
                            [&] { sends[i]->waitSend(left()); }));
  }
  return absl::OkStatus();
}

}  // namespace

std::unique_ptr<GroupCommunicator> MakeGlooCommunicator(const GlooCommunicatorOptions& options) {
  return std::make_unique<GlooCommunicator>(options);
}

}  // namespace fathom
