// What the files of the engine's Python face share.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "engine/cpu.h"
#include "engine/float_rules.h"
#include "engine/isa.h"
#include "engine/pool.h"

namespace potluck {

// Calls the engine without the GIL, under the float rules that its answers assume.
template <class Call>
auto WithoutGil(const Call& call) {
  const pybind11::gil_scoped_release released;
  const FloatRules rules;
  return call();
}

// Kernel table and threads, shared by the shards of a process.
struct Engine {
  Engine(size_t threads, const std::string& isa, bool pinned)
      : kernels(ChooseTable(isa)),
        pool(threads == 0 ? std::min(AllowedCpus(), Pool::kMaxThreads) : threads, pinned) {}
  const KernelTable& kernels;
  Pool pool;
};

// An ordinary Python class, with `type` for a metaclass: static properties, which pybind11's own
// one is for, do not occur here.
template <class T>
pybind11::class_<T> FinalClass(pybind11::module_& m, const char* name) {
  return pybind11::class_<T>(m, name, pybind11::is_final(),
                             pybind11::metaclass(reinterpret_cast<PyObject*>(&PyType_Type)));
}

// Classes of weights at work: RowSpan, TensorFiles, Shard.
void BindShard(pybind11::module_& m);

}  // namespace potluck
