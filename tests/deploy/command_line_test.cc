#include "deploy/launcher/command_line.h"

#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_split.h"
#include "deploy/launcher/vllm_flags.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

CommandLine Parsed(std::vector<std::string> arguments) {
  absl::StatusOr<CommandLine> result = ParseCommandLine(arguments, "1.2.3");
  EXPECT_TRUE(result.ok()) << result.status();
  return result.ok() ? *std::move(result) : CommandLine();
}

ServeOptions Served(std::vector<std::string> flags) {
  std::vector<std::string> arguments = {"serve", "model"};
  arguments.insert(arguments.end(), flags.begin(), flags.end());
  return Parsed(arguments).serve;
}

// Why these flags are refused.
std::string Refusal(std::vector<std::string> flags) {
  std::vector<std::string> arguments = {"serve", "model"};
  arguments.insert(arguments.end(), flags.begin(), flags.end());
  const absl::StatusOr<CommandLine> result = ParseCommandLine(arguments, "1.2.3");
  EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument);
  return std::string(result.status().message());
}

TEST(CommandLineTest, HasDefaultsThatOperatorsOfVllmExpect) {
  const ServeOptions options = Served({});
  EXPECT_EQ(options.model_dir, "model");
  EXPECT_EQ(options.host, "0.0.0.0");
  EXPECT_EQ(options.port, 8000);
  EXPECT_EQ(options.tensor_parallel_size, 1);
  EXPECT_EQ(options.gpu_memory_utilization, 0.9);
  EXPECT_EQ(options.max_model_len, 0);
  EXPECT_EQ(options.max_num_seqs, 256);
  EXPECT_EQ(BlockSizeOf(options), 16);
}

TEST(CommandLineTest, ReadsAKnownCommandLine) {
  const CommandLine line = Parsed({"serve",
                                   "--trust-remote-code",
                                   "/models/V3",
                                   "--tensor-parallel-size",
                                   "8",
                                   "--max-model-len=32k",
                                   "--gpu-memory-utilization",
                                   "0.5",
                                   "--quantization",
                                   "fp8",
                                   "--block-size",
                                   "64",
                                   "--dtype",
                                   "bfloat16",
                                   "--kv-cache-dtype",
                                   "auto",
                                   "--kv-cache-memory-bytes",
                                   "2G",
                                   "--max-num-seqs",
                                   "64",
                                   "--max-num-batched-tokens",
                                   "8192",
                                   "--target-itl-ms",
                                   "37.5",
                                   "--host",
                                   "127.0.0.1",
                                   "--port",
                                   "9000",
                                   "--seed",
                                   "18446744073709551615",
                                   "--enable-expert-parallel",
                                   "--served-model-name",
                                   "v3",
                                   "deepseek"});
  EXPECT_EQ(line.command, Command::kServe);
  const ServeOptions& options = line.serve;
  EXPECT_EQ(options.model_dir, "/models/V3");
  EXPECT_EQ(options.tensor_parallel_size, 8);
  EXPECT_EQ(options.max_model_len, 32000);
  EXPECT_EQ(options.gpu_memory_utilization, 0.5);
  EXPECT_EQ(options.quantization, "fp8");
  EXPECT_EQ(options.block_size, 64);
  EXPECT_EQ(options.dtype, "bfloat16");
  EXPECT_EQ(options.kv_cache_memory_bytes, int64_t{2} << 30);
  EXPECT_EQ(options.max_num_seqs, 64);
  EXPECT_EQ(options.max_num_batched_tokens, 8192);
  EXPECT_EQ(options.target_itl_ms, 37.5);
  EXPECT_EQ(options.port, 9000);
  EXPECT_EQ(options.seed, UINT64_MAX);
  EXPECT_TRUE(options.enable_expert_parallel);
  EXPECT_THAT(options.served_model_names, ElementsAre("v3", "deepseek"));
  EXPECT_THAT(line.notes, ElementsAre(HasSubstr("--trust-remote-code changes nothing")));
}

TEST(CommandLineTest, UnderstandsTheSpellingsOfVllmsOwnParser) {
  EXPECT_EQ(Served({"-tp", "4"}).tensor_parallel_size, 4);
  EXPECT_EQ(Served({"-tp=4"}).tensor_parallel_size, 4);
  EXPECT_EQ(Served({"-dp", "2", "--gpus", "0,1", "--device", "cuda"}).data_parallel_size, 2);
  EXPECT_THAT(Refusal({"-dp", "2", "-tp", "2", "--gpus", "0,1", "--device", "cuda"}),
              HasSubstr("one for each of the 4 workers"));
  EXPECT_THAT(Refusal({"-dp", "1024", "-tp", "2"}), HasSubstr("expected at most 1024"));
  EXPECT_EQ(Served({"-q=fp8"}).quantization, "fp8");
  EXPECT_EQ(Served({"--max_num_seqs", "7"}).max_num_seqs, 7);
  EXPECT_EQ(Served({"--max_model_len=10"}).max_model_len, 10);
  EXPECT_EQ(Served({"--max-model-len", "auto"}).max_model_len, 0);
  EXPECT_EQ(Served({"--max-model-len", "-1"}).max_model_len, 0);
  EXPECT_EQ(Served({"-q", "fp8"}).quantization, "fp8");
  EXPECT_EQ(Served({"--dtype", "float"}).dtype, "float32");
  EXPECT_EQ(Served({"--kv-cache-dtype", "fp8_e4m3"}).kv_cache_dtype, "fp8");
  EXPECT_EQ(Served({"--load-format", "safetensors"}).load_format, "auto");
  EXPECT_EQ(Served({"--load-format", "dummy"}).load_format, "dummy");
  EXPECT_EQ(Served({"--host", "localhost"}).host, "127.0.0.1");
  EXPECT_EQ(Served({"--port", "1", "--port", "2"}).port, 2);  // the last one counts
}

TEST(CommandLineTest, ReadsTheGpusOfWorkers) {
  EXPECT_EQ(Served({"--device", "cuda", "-tp", "3", "--gpus", "4,0,4"}).gpus,
            (std::vector<int>{4, 0, 4}));
}

TEST(CommandLineTest, RefusesValuesWithTheReasonAndWhatIsExpected) {
  EXPECT_THAT(Refusal({"--dtype", "half"}), HasSubstr("leave the range of float16"));
  EXPECT_THAT(Refusal({"--dtype", "int8"}), HasSubstr("not one of auto, float32"));
  EXPECT_THAT(Refusal({"--kv-cache-dtype", "fp8_e5m2"}), HasSubstr("use fp8"));
  EXPECT_THAT(Refusal({"--load-format", "pt"}), HasSubstr("from safetensors only"));
  EXPECT_THAT(Refusal({"--activation-quantization", "int8"}), HasSubstr("not one of auto, none"));
  EXPECT_THAT(Refusal({"--block-size", "8"}), HasSubstr("not one of 1, 16, 32, 64, 128"));
  EXPECT_THAT(Refusal({"--device", "tpu"}), HasSubstr("not one of cpu, cuda, sim"));
  EXPECT_THAT(Refusal({"--quantization", "awq"}), HasSubstr("not one of none, fp8"));
  EXPECT_THAT(Refusal({"--tensor-parallel-size", "0"}), HasSubstr("expected 1 to 1024"));
  EXPECT_THAT(Refusal({"--device", "cuda", "--gpus", "0,x"}), HasSubstr("'x' is no GPU"));
  EXPECT_THAT(Refusal({"--device", "cuda", "-tp", "2", "--gpus", "0"}),
              HasSubstr("--gpus names 1 GPUs: expected one for each of the 2 workers"));
  EXPECT_THAT(Refusal({"--gpus", "0"}), HasSubstr("--gpus is for --device cuda, not cpu"));
  EXPECT_THAT(Refusal({"--collectives", "nccl"}), HasSubstr("is for --device cuda, not cpu"));
  EXPECT_THAT(Refusal({"--device", "sim"}), HasSubstr("go together: give both or none"));
  EXPECT_THAT(Refusal({"--sim-profile", "x"}), HasSubstr("go together: give both or none"));
  EXPECT_EQ(Served({"--device", "sim", "--sim-profile", "x"}).sim_profile, "x");
  EXPECT_THAT(Refusal({"--port", "65536"}), HasSubstr("expected 0 to 65535"));
  EXPECT_THAT(Refusal({"--port", "abc"}), HasSubstr("'abc' is no whole number: expected 0 to"));
  EXPECT_THAT(Refusal({"--gpu-memory-utilization", "1.5"}), HasSubstr("expected 0 < F <= 1"));
  EXPECT_THAT(Refusal({"--gpu-memory-utilization", "nan"}), HasSubstr("expected 0 < F <= 1"));
  EXPECT_THAT(Refusal({"--max-model-len", "-5"}), HasSubstr("--max-model-len"));
  EXPECT_THAT(Refusal({"--max-num-seqs", "0"}), HasSubstr("expected at least 1"));
  EXPECT_THAT(Refusal({"--seed", "-1"}), HasSubstr("--seed"));
  EXPECT_THAT(Refusal({"--port"}), HasSubstr("--port"));
}

TEST(CommandLineTest, RefusesWhatOnlyVllmCanDoWithTheReason) {
  EXPECT_THAT(Refusal({"--ssl-ca-certs", "x"}), HasSubstr("--ssl-ca-certs is refused: clients"));
  EXPECT_THAT(Refusal({"--pipeline-parallel-size", "2"}), HasSubstr("--tensor-parallel-size"));
}

TEST(CommandLineTest, AcceptsWhatChangesNothingAndSaysSo) {
  const CommandLine line =
      Parsed({"serve", "model", "--pipeline-parallel-size", "1", "--enable-chunked-prefill"});
  EXPECT_THAT(line.notes, ElementsAre(HasSubstr("--enable-chunked-prefill changes nothing"),
                                      HasSubstr("--pipeline-parallel-size 1 changes nothing")));
}

TEST(CommandLineTest, SharesPrefixesUnlessToldOtherwise) {
  EXPECT_TRUE(Served({}).enable_prefix_caching);
  EXPECT_TRUE(Served({"--enable-prefix-caching"}).enable_prefix_caching);
  EXPECT_FALSE(Served({"--no-enable-prefix-caching"}).enable_prefix_caching);
}

TEST(CommandLineTest, SuggestsTheFlagThatWasMeant) {
  EXPECT_THAT(Refusal({"--prot", "80"}), HasSubstr("unknown flag --prot: did you mean --port?"));
  EXPECT_THAT(Refusal({"--max-modl-len=3"}), HasSubstr("did you mean --max-model-len?"));
  EXPECT_THAT(Refusal({"--frobnicate"}), HasSubstr("unknown flag --frobnicate (fathom serve --h"));
  EXPECT_THAT(Refusal({"another"}), HasSubstr("'another' is one argument too many"));
}

TEST(CommandLineTest, KnowsItsCommands) {
  EXPECT_EQ(Parsed({"check", "model"}).command, Command::kCheck);
  EXPECT_EQ(Parsed({"version"}).text, "fathom 1.2.3\n");
  EXPECT_EQ(Parsed({"--version"}).text, "fathom 1.2.3\n");
  EXPECT_THAT(Parsed({"serve", "--help"}).text, HasSubstr("--tensor-parallel-size"));
  EXPECT_THAT(Parsed({}).text, HasSubstr("serve"));
  EXPECT_THAT(std::string(ParseCommandLine({"server"}, "").status().message()),
              HasSubstr("'server' is no command: expected serve, check or version"));
  EXPECT_THAT(std::string(ParseCommandLine({"serve"}, "").status().message()),
              HasSubstr("MODEL_DIR is required"));
}

TEST(CommandLineTest, WantsTlsCompleteAndOnlyWhereItMatters) {
  EXPECT_THAT(Refusal({"--grpc-listen", "0.0.0.0:1", "--tls-certificate", "c"}),
              HasSubstr("go together"));
  EXPECT_THAT(Refusal({"--insecure"}), HasSubstr("--grpc-listen, which is not given"));
  EXPECT_TRUE(Served({"--grpc-listen", "0.0.0.0:1", "--insecure"}).insecure);
}

TEST(CommandLineTest, PassesKeysAndCertificatesOnToTheGateway) {
  const ServeOptions options = Served({"--api-key", "a", "b", "--ssl-certfile", "c",
                                       "--ssl-keyfile", "k", "--access-log-file", "log"});
  EXPECT_THAT(options.gateway_flags,
              ElementsAre("--api-key", "a", "--api-key", "b", "--ssl-certfile", "c",
                          "--ssl-keyfile", "k", "--access-log-file", "log"));
  EXPECT_TRUE(options.https);
  EXPECT_TRUE(options.gateway_reloads);
  EXPECT_FALSE(Served({"--api-key", "a"}).gateway_reloads) << "it names no file";
  EXPECT_THAT(Refusal({"--ssl-certfile", "c"}), HasSubstr("--ssl-keyfile"));
}

TEST(CommandLineTest, SaysOfVllmsOwnFlagsWhyTheyAreRefused) {
  EXPECT_THAT(Refusal({"--enable-lora"}), HasSubstr("--enable-lora is refused: adapters"));
  EXPECT_THAT(Refusal({"--kv-transfer-config", "{}"}), HasSubstr("stays with the workers"));
  EXPECT_THAT(Refusal({"--limit_mm_per_prompt={}"}), HasSubstr("read text only"));
  EXPECT_THAT(Refusal({"-pp", "2"}), HasSubstr("--pipeline-parallel-size 2 is refused"));
  EXPECT_THAT(Refusal({"--frobnicate"}), HasSubstr("unknown flag --frobnicate"));
}

TEST(CommandLineTest, RefusesNoFlagOfItsOwn) {
  const absl::StatusOr<CommandLine> help = ParseCommandLine({"serve", "--help"}, "1");
  int num_flags = 0;
  for (const absl::string_view word : absl::StrSplit(help->text, absl::ByAnyChar(" ,\n"))) {
    if (!absl::StartsWith(word, "--")) continue;
    ++num_flags;
    EXPECT_EQ(ReasonToRefuse(word), std::nullopt) << word;
  }
  EXPECT_GT(num_flags, 60);
}

TEST(CommandLineTest, PassesListsOfOriginsOnAsTheyAre) {
  EXPECT_THAT(Served({"--allowed-origins", "[\"https://a\", \"https://b\"]", "--allowed_methods",
                      "[\"POST\"]", "--allow-credentials"})
                  .gateway_flags,
              ElementsAre("--allowed-origins", "[\"https://a\", \"https://b\"]",
                          "--allowed-methods", "[\"POST\"]", "--allow-credentials"));
}

TEST(CommandLineTest, PassesLimitsOnToTheGateway) {
  EXPECT_THAT(
      Served({"--max-n", "9", "--max-n", "4", "--body-timeout-seconds", "2.5"}).gateway_flags,
      ElementsAre("--body-timeout-seconds", "2.5", "--max-n", "4"));
  EXPECT_THAT(Refusal({"--max-logprobs", "21"}), HasSubstr("expected 0 to 20"));
  EXPECT_THAT(Refusal({"--max-n", "1.5"}), HasSubstr("a whole number"));
  EXPECT_THAT(Refusal({"--max-connections", "many"}), HasSubstr("'many' is not a count"));
}

TEST(ParseCountTest, KnowsTheSuffixesOfVllm) {
  EXPECT_EQ(*ParseCount("0"), 0);
  EXPECT_EQ(*ParseCount("4096"), 4096);
  EXPECT_EQ(*ParseCount("32k"), 32000);
  EXPECT_EQ(*ParseCount("32K"), 32768);
  EXPECT_EQ(*ParseCount("25.6k"), 25600);
  EXPECT_EQ(*ParseCount("1M"), 1 << 20);
  EXPECT_EQ(*ParseCount("1m"), 1'000'000);
  EXPECT_EQ(*ParseCount("16G"), int64_t{16} << 30);
}

TEST(ParseCountTest, RefusesWhatIsNoCount) {
  for (const char* text : {"", "k", "-1", "+1", "1.5", "abc", "1e3", "0x10", "1kk", " 1", "nan",
                           "1.2.3", "99999999999999999999", "99999T"}) {
    EXPECT_FALSE(ParseCount(text).ok()) << text;
  }
}

}  // namespace
}  // namespace fathom
