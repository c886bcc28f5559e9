#include "deploy/launcher/service_notifier.h"

#include <sys/socket.h>
#include <sys/un.h>

#include <cstddef>

#include "deploy/launcher/child_process.h"

namespace fathom {

void ServiceNotifier::Notify(absl::string_view state) const {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (socket_path_.empty() || socket_path_.size() >= sizeof(address.sun_path)) return;
  socket_path_.copy(address.sun_path, socket_path_.size());
  if (address.sun_path[0] == '@') address.sun_path[0] = '\0';
  const UniqueFd socket_fd(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  const socklen_t size = offsetof(sockaddr_un, sun_path) + socket_path_.size();
  (void)sendto(socket_fd.get(), state.data(), state.size(), MSG_NOSIGNAL,
               reinterpret_cast<const sockaddr*>(&address), size);
}

}  // namespace fathom
