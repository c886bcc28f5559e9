#include "deploy/launcher/run_directory.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace fathom {
namespace {

constexpr size_t kMaxSocketPath = 107;  // sockaddr_un
constexpr char kPrefix[] = "fathom-";
constexpr char kTemplate[] = "/fathom-XXXXXX";
constexpr char kLockFile[] = "/lock";

// A directory whose owner once locked it and no longer does. (One that was just made has no lock
// yet, or an empty one.)
bool IsAbandoned(const std::string& path) {
  const UniqueFd lock(open((path + kLockFile).c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
  struct stat info = {};
  return lock.get() >= 0 && fstat(lock.get(), &info) == 0 && info.st_uid == geteuid() &&
         info.st_size > 0 && flock(lock.get(), LOCK_EX | LOCK_NB) == 0;
}

void RemoveAbandoned(const std::string& parent) {
  std::error_code error;
  std::filesystem::directory_iterator entry(parent, error);
  for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    if (!absl::StartsWith(name, kPrefix) || name.size() != sizeof(kTemplate) - 2) continue;
    std::error_code ignored;
    if (IsAbandoned(entry->path())) std::filesystem::remove_all(entry->path(), ignored);
  }
}

}  // namespace

absl::StatusOr<RunDirectory> RunDirectory::Create(const std::string& parent, size_t longest_name) {
  std::string path;
  for (const std::string& place : {parent, std::string("/tmp")}) {
    if (place.empty()) continue;
    path = place + kTemplate;
    if (path.size() + longest_name > kMaxSocketPath) continue;
    RemoveAbandoned(place);
    if (mkdtemp(path.data()) == nullptr) continue;
    RunDirectory directory(path, /*is_ours=*/true);
    RETURN_IF_ERROR(directory.Lock());
    return directory;
  }
  return absl::FailedPreconditionError(
      absl::StrCat("cannot make ", path, ": ", std::strerror(errno), "; give --run-directory"));
}

absl::Status RunDirectory::Check(const std::string& path, size_t longest_name) {
  const auto wrong = [&path](const auto&... what) {
    return absl::InvalidArgumentError(absl::StrCat("--run-directory ", path, what...));
  };
  if (path.size() + longest_name > kMaxSocketPath) {
    return wrong(" is too long for a socket's address: expected at most ",
                 kMaxSocketPath - longest_name, " bytes");
  }
  struct stat info = {};
  if (stat(path.c_str(), &info) != 0) {
    const std::string parent = std::filesystem::absolute(path).parent_path().string();
    const bool can_make = errno == ENOENT && access(parent.c_str(), W_OK | X_OK) == 0;
    return can_make ? absl::OkStatus() : wrong(" cannot be made: ", std::strerror(errno));
  }
  if (!S_ISDIR(info.st_mode)) return wrong(" is no directory");
  if (info.st_uid != geteuid() || (info.st_mode & 0077) != 0) {
    return wrong(" is open to others: expected our own, with mode 0700");
  }
  return absl::OkStatus();
}

absl::StatusOr<RunDirectory> RunDirectory::Use(const std::string& path, size_t longest_name) {
  RETURN_IF_ERROR(Check(path, longest_name));
  const bool made = mkdir(path.c_str(), 0700) == 0;
  RETURN_IF_ERROR(Check(path, longest_name));  // it may have been another's in the meantime
  return RunDirectory(path, made);
}

absl::Status RunDirectory::Lock() {
  lock_ = UniqueFd(open((path_ + kLockFile).c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  // Locked before it is filled: who sees it filled and unlocked knows that its owner is gone.
  if (lock_.get() < 0 || flock(lock_.get(), LOCK_EX | LOCK_NB) != 0 ||
      write(lock_.get(), "fathom\n", 7) != 7) {
    return absl::ErrnoToStatus(errno, absl::StrCat("cannot lock ", path_));
  }
  return absl::OkStatus();
}

RunDirectory::RunDirectory(RunDirectory&& other) noexcept
    : path_(std::exchange(other.path_, "")),
      is_ours_(other.is_ours_),
      lock_(std::move(other.lock_)) {}

RunDirectory::~RunDirectory() {
  if (path_.empty()) return;
  std::error_code ignored;
  if (is_ours_) {
    std::filesystem::remove_all(path_, ignored);
    return;
  }
  std::filesystem::directory_iterator entry(path_, ignored);
  for (; !ignored && entry != std::filesystem::directory_iterator(); entry.increment(ignored)) {
    std::error_code failed;
    if (entry->path().extension() == ".sock") std::filesystem::remove(entry->path(), failed);
  }
}

}  // namespace fathom
