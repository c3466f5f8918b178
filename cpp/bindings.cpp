// The engine's Python face (potluck/_engine.pyi is the contract). Knows no arithmetic: it checks
// buffers while it holds the GIL, gives the GIL away inside each call that computes, waits or reads
// a file, and turns the engine's errors into those of potluck.errors.
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
#include "engine/convert.h"
#include "engine/cpu.h"
#include "engine/crc32c.h"
#include "engine/errors.h"
#include "engine/float_rules.h"
#include "engine/isa.h"
#include "engine/pack_file.h"
#include "engine/pool.h"
#include "engine/probe.h"
#include "engine/product.h"
#include "engine/shard.h"
#include "engine/synthetic.h"
#include "engine/tuning.h"
#include "engine/types.h"
#include "engine/vector.h"
#include "python_buffers.h"

namespace py = pybind11;

namespace potluck {
namespace {

// Calls the engine without the GIL, under the float rules that its answers assume.
template <class Call>
auto WithoutGil(const Call& call) {
  const py::gil_scoped_release released;
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

size_t TokensIn(const std::vector<RowSpan>& rows) {
  size_t tokens = 0;
  for (const RowSpan& span : rows)
    if (__builtin_add_overflow(tokens, span.n_tokens, &tokens))
      throw UsageError("rows: more tokens than can be counted");
  return tokens;
}

size_t LogitsIn(const std::vector<RowSpan>& rows) {
  size_t logits = 0;
  for (const RowSpan& span : rows)
    if (__builtin_add_overflow(logits, span.want_logits, &logits))
      throw UsageError("rows: more logits than can be counted");
  return logits;
}

std::vector<double> ForwardOf(Shard& shard, const py::buffer& input,
                              const std::vector<RowSpan>& rows, const py::buffer& output) {
  const HeldBuffer in(input, "input");
  const HeldBuffer out(output, "output");
  const size_t n = TokensIn(rows);
  const Config& config = shard.config();
  const size_t out_rows = shard.has_head() ? LogitsIn(rows) : n;
  const size_t out_cols = shard.has_head() ? config.vocab : config.dim;
  auto* to = out.WritableValuesOf<float>("f32", {out_rows, out_cols});
  if (shard.embeds()) {
    const auto* ids = in.ValuesOf<int32_t>("int32", {n});
    return WithoutGil([&] { return shard.Forward(ids, n, rows, to, out_rows * out_cols); });
  }
  const auto* from = in.ValuesOf<float>("f32", {n, config.dim});
  return WithoutGil(
      [&] { return shard.Forward(from, n * config.dim, rows, to, out_rows * out_cols); });
}

std::vector<std::tuple<std::string, size_t, size_t>> MatricesOf(const Shard& shard) {
  std::vector<std::tuple<std::string, size_t, size_t>> all;
  for (const TensorShape& shape : shard.Matrices())
    all.emplace_back(shape.name, shape.rows, shape.cols);
  return all;
}

// An ordinary Python class, with `type` for a metaclass: static properties, which pybind11's own
// one is for, do not occur here.
template <class T>
py::class_<T> FinalClass(py::module_& m, const char* name) {
  return py::class_<T>(m, name, py::is_final(),
                       py::metaclass(reinterpret_cast<PyObject*>(&PyType_Type)));
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

void BindRows(py::module_& m) {
  FinalClass<RowSpan>(m, "RowSpan")
      .def(py::init(
               [](uint64_t session, size_t start_position, size_t n_tokens, size_t want_logits) {
                 return RowSpan{session, start_position, n_tokens, want_logits};
               }),
           py::arg("session"), py::arg("start_position"), py::arg("n_tokens"),
           py::arg("want_logits"))
      .def_readwrite("session", &RowSpan::session)
      .def_readwrite("start_position", &RowSpan::start_position)
      .def_readwrite("n_tokens", &RowSpan::n_tokens)
      .def_readwrite("want_logits", &RowSpan::want_logits);
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

// Name, type, rows, cols, offset in the file.
using SourceTuple = std::tuple<std::string, std::string, size_t, size_t, uint64_t>;

std::vector<TensorSource> SourcesOf(const std::vector<SourceTuple>& tensors) {
  std::vector<TensorSource> sources;
  sources.reserve(tensors.size());
  for (const auto& [name, type_name, rows, cols, offset_bytes] : tensors) {
    sources.push_back({name, type_name, rows, cols, offset_bytes});
  }
  return sources;
}

void BindShard(py::module_& m) {
  // Whatever takes the shard's mutex gives the GIL away first: a forward may hold the mutex for
  // seconds, and Python must go on meanwhile.
  FinalClass<Shard>(m, "Shard")
      .def(py::init([](Engine& engine, const Config& config, size_t start, size_t stop, bool embeds,
                       bool has_head, size_t kv_bytes, size_t max_sessions,
                       const std::string& kv_type) {
             const ShardPart part{start,    stop,         embeds,           has_head,
                                  kv_bytes, max_sessions, KvTypeOf(kv_type)};
             return WithoutGil([&] {
               return std::make_unique<Shard>(engine.pool, engine.kernels, config, part);
             });
           }),
           py::keep_alive<1, 2>(), py::arg("engine"), py::arg("config"), py::arg("start"),
           py::arg("stop"), py::kw_only(), py::arg("embeds"), py::arg("has_head"),
           py::arg("kv_bytes"), py::arg("max_sessions") = 256, py::arg("kv_type") = "f16")
      .def("matrices", MatricesOf)
      .def(
          "put_file",
          [](Shard& shard, const std::string& name, const std::string& type_name, size_t rows,
             size_t cols, const Origin& origin, uint64_t offset_bytes) {
            WithoutGil([&] { shard.PutFile(name, type_name, rows, cols, origin, offset_bytes); });
          },
          py::arg("name"), py::arg("type_name"), py::arg("rows"), py::arg("cols"),
          py::arg("origin"), py::arg("offset_bytes"))
      .def(
          "put",
          [](Shard& shard, const std::string& name, const std::string& type_name, size_t rows,
             size_t cols, size_t first_row, const py::buffer& data) {
            const HeldBuffer in(data, "data");
            WithoutGil([&] {
              shard.Put(name, type_name, rows, cols, first_row, in.bytes(), in.n_bytes());
            });
          },
          py::arg("name"), py::arg("type_name"), py::arg("rows"), py::arg("cols"),
          py::arg("first_row"), py::arg("data"))
      .def(
          "write_pack",
          [](Shard& shard, const std::string& pack, const Origin& origin,
             const std::vector<SourceTuple>& tensors) {
            const auto sources = SourcesOf(tensors);
            return WithoutGil([&] { return shard.WritePack(pack, origin, sources); });
          },
          py::arg("pack"), py::arg("origin"), py::arg("tensors"))
      .def(
          "pack_bytes",
          [](const Shard& shard, const std::vector<SourceTuple>& tensors) {
            const auto sources = SourcesOf(tensors);
            return WithoutGil([&] { return shard.PackBytes(sources); });
          },
          py::arg("tensors"))
      .def(
          "map_pack",
          [](Shard& shard, const std::string& pack, const Origin& origin,
             const std::vector<SourceTuple>& tensors) {
            const auto sources = SourcesOf(tensors);
            return WithoutGil([&] { return shard.MapPack(pack, origin, sources); });
          },
          py::arg("pack"), py::arg("origin"), py::arg("tensors"))
      .def("damaged_packs",
           [](const Shard& shard) { return WithoutGil([&] { return shard.DamagedPacks(); }); })
      .def(
          "seal",
          [](Shard& shard, std::optional<size_t> resident_bytes) {
            WithoutGil([&] { shard.Seal(resident_bytes.value_or(SIZE_MAX)); });
          },
          py::arg("resident_bytes") = py::none())
      .def(
          "open",
          [](Shard& shard, uint64_t session, size_t max_tokens) {
            WithoutGil([&] { shard.Open(session, max_tokens); });
          },
          py::arg("session"), py::arg("max_tokens"))
      .def(
          "truncate",
          [](Shard& shard, uint64_t session, size_t position) {
            WithoutGil([&] { shard.Truncate(session, position); });
          },
          py::arg("session"), py::arg("position"))
      .def(
          "fork",
          [](Shard& shard, uint64_t session, uint64_t new_session, size_t max_tokens) {
            WithoutGil([&] { shard.Fork(session, new_session, max_tokens); });
          },
          py::arg("session"), py::arg("new_session"), py::arg("max_tokens"))
      .def(
          "close",
          [](Shard& shard, uint64_t session) { WithoutGil([&] { shard.Close(session); }); },
          py::arg("session"))
      .def("forward", ForwardOf, py::arg("input"), py::arg("rows"), py::arg("output"))
      .def("cancel", &Shard::Cancel)
      .def_property_readonly("progress", &Shard::progress)
      .def_property_readonly(
          "shard_bytes",
          [](const Shard& shard) { return WithoutGil([&] { return shard.shard_bytes(); }); })
      .def_property_readonly(
          "mapped_bytes",
          [](const Shard& shard) { return WithoutGil([&] { return shard.mapped_bytes(); }); })
      .def_property_readonly(
          "n_streamed",
          [](const Shard& shard) { return WithoutGil([&] { return shard.n_streamed(); }); })
      .def_property_readonly("kv_bytes", &Shard::kv_bytes)
      .def_property_readonly(
          "scratch_bytes",
          [](const Shard& shard) { return WithoutGil([&] { return shard.scratch_bytes(); }); })
      .def_property_readonly(
          "kv_used_bytes",
          [](const Shard& shard) { return WithoutGil([&] { return shard.kv_used_bytes(); }); })
      .def(
          "length",
          [](const Shard& shard, uint64_t session) {
            return WithoutGil([&] { return shard.Length(session); });
          },
          py::arg("session"));
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
  BindRows(m);
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
         size_t rounds) {
        const WeightType type = KnownType(type_name).type;
        return WithoutGil([&] {
          return BenchmarkMatMul(engine.pool, *engine.kernels.matmul, type, rows, cols, batch,
                                 rounds);
        });
      },
      py::arg("engine"), py::arg("type_name"), py::arg("rows"), py::arg("cols"), py::arg("batch"),
      py::arg("rounds"));
}

}  // namespace potluck
