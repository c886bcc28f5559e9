#include "worker/weight_source.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/algorithm/container.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/number_formats.h"
#include "kernels/ops.h"

namespace fathom {
namespace {

constexpr int64_t kPieceBytes = int64_t{4} << 20;  // of one read
// A gap between two column slices below this is read and dropped: the disk delivers whole pages.
constexpr int64_t kSmallestGapBytes = 4096;

std::string Expected(absl::Span<const int64_t> shape, absl::Span<const DType> types) {
  std::vector<const char*> names;
  for (const DType type : types) names.push_back(NameOf(type));
  return absl::StrCat(absl::StrJoin(names, " or "), "[", absl::StrJoin(shape, ", "), "]");
}

// 64 bits that differ for different parts of different tensors: FNV-1a.
uint64_t SeedOf(const std::string& name, const MatrixPart& part) {
  uint64_t hash = 0xcbf29ce484222325u;
  const auto add = [&hash](uint64_t value) { hash = (hash ^ value) * 0x100000001b3u; };
  for (const char character : name) add(static_cast<unsigned char>(character));
  add(static_cast<uint64_t>(part.rows.begin));
  add(static_cast<uint64_t>(part.columns.begin));
  return hash;
}

// Root mean square of what FillRandom makes of F8_E4M3: the exponents 2⁻⁶ to 2⁻¹ and below, all
// mantissas, as often as each other.
double RandomE4M3Deviation() {
  double sum = 0.0;
  constexpr int kCodes = 7 << 3;  // of positive numbers below 1
  for (int code = 0; code < kCodes; ++code) {
    const double value = ToFloat(Float8E4M3{static_cast<uint8_t>(code)});
    sum += value * value;
  }
  return std::sqrt(sum / kCodes);
}

}  // namespace

absl::StatusOr<DType> CheckpointWeights::TypeOf(const std::string& name,
                                                absl::Span<const int64_t> shape,
                                                absl::Span<const DType> types) const {
  const Checkpoint::Entry* entry = checkpoint_.Find(name);
  if (entry == nullptr) {
    return absl::NotFoundError(absl::StrCat(checkpoint_.directory(), ": tensor \"", name,
                                            "\" is missing, expected ", Expected(shape, types)));
  }
  for (const DType type : types) {
    if (entry->info->dtype == NameOf(type) && entry->info->shape == shape) return type;
  }
  return absl::InvalidArgumentError(absl::StrCat(entry->file->path(), ": tensor \"", name, "\" is ",
                                                 entry->info->DebugString(), ", expected ",
                                                 Expected(shape, types)));
}

absl::Status CheckpointWeights::ReadMatrix(const std::string& name, DType type,
                                           const MatrixPart& part, Device& device,
                                           const Tensor& target, const ReadProgress& progress) {
  const Checkpoint::Entry* entry = checkpoint_.Find(name);
  CHECK(entry != nullptr) << name;
  const SafetensorsFile& file = *entry->file;
  const int64_t element_bytes = SizeOf(type);
  const int64_t row_bytes = part.num_columns * element_bytes;
  const int64_t slice_bytes = part.columns.size() * element_bytes;
  const bool reads_across = row_bytes - slice_bytes < kSmallestGapBytes;
  const int64_t rows_per_piece =
      std::max<int64_t>(1, kPieceBytes / (reads_across ? row_bytes : slice_bytes));
  const int64_t first = entry->info->file_offset + part.columns.begin * element_bytes;  // of row 0

  for (int64_t row = part.rows.begin; row < part.rows.end; row += rows_per_piece) {
    const int64_t num_rows = std::min(rows_per_piece, part.rows.end - row);
    if (reads_across) {
      staging_.resize((num_rows - 1) * row_bytes + slice_bytes);
      RETURN_IF_ERROR(file.Read(first + row * row_bytes, staging_.size(), staging_.data()));
      for (int64_t i = 1; i < num_rows && slice_bytes < row_bytes; ++i) {
        std::memmove(&staging_[i * slice_bytes], &staging_[i * row_bytes], slice_bytes);
      }
    } else {
      staging_.resize(num_rows * slice_bytes);
      for (int64_t i = 0; i < num_rows; ++i) {
        RETURN_IF_ERROR(
            file.Read(first + (row + i) * row_bytes, slice_bytes, &staging_[i * slice_bytes]));
      }
    }
    const int64_t target_row = row - part.rows.begin;
    device.CopyFromHost(staging_.data(), target.Slice(0, target_row, target_row + num_rows));
    progress(num_rows * slice_bytes);
  }
  return absl::OkStatus();
}

absl::Status CheckpointWeights::ReadVector(const std::string& name, DType type,
                                           std::vector<float>& values) {
  const Checkpoint::Entry* entry = checkpoint_.Find(name);
  CHECK(entry != nullptr) << name;
  staging_.resize(values.size() * SizeOf(type));
  RETURN_IF_ERROR(entry->file->Read(entry->info->file_offset, static_cast<int64_t>(staging_.size()),
                                    staging_.data()));
  if (type == DType::kF32) {
    std::memcpy(values.data(), staging_.data(), staging_.size());
    return absl::OkStatus();
  }
  for (size_t i = 0; i < values.size(); ++i) {
    BFloat16 value;
    std::memcpy(&value, &staging_[i * sizeof(value)], sizeof(value));
    values[i] = ToFloat(value);
  }
  return absl::OkStatus();
}

absl::StatusOr<DType> RandomWeights::TypeOf(const std::string&, absl::Span<const int64_t>,
                                            absl::Span<const DType> types) const {
  for (const DType type : {DType::kF8E4M3, DType::kBF16}) {
    if (absl::c_linear_search(types, type)) return type;
  }
  return types.front();
}

absl::Status RandomWeights::ReadMatrix(const std::string& name, DType type, const MatrixPart& part,
                                       Device& device, const Tensor& target,
                                       const ReadProgress& progress) {
  if (absl::EndsWith(name, "_scale_inv")) {
    const double width = static_cast<double>(part.num_columns) * kFp8Block;
    const std::vector<float> factors(
        target.num_elements(),
        static_cast<float>(1.0 / (RandomE4M3Deviation() * std::sqrt(width))));
    device.CopyFromHost(factors.data(), target);
  } else {
    // The variance of uniform numbers is a third of their amplitude's square.
    const double amplitude = std::sqrt(3.0 / static_cast<double>(part.num_columns));
    device.ops().FillRandom(target, static_cast<float>(amplitude), SeedOf(name, part));
  }
  progress(target.num_elements() * SizeOf(type));
  return absl::OkStatus();
}

absl::Status RandomWeights::ReadVector(const std::string& name, DType, std::vector<float>& values) {
  std::fill(values.begin(), values.end(), absl::EndsWith(name, "bias") ? 0.0f : 1.0f);
  return absl::OkStatus();
}

}  // namespace fathom
