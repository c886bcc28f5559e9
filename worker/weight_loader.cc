#include "worker/weight_loader.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/number_formats.h"
#include "worker/arena.h"

namespace fathom {
namespace {

constexpr int64_t kPieceBytes = int64_t{4} << 20;  // of one read
// A gap between two column slices below this is read and dropped: the disk delivers whole pages.
constexpr int64_t kSmallestGapBytes = 4096;

constexpr std::initializer_list<DType> kPlainTypes = {DType::kF32, DType::kBF16};
constexpr std::initializer_list<DType> kLinearTypes = {DType::kF32, DType::kBF16, DType::kF8E4M3};
constexpr std::initializer_list<DType> kFactorTypes = {DType::kF32};

int64_t BlocksOf(int64_t size) { return (size + kFp8Block - 1) / kFp8Block; }

// The factors of a part of an F8_E4M3 matrix: whole blocks, of which the outer ones may be cut.
MatrixPart FactorsOf(const MatrixPart& part) {
  return {.num_rows = BlocksOf(part.num_rows),
          .num_columns = BlocksOf(part.num_columns),
          .rows = {part.rows.begin / kFp8Block, BlocksOf(part.rows.end)},
          .columns = {part.columns.begin / kFp8Block, BlocksOf(part.columns.end)}};
}

int64_t BytesOf(const MatrixPart& part, DType dtype) {
  return part.rows.size() * part.columns.size() * SizeOf(dtype);
}

std::string FactorsName(const std::string& name) { return absl::StrCat(name, "_scale_inv"); }

// A tensor of the checkpoint with the type and shape that were expected of it.
struct Source {
  const Checkpoint::Entry* entry = nullptr;
  DType dtype = DType::kF32;
};

absl::StatusOr<Source> FindSource(const Checkpoint& checkpoint, const std::string& name,
                                  const std::vector<int64_t>& shape,
                                  std::initializer_list<DType> types) {
  std::vector<const char*> type_names;
  for (DType type : types) type_names.push_back(NameOf(type));
  const std::string expected =
      absl::StrCat(absl::StrJoin(type_names, " or "), "[", absl::StrJoin(shape, ", "), "]");
  const Checkpoint::Entry* entry = checkpoint.Find(name);
  if (entry == nullptr) {
    return absl::NotFoundError(absl::StrCat(checkpoint.directory(), ": tensor \"", name,
                                            "\" is missing, expected ", expected));
  }
  for (DType type : types) {
    if (entry->info->dtype == NameOf(type) && entry->info->shape == shape) {
      return Source{.entry = entry, .dtype = type};
    }
  }
  return absl::InvalidArgumentError(absl::StrCat(entry->file->path(), ": tensor \"", name, "\" is ",
                                                 entry->info->DebugString(), ", expected ",
                                                 expected));
}

absl::StatusOr<Source> FindMatrix(const Checkpoint& checkpoint, const std::string& name,
                                  const MatrixPart& part, std::initializer_list<DType> types) {
  return FindSource(checkpoint, name, {part.num_rows, part.num_columns}, types);
}

struct LinearSource {
  Source values;
  Source factors;  // F8_E4M3 only
};

absl::StatusOr<LinearSource> FindLinear(const Checkpoint& checkpoint,
                                        const WeightLoaderOptions& options, const std::string& name,
                                        const MatrixPart& part) {
  LinearSource source;
  ASSIGN_OR_RETURN(source.values, FindMatrix(checkpoint, name, part,
                                             options.accept_fp8 ? kLinearTypes : kPlainTypes));
  if (source.values.dtype == DType::kF8E4M3) {
    ASSIGN_OR_RETURN(source.factors,
                     FindMatrix(checkpoint, FactorsName(name), FactorsOf(part), kFactorTypes));
  }
  return source;
}

// How a linear layer is kept, given how the checkpoint stores it.
struct LinearForm {
  DType kept = DType::kF32;
  bool quantises = false;   // F8_E4M3 is made here, in blocks of the slice
  MatrixPart factors = {};  // F8_E4M3 only: which the slice has, of the checkpoint's or its own
  int row_offset = 0;
  int column_offset = 0;
};

LinearForm FormOf(const WeightLoaderOptions& options, const MatrixPart& part, DType stored) {
  if (stored == DType::kF8E4M3) {
    return {.kept = stored,
            .factors = FactorsOf(part),
            .row_offset = static_cast<int>(part.rows.begin % kFp8Block),
            .column_offset = static_cast<int>(part.columns.begin % kFp8Block)};
  }
  if (options.quantization == Quantization::kNone) return {.kept = stored};
  return {.kept = DType::kF8E4M3,
          .quantises = true,
          .factors = FactorsOf(MatrixPart::Whole(part.rows.size(), part.columns.size()))};
}

template <typename... Fns>
struct Overloaded : Fns... {
  using Fns::operator()...;
};
template <typename... Fns>
Overloaded(Fns...) -> Overloaded<Fns...>;

}  // namespace

// Checks wishes against the headers and adds up their bytes.
class WeightPlanner {
 public:
  WeightPlanner(const WeightLoaderOptions& options, const Checkpoint& checkpoint)
      : options_(options), checkpoint_(checkpoint) {}

  absl::Status Add(const WeightLoader::Vector& wish);
  absl::Status Add(const WeightLoader::Table& wish);
  absl::Status Add(const WeightLoader::Linear& wish);
  absl::Status Add(const WeightLoader::KvB& wish);

  const WeightLoader::Footprint& total() const { return total_; }

 private:
  const WeightLoaderOptions& options_;
  const Checkpoint& checkpoint_;
  WeightLoader::Footprint total_;
};

absl::Status WeightPlanner::Add(const WeightLoader::Vector& wish) {
  ASSIGN_OR_RETURN(const Source source,
                   FindSource(checkpoint_, wish.name, {wish.size}, kPlainTypes));
  total_.weight_bytes += wish.size * SizeOf(DType::kF32);
  total_.read_bytes += wish.size * SizeOf(source.dtype);
  return absl::OkStatus();
}

absl::Status WeightPlanner::Add(const WeightLoader::Table& wish) {
  ASSIGN_OR_RETURN(const Source source, FindMatrix(checkpoint_, wish.name, wish.part, kPlainTypes));
  total_.weight_bytes += BytesOf(wish.part, source.dtype);
  total_.read_bytes += BytesOf(wish.part, source.dtype);
  return absl::OkStatus();
}

absl::Status WeightPlanner::Add(const WeightLoader::Linear& wish) {
  ASSIGN_OR_RETURN(const LinearSource first,
                   FindLinear(checkpoint_, options_, wish.names[0], wish.part));
  const DType stored = first.values.dtype;
  const LinearForm form = FormOf(options_, wish.part, stored);
  const int64_t factor_bytes = form.kept == DType::kF8E4M3 ? BytesOf(form.factors, DType::kF32) : 0;
  for (const std::string& name : wish.names) {
    ASSIGN_OR_RETURN(const LinearSource source, FindLinear(checkpoint_, options_, name, wish.part));
    if (source.values.dtype != stored) {
      return absl::InvalidArgumentError(absl::StrCat(
          source.values.entry->file->path(), ": tensor \"", name, "\" is ",
          NameOf(source.values.dtype), ", expected ", NameOf(stored), " like ", wish.names[0]));
    }
    total_.weight_bytes += BytesOf(wish.part, form.kept) + factor_bytes;
    total_.read_bytes += BytesOf(wish.part, stored) + (form.quantises ? 0 : factor_bytes);
  }
  return absl::OkStatus();
}

absl::Status WeightPlanner::Add(const WeightLoader::KvB& wish) {
  ASSIGN_OR_RETURN(const LinearSource source,
                   FindLinear(checkpoint_, options_, wish.name, wish.PartOfHead(0)));
  const DType stored = source.values.dtype;
  for (int64_t head = wish.heads.begin; head < wish.heads.end; ++head) {
    const MatrixPart part = wish.PartOfHead(head);
    total_.weight_bytes += BytesOf(part, options_.dtype);
    total_.read_bytes += BytesOf(part, stored);
    if (stored == DType::kF8E4M3) total_.read_bytes += BytesOf(FactorsOf(part), DType::kF32);
  }
  return absl::OkStatus();
}

// The state of one Load.
class WeightReader {
 public:
  WeightReader(const WeightLoaderOptions& options, const Checkpoint& checkpoint, Device& device,
               const LoadProgress& progress, int64_t bytes_total)
      : options_(options),
        checkpoint_(checkpoint),
        device_(device),
        progress_(progress),
        bytes_total_(bytes_total) {}

  absl::Status Read(const WeightLoader::Vector& wish);
  absl::Status Read(const WeightLoader::Table& wish);
  absl::Status Read(const WeightLoader::Linear& wish);
  absl::Status Read(const WeightLoader::KvB& wish);

  int64_t bytes_done() const { return bytes_done_; }
  std::vector<Buffer> TakeBuffers() { return std::move(buffers_); }

 private:
  // Device memory that stays.
  absl::StatusOr<Tensor> Allocate(DType dtype, std::initializer_list<int64_t> shape);
  // Device memory for one conversion; the next call reuses it.
  absl::Status ReserveScratch(int64_t num_bytes);
  absl::Status ReadPart(const Source& source, const MatrixPart& part, const Tensor& target);
  absl::Status ReadHead(const WeightLoader::KvB& wish, const LinearSource& source, int64_t head);
  void Advance(int64_t num_bytes);

  const WeightLoaderOptions& options_;
  const Checkpoint& checkpoint_;
  Device& device_;
  const LoadProgress& progress_;
  const int64_t bytes_total_;
  int64_t bytes_done_ = 0;
  std::vector<Buffer> buffers_;
  std::vector<char> staging_;  // what was read last, on the host
  Buffer scratch_;
};

absl::StatusOr<Tensor> WeightReader::Allocate(DType dtype, std::initializer_list<int64_t> shape) {
  ASSIGN_OR_RETURN(Buffer buffer, device_.Allocate(Tensor(nullptr, dtype, shape).num_bytes()));
  const Tensor tensor(buffer.data(), dtype, shape);
  buffers_.push_back(std::move(buffer));
  return tensor;
}

absl::Status WeightReader::ReserveScratch(int64_t num_bytes) {
  if (scratch_.num_bytes() >= num_bytes) return absl::OkStatus();
  { const Buffer released = std::move(scratch_); }  // never both at once
  ASSIGN_OR_RETURN(scratch_, device_.Allocate(num_bytes));
  return absl::OkStatus();
}

void WeightReader::Advance(int64_t num_bytes) {
  bytes_done_ += num_bytes;
  if (progress_) progress_(bytes_done_, bytes_total_);
}

absl::Status WeightReader::ReadPart(const Source& source, const MatrixPart& part,
                                    const Tensor& target) {
  const SafetensorsFile& file = *source.entry->file;
  const int64_t element_bytes = SizeOf(source.dtype);
  const int64_t row_bytes = part.num_columns * element_bytes;
  const int64_t slice_bytes = part.columns.size() * element_bytes;
  const bool reads_across = row_bytes - slice_bytes < kSmallestGapBytes;
  const int64_t rows_per_piece =
      std::max<int64_t>(1, kPieceBytes / (reads_across ? row_bytes : slice_bytes));
  const int64_t first =
      source.entry->info->file_offset + part.columns.begin * element_bytes;  // of row 0

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
    device_.CopyFromHost(staging_.data(), target.Slice(0, target_row, target_row + num_rows));
    Advance(num_rows * slice_bytes);
  }
  return absl::OkStatus();
}

absl::Status WeightReader::Read(const WeightLoader::Vector& wish) {
  ASSIGN_OR_RETURN(const Source source,
                   FindSource(checkpoint_, wish.name, {wish.size}, kPlainTypes));
  const int64_t num_bytes = wish.size * SizeOf(source.dtype);
  staging_.resize(num_bytes);
  RETURN_IF_ERROR(
      source.entry->file->Read(source.entry->info->file_offset, num_bytes, staging_.data()));
  std::vector<float> values(wish.size);
  if (source.dtype == DType::kF32) {
    std::memcpy(values.data(), staging_.data(), num_bytes);
  } else {
    for (int64_t i = 0; i < wish.size; ++i) {
      BFloat16 value;
      std::memcpy(&value, &staging_[i * sizeof(value)], sizeof(value));
      values[i] = ToFloat(value);
    }
  }
  ASSIGN_OR_RETURN(*wish.out, Allocate(DType::kF32, {wish.size}));
  device_.CopyFromHost(values.data(), *wish.out);
  Advance(num_bytes);
  return absl::OkStatus();
}

absl::Status WeightReader::Read(const WeightLoader::Table& wish) {
  ASSIGN_OR_RETURN(const Source source, FindMatrix(checkpoint_, wish.name, wish.part, kPlainTypes));
  ASSIGN_OR_RETURN(*wish.out,
                   Allocate(source.dtype, {wish.part.rows.size(), wish.part.columns.size()}));
  return ReadPart(source, wish.part, *wish.out);
}

absl::Status WeightReader::Read(const WeightLoader::Linear& wish) {
  ASSIGN_OR_RETURN(const LinearSource first,
                   FindLinear(checkpoint_, options_, wish.names[0], wish.part));
  const DType stored = first.values.dtype;
  const LinearForm form = FormOf(options_, wish.part, stored);

  // Everything is made as a stack; a single layer is a stack of one without its first dimension.
  const int64_t count = static_cast<int64_t>(wish.names.size());
  const int64_t rows = wish.part.rows.size(), columns = wish.part.columns.size();
  Weight stack = {.values = {},
                  .scale_inv = {},
                  .row_offset = form.row_offset,
                  .column_offset = form.column_offset};
  ASSIGN_OR_RETURN(stack.values, Allocate(form.kept, {count, rows, columns}));
  if (form.kept == DType::kF8E4M3) {
    ASSIGN_OR_RETURN(stack.scale_inv, Allocate(DType::kF32, {count, form.factors.rows.size(),
                                                             form.factors.columns.size()}));
  }
  for (int64_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(const LinearSource source,
                     FindLinear(checkpoint_, options_, wish.names[i], wish.part));
    if (form.quantises) {
      RETURN_IF_ERROR(ReserveScratch(BytesOf(wish.part, stored)));
      const Tensor slice(scratch_.data(), stored, {rows, columns});
      RETURN_IF_ERROR(ReadPart(source.values, wish.part, slice));
      device_.ops().QuantizeFp8(slice,
                                {.values = stack.values[i], .scale_inv = stack.scale_inv[i]});
      continue;
    }
    RETURN_IF_ERROR(ReadPart(source.values, wish.part, stack.values[i]));
    if (stack.scale_inv.present()) {
      RETURN_IF_ERROR(ReadPart(source.factors, form.factors, stack.scale_inv[i]));
    }
  }
  *wish.out = stack;
  if (!wish.is_stack) {
    wish.out->values = stack.values[0];
    if (stack.scale_inv.present()) wish.out->scale_inv = stack.scale_inv[0];
  }
  return absl::OkStatus();
}

absl::Status WeightReader::Read(const WeightLoader::KvB& wish) {
  ASSIGN_OR_RETURN(const LinearSource source,
                   FindLinear(checkpoint_, options_, wish.name, wish.PartOfHead(0)));
  const int64_t heads = wish.heads.size();
  ASSIGN_OR_RETURN(*wish.w_uk, Allocate(options_.dtype, {heads, wish.kv_lora_rank, wish.nope_dim}));
  ASSIGN_OR_RETURN(*wish.w_uv, Allocate(options_.dtype, {heads, wish.v_dim, wish.kv_lora_rank}));
  for (int64_t head = wish.heads.begin; head < wish.heads.end; ++head) {
    RETURN_IF_ERROR(ReadHead(wish, source, head));
  }
  return absl::OkStatus();
}

absl::Status WeightReader::ReadHead(const WeightLoader::KvB& wish, const LinearSource& source,
                                    int64_t head) {
  const MatrixPart part = wish.PartOfHead(head);
  const MatrixPart factors = FactorsOf(part);
  const int64_t rows = part.rows.size(), rank = wish.kv_lora_rank;
  const bool is_fp8 = source.values.dtype == DType::kF8E4M3;

  // The head as it is stored, its factors if any, and the head in the activations' type.
  Arena counted;
  Tensor plain;
  Weight stored = {.values = {}, .row_offset = static_cast<int>(part.rows.begin % kFp8Block)};
  const auto place = [&](Arena& arena) {
    plain = arena.Take(options_.dtype, {rows, rank});
    stored.values = arena.Take(source.values.dtype, {rows, rank});
    if (!is_fp8) return;
    stored.scale_inv = arena.Take(DType::kF32, {factors.rows.size(), factors.columns.size()});
  };
  place(counted);
  RETURN_IF_ERROR(ReserveScratch(counted.peak_bytes()));
  Arena placed(scratch_.data());
  place(placed);
  RETURN_IF_ERROR(ReadPart(source.values, part, stored.values));
  if (is_fp8) RETURN_IF_ERROR(ReadPart(source.factors, factors, stored.scale_inv));
  device_.ops().Dequantize(stored, plain);

  // [nope, R] becomes [R, nope] on the way through the host; the values' rows stay as they are.
  const Tensor keys = plain.Slice(0, 0, wish.nope_dim);
  const int64_t element_bytes = SizeOf(options_.dtype);
  std::vector<char> rows_first(keys.num_bytes()), columns_first(keys.num_bytes());
  device_.CopyToHost(keys, rows_first.data());
  for (int64_t n = 0; n < wish.nope_dim; ++n) {
    for (int64_t r = 0; r < rank; ++r) {
      std::memcpy(&columns_first[(r * wish.nope_dim + n) * element_bytes],
                  &rows_first[(n * rank + r) * element_bytes], element_bytes);
    }
  }
  const int64_t local_head = head - wish.heads.begin;
  device_.CopyFromHost(columns_first.data(), (*wish.w_uk)[local_head]);

  device_.Copy(plain.Slice(0, wish.nope_dim, rows), (*wish.w_uv)[local_head]);
  return absl::OkStatus();
}

void WeightLoader::AddVector(const std::string& name, int64_t size, Tensor& out) {
  wishes_.push_back(Vector{.name = name, .size = size, .out = &out});
}

void WeightLoader::AddTable(const std::string& name, const MatrixPart& part, Tensor& out) {
  wishes_.push_back(Table{.name = name, .part = part, .out = &out});
}

void WeightLoader::AddLinear(const std::string& name, const MatrixPart& part, Weight& out) {
  wishes_.push_back(Linear{.names = {name}, .part = part, .is_stack = false, .out = &out});
}

void WeightLoader::AddLinearStack(const std::vector<std::string>& names, const MatrixPart& part,
                                  Weight& out) {
  CHECK(!names.empty());
  wishes_.push_back(Linear{.names = names, .part = part, .is_stack = true, .out = &out});
}

void WeightLoader::AddKvB(const std::string& name, const ModelConfig& config, const Range& heads,
                          Tensor& w_uk, Tensor& w_uv) {
  wishes_.push_back(KvB{.name = name,
                        .num_heads = config.num_attention_heads,
                        .nope_dim = config.qk_nope_head_dim,
                        .v_dim = config.v_head_dim,
                        .kv_lora_rank = config.kv_lora_rank,
                        .heads = heads,
                        .w_uk = &w_uk,
                        .w_uv = &w_uv});
}

MatrixPart WeightLoader::KvB::PartOfHead(int64_t head) const {
  const int64_t head_rows = int64_t{nope_dim} + v_dim;
  return MatrixPart::Rows(num_heads * head_rows, kv_lora_rank,
                          {head * head_rows, (head + 1) * head_rows});
}

absl::StatusOr<WeightLoader::Footprint> WeightLoader::Plan() const {
  WeightPlanner planner(options_, checkpoint_);
  for (const Wish& wish : wishes_) {
    RETURN_IF_ERROR(std::visit([&](const auto& one) { return planner.Add(one); }, wish));
  }
  return planner.total();
}

absl::StatusOr<std::vector<Buffer>> WeightLoader::Load(Device& device,
                                                       const LoadProgress& progress) {
  ASSIGN_OR_RETURN(const Footprint footprint, Plan());
  WeightReader reader(options_, checkpoint_, device, progress, footprint.read_bytes);
  for (const Wish& wish : wishes_) {
    RETURN_IF_ERROR(std::visit([&](const auto& one) { return reader.Read(one); }, wish));
  }
  CHECK_EQ(reader.bytes_done(), footprint.read_bytes);
  return reader.TakeBuffers();
}

std::vector<std::string> WeightLoader::Names() const {
  std::vector<std::string> names;
  const auto add_linear = [&](const std::string& name) {
    names.push_back(name);
    names.push_back(FactorsName(name));
  };
  for (const Wish& wish : wishes_) {
    std::visit(Overloaded{[&](const Vector& one) { names.push_back(one.name); },
                          [&](const Table& one) { names.push_back(one.name); },
                          [&](const Linear& one) {
                            for (const std::string& name : one.names) add_linear(name);
                          },
                          [&](const KvB& one) { add_linear(one.name); }},
               wish);
  }
  return names;
}

}  // namespace fathom
