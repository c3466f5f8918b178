#include "engine/weight_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "engine/errors.h"

namespace potluck {

std::string Reason(int error) { return std::generic_category().message(error); }

WeightFile::WeightFile(std::string path)
    // O_NONBLOCK: opening a pipe would wait for its writer. Files don't heed it.
    : path_(std::move(path)), descriptor_(open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
  if (descriptor_ < 0) throw ModelError(path_ + ": " + Reason(errno));
}

WeightFile::~WeightFile() {
  if (descriptor_ >= 0) close(descriptor_);
}

WeightFile::WeightFile(WeightFile&& other) noexcept
    : path_(std::move(other.path_)), descriptor_(std::exchange(other.descriptor_, -1)) {}

uint64_t WeightFile::size_bytes() const {
  struct stat status = {};
  const bool is_file = fstat(descriptor_, &status) == 0 && S_ISREG(status.st_mode);
  return is_file ? static_cast<uint64_t>(status.st_size) : 0;
}

int64_t WeightFile::modified_ns() const {
  struct stat status = {};
  if (fstat(descriptor_, &status) != 0) return 0;
#if defined(__APPLE__)
  const struct timespec& time = status.st_mtimespec;
#else
  const struct timespec& time = status.st_mtim;
#endif
  return int64_t{time.tv_sec} * 1000000000 + time.tv_nsec;
}

void WeightFile::CheckHolds(const std::string& tensor, uint64_t offset_bytes,
                            uint64_t n_bytes) const {
  const uint64_t size = size_bytes();
  if (offset_bytes <= size && n_bytes <= size - offset_bytes) return;
  throw ModelError(path_ + ": " + std::to_string(size) + " bytes, but " + tensor + " takes " +
                   std::to_string(n_bytes) + " at byte " + std::to_string(offset_bytes) +
                   "; is the file cut short?");
}

void WeightFile::Read(uint64_t offset_bytes, size_t n_bytes, uint8_t* out) const {
  while (n_bytes > 0) {
    const ssize_t got = pread(descriptor_, out, n_bytes, static_cast<off_t>(offset_bytes));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) {
      throw ModelError(path_ + ": can't read at byte " + std::to_string(offset_bytes) + ": " +
                       (got < 0 ? Reason(errno) : "the file ends"));
    }
    out += got;
    offset_bytes += static_cast<uint64_t>(got);
    n_bytes -= static_cast<size_t>(got);
  }
}

void WeightFile::Drop(uint64_t offset_bytes, uint64_t n_bytes) const {
#if defined(POSIX_FADV_DONTNEED)
  posix_fadvise(descriptor_, static_cast<off_t>(offset_bytes), static_cast<off_t>(n_bytes),
                POSIX_FADV_DONTNEED);
#else
  static_cast<void>(offset_bytes);
  static_cast<void>(n_bytes);
#endif
}

}  // namespace potluck
