#include "worker/shared_segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace fathom {
namespace {

constexpr char kFolder[] = "/dev/shm";  // where shm_open keeps its names
constexpr char kPrefix[] = "fathom-";
constexpr int kCreatorLock = 1 << 30;  // beyond any rank
// A segment without a creator's lock may be one that is just being created; not after this time.
constexpr absl::Duration kAbandonedAfter = absl::Seconds(10);

std::string RandomToken() {
  std::array<char, 16> bytes;
  CHECK_EQ(getrandom(bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
  return absl::BytesToHexString(absl::string_view(bytes.data(), bytes.size()));
}

absl::Status NoRoom(int64_t num_bytes) {
  struct statvfs space = {};
  const bool known = statvfs(kFolder, &space) == 0;
  return absl::ResourceExhaustedError(absl::StrCat(
      "the ranks need ", num_bytes, " bytes of shared memory in /dev/shm, which has ",
      known ? absl::StrCat(static_cast<uint64_t>(space.f_bavail) * space.f_frsize)
            : "an unknown number",
      " bytes free: make it larger (a container's --shm-size, an emptyDir of medium Memory)"));
}

struct flock LockOf(int byte) {
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = byte;
  lock.l_len = 1;
  return lock;
}

bool IsLockedElsewhere(int descriptor, int byte) {
  struct flock lock = LockOf(byte);
  const int result = fcntl(descriptor, F_OFD_GETLK, &lock);
  return result != 0 || lock.l_type != F_UNLCK;  // in doubt it is
}

}  // namespace

absl::StatusOr<std::unique_ptr<SharedSegment>> SharedSegment::Create(const std::string& label,
                                                                     int64_t num_bytes) {
  RemoveAbandoned(absl::Now());
  const std::string name = absl::StrCat("/", kPrefix, label, "-", RandomToken());
  const int descriptor = shm_open(name.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
  if (descriptor < 0) return absl::ErrnoToStatus(errno, absl::StrCat("cannot create '", name, "'"));
  auto segment = std::unique_ptr<SharedSegment>(new SharedSegment(name, descriptor, num_bytes));
  segment->owns_name_ = true;
  struct flock lock = LockOf(kCreatorLock);
  fcntl(descriptor, F_OFD_SETLK, &lock);
  int error;
  do {
    error = posix_fallocate(descriptor, 0, num_bytes);
  } while (error == EINTR);
  if (error == ENOSPC || error == EFBIG) return NoRoom(num_bytes);
  if (error != 0) return absl::ErrnoToStatus(error, absl::StrCat("cannot size '", name, "'"));
  RETURN_IF_ERROR(segment->Map());
  return segment;
}

absl::StatusOr<std::unique_ptr<SharedSegment>> SharedSegment::Open(const std::string& name,
                                                                   int64_t num_bytes) {
  const int descriptor = shm_open(name.c_str(), O_RDWR | O_CLOEXEC, 0);
  if (descriptor < 0) {
    return absl::ErrnoToStatus(
        errno, absl::StrCat("cannot open the shared memory '", name,
                            "' of rank 0 (on another host or with another /dev/shm, collectives "
                            "must be gloo)"));
  }
  auto segment = std::unique_ptr<SharedSegment>(new SharedSegment(name, descriptor, num_bytes));
  struct stat file = {};
  if (fstat(descriptor, &file) != 0) return absl::ErrnoToStatus(errno, name);
  if (file.st_size != num_bytes) {
    return absl::FailedPreconditionError(
        absl::StrCat("'", name, "' has ", file.st_size, " bytes, expected ", num_bytes));
  }
  RETURN_IF_ERROR(segment->Map());
  return segment;
}

SharedSegment::~SharedSegment() {
  RemoveName();
  if (data_ != nullptr) munmap(data_, num_bytes_);
  close(descriptor_);
}

absl::Status SharedSegment::Map() {
  void* data = mmap(nullptr, num_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor_, 0);
  if (data == MAP_FAILED) {
    return absl::ErrnoToStatus(errno,
                               absl::StrCat("cannot map ", num_bytes_, " bytes of '", name_, "'"));
  }
  data_ = static_cast<char*>(data);
  return absl::OkStatus();
}

void SharedSegment::RemoveName() {
  if (!owns_name_) return;
  shm_unlink(name_.c_str());
  owns_name_ = false;
}

absl::Status SharedSegment::ClaimRank(int rank) {
  struct flock lock = LockOf(rank);
  if (fcntl(descriptor_, F_OFD_SETLK, &lock) == 0) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("rank ", rank, " is taken by another worker"));
}

bool SharedSegment::IsClaimedElsewhere(int rank) const {
  return IsLockedElsewhere(descriptor_, rank);
}

void SharedSegment::RemoveAbandoned(absl::Time now) {
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(kFolder, error)) {
    const std::string name = entry.path().filename().string();
    if (!absl::StartsWith(name, kPrefix)) continue;
    const int descriptor = open(entry.path().c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (descriptor < 0) continue;  // another user's, or gone
    struct stat file = {};
    if (fstat(descriptor, &file) == 0 && now - absl::FromTimeT(file.st_ctime) > kAbandonedAfter &&
        !IsLockedElsewhere(descriptor, kCreatorLock)) {
      shm_unlink(name.c_str());
    }
    close(descriptor);
  }
}

}  // namespace fathom
