// grammar_bench: what grammars cost a worker, with the vocabulary of a real model.
//
//   build/cpu/bin/grammar_bench --model tests/golden/tokenizer_v3 [--schemas FILE]
//
// FILE has a JSON Schema on each line. Every grammar is compiled, and then a few texts are drawn
// from it: each token at random from the mask before it, as from a model with random weights. A
// mask is what a step may wait for: from the moment the token is chosen until the mask of the next
// one is there. Its share of the limit is that of the processor time that each token adds to its
// grammar's account (grammar/compiler/session.cc).
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/flag_parser.h"
#include "grammar/grammar_keeper.h"

namespace fathom {
namespace {

constexpr double kMaskMillisecondsPerToken = 20;

struct Flags {
  std::string model = "tests/golden/tokenizer_v3";
  std::string program;
  std::string schemas;
  int vocab_size = 129280;
  int eos_token_id = 1;
  int num_texts = 4;     // of each grammar
  int num_tokens = 100;  // of each text, at most
};

const Grammar kBuiltIn[] = {
    {Grammar::Kind::kJsonSchema, R"({"type":"object"})"},
    {Grammar::Kind::kJsonSchema,
     R"({"type":"object","required":["place","unit"],"properties":{
        "place":{"type":"string"},"unit":{"enum":["celsius","kelvin"]},
        "days":{"type":"integer","minimum":1,"maximum":14}}})"},
    {Grammar::Kind::kJsonSchema, R"({"type":"string","minLength":10,"maxLength":200})"},
    {Grammar::Kind::kJsonSchema,
     R"({"type":"array","items":{"type":"object","properties":{"a":{"type":"number"},
        "b":{"type":["string","null"],"maxLength":64}},"required":["a","b"]},"minItems":3})"},
    {Grammar::Kind::kRegex, R"([A-Z][a-z]+( [A-Z][a-z]+){0,20})"},
    {Grammar::Kind::kRegex, R"((\w+@\w+\.(com|org)\n){3,})"},
};

std::vector<Grammar> GrammarsOf(const Flags& flags) {
  std::vector<Grammar> grammars;
  std::ifstream file(flags.schemas);
  for (std::string line; std::getline(file, line);) {
    grammars.push_back({Grammar::Kind::kJsonSchema, line});
  }
  if (flags.schemas.empty()) grammars.assign(std::begin(kBuiltIn), std::end(kBuiltIn));
  return grammars;
}

double MillisecondsSince(absl::Time begin) {
  return absl::ToDoubleMilliseconds(absl::Now() - begin);
}

void Print(const char* what, std::vector<double>& milliseconds) {
  if (milliseconds.empty()) return;
  std::sort(milliseconds.begin(), milliseconds.end());
  double sum = 0;
  for (const double each : milliseconds) sum += each;
  const auto quantile = [&](double q) {
    return milliseconds[static_cast<size_t>(q * static_cast<double>(milliseconds.size() - 1))];
  };
  std::printf("%-28s %7zu: mean %7.3f, p50 %7.3f, p99 %7.3f, longest %7.3f ms", what,
              milliseconds.size(), sum / static_cast<double>(milliseconds.size()), quantile(0.5),
              quantile(0.99), milliseconds.back());
}

int Run(const Flags& flags) {
  GrammarKeeper keeper({.program = flags.program,
                        .model_directory = flags.model,
                        .vocab_size = flags.vocab_size,
                        .eos_token_ids = {flags.eos_token_id}});
  const absl::Time start = absl::Now();
  (void)keeper.Prepare({Grammar::Kind::kRegex, "a"});
  std::printf("reading the vocabulary: %.0f ms\n", MillisecondsSince(start));
  std::mt19937 random(1);
  std::vector<double> compiling, first_masks, masks;
  int num_refused = 0, num_failed = 0;
  for (const Grammar& grammar : GrammarsOf(flags)) {
    const absl::Time begin = absl::Now();
    if (!keeper.Prepare(grammar).ok()) {
      ++num_refused;
      continue;
    }
    compiling.push_back(MillisecondsSince(begin));
    for (int text = 0; text < flags.num_texts; ++text) {
      absl::Time asked = absl::Now();
      auto matcher = keeper.Match(grammar, {});
      for (int i = 0; matcher.ok() && i < flags.num_tokens; ++i) {
        const auto mask = (*matcher)->Mask();
        if (!mask.ok()) {
          ++num_failed;
          std::printf("%s: %s\n", grammar.text.substr(0, 100).c_str(),
                      std::string(mask.status().message()).c_str());
          break;
        }
        (text == 0 ? first_masks : masks).push_back(MillisecondsSince(asked));
        if (mask->empty()) break;
        std::vector<int32_t> allowed;
        for (int id = 0; id < flags.vocab_size; ++id) {
          if (((*mask)[id / 32] >> (id % 32) & 1) != 0) allowed.push_back(id);
        }
        asked = absl::Now();
        (*matcher)->Advance(allowed[random() % allowed.size()]);
      }
    }
  }
  std::printf("%d grammars refused, %d texts failed\n", num_refused, num_failed);
  Print("compiling", compiling);
  std::printf("\n");
  for (auto& [what, times] :
       {std::pair<const char*, std::vector<double>&>{"masks of a first text", first_masks},
        {"masks of the next texts", masks}}) {
    Print(what, times);
    if (!times.empty()) {
      std::printf(", %.0f %% of the limit\n", 100 * times.back() / kMaskMillisecondsPerToken);
    }
  }
  return 0;
}

int Main(int argc, char** argv) {
  Flags flags;
  flags.program = std::filesystem::canonical("/proc/self/exe").parent_path() / "fathom-grammar";
  FlagParser parser("What grammars cost a worker.", "grammar_bench");
  parser.ShowDefaults();
  parser.Add("--model", flags.model, "folder with a tokenizer.json");
  parser.Add("--vocab-size", flags.vocab_size).Between(1, std::numeric_limits<int>::max());
  parser.Add("--eos-token-id", flags.eos_token_id).Between(0, std::numeric_limits<int>::max());
  parser.Add("--schemas", flags.schemas, "a JSON Schema on each line; else a few of ours");
  parser.Add("--texts", flags.num_texts, "of each grammar")
      .Between(1, std::numeric_limits<int>::max());
  parser.Add("--tokens", flags.num_tokens, "of each text")
      .Between(1, std::numeric_limits<int>::max());
  if (const std::optional<int> code = parser.Parse(argc, argv)) return *code;
  return Run(flags);
}

}  // namespace
}  // namespace fathom

int main(int argc, char** argv) { return fathom::Main(argc, argv); }
