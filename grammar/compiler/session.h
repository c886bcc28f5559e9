// The life of a forked child: one grammar and the sequences that obey it, under limits.
#pragma once

#include <cstdint>

#include "base/unique_fd.h"
#include "grammar/compiler/token_grammar.h"

namespace fathom {

struct SessionOptions {
  int vocab_size = 0;
  int compile_milliseconds = 600;  // of processor time; kCompilePatience times as long by the clock
  int64_t process_bytes = int64_t{512} << 20;  // besides what the child was forked with
};

// Serves the session of `socket` and `memory` (protocol.h) until the socket is closed; then, or at
// the first limit, the process ends. Memory: RLIMIT_AS. Compiling: timers of processor and
// wall-clock time. Masks: an account of processor time, which every token adds to and whose end is
// the process's end, so that no grammar can hold up a worker's steps for long. A timer or a stack
// overflow says so in a last reply, from the signal's handler.
//
// REQUIRES: the process was forked for this and has one thread.
[[noreturn]] void ServeSession(const SessionOptions& options, const TokenVocabulary& vocabulary,
                               UniqueFd socket, UniqueFd memory);

}  // namespace fathom
