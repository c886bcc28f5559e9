// What the kernels of MlaPrefillSm90 tell each other: how a step's work is divided, and the scratch
// that it goes through. Only they include this.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/mla_prefill_sm90.h"

namespace fathom::mla_prefill {

inline constexpr int kHeads = MlaPrefillSm90::kHeads;
inline constexpr int kRank = MlaPrefillSm90::kKvLoraRank;
inline constexpr int kRope = MlaPrefillSm90::kRopeHeadDim;
inline constexpr int kHeadDim = MlaPrefillSm90::kHeadDim;
inline constexpr int kQueryDim = kHeadDim + kRope;  // 192
inline constexpr int kTile = 128;                   // keys, and queries
inline constexpr int kBoxBytes = kTile * 128;       // 128 rows of 64 bf16

// Tokens [first, first + count) of a sequence; the i-th such tile of a piece fills its rows
// [128 i, 128 i + 128), with zeros after `count`.
struct KeyTile {
  int sequence;
  int first;
  int count;
  int unused;
};

// Queries of one sequence, and the keys in this piece that the last of them sees.
struct QueryTile {
  int first_token;  // of the step
  int num_tokens;   // at most 128
  int key_row;      // of the piece, a multiple of 128
  int num_keys;     // at least 1
  int diagonal;     // query i sees keys up to diagonal + i, and so none if that is negative
  int continues;    // whether an earlier piece left a running state, …
  int unfinished;   // … and whether this one shall
  int unused;
};

// One piece's work, in device memory.
struct PieceCounts {
  int num_key_tiles;
  int num_query_tiles;
  // Of the attention kernel, which leaves them at zero: items taken, blocks that have ended.
  int taken;
  int ended;
};

// The workspace, divided.
struct Workspace {
  __nv_bfloat16* keys;         // [heads, piece_tokens, 128]
  __nv_bfloat16* values;       // [heads, piece_tokens, 128]
  __nv_bfloat16* ropes;        // [piece_tokens, 64]
  __nv_bfloat16* query_ropes;  // [max_tokens, heads, 64], rotated
  __nv_bfloat16* latents;      // [piece_tokens, 512], of an FP8 cache
  float* outputs;              // [max_tokens, heads, 128]: running, not yet normalised
  float2* sums;                // [max_tokens, heads]: largest score, sum of exponentials
  PieceCounts* counts;         // [max_pieces]
  KeyTile* key_tiles;          // [max_pieces, piece_tokens / 128]
  QueryTile* query_tiles;      // [max_pieces, max_query_tiles], costliest sequence and tile first
  int max_query_tiles;
  int max_pieces;
  int piece_tokens;
  int64_t num_bytes;
};

// What expansion reads.
struct Expansion {
  MlaCache cache;
  const __nv_bfloat16* w_uk;
  const __nv_bfloat16* w_uv;
  const int* block_tables;
  int max_blocks;
  const __nv_bfloat16* q;
  const int* positions;
  const float* cos_sin;
  int num_tokens;  // of the step
};

// Once per device, before Expand.
void PrepareExpand();

// Fills keys, values and ropes of a piece from the cache; with the first piece also query_ropes.
void Expand(const Workspace& workspace, int piece, const Expansion& expansion,
            int num_multiprocessors, cudaStream_t stream);

}  // namespace fathom::mla_prefill
