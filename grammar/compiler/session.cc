#include "grammar/compiler/session.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/status_macros.h"
#include "grammar/protocol.h"

namespace fathom {
namespace {

using What = GrammarReply::What;

constexpr size_t kMaxErrorText = 2000;
// Compiling yields to the steps of workers on the same processors.
constexpr int kCompileNiceness = 10;
// The account of masks: what it starts with and never exceeds, and what each token adds. A step,
// and so everybody's next token, may wait for as long as the account lasts.
constexpr int64_t kMostMaskMicros = 150'000;
constexpr int64_t kMaskMicrosPerToken = 20'000;

// For the handlers of signals; written before any can come.
int last_words_socket = -1;
struct LastWords {
  GrammarReply reply;
  std::array<char, 200> text;
  size_t size;
};
LastWords on_processor_time, on_clock_time, on_crash;

LastWords Words(What what, std::string_view text) {
  LastWords words = {};
  words.reply.what = what;
  words.size = std::min(text.size(), words.text.size());
  std::memcpy(words.text.data(), text.data(), words.size);
  return words;
}

// Async-signal-safe.
void Send(const GrammarReply& reply, const char* text, size_t size) {
  iovec parts[2] = {{const_cast<GrammarReply*>(&reply), sizeof(reply)},
                    {const_cast<char*>(text), size}};
  msghdr message = {};
  message.msg_iov = parts;
  message.msg_iovlen = size > 0 ? 2 : 1;
  ssize_t sent;
  do {
    sent = sendmsg(last_words_socket, &message, MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  if (sent < 0) _exit(0);  // nobody listens any more
}

void Send(const GrammarReply& reply, std::string_view text) {
  Send(reply, text.data(), std::min(text.size(), kMaxErrorText));
}

extern "C" void OnSignal(int signal) {
  const LastWords& words = signal == SIGPROF   ? on_processor_time
                           : signal == SIGALRM ? on_clock_time
                                               : on_crash;
  Send(words.reply, words.text.data(), words.size);
  _exit(1);
}

// A stack overflow leaves no stack to say so on. One for each thread.
class SignalStack {
 public:
  SignalStack() : memory_(kBytes) {
    const stack_t stack = {.ss_sp = memory_.data(), .ss_flags = 0, .ss_size = memory_.size()};
    sigaltstack(&stack, nullptr);
  }
  ~SignalStack() {
    const stack_t none = {.ss_sp = nullptr, .ss_flags = SS_DISABLE, .ss_size = 0};
    sigaltstack(&none, nullptr);
  }

 private:
  static constexpr size_t kBytes = 64 << 10;
  std::vector<char> memory_;
};

void HandleSignals() {
  struct sigaction action = {};
  action.sa_handler = OnSignal;
  action.sa_flags = SA_ONSTACK;
  sigfillset(&action.sa_mask);
  for (const int signal : {SIGPROF, SIGALRM, SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL}) {
    sigaction(signal, &action, nullptr);
  }
}

// Both timers, from now on; 0 stops one.
void SetTimers(int64_t processor_micros, int64_t clock_micros) {
  const auto timer = [](int64_t micros) {
    itimerval value = {};
    value.it_value = {.tv_sec = micros / 1'000'000, .tv_usec = micros % 1'000'000};
    return value;
  };
  const itimerval processor = timer(processor_micros);
  const itimerval clock = timer(clock_micros);
  setitimer(ITIMER_PROF, &processor, nullptr);
  setitimer(ITIMER_REAL, &clock, nullptr);
}

int64_t ProcessorMicros() {
  timespec time = {};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return time.tv_sec * int64_t{1'000'000} + time.tv_nsec / 1000;
}

// Of the address space, in bytes; 0 when the kernel does not say.
int64_t AddressSpaceBytes() {
  std::ifstream file("/proc/self/statm");
  int64_t pages = 0;
  file >> pages;
  return pages * sysconf(_SC_PAGESIZE);
}

// What this process alone holds: written since it was forked.
uint64_t PrivateBytes() {
  std::ifstream file("/proc/self/smaps_rollup");
  std::string line;
  while (std::getline(file, line)) {
    unsigned long long kilobytes = 0;
    if (std::sscanf(line.c_str(), "Private_Dirty: %llu kB", &kilobytes) == 1) {
      return kilobytes << 10;
    }
  }
  return 0;
}

class Session {
 public:
  Session(const SessionOptions& options, const TokenVocabulary& vocabulary, int socket,
          uint32_t* masks)
      : options_(options),
        vocabulary_(vocabulary),
        socket_(socket),
        masks_(masks),
        packet_(kMaxGrammarPacketBytes) {}

  [[noreturn]] void Serve() {
    while (true) {
      const ssize_t received = recv(socket_, packet_.data(), packet_.size(), 0);
      if (received < 0 && errno == EINTR) continue;
      if (received < static_cast<ssize_t>(sizeof(GrammarRequest))) _exit(0);
      GrammarRequest request;
      std::memcpy(&request, packet_.data(), sizeof(request));
      Do(request, std::string_view(packet_.data(), received).substr(sizeof(request)));
    }
  }

 private:
  void Do(const GrammarRequest& request, std::string_view data) {
    switch (request.what) {
      case GrammarRequest::What::kCompile:
        return Compile(
            {.kind = Grammar::Kind{static_cast<int>(request.row)}, .text = std::string(data)});
      case GrammarRequest::What::kOpen:
        return Open(request.row);
      case GrammarRequest::What::kReplay:
        return OnAccount(data.size() / sizeof(int32_t), [&] { Replay(request.row, data); });
      case GrammarRequest::What::kAdvance:
        return OnAccount(data.size() / sizeof(int32_t) + 1, [&] {
          Replay(request.row, data);
          Answer(request.row);
        });
      case GrammarRequest::What::kClose:
        rows_.erase(request.row);
        return;
    }
  }

  void Compile(const Grammar& grammar) {
    const int64_t micros = int64_t{options_.compile_milliseconds} * 1000;
    const std::string limit = absl::StrCat(options_.compile_milliseconds, " ms");
    const std::string clock_limit =
        absl::StrCat(kCompilePatience * options_.compile_milliseconds, " ms");
    on_processor_time = Words(
        What::kRefused, absl::StrCat("the grammar is too complex: compiling it takes more than ",
                                     limit, " of processor time"));
    on_clock_time =
        Words(What::kTooBusy, absl::StrCat("the host was too busy to compile the ",
                                           "grammar within ", clock_limit, "; try again"));
    on_crash = Words(What::kRefused, "the grammar cannot be compiled: it nests too deeply");
    absl::Status status;
    // In a thread of its own, so that only compiling is nice.
    SetTimers(micros, kCompilePatience * micros);
    std::thread compiling([&] {
      const SignalStack stack;
      setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), kCompileNiceness);
      absl::StatusOr<TokenGrammar> compiled = TokenGrammar::Compile(vocabulary_, grammar);
      status = compiled.status();
      if (status.ok()) {
        grammar_ = std::make_unique<TokenGrammar>(*std::move(compiled));
        // The first mask is the first chance to hang.
        status = TryFirstMask();
      }
    });
    compiling.join();
    SetTimers(0, 0);
    if (!status.ok()) {
      Send({.what = What::kRefused},
           std::string_view(status.message().data(), status.message().size()));
      _exit(0);
    }
    on_processor_time = Words(What::kRefused,
                              "the grammar is too complex: finding out which tokens "
                              "it allows takes too long");
    on_crash = Words(What::kRefused, "the grammar failed: it nests too deeply, or is wrong");
    Send({.what = What::kDone, .memory_bytes = PrivateBytes()}, "");
  }

  absl::Status TryFirstMask() {
    ASSIGN_OR_RETURN(const std::unique_ptr<TokenMatcher> matcher, grammar_->NewMatcher());
    const absl::Span<uint32_t> mask = MaskOf(0);
    RETURN_IF_ERROR(matcher->FillMask(mask));
    if (std::any_of(mask.begin(), mask.end(), [](uint32_t word) { return word != 0; })) {
      return absl::OkStatus();
    }
    return absl::InvalidArgumentError("no text obeys the grammar");
  }

  // Runs `work` for so many tokens at the account's expense.
  template <typename Work>
  void OnAccount(size_t num_tokens, const Work& work) {
    account_micros_ = std::min(
        kMostMaskMicros, account_micros_ + kMaskMicrosPerToken * static_cast<int64_t>(num_tokens));
    const int64_t before = ProcessorMicros();
    SetTimers(account_micros_, 0);
    work();
    SetTimers(0, 0);
    account_micros_ = std::max<int64_t>(account_micros_ - (ProcessorMicros() - before), 1);
  }

  void Open(uint32_t row) {
    Row& opened = rows_[row];
    opened = {};
    absl::StatusOr<std::unique_ptr<TokenMatcher>> matcher = grammar_->NewMatcher();
    opened.failure = matcher.status();
    if (matcher.ok()) opened.matcher = *std::move(matcher);
  }

  void Replay(uint32_t index, std::string_view data) {
    Row& row = rows_[index];
    for (size_t at = 0; at + sizeof(int32_t) <= data.size() && row.failure.ok();
         at += sizeof(int32_t)) {
      int32_t token_id;
      std::memcpy(&token_id, data.data() + at, sizeof(token_id));
      const absl::StatusOr<bool> is_accepted = row.matcher->Accept(token_id);
      row.failure = is_accepted.status();
      if (row.failure.ok() && !*is_accepted) {
        row.failure = absl::InternalError(
            absl::StrCat("the grammar does not allow token ", token_id, ", which was chosen"));
      }
    }
  }

  void Answer(uint32_t index) {
    Row& row = rows_[index];
    if (row.failure.ok()) row.failure = row.matcher->FillMask(MaskOf(index));
    if (row.failure.ok()) return Send({.what = What::kMask, .row = index}, "");
    Send({.what = What::kFailed, .row = index},
         std::string_view(row.failure.message().data(), row.failure.message().size()));
  }

  absl::Span<uint32_t> MaskOf(uint32_t row) const {
    const size_t words = GrammarMaskWords(options_.vocab_size);
    return {masks_ + row * words, words};
  }

  struct Row {
    std::unique_ptr<TokenMatcher> matcher = nullptr;
    absl::Status failure = absl::OkStatus();
  };

  const SessionOptions options_;
  const TokenVocabulary& vocabulary_;
  const int socket_;
  uint32_t* const masks_;
  std::vector<char> packet_;
  std::unique_ptr<TokenGrammar> grammar_;
  std::map<uint32_t, Row> rows_;
  int64_t account_micros_ = kMostMaskMicros;
};

}  // namespace

void ServeSession(const SessionOptions& options, const TokenVocabulary& vocabulary, UniqueFd socket,
                  UniqueFd memory) {
  last_words_socket = socket.get();
  const size_t bytes =
      size_t{kMaxGrammarRows} * GrammarMaskWords(options.vocab_size) * sizeof(uint32_t);
  void* const masks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory.get(), 0);
  if (masks == MAP_FAILED) _exit(1);
  const SignalStack stack;
  HandleSignals();
  const rlim_t most = static_cast<rlim_t>(AddressSpaceBytes() + options.process_bytes);
  const rlimit limit = {.rlim_cur = most, .rlim_max = most};
  const rlimit no_core = {};
  setrlimit(RLIMIT_CORE, &no_core);
  if (setrlimit(RLIMIT_AS, &limit) != 0) {
    Send({.what = What::kTooBusy}, "this host does not let memory be limited");
    _exit(1);
  }
  Session(options, vocabulary, socket.get(), static_cast<uint32_t*>(masks)).Serve();
}

}  // namespace fathom
