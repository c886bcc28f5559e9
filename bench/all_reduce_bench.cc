// How long sums over ranks take, in one process: ranks side by side on one GPU, which is what the
// kernels cost but for the way between GPUs, and a rank on each GPU where there are several. Two
// ranks have all their blocks, as on GPUs of their own; eight on one have a quarter.
//
//   all_reduce_bench [--json]     one row per (GPUs, ranks, tokens): a sum of [tokens, 7168] bf16,
//   and the sum with residual, norm and quantising where that is one kernel, in graphs; the
//   bandwidth is what a rank sends and receives in a two-shot sum

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "kernels/cuda/all_reduce.h"
#include "kernels/cuda/cuda_check.h"

namespace fathom {
namespace {

constexpr int64_t kHidden = 7168;
constexpr int kCalls = 40;  // of one graph
constexpr int kRepeats = 9;

class DeviceMemory {
 public:
  explicit DeviceMemory(int64_t num_bytes) {
    CUDA_CHECK(cudaMalloc(&data_, static_cast<size_t>(num_bytes)));
    CUDA_CHECK(cudaMemset(data_, 0, static_cast<size_t>(num_bytes)));
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory() { CUDA_CHECK(cudaFree(data_)); }
  void* get() const { return data_; }

 private:
  void* data_ = nullptr;
};

// What one rank has, and its calls as graphs.
struct Rank {
  Rank(int64_t tokens, cudaStream_t rank_stream)
      : stream(rank_stream),
        partial(tokens * kHidden * 2),
        residual(tokens * kHidden * 2),
        normed(tokens * kHidden * 2),
        weight(kHidden * 2),
        values(tokens * kHidden),
        scales(tokens * kHidden / 128 * 4) {}

  template <typename Calls>
  cudaGraphExec_t Record(Calls calls) const {
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < kCalls; ++i) calls();
    CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
    CUDA_CHECK(cudaGraphUpload(executable, stream));
    CUDA_CHECK(cudaGraphDestroy(graph));
    return executable;
  }

  const cudaStream_t stream;
  DeviceMemory partial, residual, normed, weight, values, scales;
};

class Group {
 public:
  // gpus[r]: of rank r; those of different ranks see each other's memory.
  explicit Group(const std::vector<int>& gpus) : gpus_(gpus), groups_(gpus.size()) {
    const auto world_size = static_cast<int>(gpus.size());
    for (int rank = 0; rank < world_size; ++rank) {
      CUDA_CHECK(cudaSetDevice(gpus[rank]));
      cuda::LoadPeerKernels();
      windows_.push_back(std::make_unique<DeviceMemory>(cuda::kPeerWindowBytes));
      CUDA_CHECK(cudaStreamCreateWithFlags(&streams_.emplace_back(), cudaStreamNonBlocking));
    }
    for (int rank = 0; rank < world_size; ++rank) {
      cuda::PeerGroup& group = groups_[rank];
      group.rank = rank;
      group.world_size = world_size;
      for (int peer = 0; peer < world_size; ++peer) {
        group.windows[peer] = static_cast<char*>(windows_[peer]->get());
      }
      void* control = nullptr;
      CUDA_CHECK(cudaHostAlloc(&control, sizeof(cuda::PeerControl), cudaHostAllocMapped));
      group.control = new (control) cuda::PeerControl();
      group.timeout_ns = int64_t{10'000'000'000};
      group.shares_gpu = world_size > 2 && gpus[1] == gpus[0];
    }
  }

  // Whether residual, norm and quantising go into the kernel of the sum.
  bool CanFinishRows(int64_t tokens) const {
    return cuda::CanAllReduceAddRmsNorm(groups_[0], DType::kBF16, tokens, kHidden);
  }

  // Microseconds of a call, the least of several replays: the time between launching the ranks,
  // which a replay begins with, is the host's.
  double Measure(int64_t tokens, bool finishes_rows) {
    std::vector<std::unique_ptr<Rank>> ranks;
    std::vector<cudaGraphExec_t> graphs;
    for (size_t i = 0; i < groups_.size(); ++i) {
      CUDA_CHECK(cudaSetDevice(gpus_[i]));
      const Rank& rank = *ranks.emplace_back(std::make_unique<Rank>(tokens, streams_[i]));
      const auto rows = [&](const DeviceMemory& memory, DType dtype, int64_t columns) {
        return Tensor(memory.get(), dtype, {tokens, columns});
      };
      const cuda::PeerAddRmsNorm task = {
          .partial = rows(rank.partial, DType::kBF16, kHidden),
          .residual = rows(rank.residual, DType::kBF16, kHidden),
          .weight = Tensor(rank.weight.get(), DType::kBF16, {kHidden}),
          .eps = 1e-6f,
          .normed = rows(rank.normed, DType::kBF16, kHidden),
          .values = rows(rank.values, DType::kF8E4M3, kHidden),
          .scales = rows(rank.scales, DType::kF32, kHidden / 128)};
      graphs.push_back(rank.Record([&] {
        if (finishes_rows) {
          cuda::AllReduceAddRmsNorm(groups_[i], task, rank.stream);
        } else {
          cuda::AllReduceSum(groups_[i], rank.partial.get(), DType::kBF16, tokens * kHidden,
                             rank.stream);
        }
      }));
    }
    CUDA_CHECK(cudaSetDevice(gpus_[0]));
    cudaEvent_t begin, end;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    float best = 1e9f;
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
      Synchronize();
      for (size_t i = graphs.size();
           i-- > 0;) {  // rank 0 last: its events see least of the others'
        CUDA_CHECK(cudaSetDevice(gpus_[i]));
        if (i == 0) CUDA_CHECK(cudaEventRecord(begin, streams_[0]));
        CUDA_CHECK(cudaGraphLaunch(graphs[i], streams_[i]));
      }
      CUDA_CHECK(cudaEventRecord(end, streams_[0]));
      Synchronize();
      float ms = 0.0f;
      CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
      best = std::min(best, ms);
    }
    for (const cudaGraphExec_t graph : graphs) CUDA_CHECK(cudaGraphExecDestroy(graph));
    CHECK_EQ(groups_[0].control->fault, 0u);
    return best * 1e3 / kCalls;
  }

 private:
  void Synchronize() const {
    for (const cudaStream_t stream : streams_) CUDA_CHECK(cudaStreamSynchronize(stream));
  }

  const std::vector<int> gpus_;
  std::vector<std::unique_ptr<DeviceMemory>> windows_;
  std::vector<cudaStream_t> streams_;
  std::vector<cuda::PeerGroup> groups_;
};

void PrintRows(const std::vector<int>& gpus, int num_gpus, bool as_json) {
  Group group(gpus);
  const auto ranks = static_cast<int>(gpus.size());
  for (const int64_t tokens : {1, 8, 64, 256, 2048}) {
    const double sum_us = group.Measure(tokens, false);
    const bool is_fused = group.CanFinishRows(tokens);
    const double row_us = is_fused ? group.Measure(tokens, true) : 0.0;
    // Of a two-shot sum: all but its own unit out and in, twice.
    const double bytes = 4.0 * (ranks - 1) / ranks * static_cast<double>(tokens * kHidden * 2);
    if (as_json) {
      std::printf(
          "{\"gpus\": %d, \"ranks\": %d, \"tokens\": %d, \"sum_us\": %.2f, \"fused_us\": %.2f}\n",
          num_gpus, ranks, static_cast<int>(tokens), sum_us, row_us);
    } else {
      std::printf("%4d %5d %6d %9.2f %6.0f", num_gpus, ranks, static_cast<int>(tokens), sum_us,
                  bytes / sum_us / 1e3);
      std::printf(is_fused ? "%11.2f\n" : "          -\n", row_us);
    }
  }
}

// The GPUs from 0 on that all see each other's memory, at most as many as a group has ranks.
std::vector<int> ConnectedGpus(int count) {
  std::vector<int> gpus = {0};
  for (int gpu = 1; gpu < std::min(count, cuda::kMostPeers); ++gpu) {
    for (const int other : gpus) {
      int there = 0, back = 0;
      CUDA_CHECK(cudaDeviceCanAccessPeer(&there, gpu, other));
      CUDA_CHECK(cudaDeviceCanAccessPeer(&back, other, gpu));
      if (there == 0 || back == 0) return gpus;
      CUDA_CHECK(cudaSetDevice(gpu));
      CUDA_CHECK(cudaDeviceEnablePeerAccess(other, 0));
      CUDA_CHECK(cudaSetDevice(other));
      CUDA_CHECK(cudaDeviceEnablePeerAccess(gpu, 0));
    }
    gpus.push_back(gpu);
  }
  return gpus;
}

void Main(int num_gpus, bool as_json) {
  if (!as_json) std::printf("GPUs ranks tokens    sum us   GB/s   with residual, norm, fp8 us\n");
  for (const int ranks : {2, 8}) PrintRows(std::vector<int>(ranks, 0), 1, as_json);
  const std::vector<int> gpus = ConnectedGpus(num_gpus);
  if (gpus.size() > 1) PrintRows(gpus, static_cast<int>(gpus.size()), as_json);
}

}  // namespace
}  // namespace fathom

int main(int argc, char** argv) {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);  // ranks must not wait behind each other
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::printf("no GPU here\n");
    return 0;
  }
  fathom::Main(count, argc > 1 && std::strcmp(argv[1], "--json") == 0);
}
