#include "worker/weight_source.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <thread>

#include "absl/algorithm/container.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/number_formats.h"
#include "kernels/ops.h"
#include "worker/read_ahead.h"

namespace fathom {
namespace {

constexpr int64_t kPieceBytes = int64_t{8} << 20;  // of one read, unless a row is larger
constexpr int kMostThreads = 8;                    // so many read as fast as a device takes it

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

// The pieces of a read, with the rows of the target that each one fills.
struct TargetRows {
  int64_t begin, end;
};
void AddPieces(const SafetensorsFile& file, int64_t file_offset, const WeightRead& read,
               std::vector<FilePiece>& pieces, std::vector<TargetRows>& targets) {
  const int64_t element_bytes = SizeOf(read.type);
  FilePiece piece = {.file = &file,
                     .row_bytes = read.part.columns.size() * element_bytes,
                     .pitch_bytes = read.part.num_columns * element_bytes};
  const int64_t read_row_bytes = piece.reads_across() ? piece.pitch_bytes : piece.row_bytes;
  const int64_t rows_per_piece = std::max<int64_t>(1, kPieceBytes / read_row_bytes);
  const int64_t num_rows = read.part.rows.size();
  for (int64_t row = 0; row < num_rows; row += rows_per_piece) {
    piece.num_rows = std::min(rows_per_piece, num_rows - row);
    piece.offset = file_offset + (read.part.rows.begin + row) * piece.pitch_bytes +
                   read.part.columns.begin * element_bytes;
    pieces.push_back(piece);
    targets.push_back({row, row + piece.num_rows});
  }
}

}  // namespace

CheckpointWeights::CheckpointWeights(const Checkpoint& checkpoint, int num_threads)
    : checkpoint_(checkpoint),
      num_threads_(num_threads > 0
                       ? num_threads
                       : std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1,
                                    kMostThreads)) {}

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

absl::Status CheckpointWeights::ReadMatrices(absl::Span<const WeightRead> reads, Device& device,
                                             const ReadProgress& progress,
                                             absl::FunctionRef<void(size_t)> on_read) {
  std::vector<FilePiece> pieces;
  std::vector<TargetRows> targets;
  std::vector<size_t> ends;  // of each read's pieces
  for (const WeightRead& read : reads) {
    const Checkpoint::Entry* entry = checkpoint_.Find(read.name);
    CHECK(entry != nullptr) << read.name;
    AddPieces(*entry->file, entry->info->file_offset, read, pieces, targets);
    ends.push_back(pieces.size());
  }
  if (pieces.empty()) return absl::OkStatus();

  // Each thread has a buffer that it fills, and there are as many that are full or being copied.
  const size_t num_buffers = std::min(pieces.size(), 2 * static_cast<size_t>(num_threads_) + 2);
  int64_t buffer_bytes = 0;
  for (const FilePiece& piece : pieces) buffer_bytes = std::max(buffer_bytes, piece.buffer_bytes());
  ASSIGN_OR_RETURN(const Buffer staging,
                   device.AllocateStaging(static_cast<int64_t>(num_buffers) * buffer_bytes));
  std::vector<char*> buffers;
  for (size_t i = 0; i < num_buffers; ++i) {
    buffers.push_back(static_cast<char*>(staging.data()) + static_cast<int64_t>(i) * buffer_bytes);
  }
  std::deque<int64_t> copies;  // that may not be done, whose buffers are not released
  ReadAhead read_ahead(pieces, buffers, num_threads_);
  absl::Status status;
  for (size_t i = 0, piece = 0; i < reads.size() && status.ok(); ++i) {
    for (; piece < ends[i]; ++piece) {
      while (copies.size() > num_buffers / 2) {
        device.AwaitCopy(copies.front());
        copies.pop_front();
        read_ahead.Release();
      }
      const absl::StatusOr<const char*> bytes = read_ahead.Take();
      status = bytes.status();
      if (!status.ok()) break;
      const Tensor rows = reads[i].target.Slice(0, targets[piece].begin, targets[piece].end);
      copies.push_back(device.QueueCopy(*bytes, rows));
      progress(rows.num_bytes());
    }
    if (status.ok()) on_read(i);
  }
  if (!copies.empty()) device.AwaitCopy(copies.back());
  return status;
}

absl::Status CheckpointWeights::ReadVector(const std::string& name, DType type,
                                           std::vector<float>& values) {
  const Checkpoint::Entry* entry = checkpoint_.Find(name);
  CHECK(entry != nullptr) << name;
  std::vector<char> stored(values.size() * SizeOf(type));
  RETURN_IF_ERROR(entry->file->Read(entry->info->file_offset, static_cast<int64_t>(stored.size()),
                                    stored.data()));
  if (type == DType::kF32) {
    std::memcpy(values.data(), stored.data(), stored.size());
    return absl::OkStatus();
  }
  for (size_t i = 0; i < values.size(); ++i) {
    BFloat16 value;
    std::memcpy(&value, &stored[i * sizeof(value)], sizeof(value));
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

absl::Status RandomWeights::ReadMatrices(absl::Span<const WeightRead> reads, Device& device,
                                         const ReadProgress& progress,
                                         absl::FunctionRef<void(size_t)> on_read) {
  for (size_t i = 0; i < reads.size(); ++i) {
    const WeightRead& read = reads[i];
    const auto num_columns = static_cast<double>(read.part.num_columns);
    if (absl::EndsWith(read.name, "_scale_inv")) {
      const double factor = 1.0 / (RandomE4M3Deviation() * std::sqrt(num_columns * kFp8Block));
      const std::vector<float> factors(read.target.num_elements(), static_cast<float>(factor));
      device.CopyFromHost(factors.data(), read.target);
    } else {
      // The variance of uniform numbers is a third of their amplitude's square.
      const double amplitude = std::sqrt(3.0 / num_columns);
      device.ops().FillRandom(read.target, static_cast<float>(amplitude),
                              SeedOf(read.name, read.part));
    }
    progress(read.target.num_bytes());
    on_read(i);
  }
  return absl::OkStatus();
}

absl::Status RandomWeights::ReadVector(const std::string& name, DType, std::vector<float>& values) {
  std::fill(values.begin(), values.end(), absl::EndsWith(name, "bias") ? 0.0f : 1.0f);
  return absl::OkStatus();
}

}  // namespace fathom
