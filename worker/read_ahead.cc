#include "worker/read_ahead.h"

#include <cstring>
#include <utility>

#include "base/check.h"
#include "base/status_macros.h"

namespace fathom {
namespace {

// The disk delivers whole pages.
constexpr int64_t kSmallestGapBytes = 4096;

absl::Status Read(const FilePiece& piece, char* buffer) {
  if (piece.reads_across()) {
    RETURN_IF_ERROR(piece.file->Read(piece.offset, piece.buffer_bytes(), buffer));
    for (int64_t i = 1; i < piece.num_rows && piece.row_bytes < piece.pitch_bytes; ++i) {
      std::memmove(buffer + i * piece.row_bytes, buffer + i * piece.pitch_bytes, piece.row_bytes);
    }
    return absl::OkStatus();
  }
  for (int64_t i = 0; i < piece.num_rows; ++i) {
    RETURN_IF_ERROR(piece.file->Read(piece.offset + i * piece.pitch_bytes, piece.row_bytes,
                                     buffer + i * piece.row_bytes));
  }
  return absl::OkStatus();
}

}  // namespace

bool FilePiece::reads_across() const { return pitch_bytes - row_bytes < kSmallestGapBytes; }

int64_t FilePiece::buffer_bytes() const {
  return reads_across() ? (num_rows - 1) * pitch_bytes + row_bytes : num_rows * row_bytes;
}

ReadAhead::ReadAhead(std::vector<FilePiece> pieces, std::vector<char*> buffers, int num_threads)
    : pieces_(std::move(pieces)), slots_(buffers.size()) {
  CHECK(!buffers.empty() && num_threads > 0);
  for (size_t i = 0; i < buffers.size(); ++i) slots_[i].buffer = buffers[i];
  for (int i = 0; i < num_threads; ++i) threads_.emplace_back([this] { Work(); });
}

ReadAhead::~ReadAhead() {
  {
    const std::lock_guard lock(mutex_);
    is_stopped_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ReadAhead::Work() {
  const auto may_begin = [this] {
    return is_stopped_ || num_begun_ == pieces_.size() ||
           num_begun_ - num_released_ < slots_.size();
  };
  while (true) {
    const FilePiece* piece = nullptr;
    Slot* slot = nullptr;
    char* buffer = nullptr;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, may_begin);
      if (is_stopped_ || num_begun_ == pieces_.size()) return;
      piece = &pieces_[num_begun_];
      slot = &slots_[num_begun_ % slots_.size()];
      buffer = slot->buffer;
      ++num_begun_;
    }
    absl::Status status = Read(*piece, buffer);
    const std::lock_guard lock(mutex_);
    slot->status = std::move(status);
    slot->is_ready = true;
    changed_.notify_all();
  }
}

absl::StatusOr<const char*> ReadAhead::Take() {
  std::unique_lock lock(mutex_);
  CHECK(num_taken_ < pieces_.size() && num_taken_ - num_released_ < slots_.size());
  Slot& slot = slots_[num_taken_ % slots_.size()];
  changed_.wait(lock, [&slot] { return slot.is_ready; });
  ++num_taken_;
  slot.is_ready = false;
  RETURN_IF_ERROR(slot.status);
  return slot.buffer;
}

void ReadAhead::Release() {
  const std::lock_guard lock(mutex_);
  CHECK_LT(num_released_, num_taken_);
  ++num_released_;
  changed_.notify_all();
}

}  // namespace fathom
