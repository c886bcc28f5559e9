#include "grammar/grammar_keeper.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/time/clock.h"
#include "base/check.h"
#include "base/human_bytes.h"
#include "base/status_macros.h"
#include "spdlog/spdlog.h"

extern char** environ;

namespace fathom {
namespace {

// What an entry costs besides its process.
constexpr int64_t kEntryBytes = 512;
// Besides its own limits: to fork, and for the last words to arrive.
constexpr absl::Duration kReplyTime = absl::Milliseconds(500);
constexpr int kMaxAttempts = 3;
constexpr absl::Duration kRetryTime = absl::Milliseconds(20);
// For processes to end with the keeper.
constexpr absl::Duration kEndTime = absl::Seconds(1);
// For a turn to compile.
constexpr absl::Duration kQueueTime = absl::Seconds(5);

absl::Status Gone(const std::string& why) {
  return absl::UnavailableError(absl::StrCat("fathom-grammar ", why, "; try again"));
}

// Runs it with `control` as descriptor kGrammarControlFd.
absl::StatusOr<pid_t> Spawn(const std::vector<std::string>& arguments, int control) {
  std::vector<char*> argv;
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  // Its signals are not ours: the worker's threads block some.
  sigset_t none, defaults;
  sigemptyset(&none);
  sigemptyset(&defaults);
  sigaddset(&defaults, SIGPIPE);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  posix_spawnattr_setflags(&attributes,
                           POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
  posix_spawnattr_setsigmask(&attributes, &none);
  posix_spawnattr_setsigdefault(&attributes, &defaults);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, control, kGrammarControlFd);
  pid_t pid = -1;
  const int error = posix_spawn(&pid, argv[0], &actions, &attributes, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  posix_spawnattr_destroy(&attributes);
  if (error != 0) return absl::ErrnoToStatus(error, absl::StrCat("cannot run ", argv[0]));
  return pid;
}

absl::Status SendDescriptors(int socket, const std::array<int, 2>& descriptors) {
  char byte = 0;
  iovec part = {&byte, 1};
  alignas(cmsghdr) char space[CMSG_SPACE(sizeof(descriptors))] = {};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = space;
  message.msg_controllen = sizeof(space);
  cmsghdr* const header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(descriptors));
  std::memcpy(CMSG_DATA(header), descriptors.data(), sizeof(descriptors));
  if (sendmsg(socket, &message, MSG_NOSIGNAL) == 1) return absl::OkStatus();
  return absl::ErrnoToStatus(errno, "sendmsg");
}

}  // namespace

GrammarKeeper::GrammarKeeper(GrammarKeeperOptions options) : options_(std::move(options)) {}

absl::Status GrammarPreparation::Await(absl::Duration timeout) {
  absl::MutexLock lock(&mutex_);
  const auto is_settled = [this]()
                              ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return status_.has_value(); };
  if (mutex_.AwaitWithTimeout(absl::Condition(&is_settled), timeout)) return *status_;
  return absl::DeadlineExceededError("the grammar was not compiled in time; try again");
}

void GrammarPreparation::Settle(absl::Status status) {
  absl::MutexLock lock(&mutex_);
  status_ = std::move(status);
}

GrammarKeeper::~GrammarKeeper() {
  std::thread preparer;
  {
    absl::MutexLock lock(&asked_mutex_);
    is_ending_ = true;
    preparer = std::move(preparer_);
  }
  if (preparer.joinable()) preparer.join();
  {
    absl::MutexLock lock(&mutex_);
    for (const Kept& kept : kept_) {
      if (kept.process != nullptr) kept.process->End();
    }
    const absl::Time deadline = absl::Now() + kEndTime;
    for (const Kept& kept : kept_) {
      if (kept.process != nullptr) kept.process->AwaitEnd(deadline);
    }
  }
  absl::MutexLock lock(&program_mutex_);
  EndProgram();
}

void GrammarKeeper::Start() {
  absl::MutexLock lock(&program_mutex_);
  const absl::Status started = StartProgram();
  if (!started.ok()) spdlog::warn("no structured output yet: {}", std::string(started.message()));
}

absl::Status GrammarKeeper::StartProgram() {
  EndProgram();
  int sockets[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets) != 0) {
    return absl::ErrnoToStatus(errno, "socketpair");
  }
  UniqueFd ours(sockets[0]);
  const UniqueFd theirs(sockets[1]);
  ASSIGN_OR_RETURN(pid_,
                   Spawn({options_.program, "--model", options_.model_directory, "--vocab-size",
                          absl::StrCat(options_.vocab_size), "--eos-token-ids",
                          absl::StrJoin(options_.eos_token_ids, ","), "--compile-milliseconds",
                          absl::StrCat(absl::ToInt64Milliseconds(options_.compile_time)),
                          "--process-bytes", absl::StrCat(options_.process_bytes)},
                         theirs.get()));
  control_ = std::move(ours);
  return absl::OkStatus();
}

absl::Status GrammarKeeper::AwaitProgram() {
  if (is_ready_) return absl::OkStatus();
  pollfd polled = {.fd = control_.get(), .events = POLLIN, .revents = 0};
  if (poll(&polled, 1, static_cast<int>(absl::ToInt64Milliseconds(options_.start_timeout))) <= 0) {
    return Gone("is still reading the vocabulary");
  }
  GrammarReply reply;
  std::array<char, 4096> text;
  std::array<iovec, 2> parts = {iovec{&reply, sizeof(reply)}, iovec{text.data(), text.size()}};
  msghdr message = {};
  message.msg_iov = parts.data();
  message.msg_iovlen = parts.size();
  const ssize_t received = recvmsg(control_.get(), &message, 0);
  const bool is_reply = received >= static_cast<ssize_t>(sizeof(reply));
  is_ready_ = is_reply && reply.what == GrammarReply::What::kDone;
  if (is_ready_) return absl::OkStatus();
  control_.reset();
  if (!is_reply) return Gone("ended while it started");
  // Clients read it: it says which file, not where.
  const std::string why = absl::StrReplaceAll({text.data(), received - sizeof(reply)},
                                              {{absl::StrCat(options_.model_directory, "/"), ""}});
  return absl::InvalidArgumentError(
      absl::StrCat("structured output is not available for this model: ", why));
}

void GrammarKeeper::EndProgram() {
  control_.reset();
  is_ready_ = false;
  if (pid_ <= 0) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

absl::StatusOr<std::unique_ptr<GrammarProcess>> GrammarKeeper::NewProcess() {
  GrammarProcess::Ends ends;
  ASSIGN_OR_RETURN(std::unique_ptr<GrammarProcess> process,
                   GrammarProcess::Create(options_.vocab_size, ends));
  const std::array<int, 2> descriptors = {ends.socket.get(), ends.memory.get()};
  absl::MutexLock lock(&program_mutex_);
  if (is_ready_ && SendDescriptors(control_.get(), descriptors).ok()) return process;
  // It was never started, or somebody killed it.
  if (is_ready_ || control_.get() < 0) RETURN_IF_ERROR(StartProgram());
  RETURN_IF_ERROR(AwaitProgram());
  RETURN_IF_ERROR(SendDescriptors(control_.get(), descriptors));
  return process;
}

absl::Status GrammarKeeper::Prepare(const Grammar& grammar) { return Find(grammar).status(); }

std::shared_ptr<GrammarPreparation> GrammarKeeper::PrepareSoon(const Grammar& grammar) {
  auto preparation = std::make_shared<GrammarPreparation>();
  absl::MutexLock lock(&asked_mutex_);
  asked_.emplace_back(grammar, preparation);
  if (!preparer_.joinable()) preparer_ = std::thread([this] { PrepareWhatIsAsked(); });
  return preparation;
}

void GrammarKeeper::PrepareWhatIsAsked() {
  while (true) {
    std::pair<Grammar, std::shared_ptr<GrammarPreparation>> next;
    {
      absl::MutexLock lock(&asked_mutex_);
      const auto has_work = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(asked_mutex_) {
        return is_ending_ || !asked_.empty();
      };
      asked_mutex_.Await(absl::Condition(&has_work));
      if (is_ending_) return;
      next = std::move(asked_.front());
      asked_.pop_front();
    }
    next.second->Settle(Prepare(next.first));
  }
}

absl::StatusOr<std::unique_ptr<GrammarMatcher>> GrammarKeeper::Match(
    const Grammar& grammar, absl::Span<const int32_t> token_ids) {
  std::shared_ptr<GrammarProcess> process;
  {
    absl::MutexLock lock(&mutex_);
    const auto found = places_.find(grammar);
    if (found == places_.end() || found->second->process == nullptr) {
      return absl::NotFoundError("the grammar is not prepared");
    }
    kept_.splice(kept_.begin(), kept_, found->second);
    process = found->second->process;
  }
  const absl::StatusOr<int> row = process->OpenRow(token_ids);
  if (row.ok()) {
    return std::make_unique<GrammarMatcher>(std::move(process), *row, options_.mask_timeout);
  }
  if (absl::IsResourceExhausted(row.status())) return row.status();
  // It has ended, which is noticed only now.
  absl::MutexLock lock(&mutex_);
  const auto found = places_.find(grammar);
  const bool is_kept = found != places_.end() && found->second->process == process;
  if (is_kept && !process->WasRefused()) Erase(found->second);
  return absl::NotFoundError("the grammar's process has ended");
}

absl::StatusOr<std::shared_ptr<GrammarProcess>> GrammarKeeper::Find(const Grammar& grammar) {
  CHECK_LE(grammar.text.size(), kMaxGrammarBytes);
  absl::MutexLock lock(&mutex_);
  while (true) {
    const auto found = places_.find(grammar);
    if (found == places_.end()) {
      const auto may_compile = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
        return num_compiling_ < options_.max_compiling;
      };
      if (!mutex_.AwaitWithTimeout(absl::Condition(&may_compile), kQueueTime)) {
        return absl::ResourceExhaustedError("too many grammars are being compiled; try again");
      }
      if (!places_.contains(grammar)) break;
      continue;
    }
    Kept& kept = *found->second;
    if (kept.process != nullptr && kept.process->WasRefused()) {
      kept_bytes_ -= kept.process->memory_bytes();
      kept.bytes -= kept.process->memory_bytes();
      kept.process.reset();
      kept.refusal = absl::InvalidArgumentError(
          "the grammar is too complex: it was ended while it found out which tokens it allows");
    } else if (kept.process != nullptr && kept.process->HasEnded()) {
      Erase(found->second);
      continue;
    }
    if (!kept.is_compiling) {
      kept_.splice(kept_.begin(), kept_, found->second);
      RETURN_IF_ERROR(kept.refusal);
      return kept.process;
    }
    // Somebody else compiles it. It may fail and be forgotten, then it is our turn.
    const auto is_settled = [this, &grammar]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      const auto place = places_.find(grammar);
      return place == places_.end() || !place->second->is_compiling;
    };
    mutex_.Await(absl::Condition(&is_settled));
  }

  ++num_compiling_;
  kept_.push_front({.grammar = grammar, .is_compiling = true});
  const Place place = kept_.begin();
  places_[grammar] = place;
  mutex_.Unlock();
  absl::StatusOr<std::shared_ptr<GrammarProcess>> process = Compile(grammar);
  mutex_.Lock();
  --num_compiling_;
  place->is_compiling = false;
  if (!process.ok() && !absl::IsInvalidArgument(process.status())) {
    Erase(place);
    return process.status();
  }
  place->refusal = process.status();
  place->bytes = kEntryBytes + static_cast<int64_t>(2 * grammar.text.size());
  if (process.ok()) {
    place->process = *process;
    place->bytes += (*process)->memory_bytes();
  }
  kept_bytes_ += place->bytes;
  const absl::Status room = MakeRoom();
  if (!room.ok()) {
    Erase(place);
    return room;
  }
  return process;
}

absl::StatusOr<std::shared_ptr<GrammarProcess>> GrammarKeeper::Compile(const Grammar& grammar) {
  for (int attempt = 1;; ++attempt) {
    ASSIGN_OR_RETURN(std::unique_ptr<GrammarProcess> process, NewProcess());
    const absl::Status status =
        process->Compile(grammar, kCompilePatience * options_.compile_time + kReplyTime);
    if (status.ok()) return std::shared_ptr<GrammarProcess>(std::move(process));
    if (!absl::IsInternal(status)) return status;
    // Killed from outside, or the program was before it could fork, whose sockets close in any
    // order: once more.
    if (attempt == kMaxAttempts) return absl::UnavailableError(status.message());
    absl::SleepFor(kRetryTime);
  }
}

absl::Status GrammarKeeper::MakeRoom() {
  for (auto place = kept_.end(); kept_bytes_ > options_.cache_bytes && place != kept_.begin();) {
    --place;
    // The first is the one that room is made for. Ours is the only reference to what is idle.
    if (place == kept_.begin() || place->is_compiling || place->process.use_count() > 1) continue;
    const Place next = std::next(place);
    Erase(place);
    place = next;
  }
  if (kept_bytes_ <= options_.cache_bytes) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat("the grammars in use would take ", HumanBytes(kept_bytes_), " of memory, limit ",
                   HumanBytes(options_.cache_bytes), "; try again later"));
}

void GrammarKeeper::Erase(Place place) {
  kept_bytes_ -= place->bytes;
  places_.erase(place->grammar);
  kept_.erase(place);
}

}  // namespace fathom
