// CHECK: for our own bugs (wrong shape, double free, impossible state), in all builds.
//
// What the world can cause (a client, a file, the network, the operator) is an absl::Status
// instead: a client must not be able to stop the server. Thread-safe.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>

namespace fathom {

[[noreturn]] inline void CheckFailed(const char* file, int line, const std::string& what) {
  std::fprintf(stderr, "%s:%d: CHECK failed: %s\n", file, line, what.c_str());
  std::abort();
}

// Collects what is streamed behind a failed CHECK and aborts when the statement ends.
class CheckFailure {
 public:
  CheckFailure(const char* file, int line, const char* condition) : file_(file), line_(line) {
    message_ << condition << ' ';
  }
  [[noreturn]] ~CheckFailure() { CheckFailed(file_, line_, message_.str()); }
  std::ostream& stream() { return message_; }

 private:
  const char* file_;
  int line_;
  std::ostringstream message_;
};

// Turns a streamed message into an expression of type void, so that CHECK can stand anywhere.
struct CheckSink {
  void operator&(std::ostream&) const {}
};

}  // namespace fathom

#define CHECK(condition)     \
  (condition)                \
      ? static_cast<void>(0) \
      : ::fathom::CheckSink() & ::fathom::CheckFailure(__FILE__, __LINE__, #condition).stream()
#define CHECK_EQ(a, b) CHECK((a) == (b)) << "(" << (a) << " vs " << (b) << ") "
#define CHECK_NE(a, b) CHECK((a) != (b)) << "(" << (a) << " vs " << (b) << ") "
#define CHECK_LT(a, b) CHECK((a) < (b)) << "(" << (a) << " vs " << (b) << ") "
#define CHECK_LE(a, b) CHECK((a) <= (b)) << "(" << (a) << " vs " << (b) << ") "
#define CHECK_GT(a, b) CHECK((a) > (b)) << "(" << (a) << " vs " << (b) << ") "
#define CHECK_GE(a, b) CHECK((a) >= (b)) << "(" << (a) << " vs " << (b) << ") "
