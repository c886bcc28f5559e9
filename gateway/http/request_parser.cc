#include "gateway/http/request_parser.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "boost/beast/core/string.hpp"
#include "boost/beast/http/empty_body.hpp"
#include "boost/beast/http/error.hpp"
#include "boost/beast/http/parser.hpp"

namespace fathom {
namespace {

namespace beast = boost::beast;
namespace http = boost::beast::http;

std::string_view View(beast::string_view text) { return {text.data(), text.size()}; }

int HexDigit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

// nullopt when an escape is malformed or stands for NUL.
std::optional<std::string> PercentDecode(std::string_view text) {
  std::string decoded;
  decoded.reserve(text.size());
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      decoded.push_back(text[i]);
      continue;
    }
    if (i + 2 >= text.size()) return std::nullopt;
    const int high = HexDigit(text[i + 1]);
    const int low = HexDigit(text[i + 2]);
    if (high < 0 || low < 0 || high + low == 0) return std::nullopt;
    decoded.push_back(static_cast<char>(high << 4 | low));
    i += 2;
  }
  return decoded;
}

}  // namespace

struct RequestParser::Grammar {
  http::request_parser<http::empty_body> parser;
};

RequestParser::RequestParser(RequestLimits limits)
    : limits_(limits), grammar_(std::make_unique<Grammar>()), chunked_body_(limits.body_bytes) {
  grammar_->parser.header_limit(static_cast<uint32_t>(limits.head_bytes));
  grammar_->parser.body_limit(std::numeric_limits<uint64_t>::max());  // CheckHead keeps ours
}

RequestParser::~RequestParser() = default;

void RequestParser::Refuse(int status, std::string message) {
  if (!problem_) problem_ = RequestProblem{status, std::move(message)};
}

size_t RequestParser::Parse(std::string_view bytes) {
  CHECK(!problem_ && !done());
  size_t taken = 0;
  if (part_ == Part::kHead) {
    taken = ParseHead(bytes);
    if (problem_ || part_ == Part::kHead) return taken;
  }
  return taken + ParseBody(bytes.substr(taken));
}

size_t RequestParser::ScanHead(std::string_view bytes) {
  // Another protocol, TLS for one, may never send the end of a line.
  if (!bytes.empty() && !absl::ascii_isalpha(bytes[0])) {
    Refuse(400, "the request does not begin with a method");
    return std::string_view::npos;
  }
  for (size_t i = scanned_bytes_; i < bytes.size(); ++i) {
    if (i >= limits_.head_bytes) {
      if (bytes.substr(0, i).find('\n') == std::string_view::npos) {
        Refuse(414, absl::StrCat("the request line is longer than ", limits_.head_bytes, " bytes"));
      } else {
        Refuse(431,
               absl::StrCat("the request's head is longer than ", limits_.head_bytes, " bytes"));
      }
      return std::string_view::npos;
    }
    if (bytes[i] == '\n' && (i == 0 || bytes[i - 1] != '\r')) {
      Refuse(400, "a line of the request's head ends with a bare LF, expected CR LF");
      return std::string_view::npos;
    }
    if (i > 0 && bytes[i - 1] == '\r' && bytes[i] != '\n') {
      Refuse(400, "the request's head has a bare CR");
      return std::string_view::npos;
    }
    if (i > 0 && bytes[i - 1] == '\n' && (bytes[i] == ' ' || bytes[i] == '\t')) {
      Refuse(400, "the request's head has a folded line");
      return std::string_view::npos;
    }
    if (bytes[i] == '\n' && i >= 3 && bytes[i - 2] == '\n') return i + 1;
  }
  scanned_bytes_ = bytes.size();
  return std::string_view::npos;
}

size_t RequestParser::ParseHead(std::string_view bytes) {
  size_t skipped = 0;  // an empty line before the request is forgiven (RFC 9112 §2.2)
  if (scanned_bytes_ == 0 && !skipped_empty_line_) {
    if (bytes == "\r") return 0;
    if (bytes.starts_with("\r\n")) skipped = 2;
    skipped_empty_line_ = true;
  }
  bytes.remove_prefix(skipped);
  const size_t head_bytes = ScanHead(bytes);
  if (head_bytes == std::string_view::npos) return skipped;

  beast::error_code error;
  grammar_->parser.put(boost::asio::const_buffer(bytes.data(), head_bytes), error);
  if (error == http::error::bad_version) {
    Refuse(505, "expected HTTP/1.1 or HTTP/1.0");
  } else if (error && error != http::error::need_more) {
    Refuse(400, absl::StrCat("the request's head is malformed: ", error.message()));
  } else if (!grammar_->parser.is_header_done()) {
    // The empty line is not where the grammar would have it.
    Refuse(400, "the request's head is malformed");
  } else {
    CheckHead();
  }
  return skipped + head_bytes;
}

size_t RequestParser::ParseBody(std::string_view bytes) {
  size_t taken = 0;
  if (part_ == Part::kBody) {
    taken = std::min<uint64_t>(content_length_ - request_.body.size(), bytes.size());
    request_.body.append(bytes.substr(0, taken));
    if (request_.body.size() == content_length_) part_ = Part::kNothing;
  } else if (part_ == Part::kChunkedBody) {
    taken = chunked_body_.Parse(bytes, request_.body);
    switch (chunked_body_.state()) {
      case ChunkedBody::State::kNeedsMore:
        break;
      case ChunkedBody::State::kDone:
        part_ = Part::kNothing;
        break;
      case ChunkedBody::State::kMalformed:
        Refuse(400, "the request's chunked body is malformed");
        break;
      case ChunkedBody::State::kTooLarge:
        Refuse(413,
               absl::StrCat("the request's body is larger than ", limits_.body_bytes, " bytes"));
        break;
    }
  }
  return taken;
}

void RequestParser::CheckHead() {
  const auto& message = grammar_->parser.get();
  request_.method = std::string(View(message.method_string()));
  for (const auto& field : message) {
    std::string name(View(field.name_string()));
    absl::AsciiStrToLower(&name);
    request_.headers.emplace_back(std::move(name), View(field.value()));
  }
  is_http_1_0_ = message.version() == 10;
  keep_alive_ = grammar_->parser.keep_alive();
  if (message.version() != 10 && message.version() != 11) {
    return Refuse(505, "expected HTTP/1.1 or HTTP/1.0");
  }
  CheckTarget();
  CheckFields();
  if (problem_) return;
  if (grammar_->parser.chunked()) {
    part_ = Part::kChunkedBody;
  } else {
    content_length_ = grammar_->parser.content_length().value_or(0);
    part_ = content_length_ > 0 ? Part::kBody : Part::kNothing;
  }
  if (content_length_ > limits_.body_bytes) {
    Refuse(413, absl::StrCat("the request's body is larger than ", limits_.body_bytes, " bytes"));
  }
}

void RequestParser::CheckFields() {
  if (request_.headers.size() > limits_.fields) {
    return Refuse(431, absl::StrCat("the request has ", request_.headers.size(),
                                    " header fields, limit ", limits_.fields));
  }
  int lengths = 0, codings = 0, hosts = 0;
  for (const auto& [name, value] : request_.headers) {
    if (name == "content-length") {
      ++lengths;
      if (value.find_first_not_of("0123456789") != std::string::npos) {
        return Refuse(400, "Content-Length: expected one number");
      }
    }
    if (name == "host") ++hosts;
    if (name == "transfer-encoding") {
      ++codings;
      if (!absl::EqualsIgnoreCase(value, "chunked")) {
        return Refuse(501, "Transfer-Encoding: expected chunked and nothing else");
      }
    }
    if (name == "expect") {
      if (!absl::EqualsIgnoreCase(value, "100-continue")) {
        return Refuse(417, "Expect: only 100-continue is understood");
      }
      expects_continue_ = !is_http_1_0_;
    }
  }
  if (lengths > 1) return Refuse(400, "Content-Length is given twice");
  if (codings > 1) return Refuse(400, "Transfer-Encoding is given twice");
  if (lengths + codings > 1) {
    return Refuse(400, "both Content-Length and Transfer-Encoding are given");
  }
  if (codings > 0 && is_http_1_0_) return Refuse(400, "HTTP/1.0 has no Transfer-Encoding");
  if (hosts > 1) return Refuse(400, "Host is given twice");
  if (hosts == 0 && !is_http_1_0_) return Refuse(400, "the Host header is missing");
}

void RequestParser::CheckTarget() {
  const beast::string_view sent_target = grammar_->parser.get().target();
  std::string_view target = View(sent_target);
  if (target.size() > limits_.target_bytes) {
    return Refuse(414, absl::StrCat("the request's target has ", target.size(), " bytes, limit ",
                                    limits_.target_bytes));
  }
  constexpr std::string_view kScheme = "http://";
  if (beast::iequals(sent_target.substr(0, kScheme.size()),
                     "http://")) {  // absolute form: only for this host
    target.remove_prefix(kScheme.size());
    const size_t slash = target.find('/');
    const std::string_view authority = target.substr(0, slash);
    target = slash == std::string_view::npos ? "/" : target.substr(slash);
    if (authority != request_.Header("host")) {
      return Refuse(400, "the request's target names another host than its Host header");
    }
  }
  const size_t question = target.find('?');
  if (question != std::string_view::npos) request_.query = std::string(target.substr(question + 1));
  std::optional<std::string> path = PercentDecode(target.substr(0, question));
  if (!path || path->empty() || path->front() != '/') {
    request_.path = std::string(target);
    if (target == "*" && request_.method == "OPTIONS") return;  // no route has it
    return Refuse(400, "the request's target is malformed, expected a path");
  }
  request_.path = *std::move(path);
}

}  // namespace fathom
