#include "worker/safetensors.h"

#include <fcntl.h>
#include <simdjson.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace fathom {
namespace {

constexpr char kIndexName[] = "model.safetensors.index.json";
constexpr char kSingleName[] = "model.safetensors";
constexpr char kConfigName[] = "config.json";
constexpr int64_t kMaxIndexBytes = 100'000'000;
constexpr int64_t kMaxJsonBytes = 16'000'000;
constexpr size_t kMaxShards = 4096;
constexpr size_t kMaxRank = 8;

struct SafetensorsType {
  const char* name;
  int64_t element_bytes;
};
constexpr SafetensorsType kTypes[] = {
    {"BF16", 2}, {"F32", 4}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F16", 2},
    {"F64", 8},  {"I64", 8}, {"U64", 8},     {"I32", 4},     {"U32", 4},
    {"I16", 2},  {"U16", 2}, {"I8", 1},      {"U8", 1},      {"BOOL", 1},
};

// A name from a hostile file, fit to be printed.
std::string Quoted(std::string_view name) {
  constexpr size_t kLongest = 200;
  const std::string text(name.substr(0, kLongest));
  return absl::StrCat("\"", absl::CHexEscape(text), name.size() > kLongest ? "...\"" : "\"");
}

// -1 for a type the format does not know.
int64_t ElementBytes(std::string_view dtype) {
  for (const SafetensorsType& type : kTypes) {
    if (dtype == type.name) return type.element_bytes;
  }
  return -1;
}

class FileDescriptor {
 public:
  explicit FileDescriptor(int descriptor) : descriptor_(descriptor) {}
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  int get() const { return descriptor_; }
  int release() { return std::exchange(descriptor_, -1); }

 private:
  int descriptor_;
};

// Symbolic links are followed, as a Hugging Face cache consists of them; what they lead to must be
// a regular file (non-blocking, so that a pipe cannot hold us).
absl::StatusOr<int> OpenRegularFile(const std::string& path, int64_t& file_bytes) {
  FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) {
    const int error = errno;
    const std::string message = absl::StrCat(path, ": ", std::strerror(error));
    return error == ENOENT ? absl::NotFoundError(message) : absl::InvalidArgumentError(message);
  }
  struct stat status;
  if (::fstat(file.get(), &status) != 0 || !S_ISREG(status.st_mode)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file"));
  }
  file_bytes = status.st_size;
  return file.release();
}

absl::Status ReadAt(const std::string& path, int descriptor, int64_t offset, int64_t num_bytes,
                    void* out) {
  char* target = static_cast<char*>(out);
  while (num_bytes > 0) {
    const ssize_t count = ::pread(descriptor, target, num_bytes, offset);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return absl::DataLossError(absl::StrCat(path, ": ", std::strerror(errno)));
    if (count == 0) {
      return absl::DataLossError(absl::StrCat(path, ": ends at byte ", offset, ", expected ",
                                              num_bytes, " more; was it truncated?"));
    }
    target += count;
    offset += count;
    num_bytes -= count;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int64_t>> ParseIntegers(simdjson::dom::element element, size_t most) {
  simdjson::dom::array array;
  if (element.get(array) != simdjson::SUCCESS || array.size() > most) {
    return absl::InvalidArgumentError(
        absl::StrCat("expected an array of at most ", most, " integers"));
  }
  std::vector<int64_t> integers;
  for (simdjson::dom::element item : array) {
    int64_t value = 0;
    if (item.get(value) != simdjson::SUCCESS || value < 0) {
      return absl::InvalidArgumentError("expected integers from 0 to 2^63 - 1");
    }
    integers.push_back(value);
  }
  return integers;
}

// type × shape, or -1 when that is no number of bytes that a file can have.
int64_t BytesOf(int64_t element_bytes, const std::vector<int64_t>& shape) {
  int64_t bytes = element_bytes;
  for (int64_t size : shape) {
    if (__builtin_mul_overflow(bytes, size, &bytes)) return -1;
  }
  return bytes;
}

// One entry of a header. `data_start` is where the tensors begin in the file, `data_bytes` how much
// follows.
absl::StatusOr<TensorInfo> ParseTensor(simdjson::dom::element element, int64_t data_start,
                                       int64_t data_bytes) {
  simdjson::dom::object object;
  if (element.get(object) != simdjson::SUCCESS) {
    return absl::InvalidArgumentError("expected an object with dtype, shape and data_offsets");
  }
  TensorInfo info;
  std::vector<int64_t> offsets;
  std::set<std::string_view> seen;
  for (const auto& [key, value] : object) {
    if (!seen.insert(key).second) {
      return absl::InvalidArgumentError(absl::StrCat("field ", Quoted(key), " occurs twice"));
    }
    std::string_view text;
    if (key == "dtype") {
      if (value.get(text) != simdjson::SUCCESS || ElementBytes(text) < 0) {
        return absl::InvalidArgumentError(
            absl::StrCat("dtype is ", simdjson::minify(value).substr(0, 40),
                         ", expected a type of the safetensors format such as BF16"));
      }
      info.dtype = std::string(text);
    } else if (key == "shape") {
      ASSIGN_OR_RETURN(info.shape, ParseIntegers(value, kMaxRank));
    } else if (key == "data_offsets") {
      ASSIGN_OR_RETURN(offsets, ParseIntegers(value, 2));
    } else {
      return absl::InvalidArgumentError(absl::StrCat(
          "unknown field ", Quoted(key), ", expected dtype, shape and data_offsets only"));
    }
  }
  if (seen.size() != 3 || offsets.size() != 2) {
    return absl::InvalidArgumentError("expected dtype, shape and two data_offsets");
  }
  const int64_t begin = offsets[0], end = offsets[1];
  if (begin > end || end > data_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("data_offsets are [", begin, ", ", end,
                                                   "], but the file has ", data_bytes,
                                                   " bytes after its header; was it truncated?"));
  }
  info.num_bytes = BytesOf(ElementBytes(info.dtype), info.shape);
  if (info.num_bytes != end - begin) {
    return absl::InvalidArgumentError(absl::StrCat(
        "data_offsets span ", end - begin, " bytes, but ", info.DebugString(), " needs ",
        info.num_bytes < 0 ? std::string("more than any file has") : absl::StrCat(info.num_bytes)));
  }
  info.file_offset = data_start + begin;
  return info;
}

absl::StatusOr<std::map<std::string, std::string>> ParseIndex(const std::string& path,
                                                              const std::string& text) {
  simdjson::dom::parser parser;
  simdjson::dom::element document;
  if (simdjson::error_code error = parser.parse(text).get(document); error != simdjson::SUCCESS) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": not valid JSON: ", simdjson::error_message(error)));
  }
  simdjson::dom::object weight_map;
  if (document["weight_map"].get(weight_map) != simdjson::SUCCESS) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": expected an object with an object weight_map"));
  }
  std::map<std::string, std::string> files_by_tensor;
  for (const auto& [key, value] : weight_map) {
    std::string_view file;
    if (value.get(file) != simdjson::SUCCESS) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": weight_map of ", Quoted(key), " is not a file name"));
    }
    const bool is_plain_name = file.ends_with(".safetensors") && file.front() != '.' &&
                               file.find('/') == file.npos && file.find('\0') == file.npos;
    if (!is_plain_name) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": weight_map of ", Quoted(key), " is ", Quoted(file),
                       ", expected the name of a .safetensors file beside the index"));
    }
    if (!files_by_tensor.emplace(key, file).second) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": tensor ", Quoted(key), " occurs twice"));
    }
  }
  if (files_by_tensor.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": weight_map is empty"));
  }
  return files_by_tensor;
}

class Fingerprinter {
 public:
  Fingerprinter() : state_(XXH3_createState()) {
    CHECK(state_ != nullptr);
    XXH3_128bits_reset(state_);
  }
  Fingerprinter(const Fingerprinter&) = delete;
  Fingerprinter& operator=(const Fingerprinter&) = delete;
  ~Fingerprinter() { XXH3_freeState(state_); }

  void Add(int64_t number) { XXH3_128bits_update(state_, &number, sizeof(number)); }
  // With its length, so that ("ab", "c") and ("a", "bc") differ.
  void Add(std::string_view text) {
    Add(static_cast<int64_t>(text.size()));
    XXH3_128bits_update(state_, text.data(), text.size());
  }
  std::string Digest() const {
    const XXH128_hash_t hash = XXH3_128bits_digest(state_);
    return absl::StrFormat("%016x%016x", hash.high64, hash.low64);
  }

 private:
  XXH3_state_t* const state_;
};

}  // namespace

std::string TensorInfo::DebugString() const {
  return absl::StrCat(dtype, "[", absl::StrJoin(shape, ", "), "]");
}

absl::StatusOr<std::string> ReadTextFile(const std::string& path, int64_t max_bytes) {
  int64_t file_bytes = 0;
  ASSIGN_OR_RETURN(const int descriptor, OpenRegularFile(path, file_bytes));
  FileDescriptor file(descriptor);
  if (file_bytes > max_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": ", file_bytes, " bytes, expected at most ", max_bytes));
  }
  std::string text(file_bytes, '\0');
  RETURN_IF_ERROR(ReadAt(path, file.get(), 0, file_bytes, text.data()));
  return text;
}

SafetensorsFile::SafetensorsFile(std::string path, int descriptor, int64_t file_bytes)
    : path_(std::move(path)), descriptor_(descriptor), file_bytes_(file_bytes) {}

SafetensorsFile::~SafetensorsFile() { ::close(descriptor_); }

absl::StatusOr<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Open(const std::string& path) {
  int64_t file_bytes = 0;
  ASSIGN_OR_RETURN(const int descriptor, OpenRegularFile(path, file_bytes));
  std::unique_ptr<SafetensorsFile> file(new SafetensorsFile(path, descriptor, file_bytes));
  RETURN_IF_ERROR(file->ReadHeader());
  return file;
}

absl::Status SafetensorsFile::Read(int64_t offset, int64_t num_bytes, void* out) const {
  return ReadAt(path_, descriptor_, offset, num_bytes, out);
}

absl::Status SafetensorsFile::ReadHeader() {
  uint64_t header_bytes = 0;  // little-endian, as every machine we build for
  constexpr int64_t kLengthBytes = sizeof(header_bytes);
  if (file_bytes_ < kLengthBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        path_, ": ", file_bytes_, " bytes are too few for a safetensors file; was it truncated?"));
  }
  RETURN_IF_ERROR(Read(0, kLengthBytes, &header_bytes));
  if (header_bytes > static_cast<uint64_t>(kMaxHeaderBytes)) {
    return absl::InvalidArgumentError(absl::StrCat(path_, ": header length is ", header_bytes,
                                                   ", expected at most ", kMaxHeaderBytes));
  }
  const int64_t data_start = kLengthBytes + static_cast<int64_t>(header_bytes);
  if (data_start > file_bytes_) {
    return absl::InvalidArgumentError(
        absl::StrCat(path_, ": header length is ", header_bytes, ", but the file has only ",
                     file_bytes_ - kLengthBytes, " bytes after it; was it truncated?"));
  }
  std::string header_json(header_bytes, '\0');
  RETURN_IF_ERROR(Read(kLengthBytes, header_bytes, header_json.data()));
  RETURN_IF_ERROR(ParseHeader(header_json, data_start));
  return CheckTiling(data_start);
}

absl::Status SafetensorsFile::ParseHeader(std::string_view header_json, int64_t data_start) {
  if (header_json.empty() || header_json.front() != '{') {
    return absl::InvalidArgumentError(
        absl::StrCat(path_, ": header does not start with '{'; is this a safetensors file?"));
  }
  simdjson::dom::parser parser;
  simdjson::dom::object header;
  if (simdjson::error_code error = parser.parse(header_json.data(), header_json.size()).get(header);
      error != simdjson::SUCCESS) {
    return absl::InvalidArgumentError(
        absl::StrCat(path_, ": header is not valid JSON: ", simdjson::error_message(error)));
  }
  int num_metadata = 0;
  for (const auto& [key, value] : header) {
    if (key == "__metadata__") {
      if (!value.is_object() || ++num_metadata > 1) {
        return absl::InvalidArgumentError(
            absl::StrCat(path_, ": __metadata__: expected one object of strings"));
      }
      continue;
    }
    absl::StatusOr<TensorInfo> info = ParseTensor(value, data_start, file_bytes_ - data_start);
    if (!info.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(path_, ": tensor ", Quoted(key), ": ", info.status().message()));
    }
    if (!tensors_.emplace(key, *std::move(info)).second) {
      return absl::InvalidArgumentError(
          absl::StrCat(path_, ": tensor ", Quoted(key), " occurs twice"));
    }
  }
  return absl::OkStatus();
}

absl::Status SafetensorsFile::CheckTiling(int64_t data_start) const {
  std::vector<std::pair<const std::string*, const TensorInfo*>> by_offset;
  for (const auto& [name, info] : tensors_) by_offset.emplace_back(&name, &info);
  std::sort(by_offset.begin(), by_offset.end(), [](const auto& a, const auto& b) {
    return std::pair(a.second->file_offset, a.second->num_bytes) <
           std::pair(b.second->file_offset, b.second->num_bytes);
  });
  int64_t end = data_start;
  for (const auto& [name, info] : by_offset) {
    if (info->file_offset != end) {
      return absl::InvalidArgumentError(
          absl::StrCat(path_, ": tensor ", Quoted(*name), " begins at data offset ",
                       info->file_offset - data_start, ", expected ", end - data_start,
                       info->file_offset < end ? ": it overlaps the tensor before it"
                                               : ": a gap lies before it"));
    }
    end += info->num_bytes;
  }
  if (end != file_bytes_) {
    return absl::InvalidArgumentError(
        absl::StrCat(path_, ": the tensors end at byte ", end, ", but the file has ", file_bytes_));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& model_directory) {
  std::unique_ptr<Checkpoint> checkpoint(new Checkpoint);
  checkpoint->directory_ = model_directory;
  ASSIGN_OR_RETURN(const std::string config_json,
                   ReadTextFile(absl::StrCat(model_directory, "/", kConfigName), kMaxJsonBytes));

  // An index names the shards; without one everything is in a single file.
  const std::string index_path = absl::StrCat(model_directory, "/", kIndexName);
  absl::StatusOr<std::string> index = ReadTextFile(index_path, kMaxIndexBytes);
  if (index.ok()) {
    ASSIGN_OR_RETURN(const auto weight_map, ParseIndex(index_path, *index));
    std::set<std::string> file_names;
    for (const auto& [tensor, file_name] : weight_map) file_names.insert(file_name);
    if (file_names.size() > kMaxShards) {
      return absl::InvalidArgumentError(absl::StrCat(index_path, ": names ", file_names.size(),
                                                     " files, expected at most ", kMaxShards));
    }
    for (const std::string& file_name : file_names) RETURN_IF_ERROR(checkpoint->AddFile(file_name));
    RETURN_IF_ERROR(checkpoint->CheckIndex(weight_map));
  } else if (absl::IsNotFound(index.status())) {
    absl::Status status = checkpoint->AddFile(kSingleName);
    if (absl::IsNotFound(status)) {
      return absl::NotFoundError(absl::StrCat(model_directory, ": neither ", kSingleName, " nor ",
                                              kIndexName, " is there"));
    }
    RETURN_IF_ERROR(status);
  } else {
    return index.status();
  }

  checkpoint->TakeFingerprint(config_json);
  return checkpoint;
}

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::WithoutTensors(
    const std::string& model_directory) {
  std::unique_ptr<Checkpoint> checkpoint(new Checkpoint);
  checkpoint->directory_ = model_directory;
  ASSIGN_OR_RETURN(const std::string config_json,
                   ReadTextFile(absl::StrCat(model_directory, "/", kConfigName), kMaxJsonBytes));
  checkpoint->TakeFingerprint(config_json);
  return checkpoint;
}

void Checkpoint::TakeFingerprint(const std::string& config_json) {
  Fingerprinter fingerprinter;
  fingerprinter.Add(std::string_view(config_json));
  for (const auto& [name, entry] : tensors_) {
    fingerprinter.Add(std::string_view(name));
    fingerprinter.Add(std::string_view(entry.info->dtype));
    fingerprinter.Add(static_cast<int64_t>(entry.info->shape.size()));
    for (int64_t size : entry.info->shape) fingerprinter.Add(size);
  }
  fingerprint_ = fingerprinter.Digest();
}

const Checkpoint::Entry* Checkpoint::Find(std::string_view name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

absl::Status Checkpoint::AddFile(const std::string& file_name) {
  ASSIGN_OR_RETURN(std::unique_ptr<SafetensorsFile> file,
                   SafetensorsFile::Open(absl::StrCat(directory_, "/", file_name)));
  for (const auto& [name, info] : file->tensors()) {
    const auto [place, is_new] = tensors_.emplace(name, Entry{file.get(), &info});
    if (!is_new) {
      return absl::InvalidArgumentError(absl::StrCat(file->path(), ": tensor ", Quoted(name),
                                                     " is also in ", place->second.file->path()));
    }
  }
  files_.push_back(std::move(file));
  return absl::OkStatus();
}

absl::Status Checkpoint::CheckIndex(const std::map<std::string, std::string>& weight_map) const {
  for (const auto& [name, file_name] : weight_map) {
    const Entry* entry = Find(name);
    const std::string path = absl::StrCat(directory_, "/", file_name);
    if (entry == nullptr || entry->file->path() != path) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": tensor ", Quoted(name),
                                                     " is missing, though ", kIndexName,
                                                     " says that it is there"));
    }
  }
  for (const auto& [name, entry] : tensors_) {
    if (!weight_map.contains(name)) {
      return absl::InvalidArgumentError(
          absl::StrCat(directory_, "/", kIndexName, ": weight_map lacks tensor ", Quoted(name),
                       ", expected every tensor of its files; it is in ", entry.file->path()));
    }
  }
  return absl::OkStatus();
}

}  // namespace fathom
