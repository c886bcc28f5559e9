#include "grammar/compiler/token_grammar.h"

#include <algorithm>
#include <new>
#include <optional>
#include <stdexcept>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "dlpack/dlpack.h"
#include "grammar/compiler/schema_check.h"
#include "grammar/compiler/utf8_masks.h"
#include "xgrammar/xgrammar.h"

namespace xgrammar {

// What xgrammar warns of is what it leaves out of a grammar.
static thread_local std::string warnings;

[[noreturn]] void LogFatalImpl(const std::string&, int, const std::string& message);
[[noreturn]] void LogFatalImpl(const std::string&, int, const std::string& message) {
  throw std::runtime_error(message);
}

void LogMessageImpl(const std::string&, int, int level, const std::string& message);
void LogMessageImpl(const std::string&, int, int level, const std::string& message) {
  constexpr int kWarning = 2;
  if (level < kWarning) return;
  if (!warnings.empty()) warnings += "; ";
  warnings += message.substr(0, message.find("; ignoring"));  // it is refused
}

}  // namespace xgrammar

namespace fathom {
namespace {

// White space between the parts of JSON: enough to indent by, too little to fill an answer with.
constexpr int kMaxWhitespace = 64;

// Begins what stands for a token without text: no text has these bytes.
constexpr char kNoText[] = "\xff\xfe";

// What an error of xgrammar's says to whoever wrote the grammar, without the condition in its code
// that failed.
std::string InWordsOfClients(std::string_view message) {
  constexpr std::string_view kCheck = "Check failed: ", kFailed = " is false: ";
  if (message.substr(0, kCheck.size()) == kCheck) {
    const size_t end = message.find(kFailed);
    message = end == std::string_view::npos ? "" : message.substr(end + kFailed.size());
  }
  while (!message.empty() && message.back() <= ' ') message.remove_suffix(1);
  // picojson's word for a value that is, say, a number where a string was expected.
  if (message.substr(0, 13) == "type mismatch") message = "a value is of the wrong type";
  return message.empty() ? "the grammar cannot be compiled" : std::string(message);
}

// Runs `work`, which returns a Status; xgrammar's exceptions become one.
template <typename Work>
absl::Status Guarded(const Work& work) {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    return absl::InvalidArgumentError("the grammar needs too much memory");
  } catch (const std::exception& error) {
    return absl::InvalidArgumentError(InWordsOfClients(error.what()));
  }
}

}  // namespace

struct TokenVocabulary::Info {
  xgrammar::TokenizerInfo tokenizer;
  int vocab_size;
  Utf8Masks utf8;
  std::vector<int> eos_token_ids;
};

TokenVocabulary::TokenVocabulary(const std::vector<std::string>& bytes_of_id, int vocab_size,
                                 const std::vector<int>& eos_token_ids) {
  CHECK_LE(bytes_of_id.size(), static_cast<size_t>(vocab_size));
  // xgrammar allows a token without bytes nowhere, not even where it is asked for by its id.
  std::vector<std::string> spelled = bytes_of_id;
  for (size_t id = 0; id < spelled.size(); ++id) {
    if (spelled[id].empty()) spelled[id] = absl::StrCat(kNoText, id);
  }
  info_ = std::make_shared<const Info>(Info{
      xgrammar::TokenizerInfo(spelled, xgrammar::VocabType::RAW, vocab_size,
                              std::vector<int32_t>(eos_token_ids.begin(), eos_token_ids.end())),
      vocab_size, Utf8Masks(bytes_of_id), eos_token_ids});
}

struct TokenGrammar::Compiled {
  xgrammar::CompiledGrammar grammar;
  TokenVocabulary vocabulary;
};

namespace {

class XgrammarMatcher final : public TokenMatcher {
 public:
  XgrammarMatcher(const xgrammar::CompiledGrammar& grammar, int vocab_size, const Utf8Masks& utf8,
                  const std::vector<int>& eos_token_ids)
      : matcher_(grammar), vocab_size_(vocab_size), utf8_(utf8), eos_token_ids_(eos_token_ids) {}

  absl::StatusOr<bool> Accept(int32_t token_id) override {
    if (HasEnded()) return true;
    bool is_accepted = false;
    const absl::Status status = Guarded([&] {
      is_accepted = matcher_.AcceptToken(token_id);
      return absl::OkStatus();
    });
    if (!status.ok()) return status;
    if (is_accepted) utf8_state_ = utf8_.After(utf8_state_, token_id);
    return is_accepted;
  }

  bool HasEnded() const override { return matcher_.IsTerminated(); }

  absl::Status FillMask(absl::Span<uint32_t> mask) override {
    CHECK_EQ(static_cast<int>(mask.size()), xgrammar::GetBitmaskSize(vocab_size_));
    if (HasEnded()) {
      std::fill(mask.begin(), mask.end(), 0);
      for (const int id : eos_token_ids_) mask[id / 32] |= uint32_t{1} << id % 32;
      return absl::OkStatus();
    }
    int64_t words = static_cast<int64_t>(mask.size());
    DLTensor tensor = {};
    tensor.data = mask.data();
    tensor.device = {kDLCPU, 0};
    tensor.ndim = 1;
    tensor.dtype = xgrammar::GetBitmaskDLType();
    tensor.shape = &words;
    return Guarded([&] {
      matcher_.FillNextTokenBitmask(&tensor);
      utf8_.Restrict(utf8_state_, mask);
      return absl::OkStatus();
    });
  }

 private:
  xgrammar::GrammarMatcher matcher_;
  const int vocab_size_;
  const Utf8Masks& utf8_;
  const std::vector<int>& eos_token_ids_;
  Utf8Masks::State utf8_state_ = 0;
};

xgrammar::CompiledGrammar CompileText(xgrammar::GrammarCompiler& compiler, const Grammar& grammar) {
  switch (grammar.kind) {
    case Grammar::Kind::kRegex:
      return compiler.CompileRegex(grammar.text);
    case Grammar::Kind::kEbnf:
      return compiler.CompileGrammar(grammar.text, "root");
    case Grammar::Kind::kStructuralTag:
      return compiler.CompileStructuralTag(grammar.text);
    case Grammar::Kind::kJsonSchema:
      break;
  }
  return compiler.CompileJSONSchema(grammar.text, /*any_whitespace=*/true, /*indent=*/std::nullopt,
                                    /*separators=*/std::nullopt, /*strict_mode=*/true,
                                    kMaxWhitespace);
}

}  // namespace

absl::StatusOr<TokenGrammar> TokenGrammar::Compile(const TokenVocabulary& vocabulary,
                                                   const Grammar& grammar) {
  if (grammar.kind == Grammar::Kind::kJsonSchema) RETURN_IF_ERROR(CheckSchema(grammar.text));
  if (grammar.kind == Grammar::Kind::kStructuralTag) {
    RETURN_IF_ERROR(CheckStructuralTag(grammar.text));
  }
  TokenGrammar result;
  xgrammar::warnings.clear();
  RETURN_IF_ERROR(Guarded([&] {
    xgrammar::GrammarCompiler compiler(vocabulary.info_->tokenizer, /*max_threads=*/1,
                                       /*cache_enabled=*/false, /*max_memory_bytes=*/-1,
                                       /*enable_dynamic_compilation=*/true);
    result.compiled_ =
        std::make_shared<const Compiled>(Compiled{CompileText(compiler, grammar), vocabulary});
    return absl::OkStatus();
  }));
  if (!xgrammar::warnings.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("not supported: ", xgrammar::warnings));
  }
  return result;
}

absl::StatusOr<std::unique_ptr<TokenMatcher>> TokenGrammar::NewMatcher() const {
  const TokenVocabulary::Info& vocabulary = *compiled_->vocabulary.info_;
  std::unique_ptr<TokenMatcher> matcher;
  RETURN_IF_ERROR(Guarded([&] {
    matcher = std::make_unique<XgrammarMatcher>(compiled_->grammar, vocabulary.vocab_size,
                                                vocabulary.utf8, vocabulary.eos_token_ids);
    return absl::OkStatus();
  }));
  return matcher;
}

}  // namespace fathom
