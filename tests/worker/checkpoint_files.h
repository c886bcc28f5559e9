// Checkpoints that a test reads whole, edits and writes: golden ones, variants, hostile ones.
#pragma once

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "worker/safetensors.h"

namespace fathom {

// A new folder, gone when the test ends.
class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string name = (std::filesystem::temp_directory_path() / "fathom_test_XXXXXX").string();
    CHECK(::mkdtemp(name.data()) != nullptr) << name;
    path_ = name;
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  ~TemporaryDirectory() { std::filesystem::remove_all(path_); }

  const std::string& path() const { return path_; }
  std::string File(const std::string& name) const { return absl::StrCat(path_, "/", name); }

 private:
  std::string path_;
};

inline void WriteFile(const std::string& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  CHECK(file.good()) << path;
}

inline std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  CHECK(file.good()) << path;
  std::ostringstream bytes;
  bytes << file.rdbuf();
  return bytes.str();
}

struct FileTensor {
  std::string dtype;
  std::vector<int64_t> shape;
  std::string bytes;
};
using FileTensors = std::map<std::string, FileTensor>;

// The bytes of a safetensors file with this header and data.
inline std::string SafetensorsBytes(const std::string& header_json, const std::string& data) {
  const uint64_t header_bytes = header_json.size();
  std::string bytes(sizeof(header_bytes), '\0');
  std::memcpy(bytes.data(), &header_bytes, sizeof(header_bytes));
  return absl::StrCat(bytes, header_json, data);
}

inline std::string SafetensorsBytes(const FileTensors& tensors) {
  std::vector<std::string> entries;
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    const size_t begin = data.size();
    data += tensor.bytes;
    entries.push_back(absl::StrCat("\"", name, "\":{\"dtype\":\"", tensor.dtype, "\",\"shape\":[",
                                   absl::StrJoin(tensor.shape, ","), "],\"data_offsets\":[", begin,
                                   ",", data.size(), "]}"));
  }
  return SafetensorsBytes(absl::StrCat("{", absl::StrJoin(entries, ","), "}"), data);
}

inline FileTensors ReadTensors(const SafetensorsFile& file) {
  FileTensors tensors;
  for (const auto& [name, info] : file.tensors()) {
    FileTensor& tensor = tensors[name];
    tensor = {.dtype = info.dtype, .shape = info.shape, .bytes = std::string(info.num_bytes, '\0')};
    CHECK(file.Read(info.file_offset, info.num_bytes, tensor.bytes.data()).ok());
  }
  return tensors;
}

// All tensors of a model folder.
inline FileTensors ReadCheckpoint(const std::string& directory) {
  const auto checkpoint = Checkpoint::Open(directory);
  CHECK(checkpoint.ok()) << checkpoint.status();
  FileTensors tensors;
  for (const auto& [name, entry] : (*checkpoint)->tensors()) {
    FileTensor& tensor = tensors[name];
    tensor = {.dtype = entry.info->dtype,
              .shape = entry.info->shape,
              .bytes = std::string(entry.info->num_bytes, '\0')};
    CHECK(
        entry.file->Read(entry.info->file_offset, entry.info->num_bytes, tensor.bytes.data()).ok());
  }
  return tensors;
}

inline void WriteCheckpoint(const std::string& directory, const std::string& config_json,
                            const FileTensors& tensors) {
  WriteFile(absl::StrCat(directory, "/config.json"), config_json);
  WriteFile(absl::StrCat(directory, "/model.safetensors"), SafetensorsBytes(tensors));
}

}  // namespace fathom
