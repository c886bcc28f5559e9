// tokenize_lines MODEL_DIR: answers JSON lines, for comparison with another tokenizer.
//
//   "text"    {"ids":[…]}                     its ids, without BOS
//   {"hex":"…"}  the same for any bytes
//   [1,2,3]   {"text":"…","skipping":"…"}     their text, the second without special tokens
//
// With --time N all texts are encoded N times in one thread and the best rate in MB/s is printed.
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

std::string AnswerText(const Tokenizer& tokenizer, std::string_view text) {
  const std::vector<uint32_t> ids = tokenizer.Encode(text, BosPolicy::kNone);
  return absl::StrCat("{\"ids\":[", absl::StrJoin(ids, ","), "]}");
}

// The bytes that pairs of hexadecimal digits stand for.
std::string FromHex(std::string_view digits) {
  std::string bytes;
  for (size_t i = 0; i + 1 < digits.size(); i += 2) {
    bytes += static_cast<char>(std::stoi(std::string(digits.substr(i, 2)), nullptr, 16));
  }
  return bytes;
}

std::string AnswerIds(const Tokenizer& tokenizer, simdjson::dom::array elements) {
  std::vector<uint32_t> ids;
  for (const auto element : elements) {
    ids.push_back(static_cast<uint32_t>(element.get_uint64().value()));
  }
  const auto decode = [&](bool skip_special_tokens) {
    return Quote(Decode(tokenizer, ids, {.skip_special_tokens = skip_special_tokens}));
  };
  return absl::StrCat("{\"text\":", decode(false), ",\"skipping\":", decode(true), "}");
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
    simdjson::dom::element value;
    if (parser.parse(line).get(value) != simdjson::SUCCESS) {
      std::cerr << "not JSON: " << line << "\n";
      return 1;
    }
    if (num_timings > 0) {
      texts.emplace_back(value.get_string().value());
    } else if (value.is_string()) {
      std::cout << AnswerText(**tokenizer, value.get_string().value()) << "\n";
    } else if (value.is_object()) {
      std::cout << AnswerText(**tokenizer, FromHex(value["hex"].get_string().value())) << "\n";
    } else {
      std::cout << AnswerIds(**tokenizer, value.get_array().value()) << "\n";
    }
  }
  double best = 0;
  for (int i = 0; i < num_timings; ++i) {
    best = std::max(best, MegabytesPerSecond(**tokenizer, texts));
  }
  if (num_timings > 0) std::cout << best << "\n";
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
