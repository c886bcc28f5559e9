#include "gateway/http/router.h"

#include <utility>

namespace fathom {
namespace {

bool PathMatches(std::string_view pattern, std::string_view path) {
  if (pattern.size() > 1 && pattern.ends_with("/")) {
    return path.size() > pattern.size() && path.starts_with(pattern);
  }
  return pattern == path;
}

}  // namespace

void Router::Add(std::string method, std::string path, std::shared_ptr<Handler> handler) {
  routes_.push_back({std::move(method), std::move(path), std::move(handler)});
}

Router::Match Router::Find(std::string_view method, std::string_view path) const {
  Match match;
  for (const Route& route : routes_) {
    if (!PathMatches(route.path, path)) continue;
    match.pattern = route.path;
    if (route.method == method || (route.method == "GET" && method == "HEAD")) {
      match.handler = route.handler.get();
      match.allowed_methods.clear();
      return match;
    }
    if (!match.allowed_methods.empty()) match.allowed_methods += ", ";
    match.allowed_methods += route.method == "GET" ? "GET, HEAD" : route.method;
  }
  return match;
}

}  // namespace fathom
