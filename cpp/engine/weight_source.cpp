#include "engine/weight_source.h"

#include <utility>

#include "engine/errors.h"
#include "engine/weight_file.h"

namespace potluck {
namespace {

class FileReader : public RowReader {
 public:
  FileReader(const WeightFile& file, uint64_t offset_bytes, size_t row_bytes)
      : file_(file), offset_bytes_(offset_bytes), row_bytes_(row_bytes) {}

  void Read(size_t first, size_t last, uint8_t* out) const override {
    file_.Read(offset_bytes_ + first * row_bytes_, (last - first) * row_bytes_, out);
  }
  void Drop(size_t first, size_t last) const override {
    file_.Drop(offset_bytes_ + first * row_bytes_, (last - first) * row_bytes_);
  }

 private:
  const WeightFile& file_;
  uint64_t offset_bytes_;
  size_t row_bytes_;
};

class FileSource : public WeightSource {
 public:
  explicit FileSource(const std::string& path) : file_(path) {}

  PackSource identity() const override { return {file_.size_bytes(), file_.modified_ns()}; }
  std::unique_ptr<RowReader> RowsOf(const TensorForm& form, uint64_t offset_bytes) const override {
    file_.CheckHolds(form.shape.name, offset_bytes, form.shape.rows * form.row_bytes());
    return std::make_unique<FileReader>(file_, offset_bytes, form.row_bytes());
  }

 private:
  WeightFile file_;
};

// Of a file that holds this tensor and nothing else.
class TensorFileReader : public RowReader {
 public:
  TensorFileReader(const std::string& path, const TensorForm& form)
      : file_(path), rows_(file_, 0, form.row_bytes()) {
    const uint64_t expected = form.shape.rows * form.row_bytes();
    if (file_.size_bytes() == expected) return;
    throw ModelError(form.shape.name + ": " + path + " has " + std::to_string(file_.size_bytes()) +
                     " bytes, expected " + std::to_string(expected));
  }

  void Read(size_t first, size_t last, uint8_t* out) const override {
    rows_.Read(first, last, out);
  }
  void Drop(size_t first, size_t last) const override { rows_.Drop(first, last); }

 private:
  WeightFile file_;
  FileReader rows_;
};

class TensorFilesSource : public WeightSource {
 public:
  explicit TensorFilesSource(const TensorFiles& files) : files_(files) {}

  PackSource identity() const override { return files_.identity; }
  std::unique_ptr<RowReader> RowsOf(const TensorForm& form,
                                    uint64_t /*offset_bytes*/) const override {
    const auto found = files_.paths.find(form.shape.name);
    if (found == files_.paths.end()) throw ModelError(form.shape.name + ": no file holds it");
    return std::make_unique<TensorFileReader>(found->second, form);
  }

 private:
  const TensorFiles& files_;
};

class SyntheticReader : public RowReader {
 public:
  SyntheticReader(const Synthetic& model, const TensorForm& form)
      : tensor_(model, form.shape.name, form.type->type, form.shape.cols),
        row_bytes_(form.row_bytes()) {}

  void Read(size_t first, size_t last, uint8_t* out) const override {
    for (size_t row = first; row < last; ++row, out += row_bytes_) tensor_.Row(row, out);
  }
  void Drop(size_t /*first*/, size_t /*last*/) const override {}

 private:
  SyntheticTensor tensor_;
  size_t row_bytes_;
};

class SyntheticSource : public WeightSource {
 public:
  explicit SyntheticSource(const Synthetic& model) : model_(model) { Check(model_); }

  // No size and no time: what tells one model of random weights from another. Layers, at most
  // kMostLayers, change the weights of each (Deviation).
  PackSource identity() const override {
    return {model_.seed, static_cast<int64_t>(uint64_t{model_.n_layers} << 32 | kSyntheticVersion)};
  }
  std::unique_ptr<RowReader> RowsOf(const TensorForm& form,
                                    uint64_t /*offset_bytes*/) const override {
    return std::make_unique<SyntheticReader>(model_, form);
  }

 private:
  Synthetic model_;
};

}  // namespace

std::unique_ptr<WeightSource> Open(const Origin& origin) {
  if (const auto* model = std::get_if<Synthetic>(&origin)) {
    return std::make_unique<SyntheticSource>(*model);
  }
  if (const auto* files = std::get_if<TensorFiles>(&origin)) {
    return std::make_unique<TensorFilesSource>(*files);
  }
  return std::make_unique<FileSource>(std::get<std::string>(origin));
}

}  // namespace potluck
