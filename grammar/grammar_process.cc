#include "grammar/grammar_process.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace fathom {
namespace {

// A process whose socket stays full is stuck.
constexpr absl::Duration kSendTimeout = absl::Seconds(1);
constexpr size_t kMaxReplyText = 4096;

absl::Status SystemError(const char* call) { return absl::ErrnoToStatus(errno, call); }

// Of all rows; most of it is never touched and takes no memory.
size_t MemoryBytes(int vocab_size) {
  return size_t{kMaxGrammarRows} * GrammarMaskWords(vocab_size) * sizeof(uint32_t);
}

// Whether something can be done before `deadline`.
bool Poll(int fd, int events, absl::Time deadline) {
  while (true) {
    const absl::Duration left = std::max(deadline - absl::Now(), absl::ZeroDuration());
    const timespec timeout = absl::ToTimespec(left);
    pollfd polled = {.fd = fd, .events = static_cast<short>(events), .revents = 0};
    const int ready = ppoll(&polled, 1, &timeout, nullptr);
    if (ready >= 0 || errno != EINTR) return ready > 0;
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<GrammarProcess>> GrammarProcess::Create(int vocab_size,
                                                                       Ends& others) {
  int sockets[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets) != 0) {
    return SystemError("socketpair");
  }
  UniqueFd socket(sockets[0]);
  others.socket = UniqueFd(sockets[1]);
  others.memory = UniqueFd(memfd_create("grammar-masks", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (others.memory.get() < 0) return SystemError("memfd_create");
  const size_t bytes = MemoryBytes(vocab_size);
  // Sealed, so that nobody can take the memory from under us.
  if (ftruncate(others.memory.get(), static_cast<off_t>(bytes)) != 0 ||
      fcntl(others.memory.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    return SystemError("ftruncate");
  }
  void* const masks = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, others.memory.get(), 0);
  if (masks == MAP_FAILED) return SystemError("mmap");
  return std::unique_ptr<GrammarProcess>(
      new GrammarProcess(std::move(socket), static_cast<const uint32_t*>(masks), vocab_size));
}

GrammarProcess::~GrammarProcess() {
  munmap(const_cast<uint32_t*>(masks_), size_t{kMaxGrammarRows} * mask_words_ * sizeof(uint32_t));
}

absl::Status GrammarProcess::Compile(const Grammar& grammar, absl::Duration timeout) {
  CHECK_LE(grammar.text.size(), kMaxGrammarBytes);
  Send({.what = GrammarRequest::What::kCompile, .row = static_cast<uint32_t>(grammar.kind)},
       grammar.text.data(), grammar.text.size());
  RETURN_IF_ERROR(failure_);
  std::string text;
  const absl::StatusOr<GrammarReply> reply = Receive(absl::Now() + timeout, text);
  if (reply.ok() && reply->what == GrammarReply::What::kDone) {
    memory_bytes_ = static_cast<int64_t>(reply->memory_bytes);
    return absl::OkStatus();
  }
  if (!reply.ok()) {
    failure_ = reply.status();
  } else if (reply->what == GrammarReply::What::kRefused) {
    failure_ = absl::InvalidArgumentError(text);
  } else {
    failure_ = absl::UnavailableError(text);
  }
  return failure_;
}

bool GrammarProcess::HasEnded() const {
  pollfd polled = {.fd = socket_.get(), .events = 0, .revents = 0};
  return poll(&polled, 1, 0) > 0 && (polled.revents & (POLLHUP | POLLERR)) != 0;
}

void GrammarProcess::End() { shutdown(socket_.get(), SHUT_WR); }

void GrammarProcess::AwaitEnd(absl::Time deadline) {
  // What it still says is of no interest; then its end of the socket is closed.
  std::string text;
  while (Receive(deadline, text).ok()) {
  }
}

absl::StatusOr<int> GrammarProcess::OpenRow(absl::Span<const int32_t> token_ids) {
  RETURN_IF_ERROR(failure_);
  int row = static_cast<int>(rows_.size());
  if (!free_rows_.empty()) {
    row = free_rows_.back();
    free_rows_.pop_back();
  } else if (row == kMaxGrammarRows) {
    return absl::ResourceExhaustedError(
        absl::StrCat("more than ", kMaxGrammarRows, " sequences obey one grammar; try again"));
  } else {
    rows_.emplace_back();
  }
  const int num_awaited = rows_[row].num_awaited;  // of the sequence before
  rows_[row] = {.is_open = true, .num_awaited = num_awaited};
  Send({.what = GrammarRequest::What::kOpen, .row = static_cast<uint32_t>(row)}, nullptr, 0);
  while (token_ids.size() > kMaxTokensPerPacket) {
    SendTokens(GrammarRequest::What::kReplay, row, token_ids.first(kMaxTokensPerPacket));
    token_ids.remove_prefix(kMaxTokensPerPacket);
  }
  SendTokens(GrammarRequest::What::kAdvance, row, token_ids);
  return row;
}

void GrammarProcess::CloseRow(int row) {
  CHECK(rows_[row].is_open) << "row " << row;
  rows_[row].is_open = false;
  free_rows_.push_back(row);
  Send({.what = GrammarRequest::What::kClose, .row = static_cast<uint32_t>(row)}, nullptr, 0);
}

void GrammarProcess::Advance(int row, int32_t token_id) {
  CHECK(rows_[row].is_open) << "row " << row;
  SendTokens(GrammarRequest::What::kAdvance, row, {&token_id, 1});
}

void GrammarProcess::SendTokens(GrammarRequest::What what, int row,
                                absl::Span<const int32_t> token_ids) {
  if (what == GrammarRequest::What::kAdvance) ++rows_[row].num_awaited;
  Send({.what = what, .row = static_cast<uint32_t>(row)}, token_ids.data(),
       token_ids.size() * sizeof(int32_t));
}

void GrammarProcess::Send(const GrammarRequest& request, const void* data, size_t size) {
  std::array<iovec, 2> parts = {iovec{const_cast<GrammarRequest*>(&request), sizeof(request)},
                                iovec{const_cast<void*>(data), size}};
  msghdr message = {};
  message.msg_iov = parts.data();
  message.msg_iovlen = size > 0 ? 2 : 1;
  const absl::Time deadline = absl::Now() + kSendTimeout;
  while (failure_.ok()) {
    if (sendmsg(socket_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0) return;
    if (errno == EINTR) continue;
    if (errno != EAGAIN || !Poll(socket_.get(), POLLIN | POLLOUT, deadline)) break;
    // It may be waiting for us to read.
    if (!Poll(socket_.get(), POLLIN, absl::InfinitePast())) continue;
    std::string text;
    const absl::StatusOr<GrammarReply> reply = Receive(deadline, text);
    if (reply.ok()) Take(*reply, text);
  }
  if (!failure_.ok()) return;
  // What it said last tells more than that it is gone.
  std::string text;
  const absl::StatusOr<GrammarReply> reply = Receive(absl::InfinitePast(), text);
  if (reply.ok() && !text.empty()) Take(*reply, text);
  if (failure_.ok()) failure_ = absl::InternalError("the grammar's process is gone or stuck");
}

absl::StatusOr<GrammarReply> GrammarProcess::Receive(absl::Time deadline, std::string& text) {
  if (!Poll(socket_.get(), POLLIN, deadline)) {
    return absl::UnavailableError("it was silent for too long");
  }
  GrammarReply reply;
  text.resize(kMaxReplyText);
  std::array<iovec, 2> parts = {iovec{&reply, sizeof(reply)}, iovec{text.data(), text.size()}};
  msghdr message = {};
  message.msg_iov = parts.data();
  message.msg_iovlen = parts.size();
  ssize_t received;
  do {
    received = recvmsg(socket_.get(), &message, 0);
  } while (received < 0 && errno == EINTR);
  if (received < static_cast<ssize_t>(sizeof(reply))) {
    text.clear();
    return absl::InternalError("the grammar's process has ended");
  }
  text.resize(received - sizeof(reply));
  return reply;
}

void GrammarProcess::Take(const GrammarReply& reply, const std::string& text) {
  using What = GrammarReply::What;
  if (reply.what == What::kRefused || reply.what == What::kTooBusy) {  // its last words
    was_refused_ = reply.what == What::kRefused;
    failure_ = was_refused_ ? absl::InvalidArgumentError(text) : absl::InternalError(text);
    return;
  }
  const bool is_of_row = reply.what == What::kMask || reply.what == What::kFailed;
  if (!is_of_row || reply.row >= rows_.size() || rows_[reply.row].num_awaited == 0) {
    failure_ = absl::InternalError("the grammar's process does not keep to the protocol");
    return;
  }
  Row& row = rows_[reply.row];
  --row.num_awaited;
  if (reply.what == What::kFailed && row.is_open && row.num_awaited == 0) {
    row.failure = absl::InternalError(text);
  }
}

absl::StatusOr<absl::Span<const uint32_t>> GrammarProcess::Mask(int index, absl::Time deadline) {
  Row& row = rows_[index];
  CHECK(row.is_open) << "row " << index;
  while (failure_.ok() && row.num_awaited > 0) {
    std::string text;
    const absl::StatusOr<GrammarReply> reply = Receive(deadline, text);
    if (reply.ok()) {
      Take(*reply, text);
    } else {
      failure_ =
          absl::InternalError(absl::StrCat("no mask from the grammar: ", reply.status().message()));
    }
  }
  RETURN_IF_ERROR(failure_);
  RETURN_IF_ERROR(row.failure);
  return absl::Span<const uint32_t>(masks_ + size_t{static_cast<uint32_t>(index)} * mask_words_,
                                    static_cast<size_t>(mask_words_));
}

}  // namespace fathom
