#include "worker/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "tests/worker/checkpoint_files.h"
#include "tests/worker/golden.h"

namespace fathom {
namespace {

using testing::AllOf;
using testing::HasSubstr;

std::string Header(const std::string& json) { return SafetensorsBytes(json, ""); }

std::string Refusal(const std::string& bytes) {
  TemporaryDirectory directory;
  WriteFile(directory.File("hostile.safetensors"), bytes);
  const auto file = SafetensorsFile::Open(directory.File("hostile.safetensors"));
  return file.ok() ? "accepted" : std::string(file.status().message());
}

struct HostileFile {
  const char* name;
  std::string bytes;
  const char* refusal;
};

// Two good entries: "a" of 8 bytes, then "b" of 4.
std::string TwoTensors(const std::string& a_offsets, const std::string& b_offsets) {
  return R"({"a":{"dtype":"F32","shape":[2],"data_offsets":)" + a_offsets +
         R"(},"b":{"dtype":"F32","shape":[1],"data_offsets":)" + b_offsets + "}}";
}

std::string OneTensor(const std::string& fields) { return R"({"a":{)" + fields + "}}"; }

std::string WithLength(uint64_t length, const std::string& rest) {
  std::string bytes = SafetensorsBytes("", "");
  std::memcpy(bytes.data(), &length, sizeof(length));
  return bytes + rest;
}

const std::vector<HostileFile>& HostileFiles() {
  static const auto& files = *new std::vector<HostileFile>{
      {"empty", "", "0 bytes are too few"},
      {"short_length", "\7\0\0", "too few"},
      {"huge_length", WithLength(uint64_t{1} << 63, "{}"), "header length is 9223372036854775808"},
      {"length_over_limit", WithLength(100'000'001, "{}"), "expected at most 100000000"},
      {"length_past_the_end", WithLength(1000, "{}"), "was it truncated?"},
      {"no_header", Header(""), "does not start with '{'"},
      {"not_a_brace", Header(" {}"), "does not start with '{'"},
      {"array", Header("[]"), "does not start with '{'"},
      {"bad_json", Header(R"({"a":)"), "not valid JSON"},
      {"two_documents", Header("{}{}"), "not valid JSON"},
      {"bad_utf8", Header("{\"\xff\":1}"), "not valid JSON"},
      {"deep", Header(R"({"a":)" + std::string(5000, '[') + std::string(5000, ']') + "}"),
       "not valid JSON"},
      {"entry_is_a_number", Header(R"({"a":1})"), "tensor \"a\": expected an object"},
      {"no_dtype", Header(OneTensor(R"("shape":[],"data_offsets":[0,4])")),
       "tensor \"a\": expected dtype, shape and two data_offsets"},
      {"unknown_dtype", Header(OneTensor(R"("dtype":"F31","shape":[],"data_offsets":[0,4])")),
       "dtype is \"F31\""},
      {"dtype_is_a_number", Header(OneTensor(R"("dtype":7,"shape":[],"data_offsets":[0,4])")),
       "dtype is 7"},
      {"negative_size", Header(OneTensor(R"("dtype":"F32","shape":[-1],"data_offsets":[0,4])")),
       "expected integers from 0"},
      {"fractional_size", Header(OneTensor(R"("dtype":"F32","shape":[1.5],"data_offsets":[0,4])")),
       "expected integers from 0"},
      {"rank_nine",
       Header(OneTensor(R"("dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1])")),
       "at most 8 integers"},
      {"overflowing_shape",
       Header(OneTensor(R"("dtype":"F32","shape":[4294967296,4294967296,2],"data_offsets":[0,0])")),
       "more than any file has"},
      {"size_beside_shape",
       SafetensorsBytes(OneTensor(R"("dtype":"F32","shape":[2],"data_offsets":[0,4])"), "1234"),
       "span 4 bytes, but F32[2] needs 8"},
      {"three_offsets", Header(OneTensor(R"("dtype":"U8","shape":[1],"data_offsets":[0,1,1])")),
       "at most 2 integers"},
      {"one_offset", Header(OneTensor(R"("dtype":"U8","shape":[1],"data_offsets":[0])")),
       "two data_offsets"},
      {"backward_offsets",
       SafetensorsBytes(OneTensor(R"("dtype":"U8","shape":[1],"data_offsets":[1,0])"), "1"),
       "data_offsets are [1, 0]"},
      {"truncated_data",
       SafetensorsBytes(OneTensor(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])"), "1234567"),
       "the file has 7 bytes after its header"},
      {"unknown_field",
       SafetensorsBytes(OneTensor(R"("dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1)"), "1"),
       "unknown field \"x\""},
      {"field_twice",
       SafetensorsBytes(OneTensor(R"("dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1])"),
                        "1"),
       "\"dtype\" occurs twice"},
      {"tensor_twice",
       SafetensorsBytes(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                        R"("a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                        "12"),
       "tensor \"a\" occurs twice"},
      {"metadata_twice", Header(R"({"__metadata__":{},"__metadata__":{}})"), "__metadata__"},
      {"metadata_is_text", Header(R"({"__metadata__":"x"})"), "__metadata__"},
      {"overlap", SafetensorsBytes(TwoTensors("[0,8]", "[4,8]"), std::string(8, 'x')),
       "tensor \"b\" begins at data offset 4, expected 8: it overlaps"},
      {"same_place",
       SafetensorsBytes(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                        R"("b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
                        "1"),
       "overlaps"},
      {"gap", SafetensorsBytes(TwoTensors("[0,8]", "[9,13]"), std::string(13, 'x')),
       "tensor \"b\" begins at data offset 9, expected 8: a gap"},
      {"gap_at_the_start", SafetensorsBytes(TwoTensors("[1,9]", "[9,13]"), std::string(13, 'x')),
       "tensor \"a\" begins at data offset 1, expected 0"},
      {"bytes_past_the_end", SafetensorsBytes(TwoTensors("[0,8]", "[8,12]"), std::string(13, 'x')),
       "but the file has"},
  };
  return files;
}

class HostileSafetensorsTest : public testing::TestWithParam<HostileFile> {};

TEST_P(HostileSafetensorsTest, IsRefusedNamingFileAndFault) {
  EXPECT_THAT(Refusal(GetParam().bytes),
              AllOf(HasSubstr("hostile.safetensors"), HasSubstr(GetParam().refusal)));
}

INSTANTIATE_TEST_SUITE_P(Files, HostileSafetensorsTest, testing::ValuesIn(HostileFiles()),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(SafetensorsFileTest, ReadsWhatWasWritten) {
  TemporaryDirectory directory;
  WriteFile(directory.File("good.safetensors"),
            SafetensorsBytes(R"({"__metadata__":{"format":"pt"},)"
                             R"("late":{"dtype":"BF16","shape":[2,1],"data_offsets":[4,8]},)"
                             R"("none":{"dtype":"F16","shape":[0,7],"data_offsets":[4,4]},)"
                             R"("early":{"dtype":"I32","shape":[],"data_offsets":[0,4]}}   )",
                             "12345678"));
  const auto file = SafetensorsFile::Open(directory.File("good.safetensors"));
  ASSERT_TRUE(file.ok()) << file.status();
  ASSERT_EQ((*file)->tensors().size(), 3u);
  const TensorInfo& late = (*file)->tensors().find("late")->second;
  EXPECT_EQ(late.DebugString(), "BF16[2, 1]");
  std::string bytes(4, '\0');
  ASSERT_TRUE((*file)->Read(late.file_offset, late.num_bytes, bytes.data()).ok());
  EXPECT_EQ(bytes, "5678");
}

TEST(SafetensorsFileTest, AFileCutWhileOpenIsAnErrorAndNoCrash) {
  TemporaryDirectory directory;
  const std::string path = directory.File("cut.safetensors");
  WriteFile(path, SafetensorsBytes({{"a", {"U8", {5000}, std::string(5000, 'x')}}}));
  const auto file = SafetensorsFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  const TensorInfo& info = (*file)->tensors().begin()->second;
  std::filesystem::resize_file(path, 1000);
  std::string bytes(5000, '\0');
  const absl::Status status = (*file)->Read(info.file_offset, 5000, bytes.data());
  EXPECT_TRUE(absl::IsDataLoss(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("cut.safetensors: ends at byte 1000"));
}

TEST(SafetensorsFileTest, OnlyRegularFilesAreOpenedThoughLinksToThemAreFollowed) {
  TemporaryDirectory directory;
  EXPECT_TRUE(absl::IsNotFound(SafetensorsFile::Open(directory.File("absent")).status()));
  EXPECT_THAT(std::string(SafetensorsFile::Open(directory.path()).status().message()),
              HasSubstr("not a regular file"));
  ASSERT_EQ(::mkfifo(directory.File("pipe").c_str(), 0600), 0);
  EXPECT_THAT(std::string(SafetensorsFile::Open(directory.File("pipe")).status().message()),
              HasSubstr("not a regular file"));

  WriteFile(directory.File("blob"), SafetensorsBytes({{"a", {"U8", {1}, "x"}}}));
  std::filesystem::create_symlink("blob", directory.File("model.safetensors"));
  EXPECT_TRUE(SafetensorsFile::Open(directory.File("model.safetensors")).ok());
}

// Every flip of a byte of a real header is refused or leaves a file whose tensors still tile it.
TEST(SafetensorsFileTest, SurvivesRandomDamage) {
  constexpr unsigned kSeed = 20250101;
  std::printf("seed %u\n", kSeed);
  std::mt19937 random(kSeed);
  FileTensors tensors;
  for (const char* name : {"a", "model.layers.0.b", "c"}) {
    tensors[name] = {"F32", {2, 3}, std::string(24, 'x')};
  }
  const std::string good = SafetensorsBytes(tensors);
  TemporaryDirectory directory;
  for (int round = 0; round < 300; ++round) {
    std::string bytes = good;
    for (unsigned i = 0; i <= random() % 3; ++i) {
      bytes[random() % (good.size() - 72)] = static_cast<char>(random());
    }
    if (random() % 8 == 0) bytes.resize(random() % bytes.size());
    WriteFile(directory.File("damaged"), bytes);
    const auto file = SafetensorsFile::Open(directory.File("damaged"));
    if (!file.ok()) continue;
    int64_t num_bytes = 0;
    for (const auto& [name, info] : (*file)->tensors()) num_bytes += info.num_bytes;
    EXPECT_LE(num_bytes, static_cast<int64_t>(bytes.size()));
  }
}

class CheckpointTest : public testing::Test {
 protected:
  CheckpointTest() { WriteFile(directory_.File("config.json"), "{}"); }

  void Write(const std::string& name, const std::string& bytes) {
    WriteFile(directory_.File(name), bytes);
  }
  void WriteIndex(const std::string& weight_map) {
    Write("model.safetensors.index.json", R"({"metadata":{},"weight_map":)" + weight_map + "}");
  }
  std::string Refusal() const {
    const auto checkpoint = Checkpoint::Open(directory_.path());
    return checkpoint.ok() ? "accepted" : std::string(checkpoint.status().message());
  }

  TemporaryDirectory directory_;
  const std::string one_ = SafetensorsBytes({{"a", {"U8", {1}, "x"}}});
  const std::string other_ = SafetensorsBytes({{"b", {"U8", {2}, "xy"}}});
};

TEST_F(CheckpointTest, IsOneFileOrShardsWithAnIndex) {
  Write("model.safetensors", one_);
  EXPECT_EQ((*Checkpoint::Open(directory_.path()))->tensors().size(), 1u);
  Write("1.safetensors", one_);
  Write("2.safetensors", other_);
  WriteIndex(R"({"a":"1.safetensors","b":"2.safetensors"})");
  const auto checkpoint = *Checkpoint::Open(directory_.path());
  EXPECT_EQ(checkpoint->tensors().size(), 2u);
  EXPECT_EQ(checkpoint->Find("b")->info->num_bytes, 2);
  EXPECT_EQ(checkpoint->Find("c"), nullptr);
}

TEST_F(CheckpointTest, WithoutFilesItIsNotFound) {
  EXPECT_THAT(Refusal(), HasSubstr("neither model.safetensors nor model.safetensors.index.json"));
  std::filesystem::remove(directory_.File("config.json"));
  EXPECT_THAT(Refusal(), HasSubstr("config.json: No such file"));
}

TEST_F(CheckpointTest, AnIndexNamesFilesBesideItselfOnly) {
  Write("1.safetensors", one_);
  for (const char* file : {"../1.safetensors", "/etc/passwd", "sub/1.safetensors", "..", "",
                           ".safetensors", "config.json", "1.safetensors\\u0000"}) {
    WriteIndex(absl::StrCat(R"({"a":")", file, "\"}"));
    EXPECT_THAT(Refusal(), HasSubstr("expected the name of a .safetensors file")) << file;
  }
}

TEST_F(CheckpointTest, DamagedIndexesAreRefused) {
  Write("1.safetensors", one_);
  Write("2.safetensors", other_);
  Write("model.safetensors.index.json", "{");
  EXPECT_THAT(Refusal(), HasSubstr("index.json: not valid JSON"));
  Write("model.safetensors.index.json", "[]");
  EXPECT_THAT(Refusal(), HasSubstr("object weight_map"));
  WriteIndex("{}");
  EXPECT_THAT(Refusal(), HasSubstr("weight_map is empty"));
  WriteIndex(R"({"a":1})");
  EXPECT_THAT(Refusal(), HasSubstr("\"a\" is not a file name"));
  WriteIndex(R"({"a":"1.safetensors","a":"2.safetensors"})");
  EXPECT_THAT(Refusal(), HasSubstr("tensor \"a\" occurs twice"));
  WriteIndex(R"({"a":"3.safetensors"})");
  EXPECT_THAT(Refusal(), HasSubstr("3.safetensors: No such file"));
  WriteIndex(R"({"a":"1.safetensors","b":"1.safetensors"})");
  EXPECT_THAT(Refusal(), HasSubstr("1.safetensors: tensor \"b\" is missing"));
  WriteIndex(R"({"a":"2.safetensors","b":"1.safetensors"})");
  EXPECT_THAT(Refusal(), HasSubstr("tensor \"a\" is missing, though"));
  Write("3.safetensors", SafetensorsBytes({{"b", {"U8", {1}, "x"}}, {"c", {"U8", {1}, "y"}}}));
  WriteIndex(R"({"a":"1.safetensors","b":"3.safetensors"})");
  EXPECT_THAT(Refusal(), AllOf(HasSubstr("index.json: weight_map lacks tensor \"c\""),
                               HasSubstr("3.safetensors")));
  Write("2.safetensors", one_);
  WriteIndex(R"({"a":"1.safetensors","b":"2.safetensors"})");
  EXPECT_THAT(Refusal(), AllOf(HasSubstr("2.safetensors: tensor \"a\" is also in"),
                               HasSubstr("1.safetensors")));
}

TEST_F(CheckpointTest, TheFingerprintIsOfConfigurationNamesTypesAndShapes) {
  const auto fingerprint = [&](const FileTensors& tensors, const std::string& config) {
    WriteCheckpoint(directory_.path(), config, tensors);
    return (*Checkpoint::Open(directory_.path()))->fingerprint();
  };
  const std::string first = fingerprint({{"a", {"U8", {2, 3}, "123456"}}}, "{}");
  EXPECT_EQ(first.size(), 32u);
  EXPECT_EQ(fingerprint({{"a", {"U8", {2, 3}, "654321"}}}, "{}"), first) << "values do not count";
  EXPECT_NE(fingerprint({{"b", {"U8", {2, 3}, "123456"}}}, "{}"), first);
  EXPECT_NE(fingerprint({{"a", {"I8", {2, 3}, "123456"}}}, "{}"), first);
  EXPECT_NE(fingerprint({{"a", {"U8", {3, 2}, "123456"}}}, "{}"), first);
  EXPECT_NE(fingerprint({{"a", {"U8", {2, 3}, "123456"}}}, "{} "), first);
}

}  // namespace
}  // namespace fathom
