// Python's buffers as plain pointers: type, shape and contiguity are checked, nothing is cast or
// copied.
//
// Made and destroyed with the GIL held; the memory stays valid in between, also without it.
// Refusals are UsageErrors that name the argument, what was expected and what came.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "engine/errors.h"

namespace potluck {

// A C-contiguous buffer, held.
class HeldBuffer {
 public:
  HeldBuffer(const pybind11::buffer& buffer, const char* name)
      : name_(name), info_(buffer.request()) {
    if (PyBuffer_IsContiguous(info_.view(), 'C') == 0)
      throw UsageError(name_ + ": must be C-contiguous; it is a slice or a transpose");
  }

  const uint8_t* bytes() const { return static_cast<const uint8_t*>(info_.ptr); }
  size_t n_bytes() const { return static_cast<size_t>(info_.size * info_.itemsize); }

  // The values, if they are of type T and of this shape.
  template <class T>
  const T* ValuesOf(const char* type_name, const std::vector<size_t>& shape) const {
    bool fits = info_.item_type_is_equivalent_to<T>() && info_.shape.size() == shape.size();
    for (size_t i = 0; fits && i < shape.size(); ++i)
      fits = static_cast<size_t>(info_.shape[i]) == shape[i];
    if (!fits)
      throw UsageError(name_ + ": must be " + type_name + " " + Text(shape) + ", not " + Found());
    return static_cast<const T*>(info_.ptr);
  }
  template <class T>
  T* WritableValuesOf(const char* type_name, const std::vector<size_t>& shape) const {
    const T* values = ValuesOf<T>(type_name, shape);
    if (info_.readonly) throw UsageError(name_ + ": must be writable");
    return const_cast<T*>(values);
  }
  // The length of a buffer that must have one dimension.
  size_t Length() const {
    if (info_.shape.size() != 1)
      throw UsageError(name_ + ": must have one dimension, not " + Text(info_.shape));
    return static_cast<size_t>(info_.shape[0]);
  }
  // The first of its dimensions, 0 without any.
  size_t First() const { return info_.shape.empty() ? 0 : static_cast<size_t>(info_.shape[0]); }

 private:
  template <class Sizes>
  static std::string Text(const Sizes& shape) {
    std::string text;
    for (const auto size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
    return "[" + text + "]";
  }
  // Such as "f64 [2, 3]"; formats are those of Python's struct module.
  std::string Found() const {
    const std::string& format = info_.format;
    const std::string code = format.substr(format.find_first_not_of("@=<") == 1 ? 1 : 0);
    const std::string bits = std::to_string(8 * info_.itemsize);
    std::string type = "format '" + format + "'";
    if (code.size() == 1 && std::string("efd").find(code) != std::string::npos) type = "f" + bits;
    if (code.size() == 1 && std::string("bhilqn").find(code) != std::string::npos)
      type = "int" + bits;
    if (code.size() == 1 && std::string("BHILQN").find(code) != std::string::npos)
      type = "uint" + bits;
    return type + " " + Text(info_.shape);
  }

  std::string name_;
  pybind11::buffer_info info_;
};

}  // namespace potluck
