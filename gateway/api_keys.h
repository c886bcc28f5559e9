// API keys: who may ask. Without any, everybody; with some, every route but the probes needs one,
// whatever its path.
//
// A key comes as `Authorization: Bearer KEY`, as `x-api-key: KEY` (Anthropic's clients), or as the
// password of Basic authentication (browsers, for the status page). Only SHA-256 hashes of keys are
// kept; all are compared, in a time that depends on none of them. I/O thread only.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "gateway/http/access_guard.h"

namespace fathom {

struct ApiKeyOptions {
  std::vector<std::string> keys;  // in the clear, from flags or the environment
  // Lines of a key's SHA-256, in hexadecimal, and the name that the log calls its holder by. Empty
  // lines and those that begin with '#' do not count.
  std::string file;
};

class ApiKeys : public AccessGuard {
 public:
  explicit ApiKeys(ApiKeyOptions options) : options_(std::move(options)) {}

  // Reads the file. InvalidArgument says which line is wrong, or why it cannot be read; the keys
  // stay as they were then. An empty file is wrong too: nobody could ask.
  absl::Status Load();

  // Whether keys are asked for.
  bool enabled() const { return !options_.keys.empty() || !options_.file.empty(); }

  Verdict Check(const HttpRequest& head, std::string_view pattern) override;

 private:
  using Hash = std::array<uint8_t, 32>;
  struct Entry {
    Hash hash;
    std::string name;
  };

  static Hash HashOf(std::string_view key);
  absl::Status ParseFile(std::string_view text, std::vector<Entry>& entries) const;
  // The holder of the key, or null.
  const Entry* Find(std::string_view key) const;

  const ApiKeyOptions options_;
  std::vector<Entry> entries_;
};

}  // namespace fathom
