#include "deploy/launcher/run_directory.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace fathom {
namespace {

constexpr size_t kMaxSocketPath = 107;  // sockaddr_un
constexpr char kTemplate[] = "/fathom-XXXXXX";

}  // namespace

absl::StatusOr<RunDirectory> RunDirectory::Create(const std::string& parent, size_t longest_name) {
  std::string path;
  for (const std::string& place : {parent, std::string("/tmp")}) {
    if (place.empty()) continue;
    path = place + kTemplate;
    if (path.size() + longest_name > kMaxSocketPath) continue;
    if (mkdtemp(path.data()) != nullptr) return RunDirectory(path, /*is_ours=*/true);
  }
  return absl::FailedPreconditionError(
      absl::StrCat("cannot make ", path, ": ", std::strerror(errno), "; give --run-directory"));
}

absl::StatusOr<RunDirectory> RunDirectory::Use(const std::string& path, size_t longest_name) {
  if (path.size() + longest_name > kMaxSocketPath) {
    return absl::InvalidArgumentError(
        absl::StrCat("--run-directory ", path, " is too long for a socket's address: expected at ",
                     "most ", kMaxSocketPath - longest_name, " bytes"));
  }
  const bool made = mkdir(path.c_str(), 0700) == 0;
  struct stat info = {};
  if (stat(path.c_str(), &info) != 0 || !S_ISDIR(info.st_mode)) {
    return absl::InvalidArgumentError(absl::StrCat("--run-directory ", path, " is no directory"));
  }
  if (info.st_uid != geteuid() || (info.st_mode & 0077) != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--run-directory ", path, " is open to others: expected our own, with mode 0700"));
  }
  return RunDirectory(path, made);
}

RunDirectory::RunDirectory(RunDirectory&& other) noexcept
    : path_(std::exchange(other.path_, "")), is_ours_(other.is_ours_) {}

RunDirectory::~RunDirectory() {
  if (path_.empty()) return;
  std::error_code ignored;
  if (is_ours_) {
    std::filesystem::remove_all(path_, ignored);
    return;
  }
  for (const auto& entry : std::filesystem::directory_iterator(path_, ignored)) {
    if (entry.path().extension() == ".sock") std::filesystem::remove(entry.path(), ignored);
  }
}

}  // namespace fathom
