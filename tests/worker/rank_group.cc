#include "tests/worker/rank_group.h"

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include "absl/synchronization/barrier.h"
#include "absl/time/clock.h"
#include "base/check.h"

namespace fathom {
namespace {

constexpr absl::Duration kConnectTime = absl::Seconds(20);

// Keys are files of one folder.
class FileBlackboard final : public Blackboard {
 public:
  explicit FileBlackboard(std::string folder) : folder_(std::move(folder)) {}

  absl::Status Publish(const std::string& key, const std::string& value) override {
    const std::string path = folder_ + "/" + key;
    std::ofstream(path + ".new", std::ios::binary) << value;
    std::filesystem::rename(path + ".new", path);
    return absl::OkStatus();
  }

  absl::StatusOr<std::string> Lookup(const std::string& key, absl::Time deadline) override {
    const std::string path = folder_ + "/" + key;
    while (!std::filesystem::exists(path)) {
      if (absl::Now() >= deadline) return absl::DeadlineExceededError(key);
      absl::SleepFor(absl::Milliseconds(2));
    }
    std::ostringstream value;
    value << std::ifstream(path, std::ios::binary).rdbuf();
    return value.str();
  }

 private:
  const std::string folder_;
};

// What a process leaves behind for its parent.
struct Report {
  int code;
  char message[504];
};

}  // namespace

std::vector<absl::Status> RunInThreads(int world_size, const MakeCommunicator& make,
                                       const RankBody& body) {
  signal(SIGPIPE, SIG_IGN);  // as fathom-worker does; Gloo writes to peers that are gone
  BlackboardKeeper keeper;
  std::vector<absl::Status> statuses(world_size);
  std::vector<std::thread> threads;
  auto* all_done = new absl::Barrier(world_size);
  for (int rank = 0; rank < world_size; ++rank) {
    threads.emplace_back([&, rank] {
      LocalBlackboard blackboard(keeper, 1);
      const std::unique_ptr<GroupCommunicator> communicator = make(rank, world_size);
      statuses[rank] = communicator->Connect(blackboard, absl::Now() + kConnectTime);
      if (statuses[rank].ok()) statuses[rank] = body(*communicator);
      if (all_done->Block()) delete all_done;
    });
  }
  for (std::thread& thread : threads) thread.join();
  return statuses;
}

std::vector<absl::Status> RunInProcesses(int world_size, const MakeCommunicator& make,
                                         const RankBody& body) {
  signal(SIGPIPE, SIG_IGN);
  char folder[] = "/tmp/fathom-ranks-XXXXXX";
  CHECK(mkdtemp(folder) != nullptr);
  auto* reports =
      static_cast<Report*>(mmap(nullptr, world_size * sizeof(Report), PROT_READ | PROT_WRITE,
                                MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  CHECK(reports != MAP_FAILED);
  std::vector<pid_t> children(world_size);
  for (int rank = 0; rank < world_size; ++rank) {
    reports[rank].code = static_cast<int>(absl::StatusCode::kUnknown);
    children[rank] = fork();
    CHECK(children[rank] >= 0);
    if (children[rank] != 0) continue;
    FileBlackboard blackboard(folder);
    const std::unique_ptr<GroupCommunicator> communicator = make(rank, world_size);
    absl::Status status = communicator->Connect(blackboard, absl::Now() + kConnectTime);
    if (status.ok()) status = body(*communicator);
    std::snprintf(reports[rank].message, sizeof reports[rank].message, "%s",
                  std::string(status.message()).c_str());
    reports[rank].code = static_cast<int>(status.code());
    // Closing discards what others have not read yet: wait for them.
    (void)blackboard.Publish("done " + std::to_string(rank), "");
    for (int other = 0; other < world_size; ++other) {
      (void)blackboard.Lookup("done " + std::to_string(other),
                              absl::Now() + absl::Milliseconds(300));
    }
    _exit(0);
  }
  std::vector<absl::Status> statuses;
  for (int rank = 0; rank < world_size; ++rank) {
    int wait_status = 0;
    waitpid(children[rank], &wait_status, 0);
    if (WIFSIGNALED(wait_status)) {
      std::snprintf(reports[rank].message, sizeof reports[rank].message, "killed by signal %d",
                    WTERMSIG(wait_status));
    }
    const auto code = static_cast<absl::StatusCode>(reports[rank].code);
    statuses.emplace_back(code, reports[rank].message);
  }
  munmap(reports, world_size * sizeof(Report));
  std::filesystem::remove_all(folder);
  return statuses;
}

}  // namespace fathom
