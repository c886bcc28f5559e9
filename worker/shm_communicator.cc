#include "worker/shm_communicator.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstring>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "worker/rank_order_sum.h"
#include "worker/shared_segment.h"

namespace fathom {
namespace {

constexpr uint64_t kMagic = 0x31307473'6d687466;
constexpr int64_t kPageBytes = 4096;
constexpr int kLargestWorld = 1024;
// Up to here one meeting and N sums by each are quicker than two meetings and one sum by each.
constexpr int64_t kLargestDirectElements = 16 << 10;  // over all ranks
constexpr int kSpins = 200;
// How often a waiting rank looks up whether the others live.
constexpr absl::Duration kLookInterval = absl::Milliseconds(20);
constexpr absl::Duration kNameLookupInterval = absl::Milliseconds(200);

enum class CallKind : uint64_t { kNone, kAllReduce, kGather, kBroadcast };

const char* NameOf(CallKind kind) {
  switch (kind) {
    case CallKind::kNone:
      break;
    case CallKind::kAllReduce:
      return "AllReduceSum";
    case CallKind::kGather:
      return "GatherToRank0";
    case CallKind::kBroadcast:
      return "BroadcastFromRank0";
  }
  return "none";
}

struct Call {
  CallKind kind = CallKind::kNone;
  int64_t num_bytes = 0;
  bool operator==(const Call&) const = default;
};

struct alignas(64) RankState {
  std::atomic<uint32_t> arrived;  // round that it waits for
  std::atomic<uint32_t> present;  // 1: it has claimed its number
  std::atomic<uint32_t> left;     // 1: it was aborted, or closed
  Call calls[2];                  // by parity, as the windows
};

struct Header {
  uint64_t magic;
  uint64_t epoch;
  int64_t world_size;
  int64_t window_bytes;
  alignas(64) std::atomic<uint32_t> num_arrived;
  alignas(64) std::atomic<uint32_t> round;  // meetings that took place; ranks sleep on this word
};
static_assert(std::atomic<uint32_t>::is_always_lock_free);

int64_t HeaderBytes(int world_size) {
  const int64_t bytes = sizeof(Header) + world_size * sizeof(RankState);
  return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
}

enum class Woken { kBySomeone, kByTimeout };

Woken FutexWait(std::atomic<uint32_t>& word, uint32_t expected, absl::Duration timeout) {
  const timespec relative = absl::ToTimespec(timeout);
  const long result = syscall(SYS_futex, &word, FUTEX_WAIT, expected, &relative, nullptr, 0);
  return result != 0 && errno == ETIMEDOUT ? Woken::kByTimeout : Woken::kBySomeone;
}

void FutexWakeAll(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

int UsableCores() {
  cpu_set_t cores;
  return sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : 1;
}

class ShmCommunicator final : public GroupCommunicator {
 public:
  explicit ShmCommunicator(const ShmCommunicatorOptions& options)
      : options_(options), spins_(UsableCores() >= options.world_size ? kSpins : 0) {
    CHECK(options.rank >= 0 && options.rank < options.world_size);
    CHECK_LE(options.world_size, kLargestWorld);
    CHECK(options.window_bytes > 0 && options.window_bytes % 64 == 0);
  }
  ~ShmCommunicator() override { Abort(); }

  absl::Status Connect(Blackboard& blackboard, absl::Time deadline) override;

  int rank() const override { return options_.rank; }
  int world_size() const override { return options_.world_size; }
  absl::Status AllReduceSum(const Tensor& tensor) override;
  absl::Status GatherToRank0(const Tensor& part, const Tensor& whole) override;
  absl::Status BroadcastFromRank0(void* bytes, int64_t num_bytes) override;
  void Abort() override;

 private:
  absl::Status OpenSegment(Blackboard& blackboard, absl::Time deadline);
  absl::Status CheckHeader(const Header& header) const;

  absl::Status ReduceChunk(char* data, DType dtype, int64_t count);
  char* BeginCall(CallKind kind, int64_t num_bytes);
  absl::Status MeetAndCompareCalls();

  // Returns once all ranks have come here. Who fails to meet them leaves.
  absl::Status Meet(absl::Time deadline);
  absl::Status AwaitOthers(Header& header, uint32_t round, absl::Time deadline);
  void Leave();
  absl::Status CheckNobodyLeft(Header& header, uint32_t round);
  absl::Status CheckMissingLive(Header& header, uint32_t round, absl::Time deadline);

  RankState& state(Header& header, int rank) const {
    return reinterpret_cast<RankState*>(&header + 1)[rank];
  }
  char* window(int rank) const {
    return segment_->data() + HeaderBytes(options_.world_size) +
           (parity_ * options_.world_size + rank) * options_.window_bytes;
  }
  absl::Status AbortedHere() const {
    return absl::AbortedError(absl::StrCat("rank ", options_.rank, " was told to stop"));
  }

  const ShmCommunicatorOptions options_;
  const int spins_;
  std::unique_ptr<SharedSegment> segment_;
  int parity_ = 0;  // which windows the current call uses

  std::atomic<bool> aborted_ = false;
  std::atomic<Header*> header_ = nullptr;  // set when connected far enough to be woken
};

absl::Status ShmCommunicator::Connect(Blackboard& blackboard, absl::Time deadline) {
  CHECK(segment_ == nullptr);
  RETURN_IF_ERROR(OpenSegment(blackboard, deadline));
  Header* header = header_.load();
  RETURN_IF_ERROR(segment_->ClaimRank(options_.rank));
  state(*header, options_.rank).present.store(1);
  RETURN_IF_ERROR(Meet(deadline));
  segment_->RemoveName();
  return absl::OkStatus();
}

absl::Status ShmCommunicator::OpenSegment(Blackboard& blackboard, absl::Time deadline) {
  const int64_t num_bytes = ShmBytesNeeded(options_);
  const std::string key = "shared memory";
  if (options_.rank == 0) {
    ASSIGN_OR_RETURN(segment_, SharedSegment::Create(absl::StrCat(options_.epoch), num_bytes));
    auto* header = new (segment_->data()) Header{.magic = kMagic,
                                                 .epoch = options_.epoch,
                                                 .world_size = options_.world_size,
                                                 .window_bytes = options_.window_bytes,
                                                 .num_arrived = 0,
                                                 .round = 0};
    for (int rank = 0; rank < options_.world_size; ++rank) new (&state(*header, rank)) RankState();
    header_.store(header);
    return blackboard.Publish(key, segment_->name());
  }
  while (true) {
    if (aborted_) return AbortedHere();
    const absl::StatusOr<std::string> name =
        blackboard.Lookup(key, std::min(deadline, absl::Now() + kNameLookupInterval));
    if (name.ok()) {
      ASSIGN_OR_RETURN(segment_, SharedSegment::Open(*name, num_bytes));
      break;
    }
    if (!absl::IsDeadlineExceeded(name.status())) return name.status();
    if (absl::Now() >= deadline) {
      return absl::DeadlineExceededError("rank 0 did not set up its shared memory in time");
    }
  }
  auto* header = reinterpret_cast<Header*>(segment_->data());
  RETURN_IF_ERROR(CheckHeader(*header));
  header_.store(header);
  return absl::OkStatus();
}

absl::Status ShmCommunicator::CheckHeader(const Header& header) const {
  if (header.magic == kMagic && header.epoch == options_.epoch &&
      header.world_size == options_.world_size && header.window_bytes == options_.window_bytes) {
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(absl::StrCat(
      "the shared memory of rank 0 is for epoch ", header.epoch, " and ", header.world_size,
      " ranks, expected epoch ", options_.epoch, " and ", options_.world_size, " ranks"));
}

void ShmCommunicator::Abort() {
  aborted_ = true;
  Leave();
}

void ShmCommunicator::Leave() {
  Header* header = header_.load();
  if (header == nullptr) return;
  state(*header, options_.rank).left.store(1);
  FutexWakeAll(header->round);  // wakes the others as well: they see that this rank left
}

absl::Status ShmCommunicator::AllReduceSum(const Tensor& tensor) {
  CHECK(tensor.dense()) << tensor.DebugString();
  const int64_t element_bytes = SizeOf(tensor.dtype());
  const int64_t most = options_.window_bytes / element_bytes;
  const int64_t total = tensor.num_elements();
  auto* data = static_cast<char*>(tensor.raw());
  for (int64_t begin = 0; begin < total; begin += most) {
    RETURN_IF_ERROR(
        ReduceChunk(data + begin * element_bytes, tensor.dtype(), std::min(most, total - begin)));
  }
  return absl::OkStatus();
}

absl::Status ShmCommunicator::ReduceChunk(char* data, DType dtype, int64_t count) {
  const int world_size = options_.world_size;
  const int64_t element_bytes = SizeOf(dtype);
  const int64_t num_bytes = count * element_bytes;
  std::memcpy(BeginCall(CallKind::kAllReduce, num_bytes), data, num_bytes);
  RETURN_IF_ERROR(MeetAndCompareCalls());

  std::vector<const void*> parts(world_size);
  if (count * world_size <= kLargestDirectElements) {
    for (int rank = 0; rank < world_size; ++rank) parts[rank] = window(rank);
    SumInRankOrder(parts, dtype, count, data);
    return absl::OkStatus();
  }

  // Each rank's slice, in whole cache lines. Nobody else touches the slice in any window, so the
  // result can stay in the window of rank 0.
  const int64_t line = 64 / element_bytes;
  const int64_t slice = (count + world_size * line - 1) / (world_size * line) * line;
  const int64_t begin = std::min(count, options_.rank * slice);
  const int64_t end = std::min(count, begin + slice);
  for (int rank = 0; rank < world_size; ++rank) {
    parts[rank] = window(rank) + begin * element_bytes;
  }
  if (begin < end) SumInRankOrder(parts, dtype, end - begin, window(0) + begin * element_bytes);
  RETURN_IF_ERROR(Meet(absl::Now() + options_.timeout));
  std::memcpy(data, window(0), num_bytes);
  return absl::OkStatus();
}

absl::Status ShmCommunicator::GatherToRank0(const Tensor& part, const Tensor& whole) {
  CHECK(part.dense()) << part.DebugString();
  const int64_t part_bytes = part.num_bytes();
  if (options_.rank == 0) {
    CHECK(whole.dense()) << whole.DebugString();
    CHECK_EQ(whole.num_bytes(), part_bytes * options_.world_size);
  }
  for (int64_t begin = 0; begin < part_bytes; begin += options_.window_bytes) {
    const int64_t num_bytes = std::min(options_.window_bytes, part_bytes - begin);
    char* own = BeginCall(CallKind::kGather, num_bytes);
    std::memcpy(own, static_cast<const char*>(part.raw()) + begin, num_bytes);
    RETURN_IF_ERROR(MeetAndCompareCalls());
    if (options_.rank != 0) continue;
    for (int rank = 0; rank < options_.world_size; ++rank) {
      std::memcpy(static_cast<char*>(whole.raw()) + rank * part_bytes + begin, window(rank),
                  num_bytes);
    }
  }
  return absl::OkStatus();
}

absl::Status ShmCommunicator::BroadcastFromRank0(void* bytes, int64_t num_bytes) {
  // Rank 0 has all windows to itself; they lie side by side.
  const int64_t most = options_.window_bytes * options_.world_size;
  for (int64_t begin = 0; begin < num_bytes; begin += most) {
    const int64_t chunk_bytes = std::min(most, num_bytes - begin);
    BeginCall(CallKind::kBroadcast, chunk_bytes);
    char* data = static_cast<char*>(bytes) + begin;
    if (options_.rank == 0) std::memcpy(window(0), data, chunk_bytes);
    RETURN_IF_ERROR(MeetAndCompareCalls());
    if (options_.rank != 0) std::memcpy(data, window(0), chunk_bytes);
  }
  return absl::OkStatus();
}

// Turns to the other windows and says what this rank is about to do. Gives its window.
char* ShmCommunicator::BeginCall(CallKind kind, int64_t num_bytes) {
  Header* header = header_.load(std::memory_order_relaxed);
  CHECK(header != nullptr) << "not connected";
  parity_ = 1 - parity_;
  state(*header, options_.rank).calls[parity_] = {kind, num_bytes};
  return window(options_.rank);
}

absl::Status ShmCommunicator::MeetAndCompareCalls() {
  RETURN_IF_ERROR(Meet(absl::Now() + options_.timeout));
  Header& header = *header_.load(std::memory_order_relaxed);
  const Call& own = state(header, options_.rank).calls[parity_];
  for (int rank = 0; rank < options_.world_size; ++rank) {
    const Call& other = state(header, rank).calls[parity_];
    if (other == own) continue;
    Leave();
    return absl::InternalError(absl::StrCat(
        "rank ", options_.rank, " is in ", NameOf(own.kind), " of ", own.num_bytes,
        " bytes, but rank ", rank, " in ", NameOf(other.kind), " of ", other.num_bytes, " bytes"));
  }
  return absl::OkStatus();
}

absl::Status ShmCommunicator::Meet(absl::Time deadline) {
  if (aborted_) return AbortedHere();
  Header& header = *header_.load(std::memory_order_relaxed);
  const uint32_t round = header.round.load(std::memory_order_acquire);
  RETURN_IF_ERROR(CheckNobodyLeft(header, round));
  state(header, options_.rank).arrived.store(round + 1);
  const auto num_ranks = static_cast<uint32_t>(options_.world_size);
  if (header.num_arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == num_ranks) {
    header.num_arrived.store(0, std::memory_order_relaxed);
    header.round.store(round + 1, std::memory_order_release);
    FutexWakeAll(header.round);
    return absl::OkStatus();
  }
  for (int spin = 0; spin < spins_; ++spin) {
    if (header.round.load(std::memory_order_acquire) != round) return absl::OkStatus();
    std::this_thread::yield();
  }
  const absl::Status status = AwaitOthers(header, round, deadline);
  if (!status.ok()) Leave();
  return status;
}

absl::Status ShmCommunicator::AwaitOthers(Header& header, uint32_t round, absl::Time deadline) {
  while (header.round.load(std::memory_order_acquire) == round) {
    if (aborted_) return AbortedHere();
    RETURN_IF_ERROR(CheckNobodyLeft(header, round));
    if (FutexWait(header.round, round, kLookInterval) == Woken::kByTimeout) {
      RETURN_IF_ERROR(CheckMissingLive(header, round, deadline));
    }
  }
  return absl::OkStatus();
}

absl::Status ShmCommunicator::CheckNobodyLeft(Header& header, uint32_t round) {
  for (int rank = 0; rank < options_.world_size; ++rank) {
    const RankState& other = state(header, rank);
    if (other.left.load() == 0) continue;
    // It may have met the others here, gone on and left since.
    if (header.round.load() != round) return absl::OkStatus();
    return absl::AbortedError(absl::StrCat("rank ", rank, " left the group"));
  }
  return absl::OkStatus();
}

absl::Status ShmCommunicator::CheckMissingLive(Header& header, uint32_t round,
                                               absl::Time deadline) {
  std::vector<int> missing;
  for (int rank = 0; rank < options_.world_size; ++rank) {
    const RankState& other = state(header, rank);
    if (other.arrived.load() == round + 1) continue;
    missing.push_back(rank);
    if (other.present.load() == 0 || segment_->IsClaimedElsewhere(rank)) continue;
    if (header.round.load() != round) return absl::OkStatus();
    return absl::UnavailableError(absl::StrCat("the process of rank ", rank, " ended"));
  }
  if (absl::Now() < deadline || header.round.load() != round) return absl::OkStatus();
  return absl::DeadlineExceededError(absl::StrCat(
      "rank ", options_.rank, " waited in vain for rank ", absl::StrJoin(missing, ", ")));
}

}  // namespace

int64_t ShmBytesNeeded(const ShmCommunicatorOptions& options) {
  return HeaderBytes(options.world_size) + 2 * options.world_size * options.window_bytes;
}

std::unique_ptr<GroupCommunicator> MakeShmCommunicator(const ShmCommunicatorOptions& options) {
  return std::make_unique<ShmCommunicator>(options);
}

}  // namespace fathom
