// Tells systemd how we are (sd_notify): one datagram per message.
#pragma once

#include <string>

#include "absl/strings/string_view.h"

namespace fathom {

// Not thread-safe.
class ServiceNotifier {
 public:
  // `socket_path` is the value of NOTIFY_SOCKET: a path, or an abstract name behind '@'. Empty:
  // nobody wants to know.
  explicit ServiceNotifier(std::string socket_path) : socket_path_(std::move(socket_path)) {}

  // E.g. "READY=1\nSTATUS=Serving". What cannot be delivered is dropped.
  void Notify(absl::string_view state) const;

 private:
  const std::string socket_path_;
};

}  // namespace fathom
