// Who may ask for what while the server drains: only how it is.
//
//   /live                                         200: it must not be killed yet
//   /metrics, /load, /version, / (status page)    as always
//   /health, /ready, /ping, and all else          503 with Retry-After; the connection closes
//
// Before, another guard alone decides; it is asked first while draining too. I/O thread only.
#pragma once

#include <string_view>

#include "gateway/http/access_guard.h"

namespace fathom {

class DrainGuard : public AccessGuard {
 public:
  // `guard` must outlive this.
  explicit DrainGuard(AccessGuard& guard) : guard_(guard) {}

  void BeginDraining() { is_draining_ = true; }

  Verdict Check(const HttpRequest& head, std::string_view pattern) override;

 private:
  AccessGuard& guard_;
  bool is_draining_ = false;
};

}  // namespace fathom
