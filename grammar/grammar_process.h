// One grammar in a process of its own, seen from the worker: sequences that obey it, and the tokens
// that each may take next.
//
// The process is a child of `fathom-grammar` (see grammar_keeper.h). The kernel ends it when it has
// used up its time or memory, so whatever a grammar does is a matter of the sequences that obey it:
// every failure is a Status here, and all later calls return it too.
//
// Compile belongs to one thread; afterwards the rows belong to one thread, perhaps another one.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "base/unique_fd.h"
#include "grammar/grammar.h"
#include "grammar/protocol.h"

namespace fathom {

class GrammarProcess {
 public:
  // What the control socket must be sent for a process to appear at the other end.
  struct Ends {
    UniqueFd socket;
    UniqueFd memory;
  };
  static absl::StatusOr<std::unique_ptr<GrammarProcess>> Create(int vocab_size, Ends& others);
  ~GrammarProcess();

  // InvalidArgument when the grammar is refused, saying why; Unavailable when the host was too
  // busy, or there is no answer within `timeout`; Internal when the process is gone.
  absl::Status Compile(const Grammar& grammar, absl::Duration timeout);
  int64_t memory_bytes() const { return memory_bytes_; }

  // Whether it is gone, killed perhaps. From any thread.
  bool HasEnded() const;

  // Whether it ended because its sequences' masks cost too much, or crashed it. From any thread.
  bool WasRefused() const { return was_refused_; }

  // Tells the process to end; AwaitEnd returns when it has, or at `deadline`. Nothing else after
  // that.
  void End();
  void AwaitEnd(absl::Time deadline);

  // A sequence at the beginning of the grammar, after `token_ids`. ResourceExhausted when there are
  // too many. Its mask is under way.
  absl::StatusOr<int> OpenRow(absl::Span<const int32_t> token_ids);
  void CloseRow(int row);

  // `token_id` was chosen; the next mask is under way. Does not wait.
  void Advance(int row, int32_t token_id);

  // Waits for the mask that is under way. Valid until Advance. There is none, now and for ever:
  // InvalidArgument when the grammar costs too much, Internal when the process is gone, or is
  // silent until `deadline`.
  absl::StatusOr<absl::Span<const uint32_t>> Mask(int row, absl::Time deadline);

 private:
  struct Row {
    bool is_open = false;
    int num_awaited = 0;  // replies to come
    absl::Status failure = absl::OkStatus();
  };

  GrammarProcess(UniqueFd socket, const uint32_t* masks, int vocab_size)
      : socket_(std::move(socket)), masks_(masks), mask_words_(GrammarMaskWords(vocab_size)) {}

  void SendTokens(GrammarRequest::What what, int row, absl::Span<const int32_t> token_ids);
  void Send(const GrammarRequest& request, const void* data, size_t size);
  // Receives one reply; Unavailable when there is none until `deadline`.
  absl::StatusOr<GrammarReply> Receive(absl::Time deadline, std::string& text);
  void Take(const GrammarReply& reply, const std::string& text);

  const UniqueFd socket_;
  const uint32_t* const masks_;
  const int mask_words_;
  int64_t memory_bytes_ = 0;
  std::vector<Row> rows_;
  std::vector<int> free_rows_;
  absl::Status failure_;  // of the process
  std::atomic<bool> was_refused_ = false;
};

}  // namespace fathom
