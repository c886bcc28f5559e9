// How fast a checkpoint becomes a shard: BF16 weights from files, quantised to FP8 on the way to
// the device, beside how fast the same files can be read at all.
//
//   load_bench --folder DIR [--gigabytes 20] [--device cuda] [--threads 8] [--keep] [--holes]
//
// Makes a checkpoint of random numbers in DeepSeek-V3's shapes with as many experts as fit the
// size, and reads and loads it twice: first from the disk (as far as the operating system drops
// what it has in memory when asked to), then from memory. The share is that of the reading rate:
// what is lost to copies, to quantising, and to the order in which weights are wanted. With
// --holes the file has no numbers and is there at once: what is read never comes from a disk.

#include <fcntl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/substitute.h"
#include "base/check.h"
#include "base/flag_parser.h"
#include "kernels/device.h"
#include "kernels/number_formats.h"
#include "worker/model_shard.h"

namespace fathom {
namespace {

struct Flags {
  std::string folder;
  double gigabytes = 20.0;
  std::string device = "cuda";
  int threads = 8;
  bool keep = false;
  bool holes = false;
};

// One dense layer and two with experts.
std::string ConfigJson(int64_t num_experts) {
  return absl::Substitute(
      R"({"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
 "torch_dtype": "bfloat16", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
 "moe_intermediate_size": 2048, "num_hidden_layers": 3, "num_nextn_predict_layers": 0,
 "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
 "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": $0,
 "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
 "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": true,
 "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
 "hidden_act": "silu", "rms_norm_eps": 1e-06, "rope_theta": 10000, "attention_bias": false,
 "max_position_embeddings": 4096, "tie_word_embeddings": false,
 "bos_token_id": 0, "eos_token_id": 1})",
      num_experts);
}

// Notes the shapes that a model asks for and says that they are all there, in BF16.
class ShapeList final : public WeightSource {
 public:
  absl::StatusOr<DType> TypeOf(const std::string& name, absl::Span<const int64_t> shape,
                               absl::Span<const DType>) const override {
    shapes_[name] = {shape.begin(), shape.end()};
    return DType::kBF16;
  }
  absl::Status ReadVector(const std::string&, DType, std::vector<float>&) override {
    return absl::UnimplementedError("no numbers");
  }
  absl::Status ReadMatrices(absl::Span<const WeightRead>, Device&, const ReadProgress&,
                            absl::FunctionRef<void(size_t)>) override {
    return absl::UnimplementedError("no numbers");
  }
  const std::map<std::string, std::vector<int64_t>>& shapes() const { return shapes_; }

 private:
  mutable std::map<std::string, std::vector<int64_t>> shapes_;
};

template <typename T>
T OrDie(absl::StatusOr<T> result) {
  if (!result.ok()) {
    std::fprintf(stderr, "load_bench: %s\n", std::string(result.status().message()).c_str());
    std::exit(EXIT_FAILURE);
  }
  return *std::move(result);
}

// A kind of clock.
class Stopwatch {
 public:
  double Seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

class LoadBench {
 public:
  explicit LoadBench(const Flags& flags)
      : flags_(flags), path_(absl::StrCat(flags.folder, "/model.safetensors")) {}

  void Make();
  void Measure();

 private:
  int64_t BytesWith(int64_t num_experts);
  std::map<std::string, std::vector<int64_t>> Shapes() const;
  void WriteRandom(std::ofstream& file) const;
  void ForgetCache() const;
  double ReadRate() const;
  double LoadRate();

  const Flags flags_;
  const std::string path_;
  int64_t file_bytes_ = 0;
};

ModelShardOptions ShardOptions() {
  return {.dtype = DType::kBF16,
          .quantization = Quantization::kFp8,
          .quantize_activations = true,
          .max_tokens_per_step = 256,
          .max_logit_rows = 16,
          .max_sequences = 16};
}

std::map<std::string, std::vector<int64_t>> LoadBench::Shapes() const {
  const ModelConfig config = OrDie(ReadModelConfig(flags_.folder));
  const ShardLayout layout = OrDie(ShardLayout::Create({}, config));
  const auto device = OrDie(OpenCpuDevice({}));
  ShapeList shapes;
  OrDie(ModelShard::Plan(ShardOptions(), config, layout, shapes, *device));
  return shapes.shapes();
}

int64_t LoadBench::BytesWith(int64_t num_experts) {
  std::ofstream(flags_.folder + "/config.json") << ConfigJson(num_experts);
  int64_t num_bytes = 0;
  for (const auto& [name, shape] : Shapes()) {
    int64_t elements = SizeOf(DType::kBF16);
    for (const int64_t size : shape) elements *= size;
    num_bytes += elements;
  }
  return num_bytes;
}

void LoadBench::Make() {
  std::filesystem::create_directories(flags_.folder);
  constexpr int64_t kGroups = 8;  // the number of experts is a multiple
  int64_t num_experts = 2 * kGroups;
  while (static_cast<double>(BytesWith(num_experts)) < flags_.gigabytes * 1e9) {
    num_experts += kGroups;
  }
  std::vector<std::string> entries;
  for (const auto& [name, shape] : Shapes()) {
    int64_t num_bytes = SizeOf(DType::kBF16);
    for (const int64_t size : shape) num_bytes *= size;
    entries.push_back(absl::StrCat("\"", name, "\":{\"dtype\":\"BF16\",\"shape\":[",
                                   absl::StrJoin(shape, ","), "],\"data_offsets\":[", file_bytes_,
                                   ",", file_bytes_ + num_bytes, "]}"));
    file_bytes_ += num_bytes;
  }
  const std::string header = absl::StrCat("{", absl::StrJoin(entries, ","), "}");
  const uint64_t header_bytes = header.size();
  const Stopwatch watch;
  std::ofstream file(path_, std::ios::binary);
  file.write(reinterpret_cast<const char*>(&header_bytes), sizeof header_bytes);
  file << header;
  if (!flags_.holes) WriteRandom(file);
  file.close();
  if (flags_.holes)
    std::filesystem::resize_file(path_, sizeof header_bytes + header_bytes + file_bytes_);
  CHECK(file.good()) << "cannot write " << path_ << "; is the disk full?";
  std::printf("made %.2f GB, %ld experts to a layer, in %.1f s\n",
              static_cast<double>(file_bytes_) / 1e9, static_cast<long>(num_experts),
              watch.Seconds());
}

void LoadBench::WriteRandom(std::ofstream& file) const {
  constexpr int64_t kPool = int64_t{64} << 20;
  std::mt19937_64 random(20250101);
  std::uniform_real_distribution<float> uniform(-0.02f, 0.02f);
  std::vector<BFloat16> pool(kPool / sizeof(BFloat16));
  for (BFloat16& value : pool) value = ToBFloat16(uniform(random));
  for (int64_t left = file_bytes_; left > 0; left -= kPool) {
    file.write(reinterpret_cast<const char*>(pool.data()), std::min(left, kPool));
  }
}

// Asks for the file's pages to go; where they belong to the file system itself they stay.
void LoadBench::ForgetCache() const {
  const int descriptor = open(path_.c_str(), O_RDONLY);
  CHECK(descriptor >= 0) << path_;
  fsync(descriptor);
  posix_fadvise(descriptor, 0, 0, POSIX_FADV_DONTNEED);
  close(descriptor);
}

double LoadBench::ReadRate() const {
  constexpr int64_t kPiece = int64_t{8} << 20;
  const int descriptor = open(path_.c_str(), O_RDONLY);
  CHECK(descriptor >= 0) << path_;
  std::atomic<int64_t> next = 0, num_bytes = 0;
  const Stopwatch watch;
  std::vector<std::thread> threads;
  for (int i = 0; i < flags_.threads; ++i) {
    threads.emplace_back([&] {
      std::vector<char> buffer(kPiece);
      while (true) {
        const ssize_t size = pread(descriptor, buffer.data(), kPiece, next.fetch_add(kPiece));
        if (size <= 0) return;
        num_bytes += size;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  close(descriptor);
  return static_cast<double>(num_bytes) / 1e9 / watch.Seconds();
}

double LoadBench::LoadRate() {
  const ModelConfig config = OrDie(ReadModelConfig(flags_.folder));
  const ShardLayout layout = OrDie(ShardLayout::Create({}, config));
  const auto device = OrDie(flags_.device == "cuda" ? OpenCudaDevice({}) : OpenCpuDevice({}));
  const auto checkpoint = OrDie(Checkpoint::Open(flags_.folder));
  CheckpointWeights source(*checkpoint, flags_.threads);
  int64_t num_bytes = 0;
  const Stopwatch watch;
  const auto shard = OrDie(ModelShard::Load(ShardOptions(), config, layout, source, *device,
                                            [&](int64_t done, int64_t) { num_bytes = done; }));
  // The last kernels may still run: a copy to the host waits for them.
  const Buffer word = OrDie(device->Allocate(sizeof(int32_t)));
  int32_t answer = 0;
  device->CopyToHost(Tensor(word.data(), DType::kI32, {1}), &answer);
  return static_cast<double>(num_bytes) / 1e9 / watch.Seconds();
}

void LoadBench::Measure() {
  std::printf("%-12s %10s %10s %7s\n", "from", "read GB/s", "load GB/s", "share");
  if (flags_.holes) ReadRate();  // then they are in memory
  for (const bool from_disk : {true, false}) {
    if (from_disk && flags_.holes) continue;
    if (from_disk) ForgetCache();
    const double read = ReadRate();
    if (from_disk) ForgetCache();
    const double load = LoadRate();
    std::printf("%-12s %10.2f %10.2f %6.0f%%\n", from_disk ? "disk" : "memory", read, load,
                100.0 * load / read);
    std::fflush(stdout);
  }
  if (!flags_.keep) std::filesystem::remove(path_);
}

int Main(int argc, char** argv) {
  Flags flags;
  FlagParser parser("Measures how fast a checkpoint becomes a shard.", "load_bench");
  parser.Add("--folder", flags.folder, "where to make the checkpoint").Required();
  parser.Add("--gigabytes", flags.gigabytes, "its size, at least 8");
  parser.Add("--device", flags.device).OneOf({"cpu", "cuda"});
  parser.Add("--threads", flags.threads, "that read").Between(1, 64);
  parser.AddSwitch("--holes", flags.holes, "zeros that lie on no disk");
  parser.AddSwitch("--keep", flags.keep, "leave the checkpoint there");
  if (const std::optional<int> code = parser.Parse(argc, argv)) return *code;
  LoadBench bench(flags);
  bench.Make();
  bench.Measure();
  return EXIT_SUCCESS;
}

}  // namespace
}  // namespace fathom

int main(int argc, char** argv) { return fathom::Main(argc, argv); }
