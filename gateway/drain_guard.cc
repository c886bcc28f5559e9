#include "gateway/drain_guard.h"

#include <algorithm>
#include <array>

#include "gateway/openai/errors.h"

namespace fathom {
namespace {

bool IsAboutServer(std::string_view pattern) {
  constexpr std::array<std::string_view, 5> kPatterns = {"/live", "/metrics", "/load", "/version",
                                                         "/"};
  return std::find(kPatterns.begin(), kPatterns.end(), pattern) != kPatterns.end();
}

}  // namespace

AccessGuard::Verdict DrainGuard::Check(const HttpRequest& head, std::string_view pattern) {
  Verdict verdict = guard_.Check(head, pattern);
  if (is_draining_ && !verdict.refusal && !IsAboutServer(pattern)) {
    verdict.refusal = HttpErrorResponse(
        503, "draining: this server is shutting down and takes no new requests; try again");
  }
  return verdict;
}

}  // namespace fathom
