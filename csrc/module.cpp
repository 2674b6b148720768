// Bindings only. Tensors come as addresses and sizes, so the module needs no libtorch; the Python callers check dtypes
// and shapes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "attention.h"
#include "class_draws.h"
#include "csv_reader.h"
#include "decoder_step.h"
#include "gather.h"
#include "gather_pool.h"
#include "multi_embedding.h"
#include "multi_head_cross_entropy.h"
#include "parallel.h"
#include "permutation.h"

namespace py = pybind11;
using namespace eventkern;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check_at_least(const char* name, int64_t value, int64_t least) {
  if (value >= least) return;
  throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + "; want at least " +
                              std::to_string(least));
}

EntityIndex entity_index(const std::array<uintptr_t, 3>& addresses) {
  return {pointer<const int32_t>(addresses[0]), pointer<const int64_t>(addresses[1]),
          pointer<const int64_t>(addresses[2])};
}

// What the gathers trust of an array of codes.
void check_codes(int code_bytes, int num_categories) {
  if (code_bytes != 1 && code_bytes != 2 && code_bytes != 4) {
    throw std::invalid_argument("code_bytes is " + std::to_string(code_bytes) + "; want 1, 2 or 4");
  }
  check_at_least("num_categories", num_categories, 1);
}

void check_out_bytes(int out_bytes) {
  if (out_bytes != 4 && out_bytes != 8) {
    throw std::invalid_argument("out_bytes is " + std::to_string(out_bytes) + "; want 4 or 8");
  }
}

WindowGather for_batch(WindowGather gather, uintptr_t windows, int64_t batch_size, uintptr_t sources,
                       uintptr_t targets) {
  gather.windows = pointer<const int64_t>(windows);
  gather.batch_size = batch_size;
  gather.sources = pointer<void>(sources);
  gather.targets = pointer<void>(targets);
  return gather;
}

// A tensor (batch, head, position, head_dim): its address and strides.
using HeadRowsTuple = std::tuple<uintptr_t, std::array<int64_t, 4>>;

HeadRows head_rows(const HeadRowsTuple& tensor) {
  const auto& [address, strides] = tensor;
  return {pointer<void>(address), strides[0], strides[1], strides[2]};
}

// (batch, heads, queries, keys, head_dim) of a call of attention.
Attention attention_call(const std::array<int64_t, 5>& sizes, bool is_causal, int float_type, int num_threads) {
  const auto [batch_size, num_heads, num_queries, num_keys, head_dim] = sizes;
  return {batch_size,
          num_heads,
          num_queries,
          num_keys,
          static_cast<int>(head_dim),
          is_causal,
          static_cast<FloatType>(float_type),
          num_threads};
}

// A call of multi_embedding with the first rows that it points to.
struct EmbeddingCall {
  std::vector<int64_t> first_rows;
  MultiEmbedding call;

  EmbeddingCall(uintptr_t ids, int id_bytes, const std::array<int64_t, 2>& id_strides, int64_t num_events,
                const std::vector<int64_t>& table_sizes, int64_t dim, int mode, int float_type, int num_threads)
      : first_rows{0} {
    for (const int64_t size : table_sizes) first_rows.push_back(first_rows.back() + size);
    call = {pointer<const void>(ids),
            id_bytes,
            id_strides[0],
            id_strides[1],
            num_events,
            static_cast<int>(table_sizes.size()),
            first_rows.data(),
            dim,
            static_cast<EmbeddingMode>(mode),
            static_cast<FloatType>(float_type),
            num_threads};
  }
};

// Targets with the first classes that they point to. (data, bytes of one, row stride, head stride, rows) come as one
// tuple, because every call names them all.
struct TargetsCall {
  std::vector<int64_t> first_classes;
  Targets targets;

  TargetsCall(const std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>& labels,
              const std::vector<int64_t>& head_sizes, int64_t ignore_index)
      : first_classes{0} {
    for (const int64_t size : head_sizes) first_classes.push_back(first_classes.back() + size);
    const auto [data, num_bytes, row_stride, head_stride, num_rows] = labels;
    targets = {
        pointer<const void>(data), num_bytes,   row_stride, head_stride, num_rows, static_cast<int>(head_sizes.size()),
        first_classes.data(),      ignore_index};
  }
};

using CsvMistakeTuple = std::tuple<const char*, int64_t, int64_t, int64_t, int64_t>;

// At most `most` of a reader's mistakes, the first ones.
std::vector<CsvMistakeTuple> csv_mistakes(const CsvReader& reader, size_t most) {
  constexpr std::array<const char*, 4> kFaults = {"num_fields", "never_closed", "after_quote", "swallowed"};
  std::vector<CsvMistakeTuple> told;
  for (const CsvMistake& each : reader.mistakes()) {
    if (told.size() == most) break;
    told.emplace_back(kFaults[static_cast<int>(each.fault)], each.row, each.line, each.number, each.other_line);
  }
  return told;
}

py::bytes bytes_of(const auto& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(values[0])};
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  watch_forks();
#ifdef EVENTKERN_CUDA
  module.attr("has_cuda") = true;
#else
  module.attr("has_cuda") = false;
#endif
#ifdef EVENTKERN_SANITIZE
  module.attr("is_sanitized") = true;
#else
  module.attr("is_sanitized") = false;
#endif
  module.attr("max_permutation_size") = kMaxPermutationSize;
  module.attr("max_streams") = kMaxStreams;

  module.def(
      "permutation_cpu",
      [](uint64_t n, uint64_t seed, uint64_t epoch, uint64_t part, int64_t start, int64_t count, uintptr_t out,
         int num_threads) {
        py::gil_scoped_release release;
        permutation_cpu(make_permutation(n, seed, epoch, part), start, count, pointer<int64_t>(out), num_threads);
      },
      py::arg("n"), py::kw_only(), py::arg("seed"), py::arg("epoch"), py::arg("part"), py::arg("start"),
      py::arg("count"), py::arg("out"), py::arg("num_threads"));

  py::class_<CsvReader>(module, "CsvReader")
      .def(py::init<int64_t>(), py::kw_only(), py::arg("most_bytes"))
      .def("read_header", &CsvReader::read_header, py::arg("block"), py::arg("is_last"))
      .def("select", &CsvReader::select, py::arg("wanted"), py::arg("time_field"))
      .def("read", &CsvReader::read, py::arg("block"), py::arg("is_last"), py::call_guard<py::gil_scoped_release>())
      .def("mistakes", &csv_mistakes, py::arg("most"))
      .def("lines", [](const CsvReader& self) { return bytes_of(self.lines()); })
      .def("columns",
           [](const CsvReader& self) {
             std::vector<std::pair<py::bytes, py::bytes>> columns;
             for (const CsvColumn& each : self.columns()) {
               columns.emplace_back(bytes_of(each.offsets), bytes_of(each.text));
             }
             return columns;
           })
      .def_property_readonly(
          "header",
          [](const CsvReader& self) { return std::vector<py::bytes>(self.header().begin(), self.header().end()); })
      .def_property_readonly("num_mistakes", [](const CsvReader& self) { return self.mistakes().size(); })
      .def_property_readonly("next_line", &CsvReader::next_line);

  // A window gather's addresses, prepared once for a store and reused for every batch.
  py::class_<WindowGather>(module, "WindowGather")
      .def(py::init([](uintptr_t codes, int code_bytes, int num_categories, uintptr_t cuts,
                       const std::array<uintptr_t, 3>& key, uintptr_t anchors, uintptr_t limits,
                       const std::vector<std::array<uintptr_t, 3>>& streams, int src_seq_len, int num_targets,
                       int out_bytes) {
             if (streams.size() > kMaxStreams) {
               throw std::invalid_argument("streams has " + std::to_string(streams.size()) + " entries; want at most " +
                                           std::to_string(kMaxStreams));
             }
             check_codes(code_bytes, num_categories);
             check_out_bytes(out_bytes);
             check_at_least("src_seq_len", src_seq_len, 0);
             check_at_least("num_targets", num_targets, 1);
             WindowGather gather{};
             gather.codes = pointer<const void>(codes);
             gather.code_bytes = code_bytes;
             gather.num_categories = num_categories;
             gather.cuts = pointer<const int32_t>(cuts);
             gather.key = entity_index(key);
             gather.anchors = pointer<const int64_t>(anchors);
             gather.limits = pointer<const int64_t>(limits);
             gather.num_streams = static_cast<int>(streams.size());
             for (size_t stream = 0; stream < streams.size(); ++stream) {
               gather.streams[stream] = entity_index(streams[stream]);
             }
             gather.src_seq_len = src_seq_len;
             gather.num_targets = num_targets;
             gather.out_bytes = out_bytes;
             return gather;
           }),
           py::kw_only(), py::arg("codes"), py::arg("code_bytes"), py::arg("num_categories"), py::arg("cuts"),
           py::arg("key"), py::arg("anchors"), py::arg("limits"), py::arg("streams"), py::arg("src_seq_len"),
           py::arg("num_targets"), py::arg("out_bytes"))
      .def(
          "cpu",
          [](const WindowGather& self, uintptr_t windows, int64_t batch_size, uintptr_t sources, uintptr_t targets,
             uintptr_t num_labels) {
            py::gil_scoped_release release;
            gather_windows_cpu(for_batch(self, windows, batch_size, sources, targets), pointer<int64_t>(num_labels));
          },
          py::arg("windows"), py::arg("batch_size"), py::arg("sources"), py::arg("targets"), py::arg("num_labels"))
#ifdef EVENTKERN_CUDA
      .def(
          "cuda",
          [](const WindowGather& self, uintptr_t windows, int64_t batch_size, uintptr_t sources, uintptr_t targets,
             uintptr_t num_labels, int device, uintptr_t stream) {
            py::gil_scoped_release release;
            gather_windows_cuda(for_batch(self, windows, batch_size, sources, targets), pointer<int64_t>(num_labels),
                                device, pointer<void>(stream));
          },
          py::arg("windows"), py::arg("batch_size"), py::arg("sources"), py::arg("targets"), py::arg("num_labels"),
          py::arg("device"), py::arg("stream"))
#endif
      ;

  py::class_<GatherPool>(module, "GatherPool")
      .def(py::init<int64_t, int>(), py::kw_only(), py::arg("num_windows"), py::arg("num_threads"))
      .def(
          "submit",
          [](GatherPool& self, const WindowGather& gather, uintptr_t windows, int64_t batch_size, uintptr_t sources,
             uintptr_t targets, uintptr_t num_labels) {
            return self.submit(for_batch(gather, windows, batch_size, sources, targets), pointer<int64_t>(num_labels));
          },
          py::arg("gather"), py::arg("windows"), py::arg("batch_size"), py::arg("sources"), py::arg("targets"),
          py::arg("num_labels"))
      .def("wait", &GatherPool::wait, py::arg("ticket"), py::call_guard<py::gil_scoped_release>())
      .def("close", &GatherPool::close, py::call_guard<py::gil_scoped_release>());

  // Positional, because a call of 1,024 rows takes only a few microseconds.
  py::class_<RowGather>(module, "RowGather")
      .def(py::init([](uintptr_t codes, int code_bytes, int num_categories, int64_t num_rows) {
             check_codes(code_bytes, num_categories);
             check_at_least("num_rows", num_rows, 0);
             return RowGather{pointer<const void>(codes), code_bytes, num_categories, num_rows};
           }),
           py::kw_only(), py::arg("codes"), py::arg("code_bytes"), py::arg("num_categories"), py::arg("num_rows"))
      .def("cpu", [](const RowGather& self, uintptr_t rows, int64_t count, uintptr_t out, int out_bytes,
                     int num_threads) {
        py::gil_scoped_release release;
        return gather_rows_cpu(self, pointer<const int64_t>(rows), count, pointer<void>(out), out_bytes, num_threads);
      });

  module.def("attention_cpu", [](const std::array<int64_t, 5>& sizes, bool is_causal, int float_type, int num_threads,
                                 const HeadRowsTuple& query, const HeadRowsTuple& key, const HeadRowsTuple& value,
                                 const HeadRowsTuple& output, uintptr_t statistics) {
    const py::gil_scoped_release release;
    attention_cpu(attention_call(sizes, is_causal, float_type, num_threads), head_rows(query), head_rows(key),
                  head_rows(value), head_rows(output), pointer<float>(statistics));
  });

  module.def("attention_backward_cpu",
             [](const std::array<int64_t, 5>& sizes, bool is_causal, int float_type, int num_threads,
                const HeadRowsTuple& grad, const HeadRowsTuple& query, const HeadRowsTuple& key,
                const HeadRowsTuple& value, const HeadRowsTuple& output, uintptr_t statistics,
                const HeadRowsTuple& query_grad, const HeadRowsTuple& key_grad, const HeadRowsTuple& value_grad) {
               const py::gil_scoped_release release;
               attention_backward_cpu(attention_call(sizes, is_causal, float_type, num_threads), head_rows(grad),
                                      head_rows(query), head_rows(key), head_rows(value), head_rows(output),
                                      pointer<const float>(statistics), head_rows(query_grad), head_rows(key_grad),
                                      head_rows(value_grad));
             });

  module.def("decoder_step_cpu",
             [](int64_t num_layers, int64_t batch_size, int64_t width, int64_t num_heads, int64_t cache_size,
                int64_t position, int64_t num_memory, int64_t memory_size, float epsilon, int num_threads,
                uintptr_t weights, uintptr_t caches, uintptr_t memory, uintptr_t states) {
               const py::gil_scoped_release release;
               const DecoderStep call{num_layers,
                                      batch_size,
                                      width,
                                      num_heads,
                                      static_cast<int>(width / num_heads),
                                      cache_size,
                                      position,
                                      num_memory,
                                      memory_size,
                                      epsilon,
                                      pointer<const float>(weights),
                                      pointer<float>(caches),
                                      pointer<const float>(memory),
                                      num_threads};
               decoder_step_cpu(call, pointer<float>(states));
             });

  module.def("multi_embedding_cpu", [](uintptr_t ids, int id_bytes, const std::array<int64_t, 2>& id_strides,
                                       int64_t num_events, const std::vector<int64_t>& table_sizes, int64_t dim,
                                       int mode, int float_type, int num_threads, uintptr_t weight,
                                       int64_t weight_stride, uintptr_t out) {
    py::gil_scoped_release release;
    const EmbeddingCall embedding(ids, id_bytes, id_strides, num_events, table_sizes, dim, mode, float_type,
                                  num_threads);
    return multi_embedding_cpu(embedding.call, pointer<const void>(weight), weight_stride, pointer<void>(out));
  });

  module.def("multi_embedding_backward_cpu",
             [](uintptr_t ids, int id_bytes, const std::array<int64_t, 2>& id_strides, int64_t num_events,
                const std::vector<int64_t>& table_sizes, int64_t dim, int mode, int float_type, int num_threads,
                uintptr_t out_grad, int64_t out_grad_stride, uintptr_t weight_grad) {
               py::gil_scoped_release release;
               const EmbeddingCall embedding(ids, id_bytes, id_strides, num_events, table_sizes, dim, mode, float_type,
                                             num_threads);
               multi_embedding_backward_cpu(embedding.call, pointer<const void>(out_grad), out_grad_stride,
                                            pointer<void>(weight_grad));
             });

  module.def("count_targets", [](const std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>& labels,
                                 const std::vector<int64_t>& head_sizes, int64_t ignore_index) {
    const py::gil_scoped_release release;
    const TargetsCall call(labels, head_sizes, ignore_index);
    std::vector<int64_t> counts(head_sizes.size());
    const int64_t position = count_targets(call.targets, counts.data());
    return std::pair(position, counts);
  });

  module.def("cross_entropy_cpu",
             [](const std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>& labels,
                const std::vector<int64_t>& head_sizes, int64_t ignore_index, uintptr_t logits, uintptr_t bias,
                int float_type, float label_smoothing, float z_loss, uintptr_t scales, int64_t scales_row_stride,
                uintptr_t losses, int64_t losses_row_stride, uintptr_t totals, int num_threads) {
               py::gil_scoped_release release;
               const TargetsCall call(labels, head_sizes, ignore_index);
               const CrossEntropy options{pointer<void>(logits),
                                          pointer<const void>(bias),
                                          static_cast<FloatType>(float_type),
                                          label_smoothing,
                                          z_loss,
                                          pointer<const float>(scales),
                                          scales_row_stride,
                                          pointer<float>(losses),
                                          losses_row_stride,
                                          num_threads};
               cross_entropy_cpu(call.targets, options, pointer<double>(totals));
             });

  module.def("add_rows_cpu", [](uintptr_t matrix, int float_type, int64_t num_rows, int64_t num_columns, uintptr_t sums,
                                int num_threads) {
    py::gil_scoped_release release;
    add_rows_cpu(pointer<const void>(matrix), static_cast<FloatType>(float_type), num_rows, num_columns,
                 pointer<float>(sums), num_threads);
  });

  module.def("draw_classes_cpu",
             [](uintptr_t logits, int64_t row_stride, int64_t num_rows, const std::vector<int64_t>& head_sizes,
                const std::vector<int64_t>& num_left_out, uintptr_t uniforms, float inverse_temperature, int64_t top_k,
                int num_threads, uintptr_t classes) {
               py::gil_scoped_release release;
               std::vector<int64_t> first_classes{0};
               for (const int64_t size : head_sizes) first_classes.push_back(first_classes.back() + size);
               const ClassDraws call{pointer<const float>(logits),
                                     row_stride,
                                     num_rows,
                                     static_cast<int>(head_sizes.size()),
                                     first_classes.data(),
                                     num_left_out.data(),
                                     pointer<const float>(uniforms),
                                     inverse_temperature,
                                     top_k,
                                     num_threads};
               draw_classes_cpu(call, pointer<int32_t>(classes));
             });

#ifdef EVENTKERN_CUDA
  module.def(
      "permutation_cuda",
      [](uint64_t n, uint64_t seed, uint64_t epoch, uint64_t part, int64_t start, int64_t count, uintptr_t out,
         int device, uintptr_t stream) {
        py::gil_scoped_release release;
        permutation_cuda(make_permutation(n, seed, epoch, part), start, count, pointer<int64_t>(out), device,
                         pointer<void>(stream));
      },
      py::arg("n"), py::kw_only(), py::arg("seed"), py::arg("epoch"), py::arg("part"), py::arg("start"),
      py::arg("count"), py::arg("out"), py::arg("device"), py::arg("stream"));
#endif
}
