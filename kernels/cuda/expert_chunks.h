// How the sorted rows of a step's experts are cut into pieces of work: ExpertGroups::notes.
//
//   notes[0]         number of chunks
//   notes[4 + 4 i]   chunk i, an ExpertChunk
// Chunks stand in the order of the sorted rows; an expert without rows has none, one with more than
// fit has several, all full but the last. Written by Route, read by the grouped kernels, both on
// the device: the host knows no more than that there are at most MaxChunks.
// Thread-safe.
#pragma once

#include <cstdint>

namespace fathom {

// Consecutive sorted rows of one expert.
struct ExpertChunk {
  int32_t expert;  // of this rank
  int32_t begin;   // the first sorted row
  int32_t count;   // at least 1, at most RowsPerChunk
  int32_t unused;
};
static_assert(sizeof(ExpertChunk) == 16);

inline constexpr int kFirstChunkNote = 4;

// The rows of a full chunk when `rows` rows go to `experts` experts: most experts' rows should fit
// into one chunk, since every further chunk of an expert reads its weight again.
constexpr int RowsPerChunk(int64_t rows, int64_t experts) {
  if (rows <= 12 * experts) return 16;
  if (rows <= 24 * experts) return 32;
  if (rows <= 48 * experts) return 64;
  return 128;
}

constexpr int64_t MaxChunks(int64_t rows, int64_t experts) {
  return (rows < experts ? rows : experts) + rows / RowsPerChunk(rows, experts);
}

}  // namespace fathom
