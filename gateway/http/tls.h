// TLS, the server's side, over sockets that do not block: TLS 1.2 and 1.3, HTTP/1.1 by ALPN.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace fathom {

struct HttpsOptions {
  std::string certificate_file;  // PEM, the chain from the server's own on; empty: plain HTTP
  std::string private_key_file;  // PEM, of the certificate

  bool enabled() const { return !certificate_file.empty(); }
};

// One connection. Not thread-safe.
class TlsSession {
 public:
  // kWantsRead, kWantsWrite: call again, with the same arguments, when the socket can be read or
  // written.
  enum class Result { kDone, kWantsRead, kWantsWrite, kClosed };

  virtual ~TlsSession() = default;

  virtual Result Handshake() = 0;
  // kDone: `size` bytes, at least one. A buffer of 16 KiB takes all that is decrypted at a time.
  virtual Result Read(char* bytes, size_t capacity, size_t& size) = 0;
  // kDone: the first `size` bytes are on their way, at least one.
  virtual Result Write(std::string_view bytes, size_t& size) = 0;
  // Tells the peer that nothing follows.
  virtual void ShutdownSend() = 0;
};

// Certificate and key. Immutable, thread-safe.
class TlsContext {
 public:
  // InvalidArgument names the file that cannot be used, and why.
  static absl::StatusOr<std::shared_ptr<const TlsContext>> Load(const HttpsOptions& options);
  virtual ~TlsContext() = default;

  // For a connection that was accepted; `socket` must outlive the session.
  virtual std::unique_ptr<TlsSession> Accept(int socket) const = 0;
};

}  // namespace fathom
