#include "engine/pack_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include "engine/crc32c.h"
#include "engine/errors.h"
#include "engine/pack.h"

namespace potluck {
namespace {

// Raised whenever the meaning of a header or the order of rows changes. How a type is packed, and
// in which pieces it is summed, are told by LayoutSum and piece_panels, without anybody's help.
constexpr uint32_t kFormat = 2;
constexpr char kMagic[] = "potluck pack";
constexpr uint32_t kByteOrder = 0x01020304;
// Tensors begin at pages of the largest size that Linux has.
constexpr uint64_t kPageBytes = uint64_t{64} << 10;

struct Head {
  char magic[16];
  char layout[16];
  uint32_t format;
  uint32_t byte_order;
  uint32_t n_tensors;
  uint32_t header_sum;  // crc32c of the whole header, this being 0
  uint64_t file_bytes;
  uint64_t source_bytes;
  int64_t source_modified_ns;
};
struct Entry {
  char name[64];
  char type[16];
  uint64_t rows;
  uint64_t cols;
  uint64_t offset;
  uint64_t size_bytes;
  uint32_t head_dim;
  uint32_t rope_dim;
  uint32_t is_vector;
  uint32_t layout_sum;
  uint32_t sum;  // SumOf the crc32c of the pieces
  uint32_t piece_panels;
};
static_assert(std::has_unique_object_representations_v<Head>, "no padding in a file");
static_assert(std::has_unique_object_representations_v<Entry>, "no padding in a file");

uint64_t RoundUp(uint64_t bytes) { return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes; }

// Fields hold the start of longer texts: TensorShape's names are short.
template <size_t N>
void Put(char (&field)[N], const std::string& text) {
  std::memcpy(field, text.data(), std::min(N, text.size()));
}

// A checksum of what packing makes of known bytes in rows of this width: another way to pack a type
// gives another sum, so packs of an older version are never taken for the new ones.
uint32_t LayoutSum(const TensorForm& form) {
  if (form.is_vector) return 0;
  std::vector<uint8_t> row(form.row_bytes());
  uint32_t state = 1;
  for (uint8_t& byte : row) {
    state = state * 1664525 + 1013904223;  // Knuth's; any generator does
    byte = static_cast<uint8_t>(state >> 24);
  }
  // Rows differ by where they begin in those bytes.
  std::vector<uint8_t> rows[kPanelRows];
  const uint8_t* starts[kPanelRows];
  for (size_t r = 0; r < kPanelRows; ++r) {
    rows[r] = row;
    const auto shift = static_cast<ptrdiff_t>((r + 1) % row.size());
    std::rotate(rows[r].begin(), rows[r].begin() + shift, rows[r].end());
    starts[r] = rows[r].data();
  }
  std::vector<uint8_t> panel(form.panel_bytes());
  static_cast<void>(PackPanel(form.type->type, starts, form.shape.cols, panel.data()));
  return Crc32c(panel.data(), panel.size());
}

// Pieces are summed by many threads, and the sum of a tensor is that of its pieces' sums.
uint32_t SumOf(const std::vector<uint32_t>& piece_sums) {
  return Crc32c(piece_sums.data(), piece_sums.size() * sizeof(uint32_t));
}

// What a file system says that does not know a request.
bool IsUnknown(int error) {
  return error == EINVAL || error == ENOSYS || error == ENOTSUP || error == EOPNOTSUPP;
}

// Whether the file still has a name.
bool IsLinked(int descriptor) {
  struct stat status = {};
  return fstat(descriptor, &status) == 0 && status.st_nlink > 0;
}

// Locks say who uses a file, to those who would remove it (potluck/packs.py). They hold one for a
// moment, so waiting is short. Where a file system has no locks nobody knows, and removing a file
// that is in use does no harm but to the room it was to make. 0, or why there is no lock.
int Lock(int descriptor, int how) {
  while (flock(descriptor, how) != 0) {
    if (errno == EINTR) continue;
    return IsUnknown(errno) || errno == ENOLCK ? 0 : errno;
  }
  return 0;
}

// Returns when the file's bytes are on the disk; 0, or why they are not.
int SyncData(int descriptor) {
#if defined(__APPLE__)
  const int done = fsync(descriptor);
#else
  const int done = fdatasync(descriptor);
#endif
  return done == 0 || IsUnknown(errno) ? 0 : errno;
}

}  // namespace

PackPlan::PackPlan(std::vector<TensorForm> forms, const PackSource& source)
    : forms_(std::move(forms)),
      source_(source),
      header_bytes_(RoundUp(sizeof(Head) + forms_.size() * sizeof(Entry))),
      file_bytes_(header_bytes_) {
  for (const TensorForm& form : forms_) {
    offsets_.push_back(file_bytes_);
    file_bytes_ += RoundUp(form.packed_bytes());
  }
}

std::vector<uint8_t> PackPlan::Header(const std::vector<uint32_t>& checksums) const {
  std::vector<uint8_t> bytes(header_bytes_);
  Head head{};
  Put(head.magic, kMagic);
  Put(head.layout, kPackLayout);
  head.format = kFormat;
  head.byte_order = kByteOrder;
  head.n_tensors = static_cast<uint32_t>(forms_.size());
  head.file_bytes = file_bytes_;
  head.source_bytes = source_.size_bytes;
  head.source_modified_ns = source_.modified_ns;
  for (size_t i = 0; i < forms_.size(); ++i) {
    const TensorForm& form = forms_[i];
    Entry entry{};
    Put(entry.name, form.shape.name);
    Put(entry.type, form.type->name);
    entry.rows = form.shape.rows;
    entry.cols = form.shape.cols;
    entry.offset = offsets_[i];
    entry.size_bytes = form.packed_bytes();
    entry.head_dim = static_cast<uint32_t>(form.head_dim);
    entry.rope_dim = static_cast<uint32_t>(form.rope_dim);
    entry.is_vector = form.is_vector ? 1 : 0;
    entry.layout_sum = LayoutSum(form);
    entry.piece_panels = static_cast<uint32_t>(form.PiecePanels());
    entry.sum = checksums[i];
    std::memcpy(bytes.data() + sizeof(Head) + i * sizeof(Entry), &entry, sizeof(Entry));
  }
  std::memcpy(bytes.data(), &head, sizeof(head));
  head.header_sum = Crc32c(bytes.data(), bytes.size());
  std::memcpy(bytes.data(), &head, sizeof(head));
  return bytes;
}

std::vector<uint32_t> PackPlan::ChecksumsOf(const std::vector<uint8_t>& header) const {
  std::vector<uint32_t> sums(forms_.size());
  for (size_t i = 0; i < sums.size(); ++i) {
    Entry entry{};
    std::memcpy(&entry, header.data() + sizeof(Head) + i * sizeof(Entry), sizeof(Entry));
    sums[i] = entry.sum;
  }
  if (Header(sums) != header) sums.clear();
  return sums;
}

std::unique_ptr<PackFile> PackFile::Open(const std::string& path, PackPlan plan, std::string* why) {
  try {
    WeightFile file(path);
    if (const int error = Lock(file.descriptor(), LOCK_SH); error != 0) {
      *why = path + ": can't be locked: " + Reason(error);
      return nullptr;
    }
    if (!IsLinked(file.descriptor())) {
      *why = path + ": removed meanwhile";
      return nullptr;
    }
    if (file.size_bytes() != plan.file_bytes()) {
      throw DamagedPack(path + ": " + std::to_string(file.size_bytes()) + " bytes, expected " +
                        std::to_string(plan.file_bytes()));
    }
    std::vector<uint8_t> header(plan.offset_of(0));
    file.Read(0, header.size(), header.data());
    std::vector<uint32_t> sums = plan.ChecksumsOf(header);
    if (sums.empty()) {
      throw DamagedPack(path + ": made from another file or by another version, or damaged");
    }
    void* mapped = mmap(nullptr, plan.file_bytes(), PROT_READ, MAP_SHARED, file.descriptor(), 0);
    if (mapped == MAP_FAILED) {
      *why = path + ": can't be mapped: " + Reason(errno);
      return nullptr;
    }
    return std::unique_ptr<PackFile>(new PackFile(std::move(file), std::move(plan), std::move(sums),
                                                  static_cast<uint8_t*>(mapped)));
  } catch (const DamagedPack&) {
    throw;
  } catch (const ModelError& error) {
    *why = error.what();
    return nullptr;
  }
}

PackFile::PackFile(WeightFile file, PackPlan plan, std::vector<uint32_t> checksums, uint8_t* mapped)
    : file_(std::move(file)),
      plan_(std::move(plan)),
      checksums_(std::move(checksums)),
      mapped_(mapped) {}

PackFile::~PackFile() { munmap(mapped_, plan_.file_bytes()); }

void PackFile::Check(Pool& pool, std::atomic<uint64_t>* progress) {
  if (is_checked_) return;
  is_damaged_ = true;  // until the opposite is known
  std::vector<std::vector<uint8_t>> buffers(pool.threads());
  for (size_t i = 0; i < plan_.forms().size(); ++i) {
    const TensorForm& form = plan_.forms()[i];
    std::vector<uint32_t> sums(form.n_pieces());
    try {
      ForPieces(pool, form, [&](const Piece& piece) {
        std::vector<uint8_t>& buffer = buffers[piece.thread];
        const size_t n_bytes = (piece.last - piece.first) * form.panel_bytes();
        if (buffer.size() < n_bytes) buffer.resize(n_bytes);
        file_.Read(plan_.offset_of(i) + piece.first * form.panel_bytes(), n_bytes, buffer.data());
        sums[piece.first / form.PiecePanels()] = Crc32c(buffer.data(), n_bytes);
        progress->fetch_add(1, std::memory_order_relaxed);
      });
    } catch (const ModelError& error) {
      throw DamagedPack(error.what());
    }
    if (SumOf(sums) == checksums_[i]) continue;
    throw DamagedPack(path() + ": " + form.shape.name + " is not what was written");
  }
  is_checked_ = true;
  is_damaged_ = false;
}

void PackFile::ReadAhead(uint64_t offset, size_t n_bytes, uint8_t* buffer) const {
  try {
    file_.Read(offset, n_bytes, buffer);
  } catch (const ModelError&) {
    return;
  }
}

void PackFile::Drop() const {
  madvise(mapped_, plan_.file_bytes(), MADV_DONTNEED);  // the cache keeps what somebody has mapped
  file_.Drop(0, plan_.file_bytes());
}

PackWriter::PackWriter(std::string path, const PackPlan& plan, size_t threads)
    : plan_(plan), path_(std::move(path)), on_its_way_(threads) {
  for (const TensorForm& form : plan.forms()) piece_sums_.emplace_back(form.n_pieces());
  Create();
#if defined(__linux__)
  // A full disk shows now and not after minutes; file systems that can't tell are no failure.
  if (error_ == 0 && fallocate(descriptor_, 0, 0, static_cast<off_t>(plan.file_bytes())) != 0 &&
      (errno == ENOSPC || errno == EDQUOT || errno == EFBIG)) {
    error_ = errno;
  }
#endif
}

// Who finds a part that nobody has locked knows that its writer died, and removes it. Whoever did
// so with this one, before it was locked, has not seen the next.
void PackWriter::Create() {
  constexpr int kTries = 100;
  for (int i = 0; i < kTries; ++i) {
    part_path_ = path_ + ".part-XXXXXX";
    descriptor_ = mkostemp(part_path_.data(), O_CLOEXEC);
    error_ = descriptor_ < 0 ? errno : Lock(descriptor_, LOCK_EX);
    if (error_ != 0 || IsLinked(descriptor_)) return;
    close(std::exchange(descriptor_, -1));
  }
  error_ = ENOENT;
}

PackWriter::~PackWriter() {
  if (descriptor_ < 0) return;
  unlink(part_path_.c_str());
  close(descriptor_);
}

void PackWriter::Write(size_t i, const Piece& piece, const uint8_t* packed) {
  const TensorForm& form = plan_.forms()[i];
  const size_t n_bytes = (piece.last - piece.first) * form.panel_bytes();
  piece_sums_[i][piece.first / form.PiecePanels()] = Crc32c(packed, n_bytes);
  const uint64_t offset = plan_.offset_of(i) + piece.first * form.panel_bytes();
  WriteAt(offset, packed, n_bytes);
  SendToDisk(piece.thread, {offset, n_bytes});
}

// Each thread waits for the piece before its last one: the disk has always something to do, and
// little is left for the end, when nothing would show that it goes on.
void PackWriter::SendToDisk(size_t thread, const Range& range) {
#if defined(__linux__)
  const auto sync = [&](const Range& which, unsigned how) {
    if (which.n_bytes == 0 || error_.load(std::memory_order_relaxed) != 0) return;
    const int done = sync_file_range(descriptor_, static_cast<off_t>(which.offset),
                                     static_cast<off_t>(which.n_bytes), how);
    if (done != 0 && !IsUnknown(errno)) Fail(errno);
  };
  sync(range, SYNC_FILE_RANGE_WRITE);
  sync(on_its_way_[thread],
       SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
  on_its_way_[thread] = range;
#else
  static_cast<void>(thread);
  static_cast<void>(range);
#endif
}

void PackWriter::Fail(int error) {
  int none = 0;
  error_.compare_exchange_strong(none, error);
}

void PackWriter::WriteAt(uint64_t offset, const uint8_t* bytes, size_t n_bytes) {
  while (n_bytes > 0 && error_.load(std::memory_order_relaxed) == 0) {
    const ssize_t put = pwrite(descriptor_, bytes, n_bytes, static_cast<off_t>(offset));
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) {
      Fail(put < 0 ? errno : ENOSPC);
      return;
    }
    bytes += put;
    offset += static_cast<uint64_t>(put);
    n_bytes -= static_cast<size_t>(put);
  }
}

// A pack gets its name when it is on the disk. Else its first check would find the bytes in the
// page cache right that a failing disk then loses, and whoever reads them later computes with
// others.
std::string PackWriter::Finish() {
  std::vector<uint32_t> sums;
  sums.reserve(piece_sums_.size());
  for (const std::vector<uint32_t>& of_pieces : piece_sums_) sums.push_back(SumOf(of_pieces));
  const std::vector<uint8_t> header = plan_.Header(sums);
  WriteAt(0, header.data(), header.size());
  if (error_ == 0 && ftruncate(descriptor_, static_cast<off_t>(plan_.file_bytes())) != 0) {
    error_ = errno;
  }
  if (error_ == 0) error_ = SyncData(descriptor_);
  if (error_ == 0 && rename(part_path_.c_str(), path_.c_str()) != 0) error_ = errno;
  if (error_ != 0) return why();
  // Only now: without its lock, a part is swept away.
  if (close(std::exchange(descriptor_, -1)) != 0 && errno != EINTR) {
    error_ = errno;
    unlink(path_.c_str());
  }
  return why();
}

std::string PackWriter::why() const { return error_ == 0 ? "" : Reason(error_); }

}  // namespace potluck
