// What a worker and its `fathom-grammar` say to each other, over Unix sockets that keep packets
// whole (SOCK_SEQPACKET). Both ends are of one build; structs travel as they lie in memory.
//
// The control socket is descriptor 3 of the program. When the vocabulary is read it sends one
// GrammarReply (kDone, or kRefused and why not). From then on every packet to it carries two
// descriptors, of a session's socket and of its mask memory: the program forks, and the child
// serves that session until its socket is closed.
//
// In a session the first request compiles a grammar. Then rows are opened, advanced and closed: row
// r is one sequence, and its mask lies at words [r * mask_words, (r + 1) * mask_words) of the
// memory; token t may come next if bit t % 32 of word t / 32 is set. Compile, Advance and a row's
// opening are answered in order; a row's mask is the worker's to read from the answer until the
// next Advance.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fathom {

inline constexpr int kGrammarControlFd = 3;
inline constexpr int kMaxGrammarRows = 4096;
// How much longer than processor time compiling may take by the clock.
inline constexpr int kCompilePatience = 5;
inline constexpr size_t kMaxGrammarPacketBytes = (size_t{64} << 10) + 4096;
inline constexpr size_t kMaxTokensPerPacket = 8192;

struct GrammarRequest {
  enum class What : uint32_t {
    kCompile,  // text follows; `row` is Grammar::Kind
    kOpen,     // a row at the beginning of the grammar
    kReplay,   // tokens follow; not answered
    kAdvance,  // tokens follow, perhaps none: what may come after them?
    kClose,    // not answered
  };
  What what = What::kCompile;
  uint32_t row = 0;
};

struct GrammarReply {
  enum class What : uint32_t {
    kDone,     // compiled
    kMask,     // see the memory
    kRefused,  // the grammar, and why: text follows
    kTooBusy,  // the time was over before the processor had worked long: text follows
    kFailed,   // this row, and why: text follows
  };
  What what = What::kDone;
  uint32_t row = 0;
  uint64_t memory_bytes = 0;  // kDone: of the session's process alone
};

inline int GrammarMaskWords(int vocab_size) { return (vocab_size + 31) / 32; }

}  // namespace fathom
