// Attention over the latent cache with a running softmax, and the steps around it: queries are
// rotated and taken into the latent space by w_uk, what they gather out of it by w_uv (absorption:
// MLA's keys and values are never made). Each of these steps rounds to act.
//
// A row is one head of one token. It walks its positions in tiles of 64 from position 0: scores of
// a tile (AddProducts, as in a linear layer), then the largest so far, then the sums. What it adds
// up, and in which order, is decided by its position alone, so decoding, whole prompts and chunks
// of prompts give the same bits. Tokens beside each other share the tile's conversion to floats.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/cpu/attention_task.h"
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/scratch.h"
#include "kernels/shape_checks.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/mla_attention.cc"
#include "hwy/foreach_target.h"  // compiles this file once per target
#include "kernels/cpu/rows-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace fathom {
namespace HWY_NAMESPACE {

// Floats of a staged query, and of a position of the tile: padded, and shifted as in linear.cc.
inline size_t RowStride(const AttentionTask& task) {
  return PadToVector(static_cast<size_t>(task.kv_lora_rank + task.rope_dim)) + kVectorFloats;
}

// The same, as far as it is read: whole vectors.
inline size_t RowLength(const AttentionTask& task) {
  const auto width = static_cast<size_t>(task.kv_lora_rank + task.rope_dim);
  return (width + kLanes - 1) / kLanes * kLanes;
}

// Copies `count` elements as floats; zeros up to the end of the last vector, which must exist.
template <typename Element>
HWY_INLINE void CopyFloats(const Element* from, size_t count, float* to) {
  for (size_t i = 0; i < count; i += kLanes) StoreFloats(LoadUpTo(from + i, count - i), to + i);
}

template <typename Act>
void StageQueries(const AttentionTask& task, const AttentionPiece& piece, float* queries) {
  const auto kv_lora_rank = static_cast<size_t>(task.kv_lora_rank);
  const auto rope_dim = static_cast<size_t>(task.rope_dim);
  for (int t = 0; t < piece.num_tokens; ++t) {
    for (int a = 0; a < piece.num_heads; ++a, queries += RowStride(task)) {
      const int64_t token = piece.first_token + t;
      const int64_t head = piece.first_head + a;
      const Act* latent = static_cast<const Act*>(task.q_latent) +
                          token * task.q_latent_strides[0] + head * task.q_latent_strides[1];
      const Act* rope = static_cast<const Act*>(task.q_rope) + token * task.q_rope_strides[0] +
                        head * task.q_rope_strides[1];
      std::fill_n(queries, RowStride(task), 0.0f);
      CopyFloats(latent, kv_lora_rank, queries);
      for (size_t i = 0; i < rope_dim; ++i) queries[kv_lora_rank + i] = ToFloat(rope[i]);
    }
  }
}

// One position of the cache as floats.
template <typename Stored>
HWY_INLINE void LoadPlace(const AttentionTask& task, int64_t place, float* to) {
  const auto width = static_cast<size_t>(task.kv_lora_rank + task.rope_dim);
  CopyFloats(static_cast<const Stored*>(task.cache) + place * static_cast<int64_t>(width), width,
             to);
}

// codes | factors | key, as StoreLatents wrote them.
template <>
HWY_INLINE void LoadPlace<Float8E4M3>(const AttentionTask& task, int64_t place, float* to) {
  const auto kv_lora_rank = static_cast<size_t>(task.kv_lora_rank);
  const auto rope_dim = static_cast<size_t>(task.rope_dim);
  const size_t num_groups = (kv_lora_rank + kFp8Block - 1) / kFp8Block;
  const size_t place_bytes = kv_lora_rank + num_groups * 4 + rope_dim * 2;
  const auto* codes =
      static_cast<const Float8E4M3*>(task.cache) + place * static_cast<int64_t>(place_bytes);
  const auto* bytes = reinterpret_cast<const char*>(codes);
  for (size_t i = 0; i < kv_lora_rank; i += kLanes) {
    float factor;
    std::memcpy(&factor, bytes + kv_lora_rank + i / kFp8Block * 4, 4);
    const FloatVec value = LoadUpTo(codes + i, kv_lora_rank - i);
    StoreFloats(hn::Mul(value, hn::Set(FloatTag(), factor * kLoadFactor<Float8E4M3>)), to + i);
  }
  const char* key = bytes + kv_lora_rank + num_groups * 4;
  for (size_t i = 0; i < rope_dim; ++i) {
    BFloat16 element;
    std::memcpy(&element, key + i * 2, 2);
    to[kv_lora_rank + i] = ToFloat(element);
  }
  for (size_t i = kv_lora_rank + rope_dim; i < RowLength(task); ++i) to[i] = 0.0f;
}

template <typename Stored>
void LoadTile(const AttentionTask& task, const int32_t* block_table, int first_position,
              int num_positions, float* tile) {
  for (int i = 0; i < num_positions; ++i, tile += RowStride(task)) {
    const int position = first_position + i;
    const int64_t place = int64_t{block_table[position / task.block_size]} * task.block_size +
                          position % task.block_size;
    LoadPlace<Stored>(task, place, tile);
  }
}

// What a row has gathered so far.
struct Running {
  float largest;  // score
  float total;    // Σ exp(score - largest)
};

// scores[row][position] = scale * query · kv, -inf behind the last position.
template <int kRows>
void ScoreTile(const AttentionTask& task, const float* queries, const float* tile,
               int num_positions, float* scores) {
  const size_t stride = RowStride(task);
  std::fill_n(scores, kRows * kTilePositions, -std::numeric_limits<float>::infinity());
  for (int position = 0; position < num_positions; position += kTileOutputs) {
    const float* w[kTileOutputs];
    for (int n = 0; n < kTileOutputs; ++n) {
      w[n] = tile + std::min(position + n, num_positions - 1) * stride;
    }
    FloatVec sums[kRows * kTileOutputs];
    for (FloatVec& sum : sums) sum = hn::Zero(FloatTag());
    AddProducts<kRows>(queries, stride, w, RowLength(task), sums);
    const int count = std::min(kTileOutputs, num_positions - position);
    for (int m = 0; m < kRows; ++m) {
      for (int n = 0; n < count; ++n) {
        scores[m * kTilePositions + position + n] = SumOf(sums[m * kTileOutputs + n]) * task.scale;
      }
    }
  }
}

// Turns the scores of a tile into shares exp(score - largest); returns the factor by which what the
// row gathered before must shrink.
HWY_INLINE float UpdateSoftmax(float* scores, Running& running) {
  const FloatTag d;
  FloatVec most = hn::LoadU(d, scores);
  for (size_t i = kLanes; i < kTilePositions; i += kLanes) {
    most = hn::Max(most, hn::LoadU(d, scores + i));
  }
  const float largest = std::max(running.largest, LargestOf(most));
  FloatVec total = hn::Zero(d);
  for (size_t i = 0; i < kTilePositions; i += kLanes) {
    const FloatVec share = Exp(hn::Sub(hn::LoadU(d, scores + i), hn::Set(d, largest)));
    total = hn::Add(total, share);
    hn::StoreU(share, d, scores + i);
  }
  const float shrink = hn::GetLane(Exp(hn::Set(d, running.largest - largest)));
  running.largest = largest;
  running.total = running.total * shrink + SumOf(total);
  return shrink;
}

// gathered = gathered * shrink + Σ share * latent, for kVecs vectors of kRows rows.
template <int kRows, int kVecs>
HWY_INLINE void GatherColumns(const float* HWY_RESTRICT latent, size_t latent_stride,
                              int num_positions, const float* HWY_RESTRICT shares,
                              const float* HWY_RESTRICT shrink, float* HWY_RESTRICT gathered,
                              size_t gathered_stride) {
  const FloatTag d;
  FloatVec s[kRows][kVecs];
  HWY_UNROLL(8)
  for (int m = 0; m < kRows; ++m) {
    HWY_UNROLL(8)
    for (int v = 0; v < kVecs; ++v) {
      s[m][v] =
          hn::Mul(hn::LoadU(d, gathered + m * gathered_stride + v * kLanes), hn::Set(d, shrink[m]));
    }
  }
  for (int position = 0; position < num_positions; ++position, latent += latent_stride) {
    FloatVec values[kVecs];
    HWY_UNROLL(8)
    for (int v = 0; v < kVecs; ++v) values[v] = hn::LoadU(d, latent + v * kLanes);
    HWY_UNROLL(8)
    for (int m = 0; m < kRows; ++m) {
      const FloatVec share = hn::Set(d, shares[m * kTilePositions + position]);
      HWY_UNROLL(8)
      for (int v = 0; v < kVecs; ++v) s[m][v] = hn::MulAdd(share, values[v], s[m][v]);
    }
  }
  HWY_UNROLL(8)
  for (int m = 0; m < kRows; ++m) {
    HWY_UNROLL(8)
    for (int v = 0; v < kVecs; ++v) {
      hn::StoreU(s[m][v], d, gathered + m * gathered_stride + v * kLanes);
    }
  }
}

template <int kRows>
void AttendTile(const AttentionTask& task, const float* queries, const float* tile,
                int num_positions, Running* running, float* gathered) {
  HWY_ALIGN float scores[kRows * kTilePositions];
  float shrink[kRows];
  ScoreTile<kRows>(task, queries, tile, num_positions, scores);
  for (int m = 0; m < kRows; ++m) {
    shrink[m] = UpdateSoftmax(scores + m * kTilePositions, running[m]);
  }
  constexpr size_t kColumns = 4 * kLanes;
  const auto kv_lora_rank = static_cast<size_t>(task.kv_lora_rank);
  const size_t stride = RowStride(task);
  size_t column = 0;
  for (; column + kColumns <= kv_lora_rank; column += kColumns) {
    GatherColumns<kRows, 4>(tile + column, stride, num_positions, scores, shrink, gathered + column,
                            stride);
  }
  for (; column < kv_lora_rank; column += kLanes) {
    GatherColumns<kRows, 1>(tile + column, stride, num_positions, scores, shrink, gathered + column,
                            stride);
  }
}

template <int kRows = kTileRows>
void AttendUpToTileRows(const AttentionTask& task, int num_rows, const float* queries,
                        const float* tile, int num_positions, Running* running, float* gathered) {
  if (num_rows == kRows) {
    AttendTile<kRows>(task, queries, tile, num_positions, running, gathered);
  } else if constexpr (kRows > 1) {
    AttendUpToTileRows<kRows - 1>(task, num_rows, queries, tile, num_positions, running, gathered);
  }
}

template <typename Act>
void StoreGathered(const AttentionTask& task, const AttentionPiece& piece, const Running* running,
                   const float* gathered) {
  const FloatTag d;
  const auto kv_lora_rank = static_cast<size_t>(task.kv_lora_rank);
  for (int t = 0; t < piece.num_tokens; ++t) {
    for (int a = 0; a < piece.num_heads; ++a, ++running, gathered += RowStride(task)) {
      Act* target = static_cast<Act*>(task.out) + (piece.first_token + t) * task.out_strides[0] +
                    (piece.first_head + a) * task.out_strides[1];
      const FloatVec total = hn::Set(d, running->total);
      for (size_t i = 0; i < kv_lora_rank; i += kLanes) {
        StoreUpTo(hn::Div(hn::LoadU(d, gathered + i), total), target + i, kv_lora_rank - i);
      }
    }
  }
}

void AttendPiece(const AttentionTask& task, const AttentionPiece& piece, Scratch& scratch) {
  const size_t stride = RowStride(task);
  const auto num_rows = static_cast<size_t>(piece.num_tokens) * piece.num_heads;
  static_assert(sizeof(Running) == 2 * sizeof(float));
  scratch.Reset((2 * num_rows + kTilePositions) * stride + PadToVector(2 * num_rows));
  float* queries = scratch.Take(num_rows * stride);
  float* gathered = scratch.Take(num_rows * stride);
  float* tile = scratch.Take(kTilePositions * stride);
  auto* running = reinterpret_cast<Running*>(scratch.Take(2 * num_rows));

  if (task.act_type == DType::kF32) {
    StageQueries<float>(task, piece, queries);
  } else {
    StageQueries<BFloat16>(task, piece, queries);
  }
  std::fill_n(gathered, num_rows * stride, 0.0f);
  std::fill_n(running, num_rows, Running{-std::numeric_limits<float>::infinity(), 0.0f});

  const int tile_rows = TileRowsFor(piece.num_heads);
  const int last_context = piece.first_context + piece.num_tokens - 1;
  for (int first = 0; first < last_context; first += kTilePositions) {
    const int num_positions = std::min(kTilePositions, last_context - first);
    switch (task.cache_type) {
      case DType::kF32:
        LoadTile<float>(task, piece.block_table, first, num_positions, tile);
        break;
      case DType::kBF16:
        LoadTile<BFloat16>(task, piece.block_table, first, num_positions, tile);
        break;
      default:
        LoadTile<Float8E4M3>(task, piece.block_table, first, num_positions, tile);
    }
    for (int t = 0; t < piece.num_tokens; ++t) {
      const int num_seen = std::min(num_positions, piece.first_context + t - first);
      if (num_seen <= 0) continue;
      for (int a = 0; a < piece.num_heads; a += tile_rows) {
        const size_t row = static_cast<size_t>(t) * piece.num_heads + a;
        AttendUpToTileRows(task, std::min(tile_rows, piece.num_heads - a), queries + row * stride,
                           tile, num_seen, running + row, gathered + row * stride);
      }
    }
  }
  if (task.act_type == DType::kF32) {
    StoreGathered<float>(task, piece, running, gathered);
  } else {
    StoreGathered<BFloat16>(task, piece, running, gathered);
  }
}

void RotateTokens(const Tensor& q_rope, const Tensor& positions, const Tensor& cos_sin,
                  const Tensor& out, int64_t begin, int64_t end) {
  VisitAct(q_rope.dtype(), [&](auto act) {
    using Act = decltype(act);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t position = positions.data<int32_t>()[t * positions.stride(0)];
      CHECK(position >= 0 && position < cos_sin.dim(0)) << position;
      const float* turn = RowOf<float>(cos_sin, position);
      for (int64_t a = 0; a < q_rope.dim(1); ++a) {
        RotateRow(RowOf<Act>(q_rope, t) + a * q_rope.stride(1), turn, q_rope.dim(2),
                  RowOf<Act>(out, t) + a * out.stride(1));
      }
    }
  });
}

void QuantizeRows(const Tensor& x, const LinearInput& out) {
  VisitAct(x.dtype(), [&](auto act) {
    for (int64_t t = 0; t < x.dim(0); ++t) QuantizeRow(RowOf<decltype(act)>(x, t), out, t);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace fathom
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fathom {
namespace {

HWY_EXPORT(AttendPiece);
HWY_EXPORT(RotateTokens);
HWY_EXPORT(QuantizeRows);

// Cuts a sequence's tokens into pieces; heads too where there are fewer tokens than threads.
void CutSequence(AttentionPiece whole, int num_heads, int head_cuts,
                 std::vector<AttentionPiece>& pieces) {
  const int heads = (num_heads + head_cuts - 1) / head_cuts;
  const int tokens = std::max(1, kMostAttentionRows / heads);
  for (int t = 0; t < whole.num_tokens; t += tokens) {
    for (int a = 0; a < num_heads; a += heads) {
      AttentionPiece piece = whole;
      piece.first_token += t;
      piece.first_context += t;
      piece.num_tokens = std::min(tokens, whole.num_tokens - t);
      piece.first_head = a;
      piece.num_heads = std::min(heads, num_heads - a);
      pieces.push_back(piece);
    }
  }
}

// The tokens [begin, end) of a tensor of which each row belongs to one.
LinearInput SliceRows(const LinearInput& rows, int64_t begin, int64_t end) {
  LinearInput slice(rows.values.Slice(0, begin, end));
  if (rows.quantized()) slice.scales = rows.scales.Slice(0, begin, end);
  return slice;
}

}  // namespace

void CpuOps::RotateHeads(const Tensor& q_rope, const Tensor& positions, const Tensor& cos_sin,
                         const Tensor& out) {
  threads_.ParallelFor(q_rope.dim(0), SmallestRange(q_rope.dim(1) * q_rope.dim(2)),
                       [&](int, int64_t begin, int64_t end) {
                         HWY_DYNAMIC_DISPATCH(RotateTokens)
                         (q_rope, positions, cos_sin, out, begin, end);
                       });
}

void CpuOps::AttendLatents(const AttentionTask& task, const AttentionBatch& batch,
                           int64_t num_heads, int64_t begin, int64_t end) {
  const auto* query_start = batch.query_start.data<int32_t>();
  const auto* context_lens = batch.context_lens.data<int32_t>();
  // A step of few tokens occupies all threads only if they share the heads.
  const int num_threads = threads_.num_threads();
  const int64_t tokens = std::max<int64_t>(1, end - begin);
  const int head_cuts =
      static_cast<int>(std::min<int64_t>(num_heads, (num_threads + tokens - 1) / tokens));
  pieces_.clear();
  int64_t work = 0;
  for (int64_t s = 0; s < batch.context_lens.dim(0); ++s) {
    const int num_tokens = query_start[s + 1] - query_start[s];
    CHECK(num_tokens >= 0 && (num_tokens == 0 || context_lens[s] >= num_tokens))
        << "sequence " << s << " of " << context_lens[s] << " tokens computes " << num_tokens;
    CHECK_GE(batch.block_tables.dim(1) * batch.block_size, context_lens[s]);
    const int64_t first = std::max<int64_t>(begin, query_start[s]);
    const int64_t last = std::min<int64_t>(end, query_start[s + 1]);
    if (first >= last) continue;
    AttentionPiece whole;
    whole.block_table = RowOf<int32_t>(batch.block_tables, s);
    whole.first_token = first - begin;
    whole.num_tokens = static_cast<int>(last - first);
    whole.first_context = context_lens[s] - static_cast<int>(query_start[s + 1] - first) + 1;
    CutSequence(whole, static_cast<int>(num_heads), head_cuts, pieces_);
    work += int64_t{whole.num_tokens} * context_lens[s] * num_heads * task.kv_lora_rank;
  }

  // Later pieces of a prompt see more positions, so each thread takes every n-th.
  constexpr int64_t kSmallestWork = int64_t{1} << 17;
  const auto num_pieces = static_cast<int64_t>(pieces_.size());
  const int64_t num_ranges = std::min<int64_t>(num_threads, work / kSmallestWork + 1);
  threads_.ParallelFor(num_ranges, 1, [&](int range, int64_t range_begin, int64_t range_end) {
    for (int64_t first = range_begin; first < range_end; ++first) {
      for (int64_t i = first; i < num_pieces; i += num_ranges) {
        HWY_DYNAMIC_DISPATCH(AttendPiece)
        (task, pieces_[static_cast<size_t>(i)], scratch_[static_cast<size_t>(range)]);
      }
    }
  });
}

void CpuOps::MlaAttention(const Tensor& q, const MlaWeights& weights, const Tensor& positions,
                          const Tensor& cos_sin, const Tensor& cache, const AttentionBatch& batch,
                          float scale, const LinearInput& out) {
  const AttentionSizes sizes = CheckMlaAttention(q, weights, positions, cos_sin, cache, batch, out);
  const DType act = q.dtype();
  AttentionTask task;
  task.act_type = act;
  task.kv_lora_rank = static_cast<int>(sizes.kv_lora_rank);
  task.rope_dim = static_cast<int>(sizes.rope_dim);
  task.scale = scale;
  task.cache = cache.raw();
  task.cache_type = cache.dtype();
  task.block_size = batch.block_size;

  for (int64_t begin = 0; begin < sizes.tokens; begin += kMostAttentionTokens) {
    const int64_t end = std::min(sizes.tokens, begin + kMostAttentionTokens);
    const int64_t rows = (end - begin) * sizes.heads;
    attention_scratch_.Reset(PadToVector(rows * sizes.kv_lora_rank) +
                             PadToVector(rows * sizes.rope_dim) + PadToVector(rows * sizes.v_dim));
    const auto take = [&](int64_t width) {
      return Tensor(attention_scratch_.Take(static_cast<size_t>(rows * width)), act,
                    {end - begin, sizes.heads, width});
    };
    // A row is read before it is written, by whoever writes it, so latents replace their queries.
    const Tensor latent = take(sizes.kv_lora_rank);
    const Tensor q_rope = take(sizes.rope_dim);
    const Tensor values = take(sizes.v_dim);

    const Tensor queries = q.Slice(0, begin, end);
    RotateHeads(queries.Slice(2, sizes.nope_dim, sizes.nope_dim + sizes.rope_dim),
                positions.Slice(0, begin, end), cos_sin, q_rope);
    MultiplyHeads(queries.Slice(2, 0, sizes.nope_dim), weights.w_uk, latent);  // absorption

    task.q_latent = latent.raw();
    task.q_rope = q_rope.raw();
    task.out = latent.raw();
    for (int i = 0; i < 2; ++i) {
      task.q_latent_strides[i] = task.out_strides[i] = latent.stride(i);
      task.q_rope_strides[i] = q_rope.stride(i);
    }
    AttendLatents(task, batch, sizes.heads, begin, end);

    const LinearInput rows_out = SliceRows(out, begin, end);
    if (out.quantized()) {
      MultiplyHeads(latent, weights.w_uv, values);
      HWY_DYNAMIC_DISPATCH(QuantizeRows)
      (values.Reshape({end - begin, sizes.heads * sizes.v_dim}), rows_out);
    } else {
      MultiplyHeads(latent, weights.w_uv, rows_out.values.SplitLast(sizes.heads, sizes.v_dim));
    }
  }
}

}  // namespace fathom
#endif  // HWY_ONCE
