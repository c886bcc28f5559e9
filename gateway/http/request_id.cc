#include "gateway/http/request_id.h"

#include <algorithm>
#include <cstdint>
#include <random>

#include "absl/strings/ascii.h"
#include "absl/strings/str_format.h"

namespace fathom {
namespace {

constexpr size_t kMaxLabelBytes = 64;

bool IsLabel(std::string_view text) {
  return !text.empty() && text.size() <= kMaxLabelBytes &&
         std::all_of(text.begin(), text.end(), [](unsigned char c) {
           return absl::ascii_isalnum(c) || c == '-' || c == '_' || c == '.';
         });
}

bool IsLowerHex(std::string_view text) {
  return text.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

}  // namespace

std::string RandomHex() {
  thread_local std::mt19937_64 generator = [] {
    std::random_device device;
    std::seed_seq seed{device(), device(), device(), device(), device(), device()};
    return std::mt19937_64(seed);
  }();
  return absl::StrFormat("%016x%016x", generator(), generator());
}

std::string RequestIdOf(std::string_view sent) {
  return IsLabel(sent) ? std::string(sent) : RandomHex();
}

std::string_view TraceIdOf(std::string_view traceparent) {
  // version "-" trace id "-" parent id "-" flags; later versions may have more after a "-".
  constexpr size_t kBytes = 2 + 1 + 32 + 1 + 16 + 1 + 2;
  if (traceparent.size() < kBytes) return {};
  const std::string_view version = traceparent.substr(0, 2), trace = traceparent.substr(3, 32),
                         parent = traceparent.substr(36, 16), flags = traceparent.substr(53, 2);
  for (const size_t dash : {2, 35, 52}) {
    if (traceparent[dash] != '-') return {};
  }
  for (const std::string_view part : {version, trace, parent, flags}) {
    if (!IsLowerHex(part)) return {};
  }
  const bool has_more = traceparent.size() > kBytes;
  if (version == "ff" || (has_more && (version == "00" || traceparent[kBytes] != '-'))) return {};
  constexpr std::string_view kZero = "0";
  if (trace.find_first_not_of(kZero) == std::string_view::npos) return {};
  if (parent.find_first_not_of(kZero) == std::string_view::npos) return {};
  return trace;
}

}  // namespace fathom
