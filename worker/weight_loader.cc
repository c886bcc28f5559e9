#include "worker/weight_loader.h"

#include <algorithm>
#include <functional>
#include <initializer_list>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "worker/arena.h"

namespace fathom {
namespace {

constexpr DType kPlainTypes[] = {DType::kF32, DType::kBF16};
constexpr DType kLinearTypes[] = {DType::kF32, DType::kBF16, DType::kF8E4M3};
constexpr DType kFactorTypes[] = {DType::kF32};

int64_t FactorsFor(int64_t size) { return (size + kFp8Block - 1) / kFp8Block; }

// The factors of a part of an F8_E4M3 matrix: whole blocks, of which the outer ones may be cut.
MatrixPart FactorsOf(const MatrixPart& part) {
  return {.num_rows = FactorsFor(part.num_rows),
          .num_columns = FactorsFor(part.num_columns),
          .rows = {part.rows.begin / kFp8Block, FactorsFor(part.rows.end)},
          .columns = {part.columns.begin / kFp8Block, FactorsFor(part.columns.end)}};
}

int64_t BytesOf(const MatrixPart& part, DType dtype) {
  return part.rows.size() * part.columns.size() * SizeOf(dtype);
}

std::string FactorsName(const std::string& name) { return absl::StrCat(name, "_scale_inv"); }

absl::StatusOr<DType> TypeOfMatrix(const WeightSource& source, const std::string& name,
                                   const MatrixPart& part, absl::Span<const DType> types) {
  return source.TypeOf(name, {part.num_rows, part.num_columns}, types);
}

// How a linear layer is stored, and how it is kept.
struct LinearForm {
  DType stored = DType::kF32;
  DType kept = DType::kF32;
  bool quantises = false;   // F8_E4M3 is made here, in blocks of the slice
  MatrixPart factors = {};  // F8_E4M3 only: which the slice has, of the checkpoint's or its own
  int64_t rows = 0;
  int64_t columns = 0;
  int row_offset = 0;
  int column_offset = 0;

  int64_t factor_rows() const { return kept == DType::kF8E4M3 ? factors.rows.size() : 0; }
  int64_t kept_bytes() const {
    return rows * columns * SizeOf(kept) +
           factor_rows() * factors.columns.size() * SizeOf(DType::kF32);
  }
  int64_t stored_bytes() const {
    return rows * columns * SizeOf(stored) +
           (quantises ? 0 : factor_rows() * factors.columns.size() * SizeOf(DType::kF32));
  }
  bool operator==(const LinearForm& other) const {
    return stored == other.stored && rows == other.rows && columns == other.columns &&
           row_offset == other.row_offset && column_offset == other.column_offset;
  }
};

LinearForm FormOf(const WeightLoaderOptions& options, const MatrixPart& part, DType stored) {
  LinearForm form = {
      .stored = stored, .kept = stored, .rows = part.rows.size(), .columns = part.columns.size()};
  if (stored == DType::kF8E4M3) {
    form.factors = FactorsOf(part);
    form.row_offset = static_cast<int>(part.rows.begin % kFp8Block);
    form.column_offset = static_cast<int>(part.columns.begin % kFp8Block);
  } else if (options.quantization == Quantization::kFp8) {
    form.kept = DType::kF8E4M3;
    form.quantises = true;
    form.factors = FactorsOf(MatrixPart::Whole(form.rows, form.columns));
  }
  return form;
}

absl::StatusOr<LinearForm> FindLinear(const WeightSource& source,
                                      const WeightLoaderOptions& options, const LinearPart& layer,
                                      absl::Span<const DType> types) {
  ASSIGN_OR_RETURN(const DType stored, TypeOfMatrix(source, layer.name, layer.part, types));
  if (stored == DType::kF8E4M3) {
    RETURN_IF_ERROR(
        TypeOfMatrix(source, FactorsName(layer.name), FactorsOf(layer.part), kFactorTypes)
            .status());
  }
  return FormOf(options, layer.part, stored);
}

absl::Span<const DType> LinearTypes(const WeightLoaderOptions& options) {
  return options.accept_fp8 ? absl::MakeConstSpan(kLinearTypes) : absl::MakeConstSpan(kPlainTypes);
}

// The forms of the layers of a stack, the same for each expert.
absl::StatusOr<std::vector<LinearForm>> FindStack(
    const WeightSource& source, const WeightLoaderOptions& options,
    const std::vector<std::vector<LinearPart>>& experts) {
  std::vector<LinearForm> forms;
  for (const LinearPart& layer : experts.front()) {
    ASSIGN_OR_RETURN(forms.emplace_back(),
                     FindLinear(source, options, layer, LinearTypes(options)));
  }
  for (const std::vector<LinearPart>& expert : experts) {
    CHECK_EQ(expert.size(), forms.size());
    for (size_t i = 0; i < forms.size(); ++i) {
      ASSIGN_OR_RETURN(const LinearForm form,
                       FindLinear(source, options, expert[i], {&forms[i].stored, 1}));
      if (form == forms[i]) continue;
      return absl::InvalidArgumentError(
          absl::StrCat("the slices of \"", expert[i].name, "\" and \"", experts.front()[i].name,
                       "\" differ in size, or begin in different places of an FP8 block"));
    }
  }
  return forms;
}

// Whether layers can stand one below the other in one Weight: their blocks of F8_E4M3 must go on
// where those of the layer above end.
bool LinesUp(const std::vector<LinearForm>& forms) {
  int64_t row = forms.front().row_offset;
  for (const LinearForm& form : forms) {
    if (form.kept != forms.front().kept) return false;
    if (form.kept == DType::kF8E4M3 &&
        (form.column_offset != forms.front().column_offset || row % kFp8Block != form.row_offset)) {
      return false;
    }
    if (&form != &forms.front() && form.row_offset != 0) return false;
    row += form.rows;
  }
  return true;
}

// Heads of kv_b_proj while they are converted: as they are stored, their factors if any, and in the
// activations' type.
struct StoredHeads {
  static StoredHeads Place(const LinearForm& form, DType act, Arena& arena) {
    StoredHeads heads = {.plain = arena.Take(act, {form.rows, form.columns}),
                         .stored = {.values = arena.Take(form.stored, {form.rows, form.columns}),
                                    .row_offset = form.row_offset}};
    if (form.stored != DType::kF8E4M3) return heads;
    heads.stored.scale_inv =
        arena.Take(DType::kF32, {form.factors.rows.size(), form.factors.columns.size()});
    return heads;
  }

  Tensor plain;
  Weight stored;
};

// The rows of `heads`, each [nope + v, R], to w_uk, [R, nope] of each, and w_uv, [v, R] of each.
template <typename Element>
void SplitHeads(const std::vector<char>& heads, int64_t num_heads, int64_t nope_dim, int64_t v_dim,
                int64_t rank, std::vector<char>& w_uk, std::vector<char>& w_uv) {
  w_uk.resize(num_heads * nope_dim * rank * sizeof(Element));
  w_uv.resize(num_heads * v_dim * rank * sizeof(Element));
  const auto* from = reinterpret_cast<const Element*>(heads.data());
  auto* keys = reinterpret_cast<Element*>(w_uk.data());
  auto* values = reinterpret_cast<Element*>(w_uv.data());
  for (int64_t head = 0; head < num_heads; ++head) {
    for (int64_t r = 0; r < rank; ++r) {
      for (int64_t n = 0; n < nope_dim; ++n) *keys++ = from[n * rank + r];
    }
    from += nope_dim * rank;
    values = std::copy_n(from, v_dim * rank, values);
    from += v_dim * rank;
  }
}

template <typename... Fns>
struct Overloaded : Fns... {
  using Fns::operator()...;
};
template <typename... Fns>
Overloaded(Fns...) -> Overloaded<Fns...>;

}  // namespace

// Checks wishes against what the source has and adds up their bytes.
class WeightPlanner {
 public:
  WeightPlanner(const WeightLoaderOptions& options, const WeightSource& source)
      : options_(options), source_(source) {}

  absl::Status Add(const WeightLoader::Vector& wish);
  absl::Status Add(const WeightLoader::Table& wish);
  absl::Status Add(const WeightLoader::Linear& wish);
  absl::Status Add(const WeightLoader::KvB& wish);

  const WeightLoader::Footprint& total() const { return total_; }

 private:
  const WeightLoaderOptions& options_;
  const WeightSource& source_;
  WeightLoader::Footprint total_;
};

absl::Status WeightPlanner::Add(const WeightLoader::Vector& wish) {
  ASSIGN_OR_RETURN(const DType type, source_.TypeOf(wish.name, {wish.size}, kPlainTypes));
  total_.weight_bytes += wish.size * SizeOf(DType::kF32);
  total_.read_bytes += wish.size * SizeOf(type);
  return absl::OkStatus();
}

absl::Status WeightPlanner::Add(const WeightLoader::Table& wish) {
  ASSIGN_OR_RETURN(const DType type, TypeOfMatrix(source_, wish.name, wish.part, kPlainTypes));
  total_.weight_bytes += BytesOf(wish.part, type);
  total_.read_bytes += BytesOf(wish.part, type);
  return absl::OkStatus();
}

absl::Status WeightPlanner::Add(const WeightLoader::Linear& wish) {
  ASSIGN_OR_RETURN(const std::vector<LinearForm> forms, FindStack(source_, options_, wish.experts));
  for (const LinearForm& form : forms) {
    total_.weight_bytes += std::ssize(wish.experts) * form.kept_bytes();
    total_.read_bytes += std::ssize(wish.experts) * form.stored_bytes();
    if (form.quantises) total_.scratch_bytes = std::max(total_.scratch_bytes, form.stored_bytes());
  }
  return absl::OkStatus();
}

// Never quantised: attention in the latent space reads it in the activations' type.
absl::StatusOr<LinearForm> FindKvB(const WeightSource& source, const WeightLoaderOptions& options,
                                   const LinearPart& heads) {
  return FindLinear(source, {.accept_fp8 = options.accept_fp8}, heads, LinearTypes(options));
}

absl::Status WeightPlanner::Add(const WeightLoader::KvB& wish) {
  const LinearPart heads = wish.Heads();
  ASSIGN_OR_RETURN(const LinearForm form, FindKvB(source_, options_, heads));
  total_.weight_bytes += BytesOf(heads.part, options_.dtype);
  total_.read_bytes += form.stored_bytes();
  Arena counted;
  StoredHeads::Place(form, options_.dtype, counted);
  total_.scratch_bytes = std::max(total_.scratch_bytes, counted.peak_bytes());
  return absl::OkStatus();
}

// The state of one Load: first all memory is allocated and every read is noted, with what is to be
// done after it; then the source makes the reads, in this order.
class WeightReader {
 public:
  WeightReader(const WeightLoaderOptions& options, WeightSource& source, Device& device,
               const LoadProgress& progress, const WeightLoader::Footprint& footprint)
      : options_(options),
        source_(source),
        device_(device),
        progress_(progress),
        footprint_(footprint) {}

  absl::Status AllocateScratch();
  absl::Status Note(const WeightLoader::Vector& wish);
  absl::Status Note(const WeightLoader::Table& wish);
  absl::Status Note(const WeightLoader::Linear& wish);
  absl::Status Note(const WeightLoader::KvB& wish);
  absl::Status ReadAll();

  std::vector<Buffer> TakeBuffers() { return std::move(buffers_); }

 private:
  // Device memory that stays.
  absl::StatusOr<Tensor> Allocate(DType dtype, std::initializer_list<int64_t> shape);
  void NoteRead(const std::string& name, DType type, const MatrixPart& part, const Tensor& target,
                std::function<void()> then = nullptr);
  // Room for these layers one below the other, for so many experts: [E, N, K].
  absl::StatusOr<Weight> AllocateStack(absl::Span<const LinearForm> forms, int64_t num_experts);
  // Fills `target`, [N, K].
  void NoteLayer(const LinearPart& layer, const LinearForm& form, const Weight& target);
  // Takes the way through the host.   w_uk [A, R, nope]   w_uv [A, v, R]
  void Split(const StoredHeads& heads, const Tensor& w_uk, const Tensor& w_uv);
  void Advance(int64_t num_bytes);

  const WeightLoaderOptions& options_;
  WeightSource& source_;
  Device& device_;
  const LoadProgress& progress_;
  const WeightLoader::Footprint footprint_;
  int64_t bytes_done_ = 0;
  std::vector<Buffer> buffers_;
  Buffer scratch_;  // for one conversion at a time
  std::vector<WeightRead> reads_;
  std::vector<std::function<void()>> after_reads_;  // of each read; may be null
};

absl::Status WeightReader::AllocateScratch() {
  ASSIGN_OR_RETURN(scratch_, device_.Allocate(footprint_.scratch_bytes));
  return absl::OkStatus();
}

absl::StatusOr<Tensor> WeightReader::Allocate(DType dtype, std::initializer_list<int64_t> shape) {
  ASSIGN_OR_RETURN(Buffer buffer, device_.Allocate(Tensor(nullptr, dtype, shape).num_bytes()));
  const Tensor tensor(buffer.data(), dtype, shape);
  buffers_.push_back(std::move(buffer));
  return tensor;
}

void WeightReader::Advance(int64_t num_bytes) {
  bytes_done_ += num_bytes;
  if (progress_) progress_(bytes_done_, footprint_.read_bytes);
}

void WeightReader::NoteRead(const std::string& name, DType type, const MatrixPart& part,
                            const Tensor& target, std::function<void()> then) {
  reads_.push_back({.name = name, .type = type, .part = part, .target = target});
  after_reads_.push_back(std::move(then));
}

absl::Status WeightReader::ReadAll() {
  RETURN_IF_ERROR(source_.ReadMatrices(
      reads_, device_, [this](int64_t num_bytes) { Advance(num_bytes); },
      [this](size_t read) {
        if (after_reads_[read] != nullptr) after_reads_[read]();
      }));
  CHECK_EQ(bytes_done_, footprint_.read_bytes);
  return absl::OkStatus();
}

absl::Status WeightReader::Note(const WeightLoader::Vector& wish) {
  ASSIGN_OR_RETURN(const DType type, source_.TypeOf(wish.name, {wish.size}, kPlainTypes));
  std::vector<float> values(wish.size);
  RETURN_IF_ERROR(source_.ReadVector(wish.name, type, values));
  ASSIGN_OR_RETURN(*wish.out, Allocate(DType::kF32, {wish.size}));
  device_.CopyFromHost(values.data(), *wish.out);
  Advance(wish.size * SizeOf(type));
  return absl::OkStatus();
}

absl::Status WeightReader::Note(const WeightLoader::Table& wish) {
  ASSIGN_OR_RETURN(const DType type, TypeOfMatrix(source_, wish.name, wish.part, kPlainTypes));
  ASSIGN_OR_RETURN(*wish.out, Allocate(type, {wish.part.rows.size(), wish.part.columns.size()}));
  NoteRead(wish.name, type, wish.part, *wish.out);
  return absl::OkStatus();
}

absl::StatusOr<Weight> WeightReader::AllocateStack(absl::Span<const LinearForm> forms,
                                                   int64_t num_experts) {
  const LinearForm& first = forms.front();
  int64_t rows = 0, factor_rows = 0;
  for (const LinearForm& form : forms) {
    rows += form.rows;
    factor_rows += form.factor_rows();
  }
  Weight stack = {.values = {},
                  .scale_inv = {},
                  .row_offset = first.row_offset,
                  .column_offset = first.column_offset};
  ASSIGN_OR_RETURN(stack.values, Allocate(first.kept, {num_experts, rows, first.columns}));
  if (first.kept != DType::kF8E4M3) return stack;
  ASSIGN_OR_RETURN(stack.scale_inv,
                   Allocate(DType::kF32, {num_experts, factor_rows, first.factors.columns.size()}));
  return stack;
}

void WeightReader::NoteLayer(const LinearPart& layer, const LinearForm& form,
                             const Weight& target) {
  if (form.quantises) {
    const Tensor slice(scratch_.data(), form.stored, {form.rows, form.columns});
    NoteRead(layer.name, form.stored, layer.part, slice,
             [=, this] { device_.ops().QuantizeFp8(slice, target); });
    return;
  }
  NoteRead(layer.name, form.stored, layer.part, target.values);
  if (!target.scale_inv.present()) return;
  NoteRead(FactorsName(layer.name), DType::kF32, form.factors, target.scale_inv);
}

absl::Status WeightReader::Note(const WeightLoader::Linear& wish) {
  ASSIGN_OR_RETURN(const std::vector<LinearForm> forms, FindStack(source_, options_, wish.experts));
  // All layers in one stack, or each in one of its own.
  const size_t layers_per_stack = LinesUp(forms) ? forms.size() : 1;
  std::vector<Weight> stacks;
  for (size_t first = 0; first < forms.size(); first += layers_per_stack) {
    const auto stacked = absl::MakeConstSpan(forms).subspan(first, layers_per_stack);
    ASSIGN_OR_RETURN(Weight stack, AllocateStack(stacked, std::ssize(wish.experts)));
    for (int64_t expert = 0; expert < std::ssize(wish.experts); ++expert) {
      int64_t row = 0, factor_row = 0;
      for (size_t i = 0; i < stacked.size(); ++i) {
        const LinearForm& form = stacked[i];
        Weight target = {.values = stack.values[expert].Slice(0, row, row + form.rows)};
        row += form.rows;
        if (stack.scale_inv.present()) {
          const int64_t end = factor_row + form.factor_rows();
          target.scale_inv = stack.scale_inv[expert].Slice(0, factor_row, end);
          factor_row = end;
        }
        NoteLayer(wish.experts[expert][first + i], form, target);
      }
    }
    // A single layer is a stack of one without its first dimension.
    if (!wish.is_stack) {
      stack.values = stack.values[0];
      if (stack.scale_inv.present()) stack.scale_inv = stack.scale_inv[0];
    }
    stacks.push_back(stack);
  }
  std::visit(Overloaded{[&](Weight* out) { *out = stacks.front(); },
                        [&](StackedLinear* out) { *out = StackedLinear(stacks); }},
             wish.out);
  return absl::OkStatus();
}

absl::Status WeightReader::Note(const WeightLoader::KvB& wish) {
  const LinearPart heads = wish.Heads();
  ASSIGN_OR_RETURN(const LinearForm form, FindKvB(source_, options_, heads));
  const int64_t num_heads = wish.heads.size();
  ASSIGN_OR_RETURN(*wish.w_uk,
                   Allocate(options_.dtype, {num_heads, wish.kv_lora_rank, wish.nope_dim}));
  ASSIGN_OR_RETURN(*wish.w_uv,
                   Allocate(options_.dtype, {num_heads, wish.v_dim, wish.kv_lora_rank}));
  Arena placed(scratch_.data());
  const StoredHeads parts = StoredHeads::Place(form, options_.dtype, placed);
  const std::function<void()> split = [this, parts, w_uk = *wish.w_uk, w_uv = *wish.w_uv] {
    Split(parts, w_uk, w_uv);
  };
  const bool is_fp8 = parts.stored.scale_inv.present();
  NoteRead(heads.name, form.stored, heads.part, parts.stored.values, is_fp8 ? nullptr : split);
  if (is_fp8) {
    NoteRead(FactorsName(heads.name), DType::kF32, form.factors, parts.stored.scale_inv, split);
  }
  return absl::OkStatus();
}

void WeightReader::Split(const StoredHeads& heads, const Tensor& w_uk, const Tensor& w_uv) {
  device_.ops().Dequantize(heads.stored, heads.plain);
  std::vector<char> plain(heads.plain.num_bytes()), keys, values;
  device_.CopyToHost(heads.plain, plain.data());
  const auto split = options_.dtype == DType::kF32 ? SplitHeads<uint32_t> : SplitHeads<uint16_t>;
  split(plain, w_uk.dim(0), w_uk.dim(2), w_uv.dim(1), w_uk.dim(1), keys, values);
  device_.CopyFromHost(keys.data(), w_uk);
  device_.CopyFromHost(values.data(), w_uv);
}

void WeightLoader::AddVector(const std::string& name, int64_t size, Tensor& out) {
  wishes_.push_back(Vector{.name = name, .size = size, .out = &out});
}

void WeightLoader::AddTable(const std::string& name, const MatrixPart& part, Tensor& out) {
  wishes_.push_back(Table{.name = name, .part = part, .out = &out});
}

void WeightLoader::AddLinear(const LinearPart& layer, Weight& out) {
  wishes_.push_back(Linear{.experts = {{layer}}, .is_stack = false, .out = &out});
}

void WeightLoader::AddStackedLinear(const std::vector<LinearPart>& layers, StackedLinear& out) {
  CHECK(!layers.empty());
  wishes_.push_back(Linear{.experts = {layers}, .is_stack = false, .out = &out});
}

std::vector<std::vector<LinearPart>> WeightLoader::OneLayerEach(
    const std::vector<LinearPart>& experts) {
  std::vector<std::vector<LinearPart>> layers;
  for (const LinearPart& expert : experts) layers.push_back({expert});
  return layers;
}

void WeightLoader::AddExperts(const std::vector<LinearPart>& experts, Weight& out) {
  CHECK(!experts.empty());
  wishes_.push_back(Linear{.experts = OneLayerEach(experts), .is_stack = true, .out = &out});
}

void WeightLoader::AddStackedExperts(const std::vector<std::vector<LinearPart>>& experts,
                                     StackedLinear& out) {
  CHECK(!experts.empty() && !experts.front().empty());
  wishes_.push_back(Linear{.experts = experts, .is_stack = true, .out = &out});
}

bool WeightLoader::CanStack(const std::vector<LinearPart>& experts) const {
  return CanStack(OneLayerEach(experts));
}

bool WeightLoader::CanStack(const std::vector<std::vector<LinearPart>>& experts) const {
  return FindStack(source_, options_, experts).ok();
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

LinearPart WeightLoader::KvB::Heads() const {
  const int64_t head_rows = int64_t{nope_dim} + v_dim;
  return {.name = name,
          .part = MatrixPart::Rows(num_heads * head_rows, kv_lora_rank,
                                   {heads.begin * head_rows, heads.end * head_rows})};
}

absl::StatusOr<WeightLoader::Footprint> WeightLoader::Plan() const {
  WeightPlanner planner(options_, source_);
  for (const Wish& wish : wishes_) {
    RETURN_IF_ERROR(std::visit([&](const auto& one) { return planner.Add(one); }, wish));
  }
  return planner.total();
}

absl::StatusOr<std::vector<Buffer>> WeightLoader::Load(Device& device,
                                                       const LoadProgress& progress) {
  ASSIGN_OR_RETURN(const Footprint footprint, Plan());
  WeightReader reader(options_, source_, device, progress, footprint);
  RETURN_IF_ERROR(reader.AllocateScratch());
  for (const Wish& wish : wishes_) {
    RETURN_IF_ERROR(std::visit([&](const auto& one) { return reader.Note(one); }, wish));
  }
  RETURN_IF_ERROR(reader.ReadAll());
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
                            for (const auto& layers : one.experts) {
                              for (const LinearPart& layer : layers) add_linear(layer.name);
                            }
                          },
                          [&](const KvB& one) { add_linear(one.name); }},
               wish);
  }
  return names;
}

}  // namespace fathom
