// Fp8StreamSm90 against linear layers in double precision. Needs a Hopper GPU; skips without one.

#include "kernels/cuda/fp8_stream_sm90.h"

#include <cuda_bf16.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/expert_chunks.h"
#include "tests/kernels/cuda/sm90_fixture.h"

namespace fathom {
namespace {

using OutputType = Fp8StreamSm90::OutputType;

double FromE4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const double value =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return (bits & 0x80) != 0 ? -value : value;
}

struct Shape {
  int num_matrices = 1;
  int n = 0;
  int k = 0;
};

class Fp8StreamSm90Test : public Sm90Test<Fp8StreamSm90> {
 protected:
  // All finite values of magnitude below 4, every one as likely.
  std::vector<uint8_t> Values(size_t size) {
    std::vector<uint8_t> values(size);
    for (uint8_t& value : values)
      value = static_cast<uint8_t>(random_() % 0x48 | (random_() & 0x80));
    return values;
  }
  std::vector<float> Scales(size_t size) {
    std::uniform_real_distribution<float> uniform(0.01f, 0.02f);
    std::vector<float> values(size);
    for (float& value : values) value = uniform(random_);
    return values;
  }

  void MakeInputs(const Shape& shape, int input_rows) {
    shape_ = shape;
    row_bytes_ = shape.k + 16 * static_cast<int>(random_() % 3);
    x_ = Values(static_cast<size_t>(input_rows) * row_bytes_);
    x_scales_ = Scales(static_cast<size_t>(input_rows) * (shape.k / 128));
    weight_ = Values(static_cast<size_t>(shape.num_matrices) * shape.n * shape.k);
    weight_scales_ =
        Scales(static_cast<size_t>(shape.num_matrices) * ((shape.n + 127) / 128) * (shape.k / 128));
    input_rows_ = input_rows;
  }

  void Dense(const Shape& shape, int rows, OutputType type) {
    MakeInputs(shape, rows);
    expert_of_.assign(rows, 0);
    input_of_.resize(rows);
    std::iota(input_of_.begin(), input_of_.end(), 0);
    Run(nullptr, type);
  }

  // Gate and up of rows, and what a double reference makes of them. One in bf16 would be rounded
  // twice; so values that are exact in 1×128 come from gates far out: silu(gate) = gate from 32 on.
  void MakeGateUp(int rows) {
    gate_up_stride_ = 2 * shape_.k + 8 * static_cast<int>(random_() % 3);
    gate_up_.assign(static_cast<size_t>(rows) * gate_up_stride_, __float2bfloat16(NAN));
    row_bytes_ = shape_.k;
    for (int row = 0; row < rows; ++row) {
      for (int k = 0; k < shape_.k; ++k) {
        // The largest of each 128 is 448 times a power of two, which becomes the factor.
        const float factor = std::ldexp(1.0f, -(row + k / 128) % 5);
        uint8_t& code = x_[static_cast<size_t>(row) * row_bytes_ + k];
        if (k % 128 == row % 128) code = 0x7E;  // 448
        __nv_bfloat16* gate = &gate_up_[static_cast<size_t>(row) * gate_up_stride_ + k];
        gate[0] = __float2bfloat16(32.0f);
        gate[shape_.k] = __float2bfloat16(static_cast<float>(FromE4m3(code)) * factor / 32.0f);
        x_scales_[static_cast<size_t>(row) * (shape_.k / 128) + k / 128] = factor;
      }
    }
  }

  // counts[e] rows go to expert e. With choices > 0 they are choices of random tokens, else the
  // input is sorted already.
  void Grouped(const Shape& shape, const std::vector<int>& counts, int choices, OutputType type,
               int max_count = 16) {
    const int rows = std::accumulate(counts.begin(), counts.end(), 0);
    const int tokens = choices > 0 ? std::max(1, rows / choices) : rows;
    MakeInputs(shape, tokens);
    expert_of_.clear();
    input_of_.clear();
    sorted_rows_.clear();
    std::vector<ExpertChunk> chunks;
    for (int e = 0; e < static_cast<int>(counts.size()); ++e) {
      for (int begin = 0; begin < counts[e]; begin += max_count) {
        chunks.push_back({e, static_cast<int>(expert_of_.size()) + begin,
                          std::min(max_count, counts[e] - begin), 0});
      }
      for (int i = 0; i < counts[e]; ++i) {
        const int row = static_cast<int>(expert_of_.size());
        const int choice = choices > 0 ? static_cast<int>(random_() % (tokens * choices)) : row;
        expert_of_.push_back(e);
        sorted_rows_.push_back(choice);
        input_of_.push_back(choices > 0 ? choice / choices : row);
      }
    }
    std::vector<int> notes(kFirstChunkNote + 4 * chunks.size(), -1);
    notes[0] = static_cast<int>(chunks.size());
    std::copy_n(reinterpret_cast<const int*>(chunks.data()), 4 * chunks.size(),
                notes.begin() + kFirstChunkNote);
    const DeviceArray<int> device_notes(notes), device_rows(sorted_rows_);
    const Fp8StreamSm90::Groups groups = {.notes = device_notes.data(),
                                          .rows = choices > 0 ? device_rows.data() : nullptr,
                                          .divisor = std::max(1, choices),
                                          .max_count = max_count,
                                          .complete_early = random_() % 2 == 0,
                                          .num_rows = rows,
                                          .max_chunks = static_cast<int64_t>(chunks.size())};
    Run(&groups, type);
  }

  // The rows of a token that chooses among these experts and `others` that are not here.
  void Joined(const Shape& shape, int choices, int others, OutputType type) {
    std::vector<int> experts(shape.num_matrices + others);
    std::iota(experts.begin(), experts.end(), 0);
    std::shuffle(experts.begin(), experts.end(), random_);
    std::vector<std::pair<int, int>> chosen;  // expert, choice
    for (int j = 0; j < choices; ++j) {
      if (experts[j] < shape.num_matrices) chosen.emplace_back(experts[j], j);
    }
    std::sort(chosen.begin(), chosen.end());
    const int rows = static_cast<int>(chosen.size());
    MakeInputs(shape, std::max(1, rows));
    MakeGateUp(rows);
    shares_ = Scales(choices);
    expert_of_.clear();
    input_of_.resize(rows);
    std::iota(input_of_.begin(), input_of_.end(), 0);
    sorted_rows_.assign(choices, -1);
    std::vector<ExpertChunk> chunks;
    for (int row = 0; row < rows; ++row) {
      expert_of_.push_back(chosen[row].first);
      sorted_rows_[row] = chosen[row].second;
      chunks.push_back({chosen[row].first, row, 1, 0});
    }
    std::vector<int> notes(kFirstChunkNote + 4 * (chunks.size() + 1), -1);
    notes[0] = static_cast<int>(chunks.size());
    std::copy_n(reinterpret_cast<const int*>(chunks.data()), 4 * chunks.size(),
                notes.begin() + kFirstChunkNote);
    const DeviceArray<int> device_notes(notes), device_rows(sorted_rows_);
    const Fp8StreamSm90::Groups groups = {.notes = device_notes.data(),
                                          .rows = device_rows.data(),
                                          .max_count = 1,
                                          .complete_early = random_() % 2 == 0,
                                          .num_rows = choices,
                                          .max_chunks = static_cast<int64_t>(chunks.size()) + 1};
    joins_ = true;
    Run(&groups, type);
    joins_ = false;
  }

  void Run(const Fp8StreamSm90::Groups* groups, OutputType type) {
    const int rows = NumOutputs();
    out_stride_ = shape_.n + 8 * static_cast<int>(random_() % 3);
    const int out_bytes = type == OutputType::kBf16 ? 2 : 4;
    const DeviceArray<uint8_t> x(x_), weight(weight_);
    const DeviceArray<float> x_scales(x_scales_), weight_scales(weight_scales_), shares(shares_);
    const DeviceArray<__nv_bfloat16> gate_up(gate_up_);
    const int sms = device_.multiProcessorCount;
    const DeviceArray<uint8_t> workspace(std::vector<uint8_t>(Fp8StreamSm90::WorkspaceBytes(sms)));
    const Fp8StreamSm90 stream(workspace.data(), sms);
    std::vector<uint8_t> before;
    for (int run = 0; run < 3; ++run) {
      // One row more than there is, which stays as it is.
      const std::vector<uint8_t> poison(static_cast<size_t>(rows + 1) * out_stride_ * out_bytes,
                                        0xFF);
      const DeviceArray<uint8_t> out(poison);
      const Fp8StreamSm90::Input input = {x.data(), x_scales.data(), input_rows_, row_bytes_};
      const Fp8StreamSm90::Weight weights = {weight.data(), weight_scales.data(),
                                             shape_.num_matrices, shape_.n, shape_.k};
      const Fp8StreamSm90::Output output = {out.data(), type, out_stride_, kept_};
      if (joins_) {
        stream.JoinedLinear({gate_up.data(), gate_up_stride_ * 2}, *groups, shares.data(), weights,
                            output, nullptr);
      } else if (groups == nullptr) {
        stream.Linear(input, weights, output, nullptr);
      } else {
        stream.GroupedLinear(input, *groups, weights, output, nullptr);
      }
      CUDA_CHECK(cudaDeviceSynchronize());
      const std::vector<uint8_t> bytes = out.ToHost();
      EXPECT_TRUE(run == 0 || bytes == before) << "not reproducible";
      before = bytes;
    }
    out_.resize(before.size() / out_bytes);
    for (size_t i = 0; i < out_.size(); ++i) {
      out_[i] = type == OutputType::kBf16
                    ? __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(before.data())[i])
                    : reinterpret_cast<const float*>(before.data())[i];
    }
    ExpectClose(type);
  }

  int NumOutputs() const { return joins_ ? 1 : static_cast<int>(expert_of_.size()); }
  double Expected(int row, int column) const {
    if (!joins_) return Product(row, column);
    double sum = 0;
    for (size_t i = 0; i < expert_of_.size(); ++i) {
      sum += shares_[sorted_rows_[i]] * Product(static_cast<int>(i), column);
    }
    return sum;
  }
  double Product(int row, int column) const {
    const int k_blocks = shape_.k / 128;
    const int expert = expert_of_[row], input = input_of_[row];
    const uint8_t* weight = &weight_[(static_cast<size_t>(expert) * shape_.n + column) * shape_.k];
    const uint8_t* x = &x_[static_cast<size_t>(input) * row_bytes_];
    const int scale_row = expert * ((shape_.n + 127) / 128) + column / 128;
    double sum = 0;
    for (int block = 0; block < k_blocks; ++block) {
      double products = 0;
      for (int k = block * 128; k < block * 128 + 128; ++k) {
        products += FromE4m3(weight[k]) * FromE4m3(x[k]);
      }
      sum += products * weight_scales_[static_cast<size_t>(scale_row) * k_blocks + block] *
             x_scales_[static_cast<size_t>(input) * k_blocks + block];
    }
    return sum;
  }

  // The output is rounded to BF16 once: relative 2⁻⁹ at most, 2⁻⁹/√3 = 1.1e-3 in the mean; twice
  // that is the bound. What the tensor cores lose adding up 128 products (they keep some 14 bits of
  // the largest) is all the error that F32 shows.
  void ExpectClose(OutputType type) {
    const int rows = NumOutputs();
    double difference = 0, norm = 0, worst = 0;
    for (int sample = 0; sample < 400; ++sample) {
      // Every row's and every tile's turn comes soon.
      const int row = sample < rows ? sample : static_cast<int>(random_() % rows);
      const int column = (sample * 64 + static_cast<int>(random_() % 64)) % shape_.n;
      const double expected = Expected(row, column);
      const double got = out_[static_cast<size_t>(row) * out_stride_ + column];
      ASSERT_FALSE(std::isnan(got)) << "row " << row << " column " << column << " of " << rows;
      difference += (got - expected) * (got - expected);
      norm += expected * expected;
      worst = std::max(worst, std::abs(got - expected));
    }
    const double error = std::sqrt(difference / norm);
    std::printf("error %.2e, worst %.1e of the mean\n", error, worst / std::sqrt(norm / 400));
    EXPECT_LT(error, type == OutputType::kBf16 ? 2.2e-3 : 5e-4);
    for (int row = 0; row <= rows; ++row) {
      for (int column = 0; column < out_stride_; ++column) {
        const bool ours = row < rows && column < shape_.n;
        ASSERT_EQ(std::isnan(out_[static_cast<size_t>(row) * out_stride_ + column]), !ours)
            << "row " << row << " column " << column;
      }
    }
  }

  Shape shape_;
  int input_rows_ = 0, row_bytes_ = 0, out_stride_ = 0;
  std::vector<uint8_t> x_, weight_;
  std::vector<float> x_scales_, weight_scales_, out_;
  bool joins_ = false;
  float kept_ = 0.0f;
  std::vector<float> shares_;
  int64_t gate_up_stride_ = 0;
  std::vector<__nv_bfloat16> gate_up_;
  std::vector<int> expert_of_, input_of_, sorted_rows_;
};

TEST_F(Fp8StreamSm90Test, OneTokenTimesEachOfTheModelsMatrices) {
  Dense({1, 2112, 7168}, 1, OutputType::kBf16);
  Dense({1, 3072, 1536}, 1, OutputType::kBf16);
  Dense({1, 7168, 2048}, 1, OutputType::kBf16);
}

TEST_F(Fp8StreamSm90Test, EveryNumberOfTokensUpToSeveralChunks) {
  for (int rows : {1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100}) {
    SCOPED_TRACE(rows);
    Dense({1, 320, 512}, rows, OutputType::kF32);
  }
}

TEST_F(Fp8StreamSm90Test, OneTileOfOneBlock) { Dense({1, 64, 128}, 3, OutputType::kF32); }

TEST_F(Fp8StreamSm90Test, RaggedCountsPerExpert) {
  for (int k : {128, 256, 384, 512, 640, 1408}) {
    Grouped({12, 384, k}, {0, 3, 7, 8, 2, 0, 0, 5, 8, 20, 4, 0}, 2, OutputType::kBf16, 8);
    Grouped({12, 384, k}, {0, 3, 7, 8, 2, 0, 0, 5, 8, 20, 4, 0}, 0, OutputType::kF32, 8);
    Grouped({12, 384, k}, {1, 0, 7, 16, 17, 0, 0, 33, 8, 2, 1, 64}, 4, OutputType::kBf16);
    Grouped({12, 384, k}, {0, 3, 7, 16, 17, 0, 0, 70, 8, 2, 1, 0}, 0, OutputType::kF32);
  }
}

TEST_F(Fp8StreamSm90Test, FewRowsOf257Experts) {
  std::vector<int> counts(257, 0);
  counts[256] = 1;
  for (int i = 0; i < 8; ++i) counts[random_() % 256] = 1;
  Grouped({257, 512, 1024}, counts, 9, OutputType::kBf16);
  for (int& count : counts) count = static_cast<int>(random_() % 5);
  counts[256] = 64;
  Grouped({257, 512, 1024}, counts, 9, OutputType::kBf16);
  Grouped({257, 1024, 256}, counts, 0, OutputType::kBf16);
}

TEST_F(Fp8StreamSm90Test, ManyShortItemsForEachShare) {
  std::vector<int> counts(60);
  for (int& count : counts) count = static_cast<int>(random_() % 9);
  for (int k : {128, 256, 512}) Grouped({60, 3584, k}, counts, 0, OutputType::kBf16, 8);
}

TEST_F(Fp8StreamSm90Test, OneExpertHasAllRows) {
  std::vector<int> counts(31, 0);
  counts[17] = 230;
  Grouped({31, 512, 1792}, counts, 2, OutputType::kBf16);
}

TEST_F(Fp8StreamSm90Test, OutputThatTheL2ShouldKeep) {
  kept_ = 0.5f;
  Grouped({12, 384, 256}, {0, 3, 7, 16, 17, 0, 0, 70, 8, 2, 1, 0}, 0, OutputType::kBf16);
  kept_ = 0.0f;
}

TEST_F(Fp8StreamSm90Test, JoinsTheExpertsOfOneToken) {
  for (int k : {128, 256, 640}) {
    Joined({12, 384, k}, 5, 4, OutputType::kF32);
    Joined({12, 448, k}, 1, 0, OutputType::kBf16);
  }
  Joined({33, 7168, 1024}, 9, 0, OutputType::kF32);  // several rounds of the ring
  for (int run = 0; run < 4; ++run) Joined({257, 7168, 256}, 9, 0, OutputType::kBf16);
}

TEST_F(Fp8StreamSm90Test, JoinsNoExpertsToZero) {
  constexpr int kChoices = 3;
  MakeInputs({4, 128, 256}, 1);
  MakeGateUp(1);
  const DeviceArray<uint8_t> weight(weight_);
  const DeviceArray<float> weight_scales(weight_scales_);
  const DeviceArray<float> shares(std::vector<float>(kChoices, 1.0f));
  const DeviceArray<__nv_bfloat16> gate_up(gate_up_);
  const DeviceArray<float> out(std::vector<float>(128, NAN));
  const DeviceArray<int> notes(std::vector<int>(kFirstChunkNote + 4, 0));
  const DeviceArray<int> rows(std::vector<int>(kChoices, -1));
  const int sms = device_.multiProcessorCount;
  const DeviceArray<uint8_t> workspace(std::vector<uint8_t>(Fp8StreamSm90::WorkspaceBytes(sms)));
  const Fp8StreamSm90 stream(workspace.data(), sms);
  stream.JoinedLinear({gate_up.data(), gate_up_stride_ * 2},
                      {.notes = notes.data(),
                       .rows = rows.data(),
                       .max_count = 1,
                       .num_rows = kChoices,
                       .max_chunks = 1},
                      shares.data(), {weight.data(), weight_scales.data(), 4, 128, 256},
                      {out.data(), OutputType::kF32, 128}, nullptr);
  CUDA_CHECK(cudaDeviceSynchronize());
  for (const float value : out.ToHost()) ASSERT_EQ(value, 0.0f);
}

TEST_F(Fp8StreamSm90Test, NoRowsLeaveTheOutputAlone) {
  MakeInputs({4, 128, 256}, 3);
  const DeviceArray<uint8_t> x(x_), weight(weight_), out(std::vector<uint8_t>(3 * 128 * 2, 0xFF));
  const DeviceArray<float> x_scales(x_scales_), weight_scales(weight_scales_);
  const DeviceArray<int> notes(std::vector<int>(kFirstChunkNote, 0));
  const int sms = device_.multiProcessorCount;
  const DeviceArray<uint8_t> workspace(std::vector<uint8_t>(Fp8StreamSm90::WorkspaceBytes(sms)));
  const Fp8StreamSm90 stream(workspace.data(), sms);
  stream.GroupedLinear({x.data(), x_scales.data(), 3, row_bytes_},
                       {.notes = notes.data(), .max_count = 16},
                       {weight.data(), weight_scales.data(), 4, 128, 256},
                       {out.data(), OutputType::kBf16, 128}, nullptr);
  CUDA_CHECK(cudaDeviceSynchronize());
  for (uint8_t byte : out.ToHost()) ASSERT_EQ(byte, 0xFF);
}

}  // namespace
}  // namespace fathom
