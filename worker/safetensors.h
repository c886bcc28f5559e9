// Checkpoints: *.safetensors files, single or sharded with an index. Treated as hostile.
//
// A file is accepted only when its header is sound to the last byte: sizes follow from type and
// shape, and the tensors tile the file without gap or overlap. Errors are InvalidArgument (NotFound
// for a file that is not there) and name the file, and the tensor where there is one. Files are
// read with pread, never mapped: a file truncated under our feet is an error, not a SIGBUS.
//
// Source: github.com/huggingface/safetensors, README "Format".
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace fathom {

struct TensorInfo {
  std::string dtype;  // as in the file: BF16, F32, F8_E4M3, I64, ...
  std::vector<int64_t> shape;
  int64_t file_offset = 0;  // of the first byte, from the start of the file
  int64_t num_bytes = 0;

  std::string DebugString() const;  // "BF16[64, 7168]"
};

// One open file. Thread-safe once open.
class SafetensorsFile {
 public:
  static constexpr int64_t kMaxHeaderBytes = 100'000'000;  // as the reference implementation

  static absl::StatusOr<std::unique_ptr<SafetensorsFile>> Open(const std::string& path);
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;
  ~SafetensorsFile();

  const std::string& path() const { return path_; }
  const std::map<std::string, TensorInfo, std::less<>>& tensors() const { return tensors_; }

  // Bytes [offset, offset + num_bytes) of the file. DataLoss when the file ends or fails.
  absl::Status Read(int64_t offset, int64_t num_bytes, void* out) const;

 private:
  SafetensorsFile(std::string path, int descriptor, int64_t file_bytes);
  absl::Status ReadHeader();
  absl::Status ParseHeader(std::string_view header_json, int64_t data_start);
  absl::Status CheckTiling(int64_t data_start) const;

  const std::string path_;
  const int descriptor_;
  const int64_t file_bytes_;
  std::map<std::string, TensorInfo, std::less<>> tensors_;
};

// All tensors of a model folder: model.safetensors.index.json and its shards if there is an index,
// else model.safetensors. An index names every tensor of its shards. Thread-safe once open.
class Checkpoint {
 public:
  struct Entry {
    const SafetensorsFile* file = nullptr;
    const TensorInfo* info = nullptr;
  };

  // Opens every file and checks every header. Reads no tensor.
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& model_directory);

  // Looks at config.json only: what stands for a checkpoint where there is none.
  static absl::StatusOr<std::unique_ptr<Checkpoint>> WithoutTensors(
      const std::string& model_directory);

  // Names in ascending order.
  const std::map<std::string, Entry, std::less<>>& tensors() const { return tensors_; }
  // Null when there is no such tensor.
  const Entry* Find(std::string_view name) const;

  const std::string& directory() const { return directory_; }
  // 32 hexadecimal digits: XXH3-128 of config.json's bytes and of every tensor's name, type and
  // shape. Equal for workers that would load the same model; says nothing about the values.
  const std::string& fingerprint() const { return fingerprint_; }

 private:
  Checkpoint() = default;
  absl::Status AddFile(const std::string& file_name);
  void TakeFingerprint(const std::string& config_json);
  absl::Status CheckIndex(const std::map<std::string, std::string>& weight_map) const;

  std::string directory_;
  std::string fingerprint_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, Entry, std::less<>> tensors_;
};

// A whole text file, such as config.json. NotFound, or InvalidArgument when it is not a regular
// file or larger than `max_bytes`.
absl::StatusOr<std::string> ReadTextFile(const std::string& path, int64_t max_bytes);

}  // namespace fathom
