// Bytes of a file at given offsets, read without mapping it and without leaving it in the cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace potluck {

// What the system says of an errno.
std::string Reason(int error);

// An open file, closed with the object. Any thread may read at any time.
class WeightFile {
 public:
  // ModelError: it can't be opened.
  explicit WeightFile(std::string path);
  ~WeightFile();
  WeightFile(WeightFile&& other) noexcept;
  WeightFile(const WeightFile&) = delete;
  WeightFile& operator=(const WeightFile&) = delete;

  const std::string& path() const { return path_; }
  int descriptor() const { return descriptor_; }
  // 0: not an ordinary file.
  uint64_t size_bytes() const;
  int64_t modified_ns() const;  // since 1970

  // ModelError names `tensor`: bytes [offset_bytes, offset_bytes + n_bytes) are not all there.
  void CheckHolds(const std::string& tensor, uint64_t offset_bytes, uint64_t n_bytes) const;

  // ModelError: the system refuses, or the file has become shorter.
  void Read(uint64_t offset_bytes, size_t n_bytes, uint8_t* out) const;

  // Tells the system that these bytes won't be read again: cached pages of a file count against a
  // container's memory.
  void Drop(uint64_t offset_bytes, uint64_t n_bytes) const;

 private:
  std::string path_;
  int descriptor_;
};

}  // namespace potluck
