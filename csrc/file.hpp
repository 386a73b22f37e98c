// Files: read-only maps, nameless scratch files, and files that appear whole or not at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace negfast {

class MappedFile {
 public:
  explicit MappedFile(const std::string& path);  // throws ShardError
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// Without a name, so that nothing is left of it whatever happens to the process.
class ScratchFile {
 public:
  explicit ScratchFile(const std::string& folder);
  ~ScratchFile();
  ScratchFile(const ScratchFile&) = delete;
  ScratchFile& operator=(const ScratchFile&) = delete;

  void append(const void* data, size_t size);
  void read(void* data, size_t size, uint64_t offset) const;

 private:
  int fd_ = -1;
};

// Written under a temporary name in the folder of `path`; commit() makes it durable and renames it.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path);
  ~AtomicFile();  // without commit() the temporary file is removed
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void append(const void* data, size_t size);
  void write_at(const void* data, size_t size, uint64_t offset);
  uint64_t size() const { return size_; }
  void commit();

 private:
  std::string path_, temporary_;
  int fd_ = -1;
  uint64_t size_ = 0;
};

}  // namespace negfast
