// The grammars of a worker: compiled, kept, and brought to bear on its sequences.
//
// Grammars come from strangers, so xgrammar never runs in the worker. A program of its own,
// `fathom-grammar`, reads the model's vocabulary once and then forks for every grammar: the child
// compiles it, and stays to compute the masks of the sequences that obey it. The child lives under
// limits of time and memory that the kernel enforces. A schema that explodes, hangs or crashes ends
// that child, and with it the sequences of that very grammar; the worker, its step and every other
// grammar go on. And masks are computed while the worker computes logits.
//
// Why here and not in the gateway: the worker learns each token first, so masks keep step with it
// however many steps are in flight, and a sequence that resumes is replayed from its tokens. Why a
// process per grammar and not a thread: threads cannot be killed. Why not hand over a compiled
// grammar: reading one is as much code to trust as compiling it.
//
// Grammars stay for the next request, the least recently used ones go when their processes together
// hold more than cache_bytes. What was refused is remembered too, also what was only found out by
// its masks.
//
// Thread-safe. Matchers belong to the thread that makes steps.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <deque>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "base/unique_fd.h"
#include "grammar/grammar.h"
#include "grammar/grammar_process.h"

namespace fathom {

struct GrammarKeeperOptions {
  std::string program;          // fathom-grammar
  std::string model_directory;  // whose tokenizer.json has the vocabulary
  int vocab_size = 0;           // of the model; may be larger than the tokenizer's
  std::vector<int> eos_token_ids;
  // Of one grammar's process. compile_time is processor time; by the clock it may take
  // kCompilePatience times as long, on a host that is busy.
  absl::Duration compile_time = absl::Milliseconds(600);
  int64_t process_bytes = int64_t{512} << 20;
  int64_t cache_bytes = int64_t{256} << 20;          // of all grammars' processes
  int max_compiling = 2;                             // at a time; others wait
  absl::Duration start_timeout = absl::Seconds(60);  // to read the vocabulary
  // A silent process is given up. What its masks may cost is limited there, long before.
  absl::Duration mask_timeout = absl::Seconds(1);
};

class GrammarMatcher;

// A grammar that is being prepared on another thread.
class GrammarPreparation {
 public:
  // What came of it; DeadlineExceeded when nothing has by then.
  absl::Status Await(absl::Duration timeout);

 private:
  friend class GrammarKeeper;
  void Settle(absl::Status status);

  absl::Mutex mutex_;
  std::optional<absl::Status> status_ ABSL_GUARDED_BY(mutex_);
};

class GrammarKeeper {
 public:
  explicit GrammarKeeper(GrammarKeeperOptions options);
  // All its processes end with it. REQUIRES: no matchers are left.
  ~GrammarKeeper();

  // Lets the program read the vocabulary meanwhile. Without it the first grammar waits for that.
  void Start();

  // Compiles a grammar unless it is kept. InvalidArgument: it is refused, and why.
  // ResourceExhausted: the grammars in use leave no room. Unavailable: try again. Takes about
  // compile_time at most where a processor is free, or start_timeout more the first time.
  absl::Status Prepare(const Grammar& grammar);

  // The same, but does not wait.
  std::shared_ptr<GrammarPreparation> PrepareSoon(const Grammar& grammar);

  // A sequence that obeys the grammar and has taken `token_ids` already. Quick. NotFound: it is to
  // be prepared first, or again; ResourceExhausted: too many sequences obey it.
  absl::StatusOr<std::unique_ptr<GrammarMatcher>> Match(const Grammar& grammar,
                                                        absl::Span<const int32_t> token_ids);

  absl::Duration mask_timeout() const { return options_.mask_timeout; }

 private:
  struct Kept {
    Grammar grammar;
    absl::Status refusal = absl::OkStatus();
    std::shared_ptr<GrammarProcess> process = nullptr;  // null while compiling, and if refused
    bool is_compiling = false;
    int64_t bytes = 0;
  };
  using Place = std::list<Kept>::iterator;

  absl::StatusOr<std::shared_ptr<GrammarProcess>> Find(const Grammar& grammar);
  absl::StatusOr<std::shared_ptr<GrammarProcess>> Compile(const Grammar& grammar);
  absl::StatusOr<std::unique_ptr<GrammarProcess>> NewProcess();
  absl::Status StartProgram() ABSL_EXCLUSIVE_LOCKS_REQUIRED(program_mutex_);
  absl::Status AwaitProgram() ABSL_EXCLUSIVE_LOCKS_REQUIRED(program_mutex_);
  void EndProgram() ABSL_EXCLUSIVE_LOCKS_REQUIRED(program_mutex_);
  absl::Status MakeRoom() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Erase(Place place) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void PrepareWhatIsAsked();

  const GrammarKeeperOptions options_;

  absl::Mutex program_mutex_;
  UniqueFd control_ ABSL_GUARDED_BY(program_mutex_);
  bool is_ready_ ABSL_GUARDED_BY(program_mutex_) = false;
  pid_t pid_ ABSL_GUARDED_BY(program_mutex_) = -1;

  absl::Mutex mutex_;
  std::list<Kept> kept_ ABSL_GUARDED_BY(mutex_);  // last used first
  absl::flat_hash_map<Grammar, Place> places_ ABSL_GUARDED_BY(mutex_);
  int64_t kept_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  int num_compiling_ ABSL_GUARDED_BY(mutex_) = 0;

  absl::Mutex asked_mutex_;
  std::deque<std::pair<Grammar, std::shared_ptr<GrammarPreparation>>> asked_
      ABSL_GUARDED_BY(asked_mutex_);  // by PrepareSoon
  bool is_ending_ ABSL_GUARDED_BY(asked_mutex_) = false;
  std::thread preparer_ ABSL_GUARDED_BY(asked_mutex_);
};

// Not thread-safe; the keeper outlives it.
class GrammarMatcher {
 public:
  GrammarMatcher(std::shared_ptr<GrammarProcess> process, int row, absl::Duration mask_timeout)
      : process_(std::move(process)), row_(row), mask_timeout_(mask_timeout) {}
  ~GrammarMatcher() { process_->CloseRow(row_); }
  GrammarMatcher(const GrammarMatcher&) = delete;
  GrammarMatcher& operator=(const GrammarMatcher&) = delete;

  // As GrammarProcess.
  void Advance(int32_t token_id) { process_->Advance(row_, token_id); }
  absl::StatusOr<absl::Span<const uint32_t>> Mask() {
    return process_->Mask(row_, absl::Now() + mask_timeout_);
  }

 private:
  const std::shared_ptr<GrammarProcess> process_;
  const int row_;
  const absl::Duration mask_timeout_;
};

}  // namespace fathom
