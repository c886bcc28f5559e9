// The launcher's standard error: lines of all processes, each with its process's name before it.
//
//   worker 3    | I 14:02:03.123 read 1.2 GB in 4.1 s
//
// On a terminal the names are coloured, and a line that tells progress is drawn over the one
// before.
#pragma once

#include <string>

#include "absl/strings/string_view.h"

namespace fathom {

// Whether a line of a process tells progress: it has a percentage behind "loading".
bool TellsProgress(absl::string_view line);

// A line of a process's log without its "E 14:02:03.123 ", if it has one.
absl::string_view WithoutLogPrefix(absl::string_view line);

// Not thread-safe.
class LogOutput {
 public:
  struct Options {
    int fd = 2;
    bool is_terminal = false;
    bool use_colours = false;
    int name_width = 11;  // names are padded to it: "coordinator"
    int columns = 100;    // of the terminal; progress is cut to it
  };

  explicit LogOutput(Options options) : options_(options) {}
  ~LogOutput();

  // One line, without its end. Control characters are shown as '?': a log cannot steer a terminal.
  void Line(absl::string_view process, absl::string_view text);

  // A line of the launcher itself.
  void Own(absl::string_view text) { Line("fathom", text); }

  // One line of a process, which may tell progress.
  void FromChild(absl::string_view process, absl::string_view text);

 private:
  std::string Prefixed(absl::string_view process, absl::string_view text) const;
  void Write(absl::string_view bytes);

  const Options options_;
  bool progress_is_shown_ = false;  // the cursor stands behind a line without an end
};

// Cuts a stream of bytes into lines. Lines beyond 64 KiB are cut.
class LineSplitter {
 public:
  // Calls on_line for each line that `bytes` completes.
  template <typename OnLine>
  void Add(absl::string_view bytes, const OnLine& on_line) {
    for (const char c : bytes) {
      const bool full = pending_.size() >= kMaxLineBytes;
      if (c != '\n') pending_.push_back(c);
      if (c != '\n' && !full) continue;
      on_line(absl::string_view(pending_));
      pending_.clear();
    }
  }
  // The last line, when the stream ended without ending it.
  template <typename OnLine>
  void Finish(const OnLine& on_line) {
    if (!pending_.empty()) on_line(absl::string_view(pending_));
    pending_.clear();
  }

 private:
  static constexpr size_t kMaxLineBytes = 64 << 10;
  std::string pending_;
};

}  // namespace fathom
