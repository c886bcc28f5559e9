// tokenize_lines MODEL_DIR: tokenizes JSON strings, one a line, for comparison with another
// tokenizer.
//
//   in    "text"              out   {"ids":[…],"text":"what the ids decode to, nothing skipped"}
//
// With --time N the whole input is encoded N times and the best rate printed to stderr.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "gateway/text/detokenizer.h"
#include "gateway/text/tokenizer.h"
#include "simdjson.h"

namespace fathom {
namespace {

std::string Quote(std::string_view text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') quoted.push_back('\\');
    if (static_cast<unsigned char>(c) >= 0x20) {
      quoted.push_back(c);
    } else {
      char escape[8];
      std::snprintf(escape, sizeof(escape), "\\u%04x", c);
      quoted += escape;
    }
  }
  quoted.push_back('"');
  return quoted;
}

double MegabytesPerSecond(const Tokenizer& tokenizer, const std::vector<std::string>& texts) {
  size_t num_bytes = 0;
  const auto start = std::chrono::steady_clock::now();
  for (const std::string& text : texts) {
    tokenizer.Encode(text, BosPolicy::kNone);
    num_bytes += text.size();
  }
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return static_cast<double>(num_bytes) / 1e6 / elapsed.count();
}

int Run(const std::string& model_dir, int num_timings) {
  const auto tokenizer = Tokenizer::Load(model_dir);
  if (!tokenizer.ok()) {
    std::cerr << tokenizer.status().message() << "\n";
    return 1;
  }
  simdjson::dom::parser parser;
  std::vector<std::string> texts;
  for (std::string line; std::getline(std::cin, line);) {
    std::string_view text;
    if (parser.parse(line).get(text) != simdjson::SUCCESS) {
      std::cerr << "not a JSON string: " << line << "\n";
      return 1;
    }
    if (num_timings > 0) {
      texts.emplace_back(text);
      continue;
    }
    const std::vector<uint32_t> ids = (*tokenizer)->Encode(text, BosPolicy::kNone);
    const std::string decoded = Decode(**tokenizer, ids, {.skip_special_tokens = false});
    std::cout << "{\"ids\":[" << absl::StrJoin(ids, ",") << "],\"text\":" << Quote(decoded)
              << "}\n";
  }
  double best = 0;
  for (int i = 0; i < num_timings; ++i) {
    best = std::max(best, MegabytesPerSecond(**tokenizer, texts));
  }
  if (num_timings > 0) std::cerr << best << "\n";
  return 0;
}

}  // namespace
}  // namespace fathom

int main(int argc, char** argv) {
  if (argc != 2 && !(argc == 4 && std::string(argv[2]) == "--time")) {
    std::cerr << "usage: tokenize_lines MODEL_DIR [--time N] < lines\n";
    return 64;
  }
  return fathom::Run(argv[1], argc == 4 ? std::atoi(argv[3]) : 0);
}
