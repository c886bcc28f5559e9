#include "gateway/api_keys.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <optional>
#include <sstream>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "gateway/openai/errors.h"

namespace fathom {
namespace {

constexpr size_t kMaxNameBytes = 64;

// What orchestrators ask without knowing anybody. It says nothing but yes or no, and why not.
bool IsProbe(std::string_view pattern) {
  constexpr std::array<std::string_view, 4> kProbes = {"/health", "/ping", "/live", "/ready"};
  return std::find(kProbes.begin(), kProbes.end(), pattern) != kProbes.end();
}

bool IsName(std::string_view name) {
  return !name.empty() && name.size() <= kMaxNameBytes &&
         std::all_of(name.begin(), name.end(), [](unsigned char c) {
           return absl::ascii_isalnum(c) || c == '-' || c == '_' || c == '.' || c == '@';
         });
}

// What follows "SCHEME " in an Authorization header.
std::optional<std::string> Credentials(std::string_view header, std::string_view scheme) {
  if (header.size() <= scheme.size() || header[scheme.size()] != ' ') return std::nullopt;
  const std::string given(header.substr(0, scheme.size()));
  if (!absl::EqualsIgnoreCase(given, std::string(scheme))) return std::nullopt;
  std::string rest(header.substr(scheme.size()));
  absl::StripAsciiWhitespace(&rest);
  return rest;
}

std::string KeyOf(const HttpRequest& head) {
  const std::string_view authorization = head.Header("authorization");
  if (std::optional<std::string> key = Credentials(authorization, "Bearer")) return *key;
  if (const std::optional<std::string> basic = Credentials(authorization, "Basic")) {
    std::string decoded;
    if (!absl::Base64Unescape(*basic, &decoded)) return {};
    const size_t colon = decoded.find(':');
    return colon == std::string::npos ? std::string() : decoded.substr(colon + 1);
  }
  return std::string(head.Header("x-api-key"));
}

Response Refusal(std::string_view pattern) {
  // The same whatever was wrong: no key, or not one of ours.
  Response response = ErrorResponse(absl::UnauthenticatedError(
      "Unauthorized: this server wants an API key, as 'Authorization: Bearer KEY'"));
  // A browser asks for it.
  response.headers.emplace_back("WWW-Authenticate",
                                pattern == "/" ? "Basic realm=\"fathom\"" : "Bearer");
  return response;
}

}  // namespace

ApiKeys::Hash ApiKeys::HashOf(std::string_view key) {
  Hash hash;
  SHA256(reinterpret_cast<const uint8_t*>(key.data()), key.size(), hash.data());
  return hash;
}

absl::Status ApiKeys::ParseFile(std::string_view text, std::vector<Entry>& entries) const {
  int number = 0;
  for (const absl::string_view line : absl::StrSplit(std::string(text), '\n')) {
    ++number;
    const absl::string_view trimmed = absl::StripAsciiWhitespace(line);
    if (trimmed.empty() || trimmed.front() == '#') continue;
    const std::vector<std::string> words =
        absl::StrSplit(trimmed, absl::ByAnyChar(" \t"), absl::SkipEmpty());
    Entry entry;
    const bool is_hash = words[0].size() == 2 * entry.hash.size() &&
                         std::all_of(words[0].begin(), words[0].end(),
                                     [](unsigned char c) { return absl::ascii_isxdigit(c); });
    if (!is_hash || words.size() != 2 || !IsName(words[1])) {
      // Never the line itself: somebody may have written a key into it.
      return absl::InvalidArgumentError(absl::StrCat(
          "line ", number, " of --api-key-file ", options_.file,
          ": expected the SHA-256 of a key in 64 hexadecimal digits, and a name of up to ",
          kMaxNameBytes, " letters, digits and '-_.@'"));
    }
    const std::string bytes = absl::HexStringToBytes(words[0]);
    std::copy(bytes.begin(), bytes.end(), entry.hash.begin());
    entry.name = words[1];
    entries.push_back(std::move(entry));
  }
  if (entries.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--api-key-file ", options_.file, " has no key: nobody could ask"));
  }
  return absl::OkStatus();
}

absl::Status ApiKeys::Load() {
  std::vector<Entry> entries;
  if (!options_.file.empty()) {
    errno = 0;
    std::ifstream file(options_.file);
    std::ostringstream text;
    if (file) text << file.rdbuf();
    if (!file) {
      return absl::InvalidArgumentError(
          absl::StrCat("cannot read --api-key-file ", options_.file, ": ", std::strerror(errno)));
    }
    RETURN_IF_ERROR(ParseFile(text.str(), entries));
  }
  for (size_t i = 0; i < options_.keys.size(); ++i) {
    entries.push_back({HashOf(options_.keys[i]), absl::StrCat("key-", i + 1)});
  }
  entries_ = std::move(entries);
  return absl::OkStatus();
}

const ApiKeys::Entry* ApiKeys::Find(std::string_view key) const {
  const Hash hash = HashOf(key);
  const Entry* found = nullptr;
  for (const Entry& entry : entries_) {
    if (CRYPTO_memcmp(entry.hash.data(), hash.data(), hash.size()) == 0) found = &entry;
  }
  return found;
}

AccessGuard::Verdict ApiKeys::Check(const HttpRequest& head, std::string_view pattern) {
  if (!enabled() || IsProbe(pattern)) return {};
  if (const Entry* holder = Find(KeyOf(head))) return {.refusal = {}, .caller = holder->name};
  return {.refusal = Refusal(pattern), .caller = ""};
}

}  // namespace fathom
