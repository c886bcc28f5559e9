// What a request is called, in logs and in the X-Request-Id of its response.
#pragma once

#include <string>
#include <string_view>

namespace fathom {

// 128 random bits.
std::string RandomHex();

// `sent`, the client's own X-Request-Id, if it is up to 64 letters, digits, '-', '_' and '.'; else
// random. It is a label only: two requests may have the same.
std::string RequestIdOf(std::string_view sent);

// The trace id of a W3C `traceparent` header, 32 hexadecimal digits; "" when there is none that is
// well formed. Source: W3C Trace Context, §3.2.
std::string_view TraceIdOf(std::string_view traceparent);

}  // namespace fathom
