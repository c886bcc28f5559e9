// A private directory for the sockets of one run.
#pragma once

#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "deploy/launcher/child_process.h"

namespace fathom {

// Mode 0700, removed with what is in it at the end. Movable.
//
// A launcher that is killed leaves its directory behind. The next one removes it: a directory made
// by Create holds a file `lock` that its owner keeps locked for life.
class RunDirectory {
 public:
  // A new directory under `parent`, or under /tmp when that one cannot be used or its name is so
  // long that `longest_name` bytes more would not fit a socket's address.
  static absl::StatusOr<RunDirectory> Create(const std::string& parent, size_t longest_name);

  // Whether Use would: InvalidArgument when its name is too long, it is another user's or open to
  // others, or it is not there and cannot be made. Leaves everything as it is.
  static absl::Status Check(const std::string& path, size_t longest_name);

  // This directory itself, made if need be. Errors as of Check.
  static absl::StatusOr<RunDirectory> Use(const std::string& path, size_t longest_name);

  RunDirectory(RunDirectory&& other) noexcept;
  RunDirectory& operator=(RunDirectory&&) = delete;
  ~RunDirectory();

  const std::string& path() const { return path_; }

 private:
  RunDirectory(std::string path, bool is_ours) : path_(std::move(path)), is_ours_(is_ours) {}

  absl::Status Lock();

  std::string path_;  // empty after a move
  bool is_ours_;      // made by us: removed at the end; else only what is in it
  UniqueFd lock_;
};

}  // namespace fathom
