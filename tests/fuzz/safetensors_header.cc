// Any bytes as a safetensors file: refused, or tensors that lie within it and cover it.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <string>

#include "base/check.h"
#include "worker/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const int descriptor = memfd_create("safetensors", 0);
  static const std::string& path = *new std::string("/proc/self/fd/" + std::to_string(descriptor));
  CHECK_EQ(ftruncate(descriptor, 0), 0);
  CHECK_EQ(pwrite(descriptor, data, size, 0), static_cast<ssize_t>(size));
  const auto file = fathom::SafetensorsFile::Open(path);
  if (!file.ok()) {
    CHECK(!file.status().message().empty());
    return 0;
  }
  int64_t data_bytes = 0;
  std::string values;
  for (const auto& [name, info] : (*file)->tensors()) {
    CHECK_GE(info.num_bytes, 0);
    CHECK_LE(info.file_offset + info.num_bytes, static_cast<int64_t>(size)) << name;
    values.resize(info.num_bytes);
    CHECK((*file)->Read(info.file_offset, info.num_bytes, values.data()).ok()) << name;
    data_bytes += info.num_bytes;
  }
  uint64_t header_bytes = 0;
  memcpy(&header_bytes, data, sizeof(header_bytes));
  CHECK_EQ(8 + header_bytes + data_bytes, size);
  return 0;
}
