// How MlaDecodeSm90 shares the tokens of a step out among clusters of multiprocessors.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/mla_decode_sm90.h"

namespace fathom::mla_decode {

constexpr int kUnitTokens = 16;  // rows are cut between units
constexpr int kMaxShares = 256;

// Tokens [begin, end) of a row, for one cluster.
struct alignas(16) Item {
  int token;      // line of queries and output
  int sequence;   // line of the block tables
  int begin;      // a multiple of kUnitTokens
  int end;        // at most the row's context
  int fresh;      // positions from here on are written by this step
  int part;       // which of the parts of the row this is
  int num_parts;  // 1: all of it
  int unused;
};

// What a cluster does: `first`, then rows first_row + 1 to last_row, which begin in this share:
// their items are Plan::later[row]. Nothing if last_row < first_row.
struct alignas(16) Share {
  Item first;
  int first_row, last_row;
  int unused[2];
};

struct Plan {
  Share* shares;  // [kMaxShares]
  Item* later;    // [MlaDecodeSm90::kMaxRows]
};

// For `num_clusters` of `cluster_size` multiprocessors; also zeroes counters[num_counters].
void Schedule(const MlaDecodeSm90::Rows& rows, int num_clusters, int cluster_size, const Plan& plan,
              int* counters, int num_counters, cudaStream_t stream);

}  // namespace fathom::mla_decode
