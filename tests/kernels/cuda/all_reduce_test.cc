// Several ranks in this process, on one GPU: every rank has a window and a stream, and all windows
// are local. What processes add, mapping each other's memory, is
// tests/worker/peer_communicator_test.
#include "kernels/cuda/all_reduce.h"

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <utility>
#include <vector>

#include "kernels/cuda/cuda_check.h"
#include "kernels/number_formats.h"

namespace fathom::cuda {
namespace {

constexpr uint64_t kSeed = 20261123;
// Streams must not share a queue: a kernel that waits would then wait for the one behind it.
[[maybe_unused]] const int kQueues = setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);

class DeviceArray {
 public:
  explicit DeviceArray(size_t num_bytes) : num_bytes_(num_bytes) {
    CUDA_CHECK(cudaMalloc(&data_, std::max<size_t>(num_bytes, 1)));
    CUDA_CHECK(cudaMemset(data_, 0, num_bytes));
  }
  DeviceArray(DeviceArray&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), num_bytes_(other.num_bytes_) {}
  ~DeviceArray() { cudaFree(data_); }
  void* get() const { return data_; }
  template <typename T>
  void Set(const std::vector<T>& values) {
    CHECK_EQ(values.size() * sizeof(T), num_bytes_);
    CUDA_CHECK(cudaMemcpy(data_, values.data(), num_bytes_, cudaMemcpyHostToDevice));
  }
  template <typename T>
  std::vector<T> Get() const {
    std::vector<T> values(num_bytes_ / sizeof(T));
    CUDA_CHECK(cudaMemcpy(values.data(), data_, num_bytes_, cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  void* data_ = nullptr;
  size_t num_bytes_;
};

class Ranks {
 public:
  explicit Ranks(int world_size, int64_t timeout_ns = int64_t{20'000'000'000})
      : groups_(world_size) {
    LoadPeerKernels();
    for (int rank = 0; rank < world_size; ++rank) {
      windows_.emplace_back(kPeerWindowBytes);
      cudaStream_t stream;
      CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      streams_.push_back(stream);
    }
    for (int rank = 0; rank < world_size; ++rank) {
      PeerGroup& group = groups_[rank];
      group.rank = rank;
      group.world_size = world_size;
      for (int peer = 0; peer < world_size; ++peer) {
        group.windows[peer] = static_cast<char*>(windows_[peer].get());
      }
      void* control = nullptr;
      CUDA_CHECK(cudaHostAlloc(&control, sizeof(PeerControl), cudaHostAllocMapped));
      group.control = new (control) PeerControl();
      group.timeout_ns = timeout_ns;
      group.shares_gpu = true;
    }
    CUDA_CHECK(cudaDeviceSynchronize());
  }
  ~Ranks() {
    for (const PeerGroup& group : groups_) cudaFreeHost(group.control);
    for (const cudaStream_t stream : streams_) cudaStreamDestroy(stream);
  }

  int world_size() const { return static_cast<int>(groups_.size()); }
  const PeerGroup& group(int rank) const { return groups_[rank]; }
  cudaStream_t stream(int rank) const { return streams_[rank]; }

  using Body = std::function<void(int rank, const PeerGroup& group, cudaStream_t stream)>;
  void Queue(const Body& body) {
    for (int rank = 0; rank < world_size(); ++rank) body(rank, groups_[rank], streams_[rank]);
  }
  void Run(const Body& body) {
    Queue(body);
    Await();
  }
  void Await() {
    for (int rank = 0; rank < world_size(); ++rank) {
      CUDA_CHECK(cudaStreamSynchronize(streams_[rank]));
      ASSERT_EQ(groups_[rank].control->fault, 0u) << "rank " << rank;
    }
  }

 private:
  std::vector<DeviceArray> windows_;
  std::vector<cudaStream_t> streams_;
  std::vector<PeerGroup> groups_;
};

// Numbers of very different sizes, so that another order of summing would give other bits.
class Numbers {
 public:
  explicit Numbers(uint32_t seed) : engine_(seed) {}
  float Next() {
    const float exponent = static_cast<float>(engine_() % 12) - 8.0f;
    return (static_cast<float>(engine_() % 2000001) / 1e6f - 1.0f) * std::exp2(exponent);
  }

 private:
  std::minstd_rand engine_;
};

template <typename T>
T RoundTo(float value) {
  if constexpr (sizeof(T) == 2) {
    return ToBFloat16(value);
  } else {
    return value;
  }
}
template <typename T>
float Wide(T value) {
  if constexpr (sizeof(T) == 2) {
    return ToFloat(value);
  } else {
    return value;
  }
}
template <typename T>
uint32_t Bits(T value) {
  if constexpr (sizeof(T) == 2) {
    return value.bits;
  } else {
    return BitsOf(value);
  }
}
template <typename T>
constexpr DType kTypeOf = sizeof(T) == 2 ? DType::kBF16 : DType::kF32;

template <typename T>
std::vector<T> RandomValues(int64_t count, uint32_t seed) {
  Numbers numbers(seed);
  std::vector<T> values(count);
  for (T& value : values) value = RoundTo<T>(numbers.Next());
  return values;
}
template <typename T>
std::vector<std::vector<T>> PartsOf(int world_size, int64_t count, uint32_t seed) {
  std::vector<std::vector<T>> parts;
  for (int rank = 0; rank < world_size; ++rank) {
    parts.push_back(RandomValues<T>(count, seed + 7919u * static_cast<uint32_t>(rank)));
  }
  return parts;
}
template <typename T>
std::vector<T> RankOrderSum(const std::vector<std::vector<T>>& parts) {
  std::vector<T> sums(parts[0].size());
  for (size_t i = 0; i < sums.size(); ++i) {
    float sum = Wide(parts[0][i]);
    for (size_t rank = 1; rank < parts.size(); ++rank) sum += Wide(parts[rank][i]);
    sums[i] = RoundTo<T>(sum);
  }
  return sums;
}
template <typename T>
int64_t NumDifferent(const std::vector<T>& found, const std::vector<T>& expected) {
  CHECK_EQ(found.size(), expected.size());
  int64_t different = 0;
  for (size_t i = 0; i < found.size(); ++i) different += Bits(found[i]) != Bits(expected[i]);
  return different;
}

class AllReduceTest : public testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "no GPU here";
    std::printf("seed %d\n", static_cast<int>(kSeed));
  }
};

template <typename T>
void SumAndCompare(Ranks& ranks, int64_t count) {
  const auto parts = PartsOf<T>(ranks.world_size(), count, kSeed + static_cast<uint32_t>(count));
  std::vector<DeviceArray> arrays;
  for (const auto& part : parts) arrays.emplace_back(count * sizeof(T)).Set(part);
  CUDA_CHECK(cudaDeviceSynchronize());
  ranks.Run([&](int rank, const PeerGroup& group, cudaStream_t stream) {
    AllReduceSum(group, arrays[rank].get(), kTypeOf<T>, count, stream);
  });
  const std::vector<T> expected = RankOrderSum(parts);
  for (int rank = 0; rank < ranks.world_size(); ++rank) {
    EXPECT_EQ(NumDifferent(arrays[rank].Get<T>(), expected), 0)
        << "rank " << rank << " of " << ranks.world_size() << ", " << count << " elements";
  }
}

TEST_F(AllReduceTest, SumsAreTheBitsOfRankOrderInBothWays) {
  for (const int world_size : {2, 3, 8}) {
    Ranks ranks(world_size);
    // Packets of both parities, the limits of the one-shot way, and units that do not divide
    // evenly.
    for (const int64_t count :
         {1, 3, 4, 1000, 7168, 7 * 7168, 65536, 65540, 262144, 262145, 500003}) {
      SumAndCompare<float>(ranks, count);
      SumAndCompare<BFloat16>(ranks, count);
      if (HasFatalFailure()) return;
    }
    if (world_size == 2) SumAndCompare<float>(ranks, 2'200'001);  // two launches
  }
}

struct NormShape {
  int64_t rows, columns, gap;  // gap: elements between rows
  bool quantizes;
};

// Everything of one rank, with rows `gap` apart.
template <typename T>
struct NormArrays {
  NormArrays(const NormShape& shape, const std::vector<T>& partial_values,
             const std::vector<T>& residual_values)
      : pitch(shape.columns + shape.gap),
        partial(shape.rows * pitch * sizeof(T)),
        residual(shape.rows * pitch * sizeof(T)),
        normed(shape.rows * pitch * sizeof(T)),
        values(shape.rows * pitch),
        scales(shape.rows * Groups(shape) * sizeof(float)) {
    partial.Set(partial_values);
    residual.Set(residual_values);
  }
  static int64_t Groups(const NormShape& shape) { return (shape.columns + 127) / 128; }

  PeerAddRmsNorm Task(const NormShape& shape, const Tensor& weight, float eps) const {
    const auto rows = [&](const DeviceArray& array, DType dtype) {
      return Tensor(array.get(), dtype, {shape.rows, pitch}).Slice(1, 0, shape.columns);
    };
    PeerAddRmsNorm task{.partial = rows(partial, kTypeOf<T>),
                        .residual = rows(residual, kTypeOf<T>),
                        .weight = weight,
                        .eps = eps,
                        .normed = rows(normed, kTypeOf<T>)};
    if (shape.quantizes) {
      task.values = rows(values, DType::kF8E4M3);
      task.scales = Tensor(scales.get(), DType::kF32, {shape.rows, Groups(shape)});
    }
    return task;
  }

  const int64_t pitch;
  DeviceArray partial, residual, normed, values, scales;
};

// What one row of one rank must be. The residual is exact; the norm within what its sum of squares
// can be off, and one rounding; the codes are exactly those of the norm that was found.
template <typename T>
void CheckRow(const NormShape& shape, const NormArrays<T>& arrays, int64_t row,
              const std::vector<T>& sums, const std::vector<T>& residual,
              const std::vector<float>& gains, float eps, const std::vector<T>& found_residual,
              const std::vector<T>& found_normed, const std::vector<uint8_t>& codes,
              const std::vector<float>& scales) {
  const int64_t base = row * arrays.pitch;
  double squares = 0.0;
  std::vector<double> added(shape.columns);
  int wrong = 0;
  for (int64_t i = 0; i < shape.columns; ++i) {
    const T expected = RoundTo<T>(Wide(residual[base + i]) + Wide(sums[base + i]));
    wrong += Bits(found_residual[base + i]) != Bits(expected);
    added[i] = Wide(expected);
    squares += added[i] * added[i];
  }
  EXPECT_EQ(wrong, 0) << "residual of row " << row;
  const double factor = 1.0 / std::sqrt(squares / static_cast<double>(shape.columns) + eps);
  // Some 20 roundings of a float in the sum of squares (a tree), the root and two products; then
  // the one to T.
  const double bound = 24 * std::ldexp(1.0, -24) + std::ldexp(1.0, sizeof(T) == 2 ? -8 : -24);
  for (int64_t i = 0; i < shape.columns && wrong < 3; ++i) {
    const double expected = added[i] * factor * gains[i];
    const double found = Wide(found_normed[base + i]);
    if (!(std::abs(found - expected) <= bound * std::abs(expected))) {
      ++wrong;
      ADD_FAILURE() << "norm at [" << row << ", " << i << "]: " << found << ", not " << expected;
    }
  }
  if (!shape.quantizes) return;
  for (int64_t begin = 0; begin < shape.columns && wrong < 3; begin += 128) {
    const int64_t end = std::min(begin + 128, shape.columns);
    float largest = 1e-4f;
    for (int64_t i = begin; i < end; ++i) {
      largest = std::max(largest, std::abs(Wide(found_normed[base + i])));
    }
    const float scale = largest / 448.0f;
    const int64_t group = row * NormArrays<T>::Groups(shape) + begin / 128;
    EXPECT_EQ(scales[group], scale) << "factor at [" << row << ", " << begin / 128 << "]";
    for (int64_t i = begin; i < end; ++i) {
      const uint8_t code = ToFloat8E4M3(Wide(found_normed[base + i]) / scale).bits;
      if (codes[base + i] != code) {
        ++wrong;
        ADD_FAILURE() << "code at [" << row << ", " << i << "]: " << int{codes[base + i]}
                      << ", not " << int{code};
      }
    }
  }
}

template <typename T>
void NormAndCompare(Ranks& ranks, const NormShape& shape, DType weight_type) {
  SCOPED_TRACE(testing::Message() << shape.rows << " x " << shape.columns << " + " << shape.gap
                                  << ", " << ranks.world_size() << " ranks, "
                                  << NameOf(kTypeOf<T>));
  constexpr float kEps = 1e-6f;
  const auto seed = static_cast<uint32_t>(kSeed + shape.rows * 31 + shape.columns);
  const int64_t count = shape.rows * (shape.columns + shape.gap);
  const auto parts = PartsOf<T>(ranks.world_size(), count, seed);
  const std::vector<T> residual = RandomValues<T>(count, seed + 1);
  std::vector<float> gains = RandomValues<float>(shape.columns, seed + 2);
  DeviceArray weight(shape.columns * SizeOf(weight_type));
  if (weight_type == DType::kBF16) {
    std::vector<BFloat16> rounded;
    for (float& gain : gains) {
      rounded.push_back(ToBFloat16(gain));
      gain = ToFloat(rounded.back());
    }
    weight.Set(rounded);
  } else {
    weight.Set(gains);
  }
  std::vector<NormArrays<T>> arrays;
  arrays.reserve(ranks.world_size());
  for (const auto& part : parts) arrays.emplace_back(shape, part, residual);
  CUDA_CHECK(cudaDeviceSynchronize());
  ranks.Run([&](int rank, const PeerGroup& group, cudaStream_t stream) {
    const Tensor gain(weight.get(), weight_type, {shape.columns});
    AllReduceAddRmsNorm(group, arrays[rank].Task(shape, gain, kEps), stream);
  });

  const std::vector<T> sums = RankOrderSum(parts);
  const auto found_residual = arrays[0].residual.template Get<T>();
  const auto found_normed = arrays[0].normed.template Get<T>();
  const auto codes = arrays[0].values.template Get<uint8_t>();
  const auto scales = arrays[0].scales.template Get<float>();
  const int64_t step = std::max<int64_t>(1, shape.rows / 40);
  for (int64_t row = 0; row < shape.rows; row += step) {
    CheckRow(shape, arrays[0], row, sums, residual, gains, kEps, found_residual, found_normed,
             codes, scales);
  }
  for (int rank = 1; rank < ranks.world_size(); ++rank) {  // the same bits everywhere
    EXPECT_EQ(NumDifferent(arrays[rank].residual.template Get<T>(), found_residual), 0);
    EXPECT_EQ(NumDifferent(arrays[rank].normed.template Get<T>(), found_normed), 0);
    EXPECT_EQ(arrays[rank].values.template Get<uint8_t>(), codes);
    EXPECT_EQ(arrays[rank].scales.template Get<float>(), scales);
  }
}

TEST_F(AllReduceTest, AddsToTheResidualNormsAndQuantizes) {
  for (const int world_size : {2, 5, 8}) {
    Ranks ranks(world_size);
    for (const NormShape& shape : {NormShape{1, 7168, 0, true},
                                   {4, 7168, 64, true},
                                   {3, 200, 3, true},
                                   {5, 4, 1, false},
                                   {2, 16384, 0, true},
                                   {9, 2050, 5, true}}) {
      NormAndCompare<BFloat16>(ranks, shape, DType::kBF16);
      NormAndCompare<float>(ranks, shape, DType::kF32);
      if (HasFailure()) return;
    }
    NormAndCompare<BFloat16>(ranks, {9, 7168, 0, true}, DType::kF32);
  }
}

TEST_F(AllReduceTest, FusesWhatGoesInOneShot) {
  for (const int world_size : {2, 8}) {
    const PeerGroup group{.rank = 0, .world_size = world_size};
    const int64_t most = world_size == 2 ? 36 : 9;  // rows of 14 KiB in 1 MiB / world_size
    EXPECT_TRUE(CanAllReduceAddRmsNorm(group, DType::kBF16, most, 7168));
    EXPECT_FALSE(CanAllReduceAddRmsNorm(group, DType::kBF16, most + 1, 7168));
    EXPECT_FALSE(CanAllReduceAddRmsNorm(group, DType::kBF16, 1, 16388));
  }
}

TEST_F(AllReduceTest, GathersAtRankZero) {
  Ranks ranks(4);
  for (const int64_t num_bytes : {4, 100, 4096, 64 << 10, (2 << 20) + 20, 5 << 20}) {
    const auto parts = PartsOf<float>(4, num_bytes / 4, static_cast<uint32_t>(num_bytes));
    std::vector<DeviceArray> arrays;
    for (const auto& part : parts) arrays.emplace_back(num_bytes).Set(part);
    DeviceArray whole(4 * num_bytes);
    CUDA_CHECK(cudaDeviceSynchronize());
    ranks.Run([&](int rank, const PeerGroup& group, cudaStream_t stream) {
      GatherToRank0(group, arrays[rank].get(), num_bytes, rank == 0 ? whole.get() : nullptr,
                    stream);
    });
    std::vector<float> expected;
    for (const auto& part : parts) expected.insert(expected.end(), part.begin(), part.end());
    EXPECT_EQ(NumDifferent(whole.Get<float>(), expected), 0) << num_bytes << " bytes";
  }
}

// Calls of all kinds and sizes follow each other without the host, again and again; every call's
// input is the call before's output, so that one wrong element anywhere shows at the end.
TEST_F(AllReduceTest, RecordedCallsOfAllKindsReplayInAnyMixture) {
  constexpr int kWorld = 4, kReplays = 25;
  const std::vector<int64_t> counts = {7168, 64, 600'000, 7168, 1'200'000, 4, 65'536, 7168 * 40, 9};
  Ranks ranks(kWorld);
  std::vector<DeviceArray> arrays, wholes;
  std::vector<std::vector<float>> expected;
  const int64_t most = *std::max_element(counts.begin(), counts.end());
  for (int rank = 0; rank < kWorld; ++rank) {
    std::vector<float> values(most);
    for (int64_t i = 0; i < most; ++i) {  // quarters, so that all sums are exact
      values[i] = static_cast<float>((i * 7 + rank * 13) % 64) / 4.0f;
    }
    arrays.emplace_back(most * 4).Set(values);
    wholes.emplace_back(kWorld * 4096);
    expected.push_back(std::move(values));
  }
  std::vector<cudaGraphExec_t> graphs(kWorld);
  ranks.Queue([&](int rank, const PeerGroup& group, cudaStream_t stream) {
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (const int64_t count : counts) {
      AllReduceSum(group, arrays[rank].get(), DType::kF32, count, stream);
      GatherToRank0(group, arrays[rank].get(), 4096, wholes[rank].get(), stream);
    }
    cudaGraph_t graph;
    CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&graphs[rank], graph, 0));
    CUDA_CHECK(cudaGraphUpload(graphs[rank], stream));
    CUDA_CHECK(cudaGraphDestroy(graph));
  });
  CUDA_CHECK(cudaDeviceSynchronize());
  // Sums of four grow fast: from time to time all start again from what they began with.
  for (int replay = 0; replay < kReplays; ++replay) {
    for (int rank = 0; rank < kWorld; ++rank) arrays[rank].Set(expected[rank]);
    CUDA_CHECK(cudaDeviceSynchronize());
    ranks.Run([&](int rank, const PeerGroup&, cudaStream_t stream) {
      CUDA_CHECK(cudaGraphLaunch(graphs[rank], stream));
    });
    if (HasFatalFailure()) return;
    std::vector<float> sums(most);
    for (int64_t i = 0; i < most; ++i) {
      for (int rank = 0; rank < kWorld; ++rank) sums[i] += expected[rank][i];
      int times = 0;
      for (const int64_t count : counts) times += i < count;
      for (int k = 1; k < times; ++k) sums[i] *= kWorld;
    }
    for (int rank = 0; rank < kWorld; ++rank) {
      EXPECT_EQ(NumDifferent(arrays[rank].Get<float>(), sums), 0)
          << "rank " << rank << ", replay " << replay;
    }
  }
  for (const cudaGraphExec_t graph : graphs) CUDA_CHECK(cudaGraphExecDestroy(graph));
}

TEST_F(AllReduceTest, ASilentRankIsNamedAndAllLaterCallsEndAtOnce) {
  for (const int64_t count : {100, 2'000'000}) {
    Ranks ranks(3, /*timeout_ns=*/50'000'000);
    DeviceArray array(count * 4);
    for (int call = 0; call < 50; ++call) {
      AllReduceSum(ranks.group(0), array.get(), DType::kF32, count, ranks.stream(0));
    }
    CUDA_CHECK(cudaStreamSynchronize(ranks.stream(0)));
    const uint32_t fault = ranks.group(0).control->fault;
    EXPECT_TRUE(fault == PeerControl::kTimedOut + 1 || fault == PeerControl::kTimedOut + 2)
        << fault;
  }
}

TEST_F(AllReduceTest, AbortEndsAWaitThatWouldLastForEver) {
  for (const int64_t count : {100, 2'000'000}) {
    Ranks ranks(2);
    DeviceArray array(count * 4);
    for (int call = 0; call < 50; ++call) {
      AllReduceSum(ranks.group(1), array.get(), DType::kF32, count, ranks.stream(1));
    }
    EXPECT_EQ(cudaStreamQuery(ranks.stream(1)), cudaErrorNotReady);
    ranks.group(1).control->abort = 1;
    CUDA_CHECK(cudaStreamSynchronize(ranks.stream(1)));
    EXPECT_EQ(ranks.group(1).control->fault, PeerControl::kAborted);
  }
}

}  // namespace
}  // namespace fathom::cuda
