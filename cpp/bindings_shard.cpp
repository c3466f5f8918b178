// The part of the engine's Python face that holds weights and runs steps.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bindings.h"
#include "engine/errors.h"
#include "engine/kv.h"
#include "engine/shard.h"
#include "engine/weight_source.h"
#include "python_buffers.h"

namespace py = pybind11;

namespace potluck {
namespace {

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

// By hand: of pybind11's own caster for variants gcc 12 warns without a reason.
Origin OriginOf(const py::object& origin) {
  if (py::isinstance<py::str>(origin)) return origin.cast<std::string>();
  if (py::isinstance<Synthetic>(origin)) return origin.cast<Synthetic>();
  if (py::isinstance<TensorFiles>(origin)) return origin.cast<TensorFiles>();
  throw py::type_error("origin: expected a path, Synthetic or TensorFiles");
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

void BindTensorFiles(py::module_& m) {
  FinalClass<TensorFiles>(m, "TensorFiles")
      .def(py::init(
               [](std::unordered_map<std::string, std::string> paths, const std::string& identity) {
                 PackSource source;
                 static_assert(sizeof(source) == 16, "all bits are the identity's");
                 if (identity.size() != sizeof(source)) {
                   throw UsageError("identity: " + std::to_string(identity.size()) +
                                    " bytes, expected " + std::to_string(sizeof(source)));
                 }
                 std::memcpy(&source, identity.data(), sizeof(source));
                 return TensorFiles{std::move(paths), source};
               }),
           py::kw_only(), py::arg("paths"), py::arg("identity"));
}

}  // namespace

void BindShard(py::module_& m) {
  BindRows(m);
  BindTensorFiles(m);
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
             size_t cols, const py::object& origin, uint64_t offset_bytes) {
            const Origin from = OriginOf(origin);
            WithoutGil([&] { shard.PutFile(name, type_name, rows, cols, from, offset_bytes); });
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
          [](Shard& shard, const std::string& pack, const py::object& origin,
             const std::vector<SourceTuple>& tensors) {
            const Origin from = OriginOf(origin);
            const auto sources = SourcesOf(tensors);
            return WithoutGil([&] { return shard.WritePack(pack, from, sources); });
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
          [](Shard& shard, const std::string& pack, const py::object& origin,
             const std::vector<SourceTuple>& tensors) {
            const Origin from = OriginOf(origin);
            const auto sources = SourcesOf(tensors);
            return WithoutGil([&] { return shard.MapPack(pack, from, sources); });
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

}  // namespace potluck
