#include "deploy/launcher/run_directory.h"

#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <utility>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace fathom {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

mode_t ModeOf(const std::string& path) {
  struct stat info = {};
  stat(path.c_str(), &info);
  return info.st_mode & 0777;
}

TEST(RunDirectoryTest, IsPrivateAndGoesWithItsOwner) {
  std::string path;
  {
    absl::StatusOr<RunDirectory> made = RunDirectory::Create(::testing::TempDir(), 20);
    ASSERT_TRUE(made.ok()) << made.status();
    const RunDirectory directory = *std::move(made);
    path = directory.path();
    EXPECT_EQ(ModeOf(path), 0700);
    std::ofstream(path + "/worker-0.sock") << "x";
  }
  EXPECT_FALSE(std::filesystem::exists(path));
}

TEST(RunDirectoryTest, ClearsAwayWhatAKilledLauncherLeft) {
  const std::string parent = ::testing::TempDir() + "/fathom_parent";
  std::filesystem::remove_all(parent);
  std::filesystem::create_directories(parent);
  const std::string abandoned = parent + "/fathom-aaaaaa";
  const std::string unfinished = parent + "/fathom-bbbbbb";  // about to be locked
  const std::string foreign = parent + "/fathom-notours";
  for (const std::string& path : {abandoned, unfinished, foreign}) {
    std::filesystem::create_directory(path);
  }
  std::ofstream(abandoned + "/lock") << "fathom\n";
  std::ofstream(abandoned + "/worker-0.sock") << "x";
  std::ofstream(unfinished + "/lock");
  const absl::StatusOr<RunDirectory> living = RunDirectory::Create(parent, 5);
  const absl::StatusOr<RunDirectory> another = RunDirectory::Create(parent, 5);
  ASSERT_TRUE(living.ok() && another.ok());
  EXPECT_FALSE(std::filesystem::exists(abandoned));
  EXPECT_TRUE(std::filesystem::exists(unfinished));
  EXPECT_TRUE(std::filesystem::exists(foreign));
  EXPECT_TRUE(std::filesystem::exists(living->path()));
}

TEST(RunDirectoryTest, FallsBackWhenTheParentCannotBeUsed) {
  const absl::StatusOr<RunDirectory> missing = RunDirectory::Create("/nowhere", 20);
  ASSERT_TRUE(missing.ok());
  EXPECT_THAT(missing->path(), StartsWith("/tmp/fathom-"));
  const std::string deep = ::testing::TempDir() + "/" + std::string(100, 'd');
  std::filesystem::create_directories(deep);
  const absl::StatusOr<RunDirectory> too_long = RunDirectory::Create(deep, 20);
  ASSERT_TRUE(too_long.ok());
  EXPECT_THAT(too_long->path(), StartsWith("/tmp/fathom-"));
  std::filesystem::remove_all(deep);
}

TEST(RunDirectoryTest, LeavesADirectoryThatWasThereBefore) {
  const std::string path = ::testing::TempDir() + "/fathom_run";
  std::filesystem::create_directories(path);
  chmod(path.c_str(), 0700);
  { ASSERT_TRUE(RunDirectory::Use(path, 20).ok()); }
  EXPECT_TRUE(std::filesystem::exists(path));
  chmod(path.c_str(), 0755);
  EXPECT_THAT(std::string(RunDirectory::Use(path, 20).status().message()), HasSubstr("mode 0700"));
  std::filesystem::remove_all(path);
  { ASSERT_TRUE(RunDirectory::Use(path, 20).ok()); }  // made for us, so it goes
  EXPECT_FALSE(std::filesystem::exists(path));
}

TEST(RunDirectoryTest, RefusesAPathTooLongForASocket) {
  EXPECT_THAT(std::string(RunDirectory::Use("/" + std::string(90, 'x'), 20).status().message()),
              HasSubstr("at most 87 bytes"));
}

}  // namespace
}  // namespace fathom
