// Pieces of files, read by several threads ahead of who takes them in order: one thread reads no
// faster than some GB/s, and none reads while it copies.
//
// Thread-compatible: one thread takes and releases.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/safetensors.h"

namespace fathom {

// Rows of equal length at equal distances, which become contiguous.
struct FilePiece {
  const SafetensorsFile* file = nullptr;
  int64_t offset = 0;  // of the first row
  int64_t num_rows = 0;
  int64_t row_bytes = 0;
  int64_t pitch_bytes = 0;  // from a row to the next

  // Where gaps are so short that the disk delivers them anyway, they are read too.
  bool reads_across() const;
  // What reading takes of a buffer.
  int64_t buffer_bytes() const;
};

class ReadAhead {
 public:
  // Each buffer holds the largest piece. The files and the buffers must outlive this.
  ReadAhead(std::vector<FilePiece> pieces, std::vector<char*> buffers, int num_threads);
  ~ReadAhead();

  // The bytes of the next piece, once they are there; DataLoss when reading failed. They stay
  // until they are released. REQUIRES: not all pieces are taken, not all buffers are in use.
  absl::StatusOr<const char*> Take();
  // The piece that was taken first, of those not yet released, is no longer needed.
  void Release();

 private:
  struct Slot {
    char* buffer = nullptr;
    bool is_ready = false;
    absl::Status status;
  };

  void Work();

  const std::vector<FilePiece> pieces_;

  // mutex_ guards what follows; changed_ is told of every change.
  std::mutex mutex_;
  std::condition_variable changed_;
  bool is_stopped_ = false;
  // Piece i lies in slot i modulo their number. Of all pieces the first num_released_ are done
  // with, num_taken_ were taken, num_begun_ are read or being read.
  std::vector<Slot> slots_;
  size_t num_released_ = 0;
  size_t num_taken_ = 0;
  size_t num_begun_ = 0;

  std::vector<std::thread> threads_;
};

}  // namespace fathom
