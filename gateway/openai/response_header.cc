#include "gateway/openai/response_header.h"

#include <algorithm>
#include <ctime>
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

}  // namespace

std::string RandomHex() {
  thread_local std::mt19937_64 generator = [] {
    std::random_device device;
    std::seed_seq seed{device(), device(), device(), device(), device(), device()};
    return std::mt19937_64(seed);
  }();
  return absl::StrFormat("%016x%016x", generator(), generator());
}

ResponseHeader MakeResponseHeader(std::string_view id_prefix, const HttpRequest& request,
                                  const std::string& model) {
  ResponseHeader header;
  const std::string_view label = request.Header("x-request-id");
  header.id = std::string(id_prefix) + (IsLabel(label) ? std::string(label) : RandomHex());
  header.created = std::time(nullptr);
  header.model = model;
  return header;
}

}  // namespace fathom
