#include "grammar/grammar_keeper.h"

#include <dirent.h>
#include <signal.h>
#include <unistd.h>

#include <cctype>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace fathom {
namespace {

using testing::HasSubstr;

// Of tests/golden/tokenizer_tiny: bytes and some words. `!` is token 3, and so on.
constexpr int kVocabSize = 512;
constexpr int kEos = 1;
int TokenOf(char c) { return c - '!' + 3; }

Grammar Regex(std::string text) { return {.kind = Grammar::Kind::kRegex, .text = std::move(text)}; }
Grammar Schema(std::string text) {
  return {.kind = Grammar::Kind::kJsonSchema, .text = std::move(text)};
}

// Processes that this one has started, and those that they have, by /proc.
std::vector<pid_t> ChildrenOf(pid_t parent) {
  std::vector<pid_t> children;
  DIR* const folder = opendir("/proc");
  while (const dirent* entry = readdir(folder)) {
    if (!std::isdigit(static_cast<unsigned char>(entry->d_name[0]))) continue;
    std::ifstream file(absl::StrCat("/proc/", entry->d_name, "/stat"));
    std::string line;
    std::getline(file, line);
    const size_t end = line.rfind(')');
    if (end == std::string::npos) continue;
    if (std::atoi(line.c_str() + end + 4) == parent) children.push_back(std::atoi(entry->d_name));
  }
  closedir(folder);
  return children;
}

class GrammarKeeperTest : public testing::Test {
 protected:
  // The program is slower under sanitizers, and the machine may be busy.
  static GrammarKeeperOptions Patient() {
    GrammarKeeperOptions options;
    options.program = FATHOM_GRAMMAR_PROGRAM;
    options.model_directory = "tests/golden/tokenizer_tiny";
    options.vocab_size = kVocabSize;
    options.eos_token_ids = {kEos};
    options.compile_time = absl::Seconds(30);
    options.mask_timeout = absl::Seconds(60);
    return options;
  }

  // The tokens that may come next; {-1}: any.
  static std::vector<int> Allowed(GrammarMatcher& matcher) {
    const absl::StatusOr<absl::Span<const uint32_t>> mask = matcher.Mask();
    EXPECT_TRUE(mask.ok()) << mask.status();
    if (!mask.ok() || mask->empty()) return {-1};
    EXPECT_EQ(mask->size(), (kVocabSize + 31) / 32);
    std::vector<int> allowed;
    for (int id = 0; id < kVocabSize; ++id) {
      if (((*mask)[id / 32] >> (id % 32) & 1) != 0) allowed.push_back(id);
    }
    return allowed;
  }

  static std::unique_ptr<GrammarMatcher> MatcherOf(GrammarKeeper& keeper, const Grammar& grammar,
                                                   absl::Span<const int32_t> token_ids = {}) {
    absl::StatusOr<std::unique_ptr<GrammarMatcher>> matcher = absl::NotFoundError("");
    // Twice: a process that has ended is noticed only when it is used.
    for (int attempt = 0; attempt < 2 && absl::IsNotFound(matcher.status()); ++attempt) {
      const absl::Status prepared = keeper.PrepareSoon(grammar)->Await(absl::Seconds(60));
      EXPECT_TRUE(prepared.ok()) << prepared;
      matcher = keeper.Match(grammar, token_ids);
    }
    EXPECT_TRUE(matcher.ok()) << matcher.status();
    return *std::move(matcher);
  }
};

TEST_F(GrammarKeeperTest, FollowsASequenceTokenByToken) {
  GrammarKeeper keeper(Patient());
  ASSERT_TRUE(keeper.Prepare(Regex("a[bc]")).ok());
  const std::unique_ptr<GrammarMatcher> matcher = MatcherOf(keeper, Regex("a[bc]"));
  EXPECT_THAT(Allowed(*matcher), testing::ElementsAre(TokenOf('a')));
  matcher->Advance(TokenOf('a'));
  EXPECT_THAT(Allowed(*matcher), testing::ElementsAre(TokenOf('b'), TokenOf('c')));
  matcher->Advance(TokenOf('c'));
  EXPECT_THAT(Allowed(*matcher), testing::ElementsAre(kEos));
  matcher->Advance(kEos);
  EXPECT_THAT(Allowed(*matcher), testing::ElementsAre(1));
  matcher->Advance(TokenOf('z'));
  EXPECT_THAT(Allowed(*matcher), testing::ElementsAre(1));
}

TEST_F(GrammarKeeperTest, MatchesOnlyWhatIsPrepared) {
  GrammarKeeper keeper(Patient());
  EXPECT_TRUE(absl::IsNotFound(keeper.Match(Regex("a"), {}).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(keeper.PrepareSoon(Regex("a("))->Await(absl::Seconds(60))));
  EXPECT_TRUE(absl::IsNotFound(keeper.Match(Regex("a("), {}).status()));
  EXPECT_TRUE(keeper.PrepareSoon(Regex("a"))->Await(absl::Seconds(60)).ok());
  EXPECT_TRUE(keeper.Match(Regex("a"), {}).ok());
}

TEST_F(GrammarKeeperTest, DoesNotWaitForWhatIsPreparedWhenItEnds) {
  GrammarKeeperOptions options = Patient();
  std::vector<std::shared_ptr<GrammarPreparation>> asked;
  {
    GrammarKeeper keeper(options);
    for (int i = 0; i < 100; ++i) asked.push_back(keeper.PrepareSoon(Regex(absl::StrCat("a", i))));
  }
  EXPECT_TRUE(absl::IsDeadlineExceeded(asked.back()->Await(absl::ZeroDuration())));
}

TEST_F(GrammarKeeperTest, ResumesASequenceFromItsTokens) {
  GrammarKeeper keeper(Patient());
  const Grammar grammar = Regex("(ab)*c");
  std::vector<int32_t> token_ids;
  for (int i = 0; i < 20'000; ++i) token_ids.push_back(TokenOf(i % 2 == 0 ? 'a' : 'b'));
  const auto matcher = MatcherOf(keeper, grammar, token_ids);
  EXPECT_THAT(Allowed(*matcher), testing::ElementsAre(TokenOf('a'), TokenOf('c')));
}

TEST_F(GrammarKeeperTest, KeepsSequencesOfOneGrammarApart) {
  GrammarKeeper keeper(Patient());
  const Grammar grammar = Regex("a|bc");
  auto one = MatcherOf(keeper, grammar);
  const auto other = MatcherOf(keeper, grammar);
  one->Advance(TokenOf('a'));
  other->Advance(TokenOf('b'));
  EXPECT_THAT(Allowed(*one), testing::ElementsAre(kEos));
  EXPECT_THAT(Allowed(*other), testing::ElementsAre(TokenOf('c')));
  one->Advance(kEos);  // its answer is still to come when the row is closed
  one.reset();
  const auto next = MatcherOf(keeper, grammar);
  EXPECT_THAT(Allowed(*next), testing::ElementsAre(TokenOf('a'), TokenOf('b')));
}

TEST_F(GrammarKeeperTest, SaysThatATokenWasNotAllowed) {
  GrammarKeeper keeper(Patient());
  const auto matcher = MatcherOf(keeper, Regex("ab"));
  matcher->Advance(TokenOf('z'));
  const absl::Status status = matcher->Mask().status();
  EXPECT_TRUE(absl::IsInternal(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("does not allow token"));
  EXPECT_THAT(Allowed(*MatcherOf(keeper, Regex("ab"))), testing::ElementsAre(TokenOf('a')));
}

TEST_F(GrammarKeeperTest, RefusesAndRemembersIt) {
  GrammarKeeper keeper(Patient());
  for (int i = 0; i < 2; ++i) {
    const absl::Status status = keeper.Prepare(Schema(R"({"not": {}})"));
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("not is not supported"));
  }
}

TEST_F(GrammarKeeperTest, RemembersGrammarsWhoseMasksCostTooMuch) {
  GrammarKeeper keeper(Patient());
  const Grammar grammar = Regex("(((.{0,3000}){0,3000}){0,3000})x");
  ASSERT_TRUE(keeper.Prepare(grammar).ok());
  {
    const auto matcher = MatcherOf(keeper, grammar);
    absl::Status status;
    for (int i = 0; i < 100 && status.ok(); ++i) {
      status = matcher->Mask().status();
      matcher->Advance(TokenOf('a'));
    }
    EXPECT_THAT(std::string(status.message()), HasSubstr("takes too long"));
  }
  EXPECT_FALSE(keeper.Match(grammar, {}).ok());
  EXPECT_TRUE(absl::IsInvalidArgument(keeper.Prepare(grammar)));
}

// CVE-2025-57809, CVE-2026-25048 (stack), CVE-2025-58446 (time), CVE-2026-55574 ((a+)+b) and their
// like: each is its own request's matter, at most, and the others go on.
TEST_F(GrammarKeeperTest, HostileGrammarsHarmNobodyElse) {
  GrammarKeeperOptions options = Patient();
  options.compile_time = absl::Seconds(1);
  GrammarKeeper keeper(options);
  ASSERT_TRUE(keeper.Prepare(Regex("[ab]*")).ok());  // the program is up
  const auto bystander = MatcherOf(keeper, Regex("[ab]*"));

  std::string alternatives = "a";
  for (int i = 0; i < 9000; ++i) absl::StrAppend(&alternatives, "|x", i);
  std::vector<Grammar> hostile = {
      Regex("(a+)+b"),
      Regex("((a*)*)*"),
      Regex(std::string(60'000, '(')),
      Regex(absl::StrCat(std::string(30'000, '('), "a", std::string(30'000, ')'))),
      Regex("(((((a{1,99999}){1,99999}){1,99999}){1,99999}){1,99999})"),
      Regex("[a-z]{0,100000}[a-z]{0,100000}"),
      Regex(alternatives),
      {.kind = Grammar::Kind::kEbnf, .text = "root ::= root root | root | \"a\" |"},
      {.kind = Grammar::Kind::kEbnf, .text = "root ::= root"},
      {.kind = Grammar::Kind::kEbnf,
       .text =
           absl::StrCat("root ::= ", std::string(30'000, '('), "\"a\"", std::string(30'000, ')'))},
      {.kind = Grammar::Kind::kEbnf,
       .text = "root ::= a a a a a a a a\na ::= b | b b | b b b\nb ::= [a-z]* | [a-z]* a"},
      Schema(R"({"type": "string", "minLength": 100000000})"),
      Schema(R"({"type": "array", "minItems": 2000000000})"),
      Schema(R"({"type": "array", "items": {"type": "array", "items": {"type": "string",
               "maxLength": 99999}, "maxItems": 99999}, "minItems": 99999})"),
      Schema(R"({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"},
               {"$ref": "#/$defs/b"}]}, "b": {"anyOf": [{"$ref": "#/$defs/a"},
               {"$ref": "#/$defs/a"}]}}})"),
      Schema(R"({"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$"})"),
      Schema(absl::StrCat("{\"description\": \"", std::string(60'000, '['), "\"}")),
  };
  for (const Grammar& grammar : hostile) {
    SCOPED_TRACE(grammar.text.substr(0, 80));
    (void)keeper.Prepare(grammar);
    absl::StatusOr<std::unique_ptr<GrammarMatcher>> matcher = keeper.Match(grammar, {});
    // What compiles is harmless or pays for itself: some tokens, or an end of its own.
    for (int i = 0; matcher.ok() && i < 50; ++i) {
      const auto mask = (*matcher)->Mask();
      if (!mask.ok() || mask->empty()) break;
      int token_id = 0;
      while (token_id < kVocabSize && ((*mask)[token_id / 32] >> (token_id % 32) & 1) == 0) {
        ++token_id;
      }
      ASSERT_LT(token_id, kVocabSize) << "nothing is allowed";
      (*matcher)->Advance(token_id);
    }
    EXPECT_THAT(Allowed(*bystander), testing::Contains(TokenOf('b')));
    bystander->Advance(TokenOf('b'));
  }
}

TEST_F(GrammarKeeperTest, AProcessThatIsKilledFailsItsOwnSequencesOnly) {
  GrammarKeeper keeper(Patient());
  ASSERT_TRUE(keeper.Prepare(Regex("a+")).ok());
  const std::vector<pid_t> programs = ChildrenOf(getpid());
  ASSERT_EQ(programs.size(), 1);
  const std::vector<pid_t> victims = ChildrenOf(programs[0]);
  ASSERT_EQ(victims.size(), 1);
  const auto bystander = MatcherOf(keeper, Regex("b+"));
  const auto victim = MatcherOf(keeper, Regex("a+"));
  EXPECT_THAT(Allowed(*victim), testing::Contains(TokenOf('a')));
  kill(victims[0], SIGKILL);
  victim->Advance(TokenOf('a'));
  EXPECT_TRUE(absl::IsInternal(victim->Mask().status()));
  EXPECT_THAT(Allowed(*bystander), testing::Contains(TokenOf('b')));
  // The next one gets a new process, ahead of time.
  EXPECT_TRUE(keeper.Prepare(Regex("a+")).ok());
  EXPECT_TRUE(keeper.Match(Regex("a+"), {}).ok());
  EXPECT_THAT(Allowed(*MatcherOf(keeper, Regex("a+"))), testing::Contains(TokenOf('a')));
}

TEST_F(GrammarKeeperTest, TheProgramIsStartedAgainWhenItIsKilled) {
  GrammarKeeper keeper(Patient());
  const auto bystander = MatcherOf(keeper, Regex("b+"));
  const std::vector<pid_t> programs = ChildrenOf(getpid());
  ASSERT_EQ(programs.size(), 1);
  kill(programs[0], SIGKILL);
  const absl::Status status = keeper.Prepare(Regex("c+"));
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_THAT(Allowed(*bystander), testing::Contains(TokenOf('b')));
}

TEST_F(GrammarKeeperTest, ForgetsWhatWasUsedLeastWhenThereIsNoRoom) {
  GrammarKeeperOptions options = Patient();
  options.cache_bytes = int64_t{16} << 20;
  GrammarKeeper keeper(options);
  const auto in_use = MatcherOf(keeper, Regex("z"));
  const pid_t program = ChildrenOf(getpid()).at(0);
  for (int i = 0; i < 60; ++i) ASSERT_TRUE(keeper.Prepare(Regex(absl::StrCat("a", i))).ok());
  // Each process holds some hundred kilobytes at the least, so not all 60 are there.
  EXPECT_LT(ChildrenOf(program).size(), 60);
  EXPECT_THAT(Allowed(*in_use), testing::ElementsAre(TokenOf('z')));
}

TEST_F(GrammarKeeperTest, RefusesWhenTheGrammarsInUseLeaveNoRoom) {
  GrammarKeeperOptions options = Patient();
  options.cache_bytes = 1;
  GrammarKeeper keeper(options);
  EXPECT_TRUE(absl::IsResourceExhausted(keeper.Prepare(Regex("a"))));
}

TEST_F(GrammarKeeperTest, ServesManyThreadsAtOnce) {
  GrammarKeeper keeper(Patient());
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&keeper, i] {
      for (int k = 0; k < 5; ++k) {
        EXPECT_TRUE(keeper.Prepare(Regex(absl::StrCat("a", (i + k) % 6))).ok());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_F(GrammarKeeperTest, SaysWhyThereAreNoGrammars) {
  GrammarKeeperOptions options = Patient();
  options.model_directory = "tests/golden/chat_v3_0324";
  const absl::Status no_tokenizer = GrammarKeeper(options).Prepare(Regex("a"));
  EXPECT_TRUE(absl::IsInvalidArgument(no_tokenizer));
  EXPECT_THAT(std::string(no_tokenizer.message()), HasSubstr("tokenizer.json"));
  options = Patient();
  options.program = "/nowhere/fathom-grammar";
  EXPECT_FALSE(GrammarKeeper(options).Prepare(Regex("a")).ok());
}

}  // namespace
}  // namespace fathom
