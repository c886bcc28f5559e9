// Bytes of a connection to one HTTP/1.x request, strictly.
//
// Refused besides what is malformed: folded header lines, bare CR or LF, Content-Length twice or
// together with Transfer-Encoding, transfer codings other than chunked, versions other than 1.0
// and 1.1, a request for another host. The limits hold while bytes arrive, so a client cannot make
// the buffer grow beyond them. Not thread-safe; one per request.
// Source: RFC 9112; Boost.Beast does the grammar of the head.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "gateway/http/chunked_body.h"
#include "gateway/http/http_request.h"

namespace fathom {

struct RequestLimits {
  size_t head_bytes = 16 << 10;
  size_t fields = 100;
  size_t target_bytes = 2 << 10;
  size_t body_bytes = 8 << 20;
};

// Why a request is refused before any handler sees it. The connection closes afterwards: where
// the next request would begin is unknown.
struct RequestProblem {
  int status = 400;
  std::string message;
};

class RequestParser {
 public:
  explicit RequestParser(RequestLimits limits);
  ~RequestParser();
  RequestParser(const RequestParser&) = delete;
  RequestParser& operator=(const RequestParser&) = delete;

  // Takes what it can from the front of `bytes` and returns how many it took. Call again with the
  // rest followed by more bytes until done() or problem().
  size_t Parse(std::string_view bytes);

  bool head_done() const { return part_ != Part::kHead; }
  bool done() const { return part_ == Part::kNothing; }  // request() is whole
  const std::optional<RequestProblem>& problem() const { return problem_; }

  // The rest did not arrive in time.
  void RefuseAsTimedOut() { Refuse(408, "the request did not arrive in time"); }

  // Known once head_done().
  bool expects_continue() const { return expects_continue_; }
  bool keep_alive() const { return keep_alive_; }
  bool is_http_1_0() const { return is_http_1_0_; }

  // The request so far: its method and path may be known although it has a problem.
  HttpRequest& request() { return request_; }

 private:
  // What is to come.
  enum class Part { kHead, kBody, kChunkedBody, kNothing };
  struct Grammar;  // Beast's parser

  void Refuse(int status, std::string message);
  size_t ParseHead(std::string_view bytes);
  size_t ParseBody(std::string_view bytes);
  // Finds the end of the head, npos when it is not there yet; refuses what no head may contain.
  size_t ScanHead(std::string_view bytes);
  void CheckHead();
  void CheckFields();
  void CheckTarget();

  const RequestLimits limits_;
  const std::unique_ptr<Grammar> grammar_;
  Part part_ = Part::kHead;
  uint64_t content_length_ = 0;
  ChunkedBody chunked_body_;
  HttpRequest request_;
  std::optional<RequestProblem> problem_;
  size_t scanned_bytes_ = 0;         // of a head that is not complete yet
  bool skipped_empty_line_ = false;  // or there was none to skip
  bool expects_continue_ = false;
  bool keep_alive_ = false;
  bool is_http_1_0_ = false;
};

}  // namespace fathom
