#include "deploy/launcher/log_output.h"

#include <fcntl.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "deploy/launcher/child_process.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr char kProgress[] = "I 14:02:03.123 loading weights: 43 % of 2.1 GB, 310 MB/s, 4 s left";

// What a LogOutput writes.
class LogOutputTest : public ::testing::Test {
 protected:
  LogOutputTest() : pipe_(*MakePipe()) {}

  LogOutput::Options Options() { return {.fd = pipe_.write.get()}; }

  std::string Written() {
    std::string text(65536, '\0');
    const ssize_t count = read(pipe_.read.get(), text.data(), text.size());
    text.resize(count < 0 ? 0 : count);
    return text;
  }

  Pipe pipe_;
};

TEST_F(LogOutputTest, PutsTheNameOfTheProcessBeforeEachLine) {
  LogOutput log(Options());
  log.FromChild("worker 3", "ready");
  log.Own("done");
  EXPECT_EQ(Written(), "worker 3    | ready\nfathom      | done\n");
}

TEST_F(LogOutputTest, ProgressIsLinesWhereThereIsNoTerminal) {
  LogOutput log(Options());
  log.FromChild("coordinator", kProgress);
  EXPECT_EQ(Written(), std::string("coordinator | ") + kProgress + "\n");
}

TEST_F(LogOutputTest, ProgressIsDrawnOverItselfOnATerminal) {
  LogOutput::Options options = Options();
  options.is_terminal = true;
  LogOutput log(options);
  log.FromChild("coordinator", kProgress);
  EXPECT_EQ(Written(), std::string("\r\033[Kcoordinator | ") + kProgress);
  log.FromChild("coordinator", "serving");
  EXPECT_EQ(Written(), "\r\033[Kcoordinator | serving\n");
  log.FromChild("coordinator", "still");
  EXPECT_EQ(Written(), "coordinator | still\n");
}

TEST_F(LogOutputTest, ProgressFitsTheTerminal) {
  LogOutput::Options options = Options();
  options.is_terminal = true;
  options.columns = 40;
  LogOutput log(options);
  log.FromChild("coordinator", kProgress);
  EXPECT_LE(Written().size(), 40 + std::string("\r\033[K").size());
}

TEST_F(LogOutputTest, ColoursNamesOnly) {
  LogOutput::Options options = Options();
  options.use_colours = true;
  LogOutput log(options);
  log.Line("gateway", "ready");
  const std::string written = Written();
  EXPECT_THAT(written, StartsWith("\033["));
  EXPECT_THAT(written, HasSubstr("\033[0m ready\n"));
}

TEST_F(LogOutputTest, ALineCannotSteerTheTerminal) {
  LogOutput log(Options());
  log.FromChild("gateway", "a\033[2Jb\tc\r");
  EXPECT_EQ(Written(), "gateway     | a?[2Jb\tc\n");
}

TEST(LineSplitterTest, CutsAStreamHoweverItArrives) {
  std::vector<std::string> lines;
  const auto collect = [&](absl::string_view line) { lines.emplace_back(line); };
  LineSplitter splitter;
  splitter.Add("on", collect);
  splitter.Add("e\ntwo\nthr", collect);
  splitter.Add("ee", collect);
  EXPECT_THAT(lines, ElementsAre("one", "two"));
  splitter.Finish(collect);
  splitter.Finish(collect);
  EXPECT_THAT(lines, ElementsAre("one", "two", "three"));
}

TEST(LineSplitterTest, BoundsALineWithoutAnEnd) {
  size_t longest = 0;
  LineSplitter splitter;
  for (int i = 0; i < 100; ++i) {
    splitter.Add(std::string(10'000, 'x'),
                 [&](absl::string_view line) { longest = std::max(longest, line.size()); });
  }
  EXPECT_GT(longest, 0);
  EXPECT_LE(longest, 65537);
}

}  // namespace
}  // namespace fathom
