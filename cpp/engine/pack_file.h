// One pack file: packed tensors as they lie in memory, so that the next start maps them and packs
// nothing. A cache of a GGUF on this machine, never a format to exchange.
//
// Nothing in a file is trusted, and nothing but checksums is taken from it: a PackPlan says what
// the whole header must be for these tensors of this source, and a file whose header is otherwise
// is not used. Contents are compared with their checksums when they are first needed, since that
// is when they must come from the disk anyway. Reading them then is an ordinary read: a bad sector
// is an error and not a signal. A file is replaced by renaming and never changed, so who has mapped
// one keeps it, and a shared lock on it tells others so.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/packing.h"
#include "engine/pool.h"
#include "engine/weight_file.h"

namespace potluck {

// How panels are interleaved: 8 rows, by 4 bytes (pack.h).
constexpr char kPackLayout[] = "P8k4";

// Which file was packed. Equal headers don't make equal weights, so time and size count too; where
// there is no such file, what else tells weights apart (weight_source.cpp).
struct PackSource {
  uint64_t size_bytes = 0;
  int64_t modified_ns = 0;
};

// What a pack of these tensors of this source looks like.
class PackPlan {
 public:
  PackPlan(std::vector<TensorForm> forms, const PackSource& source);

  const std::vector<TensorForm>& forms() const { return forms_; }
  uint64_t offset_of(size_t i) const { return offsets_[i]; }  // of tensor i, page by page
  uint64_t file_bytes() const { return file_bytes_; }
  // Pages before the first tensor. Checksums are those of the tensors, or zeros.
  std::vector<uint8_t> Header(const std::vector<uint32_t>& checksums) const;
  // The checksums of a header; none if it differs from Header in anything else.
  std::vector<uint32_t> ChecksumsOf(const std::vector<uint8_t>& header) const;

 private:
  std::vector<TensorForm> forms_;
  PackSource source_;
  std::vector<uint64_t> offsets_;
  uint64_t header_bytes_;
  uint64_t file_bytes_;
};

// A mapped pack. Check and Drop are for the thread that computes, ReadAhead for another.
class PackFile {
 public:
  // Null if it can't be used, which *why tells, for a log: there is none, or the system refuses.
  // DamagedPack: it is not what the plan says.
  static std::unique_ptr<PackFile> Open(const std::string& path, PackPlan plan, std::string* why);
  ~PackFile();
  PackFile(const PackFile&) = delete;
  PackFile& operator=(const PackFile&) = delete;

  const std::string& path() const { return file_.path(); }
  const uint8_t* tensor(size_t i) const { return mapped_ + plan_.offset_of(i); }
  const PackPlan& plan() const { return plan_; }
  size_t size_bytes() const { return plan_.file_bytes(); }

  // Compares the contents with their checksums, the first time. DamagedPack: they differ, or can't
  // be read. Counts pieces in *progress.
  void Check(Pool& pool, std::atomic<uint64_t>* progress);
  bool is_damaged() const { return is_damaged_; }

  // Has bytes [offset, offset + n) read into the page cache, through `buffer`; errors show when
  // the bytes are used.
  void ReadAhead(uint64_t offset, size_t n_bytes, uint8_t* buffer) const;
  // Gives the memory of all pages back; they are read again when they are used.
  void Drop() const;

 private:
  PackFile(WeightFile file, PackPlan plan, std::vector<uint32_t> checksums, uint8_t* mapped);

  WeightFile file_;
  PackPlan plan_;
  std::vector<uint32_t> checksums_;
  uint8_t* mapped_;
  bool is_checked_ = false;
  bool is_damaged_ = false;
};

// Writes a pack beside its final place and renames it, so that a pack is whole or not there.
class PackWriter {
 public:
  PackWriter(std::string path, const PackPlan& plan, size_t threads);
  ~PackWriter();  // without Finish nothing is left
  PackWriter(const PackWriter&) = delete;
  PackWriter& operator=(const PackWriter&) = delete;

  // A packed piece of tensor i; from any thread, each piece once.
  void Write(size_t i, const Piece& piece, const uint8_t* packed);
  // Puts the file in its place once it is on the disk. Why that was not possible (a full disk,
  // say); empty: done.
  std::string Finish();
  std::string why() const;  // of the first failure; empty: none yet

 private:
  struct Range {
    uint64_t offset = 0;
    size_t n_bytes = 0;
  };

  void Create();
  void WriteAt(uint64_t offset, const uint8_t* bytes, size_t n_bytes);
  void SendToDisk(size_t thread, const Range& range);
  void Fail(int error);

  const PackPlan& plan_;
  std::string path_;
  std::string part_path_;
  int descriptor_ = -1;
  std::vector<Range> on_its_way_;                  // [thread], to the disk
  std::atomic<int> error_{0};                      // errno of the first failure
  std::vector<std::vector<uint32_t>> piece_sums_;  // [tensor][piece]
};

}  // namespace potluck
