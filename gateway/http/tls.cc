#include "gateway/http/tls.h"

#include <openssl/err.h>
#include <openssl/ssl.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace fathom {
namespace {

template <auto Free>
struct Deleter {
  template <typename T>
  void operator()(T* object) const {
    Free(object);
  }
};
using SslPtr = std::unique_ptr<SSL, Deleter<SSL_free>>;
using SslContextPtr = std::unique_ptr<SSL_CTX, Deleter<SSL_CTX_free>>;

absl::Status Unusable(std::string_view what, const std::string& file) {
  char reason[256] = "unknown error";
  if (const unsigned long error = ERR_get_error(); error != 0) {  // NOLINT: OpenSSL's type
    ERR_error_string_n(error, reason, sizeof(reason));
  }
  ERR_clear_error();
  return absl::InvalidArgumentError(
      absl::StrCat(std::string(what), " '", file, "' cannot be used: ", reason));
}

// Of what the client offers, HTTP/1.1; who offers only others goes on without.
int SelectHttp11(SSL*, const unsigned char** chosen, unsigned char* chosen_size,
                 const unsigned char* offered, unsigned int offered_size, void*) {
  static constexpr unsigned char kHttp11[] = "\x08http/1.1";
  unsigned char* selected = nullptr;
  if (SSL_select_next_proto(&selected, chosen_size, kHttp11, sizeof(kHttp11) - 1, offered,
                            offered_size) != OPENSSL_NPN_NEGOTIATED) {
    return SSL_TLSEXT_ERR_NOACK;
  }
  *chosen = selected;
  return SSL_TLSEXT_ERR_OK;
}

class OpenSslSession : public TlsSession {
 public:
  explicit OpenSslSession(SslPtr ssl) : ssl_(std::move(ssl)) {}

  Result Handshake() override {
    ERR_clear_error();
    return ResultOf(SSL_accept(ssl_.get()));
  }

  Result Read(char* bytes, size_t capacity, size_t& size) override {
    ERR_clear_error();
    return ResultOf(SSL_read_ex(ssl_.get(), bytes, capacity, &size));
  }

  Result Write(std::string_view bytes, size_t& size) override {
    ERR_clear_error();
    return ResultOf(SSL_write_ex(ssl_.get(), bytes.data(), bytes.size(), &size));
  }

  void ShutdownSend() override {
    if (failed_) return;  // OpenSSL forbids it then
    ERR_clear_error();
    SSL_shutdown(ssl_.get());
  }

 private:
  Result ResultOf(int returned) {
    if (returned == 1) return Result::kDone;
    switch (SSL_get_error(ssl_.get(), returned)) {
      case SSL_ERROR_WANT_READ:
        return Result::kWantsRead;
      case SSL_ERROR_WANT_WRITE:
        return Result::kWantsWrite;
      case SSL_ERROR_ZERO_RETURN:
        return Result::kClosed;
      default:
        failed_ = true;
        return Result::kClosed;
    }
  }

  const SslPtr ssl_;
  bool failed_ = false;
};

class OpenSslContext : public TlsContext {
 public:
  explicit OpenSslContext(SslContextPtr context) : context_(std::move(context)) {}

  std::unique_ptr<TlsSession> Accept(int socket) const override {
    SslPtr ssl(SSL_new(context_.get()));
    CHECK(ssl != nullptr && SSL_set_fd(ssl.get(), socket) == 1);
    return std::make_unique<OpenSslSession>(std::move(ssl));
  }

 private:
  const SslContextPtr context_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<const TlsContext>> TlsContext::Load(const HttpsOptions& options) {
  SslContextPtr context(SSL_CTX_new(TLS_server_method()));
  CHECK(context != nullptr);
  SSL_CTX_set_min_proto_version(context.get(), TLS1_2_VERSION);
  SSL_CTX_set_options(context.get(), SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION |
                                         SSL_OP_CIPHER_SERVER_PREFERENCE |
                                         SSL_OP_IGNORE_UNEXPECTED_EOF);
  // A write may be continued from another buffer with the same bytes, and idle connections keep no
  // buffers.
  SSL_CTX_set_mode(context.get(), SSL_MODE_ENABLE_PARTIAL_WRITE |
                                      SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER |
                                      SSL_MODE_RELEASE_BUFFERS);
  SSL_CTX_set_alpn_select_cb(context.get(), SelectHttp11, nullptr);
  ERR_clear_error();
  const std::string& certificate = options.certificate_file;
  const std::string& key = options.private_key_file;
  if (SSL_CTX_use_certificate_chain_file(context.get(), certificate.c_str()) != 1) {
    return Unusable("the certificate", certificate);
  }
  if (SSL_CTX_use_PrivateKey_file(context.get(), key.c_str(), SSL_FILETYPE_PEM) != 1 ||
      SSL_CTX_check_private_key(context.get()) != 1) {
    return Unusable("the private key", key);
  }
  return std::make_shared<OpenSslContext>(std::move(context));
}

}  // namespace fathom
