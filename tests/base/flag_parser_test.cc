#include "base/flag_parser.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sysexits.h>

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace fathom {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::internal::CaptureStderr;
using testing::internal::CaptureStdout;
using testing::internal::GetCapturedStderr;
using testing::internal::GetCapturedStdout;

class FlagParserTest : public testing::Test {
 protected:
  FlagParserTest() {
    parser_.Add("--threads", threads_, "that compute").Between(1, 64).LastCounts();
    parser_.Add("--bytes", bytes_).Between(int64_t{1}, int64_t{1} << 40);
    parser_.Add("--device", device_).OneOf({"cpu", "cuda"});
    parser_.Add("--listen", addresses_).SplitAtCommas().Repeatable();
    parser_.AddSeconds("--timeout-seconds", timeout_, "of a step").Between(0.01, 10.0);
    parser_.AddSwitch("--cache,!--no-cache", cache_);
    Flag certificate = parser_.Add("--certificate", certificate_);
    certificate.Needs(parser_.Add("--key", key_));
    parser_.AddVersion("1.2.3");
  }

  std::optional<int> Parse(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), "program");
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    return parser_.Parse(static_cast<int>(argv.size()), argv.data());
  }

  std::string Complaint(std::vector<std::string> arguments) {
    CaptureStderr();
    EXPECT_EQ(Parse(std::move(arguments)), EX_USAGE);
    return GetCapturedStderr();
  }

  FlagParser parser_{"Does something.", "program"};
  int threads_ = 2;
  int64_t bytes_ = 0;
  std::string device_ = "cpu";
  std::vector<std::string> addresses_;
  std::chrono::milliseconds timeout_{3000};
  bool cache_ = true;
  std::string certificate_, key_;
};

TEST_F(FlagParserTest, SetsWhatIsGivenAndLeavesTheRest) {
  EXPECT_EQ(Parse({"--threads=8", "--bytes", "5000000000", "--timeout-seconds", "0.25",
                   "--no-cache", "--threads=9"}),
            std::nullopt);
  EXPECT_EQ(threads_, 9);
  EXPECT_EQ(bytes_, 5'000'000'000);
  EXPECT_EQ(timeout_, std::chrono::milliseconds(250));
  EXPECT_FALSE(cache_);
  EXPECT_EQ(device_, "cpu");
}

TEST_F(FlagParserTest, TakesListsWithCommasAndByRepetition) {
  EXPECT_EQ(Parse({"--listen", "a,b", "--listen=c"}), std::nullopt);
  EXPECT_THAT(addresses_, ElementsAre("a", "b", "c"));
}

TEST_F(FlagParserTest, RefusesBadValuesAndNamesTheFlag) {
  EXPECT_THAT(Complaint({"--threads=65"}), HasSubstr("--threads"));
  EXPECT_THAT(Complaint({"--threads=many"}), HasSubstr("--threads"));
  EXPECT_THAT(Complaint({"--device=tpu"}), HasSubstr("--device"));
  EXPECT_THAT(Complaint({"--timeout-seconds=11"}), HasSubstr("--timeout-seconds"));
  EXPECT_THAT(Complaint({"--certificate=a.pem"}), HasSubstr("--key"));
  EXPECT_THAT(Complaint({"--frobnicate"}), HasSubstr("--frobnicate"));
  EXPECT_THAT(Complaint({"--frobnicate"}), HasSubstr("(see program --help)\n"));
}

TEST_F(FlagParserTest, AsksForWhatIsRequired) {
  std::string model;
  parser_.Add("--model", model).Required().NotEmpty();
  EXPECT_THAT(Complaint({}), HasSubstr("--model is required"));
  EXPECT_THAT(Complaint({"--model", ""}), HasSubstr("must not be empty"));
}

TEST_F(FlagParserTest, EndsWith0AfterHelpAndVersion) {
  CaptureStdout();
  EXPECT_EQ(Parse({"--help"}), 0);
  EXPECT_THAT(GetCapturedStdout(), HasSubstr("that compute"));
  CaptureStdout();
  EXPECT_EQ(Parse({"--version"}), 0);
  EXPECT_EQ(GetCapturedStdout(), "1.2.3\n");
}

}  // namespace
}  // namespace fathom
