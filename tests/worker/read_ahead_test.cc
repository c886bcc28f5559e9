#include "worker/read_ahead.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "tests/worker/checkpoint_files.h"

namespace fathom {
namespace {

constexpr uint64_t kSeed = 20250101;

class ReadAheadTest : public testing::Test {
 protected:
  static constexpr int64_t kFileBytes = 1 << 20;

  ReadAheadTest() {
    bytes_.resize(kFileBytes);
    for (char& byte : bytes_) byte = static_cast<char>(random_());
    const std::string path = directory_.File("model.safetensors");
    WriteFile(path, SafetensorsBytes({{"x", {"U8", {kFileBytes}, bytes_}}}));
    file_ = *SafetensorsFile::Open(path);
    data_start_ = file_->tensors().at("x").file_offset;
  }

  int64_t Random(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }
  // Rows with gaps of both kinds, and without.
  FilePiece RandomPiece() {
    FilePiece piece = {.file = file_.get(), .num_rows = Random(1, 6), .row_bytes = Random(1, 9000)};
    constexpr int64_t kGaps[] = {0, 1, 4095, 4096, 20000};
    piece.pitch_bytes = piece.row_bytes + kGaps[Random(0, 4)];
    const int64_t extent = (piece.num_rows - 1) * piece.pitch_bytes + piece.row_bytes;
    piece.offset = data_start_ + Random(0, kFileBytes - extent);
    return piece;
  }
  std::string Expected(const FilePiece& piece) const {
    std::string expected;
    for (int64_t i = 0; i < piece.num_rows; ++i) {
      expected +=
          bytes_.substr(piece.offset - data_start_ + i * piece.pitch_bytes, piece.row_bytes);
    }
    return expected;
  }
  // Memory for the largest of the pieces, several times.
  std::vector<char*> Buffers(const std::vector<FilePiece>& pieces, int count) {
    int64_t largest = 0;
    for (const FilePiece& piece : pieces) largest = std::max(largest, piece.buffer_bytes());
    std::vector<char*> buffers;
    for (int i = 0; i < count; ++i) {
      memory_.emplace_back(largest);
      buffers.push_back(memory_.back().data());
    }
    return buffers;
  }

  std::mt19937_64 random_{kSeed};
  TemporaryDirectory directory_;
  std::string bytes_;
  std::unique_ptr<SafetensorsFile> file_;
  int64_t data_start_ = 0;
  std::vector<std::vector<char>> memory_;
};

TEST_F(ReadAheadTest, PiecesComeInOrderWhoeverReadThem) {
  SCOPED_TRACE(testing::Message() << "seed " << kSeed);
  std::vector<FilePiece> pieces;
  for (int i = 0; i < 400; ++i) pieces.push_back(RandomPiece());
  for (const int num_threads : {1, 2, 5}) {
    for (const int num_buffers : {1, 2, 7}) {
      ReadAhead read_ahead(pieces, Buffers(pieces, num_buffers), num_threads);
      std::vector<std::pair<const char*, const FilePiece*>> held;  // taken and not released
      for (const FilePiece& piece : pieces) {
        if (static_cast<int>(held.size()) == num_buffers || Random(0, 3) == 0) {
          for (const auto& [bytes, taken] : held) {
            ASSERT_EQ(std::string(bytes, taken->num_rows * taken->row_bytes), Expected(*taken));
            read_ahead.Release();
          }
          held.clear();
        }
        const absl::StatusOr<const char*> bytes = read_ahead.Take();
        ASSERT_TRUE(bytes.ok()) << bytes.status();
        held.emplace_back(*bytes, &piece);
      }
    }
  }
}

TEST_F(ReadAheadTest, WhatCannotBeReadIsAnErrorWhenItsTurnComes) {
  std::vector<FilePiece> pieces(20, RandomPiece());
  pieces[13].offset = data_start_ + kFileBytes;
  ReadAhead read_ahead(pieces, Buffers(pieces, 6), 3);
  for (int i = 0; i < 13; ++i) {
    ASSERT_TRUE(read_ahead.Take().ok()) << i;
    read_ahead.Release();
  }
  EXPECT_TRUE(absl::IsDataLoss(read_ahead.Take().status()));
}

TEST_F(ReadAheadTest, NobodyNeedsToTakeWhatWasRead) {
  const std::vector<FilePiece> pieces(100, RandomPiece());
  ReadAhead read_ahead(pieces, Buffers(pieces, 4), 4);
  ASSERT_TRUE(read_ahead.Take().ok());
}

}  // namespace
}  // namespace fathom
