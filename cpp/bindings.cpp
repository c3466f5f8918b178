// The engine's Python face (potluck/_engine.pyi is the contract). Knows no arithmetic: it checks
// buffers while it holds the GIL, gives the GIL away inside each call that computes, waits or reads
// a file, and turns the engine's errors into those of potluck.errors. bindings_shard.cpp holds the
// classes of weights.
#include "bindings.h"

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "engine/bench.h"
#include "engine/config.h"
#include "engine/convert.h"
#include "engine/crc32c.h"
#include "engine/errors.h"
#include "engine/isa.h"
#include "engine/pack_file.h"
#include "engine/probe.h"
#include "engine/product.h"
#include "engine/synthetic.h"
#include "engine/tuning.h"
#include "engine/types.h"
#include "engine/vector.h"
#include "python_buffers.h"

namespace py = pybind11;

namespace potluck {
namespace {

// Found at import, so that a class that is missing shows then.
const py::module_& PythonErrors() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::module_> errors;
  return errors.call_once_and_store_result([] { return py::module_::import("potluck.errors"); })
      .get_stored();
}

void SetError(const char* name, const Error& error) {
  using namespace py::literals;
  const py::object type = PythonErrors().attr(name);
  const py::object value = type(error.what(), "remedy"_a = error.remedy());
  PyErr_SetObject(type.ptr(), value.ptr());
}

void Translate(std::exception_ptr thrown) {
  try {
    std::rethrow_exception(std::move(thrown));
  } catch (const UnknownSession& error) {
    SetError("UnknownSession", error);
  } catch (const Full& error) {
    SetError("Full", error);
  } catch (const SessionError& error) {
    SetError("SessionError", error);
  } catch (const DamagedPack& error) {
    SetError("DamagedPack", error);
  } catch (const ModelError& error) {
    SetError("ModelError", error);
  } catch (const FrameError& error) {
    SetError("FrameError", error);
  } catch (const Cancelled& error) {
    SetError("Cancelled", error);
  } catch (const UsageError& error) {
    SetError("UsageError", error);
  } catch (const EngineError& error) {
    SetError("EngineError", error);
  }
}

py::tuple TupleOf(const std::vector<std::string>& names) { return py::tuple(py::cast(names)); }

const TypeInfo& KnownType(const std::string& name) {
  const TypeInfo* info = FindType(name.c_str());
  if (info != nullptr) return *info;
  std::string known;
  for (size_t i = 0; i < kTypeCount; ++i)
    known += (i == 0 ? "" : ", ") + std::string(AllTypes()[i].name);
  throw UsageError("weight type " + name + ": known are " + known);
}

void ExpOf(const py::buffer& values, const py::buffer& out) {
  const HeldBuffer in(values, "values");
  const HeldBuffer to(out, "out");
  const size_t n = in.Length();
  const auto* from = in.ValuesOf<float>("f32", {n});
  auto* result = to.WritableValuesOf<float>("f32", {n});
  const VectorTable& table = *ChooseTable("auto").vector;
  WithoutGil([&] { table.exp(from, n, result); });
}

double LogSumExpOf(const py::buffer& logits) {
  const HeldBuffer in(logits, "logits");
  const size_t n = in.Length();
  const auto* values = in.ValuesOf<float>("f32", {n});
  const VectorTable& table = *ChooseTable("auto").vector;
  return WithoutGil([&] { return LogSumExp(table, values, n); });
}

uint32_t Crc32cOf(const py::buffer& data) {
  const HeldBuffer in(data, "data");
  return WithoutGil([&] { return Crc32c(in.bytes(), in.n_bytes()); });
}

void MatMulOf(Engine& engine, const std::string& type_name, size_t rows, size_t cols,
              const py::buffer& weights, const py::buffer& x, const py::buffer& out) {
  const TypeInfo& info = KnownType(type_name);
  const HeldBuffer w(weights, "weights");
  const HeldBuffer in(x, "x");
  const HeldBuffer to(out, "out");
  const size_t batch = in.First();
  const auto* values = in.ValuesOf<float>("f32", {batch, cols});
  auto* result = to.WritableValuesOf<float>("f32", {batch, rows});
  const size_t row_bytes = RowBytes(info.type, cols);
  if (rows == 0 || w.n_bytes() % rows != 0 || w.n_bytes() / rows != row_bytes)
    throw UsageError("weights: " + std::to_string(w.n_bytes()) + " bytes, expected " +
                     std::to_string(rows) + " rows of " + std::to_string(row_bytes));
  WithoutGil([&] {
    MultiplyFileRows(engine.pool, engine.kernels, info.type, rows, cols, w.bytes(), values, batch,
                     result);
  });
}

std::optional<std::pair<size_t, float>> ConvertOf(Engine& engine, const std::string& from_type,
                                                  const std::string& to_type,
                                                  const py::buffer& data, const py::buffer& out) {
  const TypeInfo& from = KnownType(from_type);
  const TypeInfo& to = KnownType(to_type);
  const HeldBuffer in(data, "data");
  const HeldBuffer target(out, "out");
  if (in.n_bytes() % from.block_bytes != 0)
    throw UsageError("data: " + std::to_string(in.n_bytes()) + " bytes are no whole blocks of " +
                     from.name);
  const size_t n = in.n_bytes() / from.block_bytes * from.block_values;
  const size_t out_bytes = RowBytes(to.type, n);
  auto* result = target.WritableValuesOf<uint8_t>("uint8", {out_bytes});
  const std::less<> is_before;  // of pointers into whatever memory
  if (is_before(in.bytes(), result + out_bytes) && is_before(result, in.bytes() + in.n_bytes()))
    throw UsageError("out: overlaps data");
  const auto flaw =
      WithoutGil([&] { return Convert(engine.pool, from.type, to.type, n, in.bytes(), result); });
  if (!flaw) return std::nullopt;
  return std::pair(flaw->index, flaw->value);
}

void BindConfig(py::module_& m) {
  FinalClass<RopeScaling>(m, "RopeScaling")
      .def(
          py::init([](double factor, double extrapolation, double original_tokens, double beta_fast,
                      double beta_slow, double magnitude, std::vector<float> divisors) {
            return RopeScaling{factor,    extrapolation, original_tokens,    beta_fast,
                               beta_slow, magnitude,     std::move(divisors)};
          }),
          py::kw_only(), py::arg("factor") = 1.0, py::arg("extrapolation") = 0.0,
          py::arg("original_tokens") = 0.0, py::arg("beta_fast") = 32.0, py::arg("beta_slow") = 1.0,
          py::arg("magnitude") = 1.0, py::arg("divisors") = std::vector<float>{});
  FinalClass<Config>(m, "Config")
      .def(py::init([](size_t dim, size_t n_layers, size_t n_heads, size_t n_kv_heads,
                       size_t head_dim, size_t ffn_dim, size_t vocab, size_t context_tokens,
                       double norm_eps, double rope_theta, size_t rope_dim, bool rope_interleaved,
                       const RopeScaling& rope_scaling, bool qkv_bias, bool output_bias,
                       bool qk_norm) {
             const Config config{dim,          n_layers,   n_heads,     n_kv_heads,
                                 head_dim,     ffn_dim,    vocab,       context_tokens,
                                 norm_eps,     rope_theta, rope_dim,    rope_interleaved,
                                 rope_scaling, qkv_bias,   output_bias, qk_norm};
             Check(config, ShardPart{0, n_layers});  // a shard checks its own span
             return config;
           }),
           py::kw_only(), py::arg("dim"), py::arg("n_layers"), py::arg("n_heads"),
           py::arg("n_kv_heads"), py::arg("head_dim"), py::arg("ffn_dim"), py::arg("vocab"),
           py::arg("context_tokens"), py::arg("norm_eps"), py::arg("rope_theta"),
           py::arg("rope_dim"), py::arg("rope_interleaved"),
           py::arg("rope_scaling") = RopeScaling{}, py::arg("qkv_bias") = false,
           py::arg("output_bias") = false, py::arg("qk_norm") = false);
}

py::bytes RowsOf(const Synthetic& model, const std::string& name, const std::string& type_name,
                 size_t cols, size_t first_row, size_t n_rows) {
  const TypeInfo& info = KnownType(type_name);
  if (cols == 0 || cols > kMostValues || cols % info.block_values != 0)
    throw UsageError(name + ": " + std::to_string(cols) + " columns of " + type_name);
  const size_t row_bytes = RowBytes(info.type, cols);
  size_t n_bytes = 0;
  if (__builtin_mul_overflow(n_rows, row_bytes, &n_bytes) || n_bytes > PY_SSIZE_T_MAX)
    throw UsageError(name + ": " + std::to_string(n_rows) + " rows, more than fit into memory");
  std::string bytes;
  WithoutGil([&] {
    const SyntheticTensor tensor(model, name, info.type, cols);
    bytes.resize(n_bytes);
    for (size_t i = 0; i < n_rows; ++i)
      tensor.Row(first_row + i, reinterpret_cast<uint8_t*>(&bytes[i * row_bytes]));
  });
  return bytes;
}

void BindSynthetic(py::module_& m) {
  FinalClass<Synthetic>(m, "Synthetic")
      .def(py::init([](uint64_t seed, size_t n_layers) {
             const Synthetic model = {seed, n_layers};
             Check(model);
             return model;
           }),
           py::kw_only(), py::arg("seed"), py::arg("n_layers"))
      .def("rows", RowsOf, py::arg("name"), py::arg("type_name"), py::arg("cols"),
           py::arg("first_row"), py::arg("n_rows"));
  m.attr("SYNTHETIC_VERSION") = kSyntheticVersion;
}

void BindEngine(py::module_& m) {
  FinalClass<Engine>(m, "Engine")
      .def(py::init<size_t, const std::string&, bool>(), py::arg("threads") = 0,
           py::arg("isa") = "auto", py::arg("pinned") = false)
      .def_property_readonly("isa", [](const Engine& engine) { return engine.kernels.name; })
      .def_property_readonly("threads", [](const Engine& engine) { return engine.pool.threads(); })
      .def_property_readonly("decode_threads",
                             [](const Engine& engine) { return engine.pool.decode_threads(); })
      .def_property_readonly("prefill_threads",
                             [](const Engine& engine) { return engine.pool.prefill_threads(); })
      .def(
          "tune_threads",
          [](Engine& engine, size_t weight_bytes) {
            WithoutGil([&] { TuneThreads(engine.pool, *engine.kernels.matmul, weight_bytes); });
          },
          py::arg("weight_bytes") = 67108864)
      .def(
          "read_bandwidth",
          [](Engine& engine, size_t size_bytes, size_t rounds) {
            return WithoutGil([&] { return ReadBandwidth(engine.pool, size_bytes, rounds); });
          },
          py::arg("size_bytes") = 268435456, py::arg("rounds") = 3);
}

}  // namespace

PYBIND11_MODULE(_engine, m) {
  m.doc() = "The compiled engine. Imported by potluck/engine.py and by nothing else.";
  for (const char* name : {"UsageError", "ModelError", "DamagedPack", "SessionError",
                           "UnknownSession", "Full", "FrameError", "Cancelled", "EngineError"})
    (void)PythonErrors().attr(name).ptr();
  py::register_local_exception_translator(Translate);
  m.attr("ISAS") = TupleOf(CompiledIsas());
  m.attr("PACK_LAYOUT") = kPackLayout;
  m.def("available_isas", [] { return TupleOf(AvailableIsas()); });
  m.def("crc32c", Crc32cOf, py::arg("data"));
  m.def(
      "block_layout",
      [](const std::string& type_name) {
        const TypeInfo& info = KnownType(type_name);
        return std::pair(info.block_values, info.block_bytes);
      },
      py::arg("type_name"));
  m.def("exp", ExpOf, py::arg("values"), py::arg("out"));
  m.def("log_sum_exp", LogSumExpOf, py::arg("logits"));
  BindConfig(m);
  BindEngine(m);
  BindSynthetic(m);
  BindShard(m);
  m.def("convert", ConvertOf, py::arg("engine"), py::arg("from_type"), py::arg("to_type"),
        py::arg("data"), py::arg("out"));
  m.def("matmul", MatMulOf, py::arg("engine"), py::arg("type_name"), py::arg("rows"),
        py::arg("cols"), py::arg("weights"), py::arg("x"), py::arg("out"));
  m.def(
      "benchmark_matmul",
      [](Engine& engine, const std::string& type_name, size_t rows, size_t cols, size_t batch,
         size_t rounds, size_t weight_bytes) {
        const WeightType type = KnownType(type_name).type;
        return WithoutGil([&] {
          return BenchmarkMatMul(engine.pool, *engine.kernels.matmul, type, rows, cols, batch,
                                 rounds, weight_bytes);
        });
      },
      py::arg("engine"), py::arg("type_name"), py::arg("rows"), py::arg("cols"), py::arg("batch"),
      py::arg("rounds"), py::arg("weight_bytes") = size_t{256} << 20);
}

}  // namespace potluck
