#include "kernels/cuda/cuda_ops.h"

#include <algorithm>

#include "kernels/cuda/cuda_check.h"

namespace fathom {
namespace {

// Attention takes longer steps in pieces of so many tokens.
constexpr int64_t kMostLatentTokens = 1024;

int64_t AttentionBytes(const StepLimits& limits) {
  const int64_t rows = std::min(limits.max_tokens, kMostLatentTokens) * limits.heads;
  int64_t bytes = 0;
  for (const int64_t width :
       {limits.kv_lora_rank, limits.kv_lora_rank, limits.qk_rope_head_dim, limits.v_head_dim}) {
    bytes += cuda::AlignUp(rows * width * SizeOf(limits.act));
  }
  return bytes;
}

// Parts of the router's logits: in so many parts that all multiprocessors have 128 rows. And the
// rows of each expert in each block.
int64_t RouteBytes(const StepLimits& limits, int num_multiprocessors) {
  const int64_t rows = std::max<int64_t>(limits.max_tokens, int64_t{num_multiprocessors} * 128);
  const int64_t counts = CudaOps::kMostChooseBlocks * limits.num_experts;
  return cuda::AlignUp((rows * limits.n_routed_experts + counts) *
                       static_cast<int64_t>(sizeof(float)));
}

// What the hungriest operation needs.
int64_t OperationBytes(const StepLimits& limits, int num_multiprocessors) {
  return std::max(AttentionBytes(limits), RouteBytes(limits, num_multiprocessors));
}

}  // namespace

GrowingMemory::~GrowingMemory() { CUDA_CHECK(cudaFree(data_)); }

void* GrowingMemory::Reserve(int64_t num_bytes) {
  if (num_bytes > num_bytes_) {
    CUDA_CHECK(cudaFree(data_));  // waits for whoever uses it
    CUDA_CHECK(cudaMalloc(&data_, static_cast<size_t>(num_bytes)));
    num_bytes_ = num_bytes;
  }
  return data_;
}

CudaOps::CudaOps(const cudaDeviceProp& device, cudaStream_t stream)
    : device_(device), stream_(stream), step_(device) {
  const int64_t slot_bytes = cuda::RouteSlotBytes(device.multiProcessorCount);
  counter_ = static_cast<int*>(route_memory_.Reserve(kCounterBytes + slot_bytes));
  CUDA_CHECK(cudaMemsetAsync(counter_, 0, kCounterBytes, stream_));
  CUDA_CHECK(cudaMemsetAsync(route_slots(), 0xFF, static_cast<size_t>(slot_bytes), stream_));
  if (Fp8StreamSm90::Supports(device)) {
    const int64_t bytes = Fp8StreamSm90::WorkspaceBytes(device.multiProcessorCount);
    fp8_stream_.emplace(fp8_stream_memory_.Reserve(bytes), device.multiProcessorCount);
    fp8_tile_.emplace(device.multiProcessorCount);
  }
}

int64_t CudaOps::ScratchBytes(const StepLimits& limits) const {
  return OperationBytes(limits, device_.multiProcessorCount) + step_.ScratchBytes(limits);
}

void CudaOps::UseScratch(const StepLimits& limits, void* memory) {
  const int64_t bytes = OperationBytes(limits, device_.multiProcessorCount);
  scratch_.Use(memory, bytes);
  step_.UseScratch(limits, static_cast<char*>(memory) + bytes);
}

void CudaOps::BeginStep(const AttentionBatch& batch) { step_.Begin(batch, stream_); }

}  // namespace fathom
