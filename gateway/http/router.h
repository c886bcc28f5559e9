// Which handler answers which path. Filled once, then only read.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "gateway/http/handler.h"

namespace fathom {

class Router {
 public:
  // A path that ends with "/", other than "/" itself, takes every path below it. One handler may
  // serve several routes; GET also answers HEAD (the connection leaves the body out).
  void Add(std::string method, std::string path, std::shared_ptr<Handler> handler);

  struct Match {
    Handler* handler = nullptr;   // null: no route
    std::string_view pattern;     // the path as it was added; "" when none matches
    std::string allowed_methods;  // for 405: not empty when only the method is wrong
  };
  Match Find(std::string_view method, std::string_view path) const;

 private:
  struct Route {
    std::string method;
    std::string path;
    std::shared_ptr<Handler> handler;
  };
  std::vector<Route> routes_;
};

}  // namespace fathom
