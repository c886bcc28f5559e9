// fathom-grammar: compiles grammars for a worker, each in a process of its own
// (grammar/protocol.h).
//
// A worker starts it; it is of no use by hand. It ends when the worker does.
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sysexits.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "base/flag_parser.h"
#include "base/unique_fd.h"
#include "grammar/compiler/session.h"
#include "grammar/compiler/token_grammar.h"
#include "grammar/compiler/vocabulary.h"
#include "grammar/protocol.h"

namespace fathom {
namespace {

struct Flags {
  std::string model;
  std::vector<int> eos_token_ids;
  SessionOptions session;
};

void Report(GrammarReply::What what, const std::string& text) {
  GrammarReply reply = {.what = what};
  std::array<iovec, 2> parts = {iovec{&reply, sizeof(reply)},
                                iovec{const_cast<char*>(text.data()), text.size()}};
  msghdr message = {};
  message.msg_iov = parts.data();
  message.msg_iovlen = text.empty() ? 1 : 2;
  (void)!sendmsg(kGrammarControlFd, &message, MSG_NOSIGNAL);
}

// Waits for the descriptors of the next session. False: the worker is gone.
bool ReceiveSession(UniqueFd& socket, UniqueFd& memory) {
  char byte;
  iovec part = {&byte, 1};
  std::array<int, 2> descriptors;
  alignas(cmsghdr) char space[CMSG_SPACE(sizeof(descriptors))];
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = space;
  message.msg_controllen = sizeof(space);
  ssize_t received;
  do {
    received = recvmsg(kGrammarControlFd, &message, MSG_CMSG_CLOEXEC);
  } while (received < 0 && errno == EINTR);
  const cmsghdr* const header = received > 0 ? CMSG_FIRSTHDR(&message) : nullptr;
  if (header == nullptr || header->cmsg_len != CMSG_LEN(sizeof(descriptors))) return false;
  std::memcpy(descriptors.data(), CMSG_DATA(header), sizeof(descriptors));
  socket = UniqueFd(descriptors[0]);
  memory = UniqueFd(descriptors[1]);
  return true;
}

int Serve(const Flags& flags) {
  const absl::StatusOr<std::vector<std::string>> bytes_of_id =
      ReadVocabulary(flags.model, flags.session.vocab_size);
  if (!bytes_of_id.ok()) {
    Report(GrammarReply::What::kRefused, std::string(bytes_of_id.status().message()));
    return EX_CONFIG;
  }
  const TokenVocabulary vocabulary(*bytes_of_id, flags.session.vocab_size, flags.eos_token_ids);
  Report(GrammarReply::What::kDone, "");
  UniqueFd socket, memory;
  while (ReceiveSession(socket, memory)) {
    // A failed fork closes the session's socket, which the worker sees.
    if (fork() == 0) {
      close(kGrammarControlFd);
      ServeSession(flags.session, vocabulary, std::move(socket), std::move(memory));
    }
    socket.reset();
    memory.reset();
  }
  return EX_OK;
}

int Main(int argc, char** argv) {
  FlagParser parser("Compiles grammars for a worker, which starts it.", "fathom-grammar");
  Flags flags;
  parser.Add("--model", flags.model, "folder with tokenizer.json").Required();
  parser.Add("--vocab-size", flags.session.vocab_size, "of the model")
      .Required()
      .Between(1, 1 << 24);
  parser.Add("--eos-token-ids", flags.eos_token_ids, "a list with commas").SplitAtCommas();
  parser.Add("--compile-milliseconds", flags.session.compile_milliseconds, "of one grammar")
      .Between(1, 600'000);
  parser.Add("--process-bytes", flags.session.process_bytes, "memory of one grammar");
  parser.AddVersion(FATHOM_VERSION);
  if (const std::optional<int> code = parser.Parse(argc, argv)) return *code;
  signal(SIGPIPE, SIG_IGN);
  signal(SIGCHLD, SIG_IGN);  // nobody waits for the children
  return Serve(flags);
}

}  // namespace
}  // namespace fathom

int main(int argc, char** argv) { return fathom::Main(argc, argv); }
