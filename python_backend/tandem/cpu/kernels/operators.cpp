// The parts of a model's pass that a compiled graph leaves to others: products with packed weights,
// and what touches the block pool.
//
// A graph can hold neither packed weights nor the pool. So it names them by number, and whoever runs
// it says whose they are. It runs from here because an operator, unlike torch's own loader, lets
// Python's other threads go on meanwhile.

#include "operators.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <omp.h>
#include <torch/library.h>

#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace {

using at::Tensor;
using tandem::Pool;
using tandem::Sight;
using Loader = torch::inductor::AOTIModelPackageLoader;

constexpr int64_t MANY_ROWS = 8;

struct Linear {
  Tensor weight;  // packed by oneDNN
  std::optional<Tensor> bias;
  std::optional<Tensor> memory;  // where it lies, for products that don't depend on their rows
  // For the product of up to so many rows: weights in 8 bits, and one scale a row of them.
  int64_t int8_rows;
  std::optional<Tensor> int8_weight, int8_scale;
};

struct Model {
  int64_t block_size;
  std::vector<Linear> linears;
  std::map<int64_t, Pool> pools;  // by layer
};

// A graph that runs. Between the products, a few rows gain nothing from more than one thread.
struct Run {
  Model &model;
  int num_threads;  // of a product
};

// Gives what follows so many threads.
class Threads {
 public:
  explicit Threads(int number) : before_(omp_get_max_threads()) { omp_set_num_threads(number); }
  ~Threads() { omp_set_num_threads(before_); }

 private:
  int before_;
};

std::mutex mutex;
std::map<int64_t, std::unique_ptr<Model>> models;
std::map<int64_t, std::unique_ptr<Loader>> graphs;
int64_t num_made = 0;
thread_local Run *current = nullptr;

Model &find(int64_t model) {
  std::lock_guard<std::mutex> lock(mutex);
  return *models.at(model);
}

int64_t make_model(int64_t block_size) {
  std::lock_guard<std::mutex> lock(mutex);
  auto made = std::make_unique<Model>();
  made->block_size = block_size;
  models[++num_made] = std::move(made);
  return num_made;
}

void drop_model(int64_t model) {
  std::lock_guard<std::mutex> lock(mutex);
  models.erase(model);
}

int64_t add_linear(int64_t model, const Tensor &weight, const std::optional<Tensor> &bias,
                   const std::optional<Tensor> &memory, int64_t int8_rows,
                   const std::optional<Tensor> &int8_weight,
                   const std::optional<Tensor> &int8_scale) {
  auto &linears = find(model).linears;
  linears.push_back({weight, bias, memory, int8_rows, int8_weight, int8_scale});
  return static_cast<int64_t>(linears.size()) - 1;
}

void add_pool(int64_t model, int64_t layer, const Tensor &keys, const Tensor &values) {
  TORCH_CHECK(keys.is_contiguous() && values.is_contiguous());
  find(model).pools[layer] = {keys, values};
}

int64_t load_graph(const std::string &path) {
  auto loaded = std::make_unique<Loader>(path);
  std::lock_guard<std::mutex> lock(mutex);
  graphs[++num_made] = std::move(loaded);
  return num_made;
}

void drop_graph(int64_t graph) {
  std::lock_guard<std::mutex> lock(mutex);
  graphs.erase(graph);
}

Loader &loaded(int64_t graph) {
  std::lock_guard<std::mutex> lock(mutex);
  return *graphs.at(graph);
}

std::vector<std::string> graph_constants(int64_t graph) {
  return loaded(graph).get_constant_fqns();
}

void set_constants(int64_t graph, const c10::Dict<std::string, Tensor> &constants) {
  std::unordered_map<std::string, Tensor> found;
  for (const auto &each : constants) found[each.key()] = each.value();
  loaded(graph).load_constants(found, /*use_inactive=*/false, /*check_full_update=*/true,
                               /*user_managed=*/true);
}

std::vector<Tensor> run_graph(int64_t model, int64_t graph, const std::vector<Tensor> &inputs) {
  Run run{find(model), omp_get_max_threads()};
  const Threads between(inputs.at(0).numel() < MANY_ROWS ? 1 : run.num_threads);
  current = &run;
  auto outputs = loaded(graph).run(inputs);
  current = nullptr;
  return outputs;
}

const Run &running() {
  TORCH_CHECK(current != nullptr, "only graphs may call this");
  return *current;
}

Tensor linear(const Tensor &rows, int64_t index, int64_t out_features) {
  using Options = c10::List<std::optional<at::Scalar>>;
  static const Options none;
  static const auto product =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
          .typed<Tensor(const Tensor &, const Tensor &, const std::optional<Tensor> &,
                        std::string_view, Options, std::optional<std::string_view>)>();
  const Run &run = running();
  const Threads all(run.num_threads);
  const Linear &found = run.model.linears.at(index);
  const int64_t in_features = rows.size(-1);
  auto shape = rows.sizes().vec();
  shape.back() = out_features;
  if (found.int8_weight && rows.numel() <= found.int8_rows * in_features) {
    const Tensor flat = rows.reshape({-1, in_features}).to(at::kBFloat16).contiguous();
    return at::_weight_int8pack_mm(flat, *found.int8_weight, *found.int8_scale)
        .to(rows.scalar_type())
        .view(shape);
  }
  if (found.memory)
    return tandem::multiply(rows, *found.memory, found.bias, out_features, run.num_threads);
  return product.call(rows, found.weight, found.bias, "none", none, "");
}

Tensor write_kv(const Tensor &keys, const Tensor &values, const Tensor &slots, int64_t layer) {
  const Pool &found = running().model.pools.at(layer);
  const int64_t num_heads = keys.size(1), num_tokens = keys.size(2), dim = keys.size(3);
  const int64_t *slot = slots.const_data_ptr<int64_t>();
  TORCH_CHECK(slots.numel() == num_tokens);
  const std::pair<const Tensor *, const Tensor *> writes[] = {{&keys, &found.keys},
                                                              {&values, &found.values}};
  for (const auto &[states, target] : writes) {
    TORCH_CHECK(states->stride(3) == 1 && states->dtype() == target->dtype());
    TORCH_CHECK(target->size(1) == num_heads && target->size(2) == dim);
    const int64_t size = states->element_size();
    const char *from = static_cast<const char *>(states->const_data_ptr());
    char *to = static_cast<char *>(target->mutable_data_ptr());
    for (int64_t t = 0; t < num_tokens; t++)
      for (int64_t h = 0; h < num_heads; h++)
        memcpy(to + (slot[t] * num_heads + h) * dim * size,
               from + (h * states->stride(1) + t * states->stride(2)) * size, dim * size);
  }
  return at::scalar_tensor(layer, at::kLong);
}

// The compiler doesn't see through it, so what it gets is computed once and not in each place that
// reads it.
Tensor once(const Tensor &computed) { return computed.clone(); }

Tensor attend(const Tensor &query, const Tensor &layer, const Tensor &spans, const Tensor &tables,
              double scaling, int64_t window, bool causal) {
  const Run &run = running();
  const Pool &found = run.model.pools.at(*layer.const_data_ptr<int64_t>());
  return tandem::attend(query, found, spans, tables, run.model.block_size, scaling,
                        Sight{window, causal}, run.num_threads);
}

// --- outside of graphs

Tensor multiply(const Tensor &rows, const Tensor &memory, const std::optional<Tensor> &bias,
                int64_t out_features) {
  return tandem::multiply(rows, memory, bias, out_features, omp_get_max_threads());
}

Tensor paged_attention(const Tensor &query, const Tensor &keys, const Tensor &values,
                       const Tensor &spans, const Tensor &tables, int64_t block_size,
                       double scaling, int64_t window, bool causal) {
  return tandem::attend(query, Pool{keys, values}, spans, tables, block_size, scaling,
                        Sight{window, causal}, omp_get_max_threads());
}

// What a graph hands over and gets back.
const Tensor &tensor(AtenTensorHandle handle) {
  return *torch::aot_inductor::tensor_handle_to_tensor_pointer(handle);
}

AtenTensorHandle handle(Tensor &&made) {
  return torch::aot_inductor::new_tensor_handle(std::move(made));
}

}  // namespace

// As graphs call the operators: without torch's dispatcher, which would find them by name each time
// and tell torch's profiler of them.
extern "C" {

AOTITorchError aoti_torch_cpu_linear(AtenTensorHandle rows, int64_t index, int64_t out_features,
                                     AtenTensorHandle *result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    RECORD_FUNCTION("tandem::linear", {});
    *result = handle(linear(tensor(rows), index, out_features));
  });
}

AOTITorchError aoti_torch_cpu_once(AtenTensorHandle computed, AtenTensorHandle *result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({ *result = handle(once(tensor(computed))); });
}

AOTITorchError aoti_torch_cpu_write_kv(AtenTensorHandle keys, AtenTensorHandle values,
                                       AtenTensorHandle slots, int64_t layer,
                                       AtenTensorHandle *result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    RECORD_FUNCTION("tandem::write_kv", {});
    *result = handle(write_kv(tensor(keys), tensor(values), tensor(slots), layer));
  });
}

AOTITorchError aoti_torch_cpu_attend(AtenTensorHandle query, AtenTensorHandle layer,
                                     AtenTensorHandle spans, AtenTensorHandle tables,
                                     double scaling, int64_t window, int32_t causal,
                                     AtenTensorHandle *result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    RECORD_FUNCTION("tandem::attend", {});
    *result = handle(attend(tensor(query), tensor(layer), tensor(spans), tensor(tables), scaling,
                            window, causal));
  });
}
}

TORCH_LIBRARY(tandem, library) {
  library.def("make_model(int block_size) -> int", &make_model);
  library.def("drop_model(int model) -> ()", &drop_model);
  library.def(
      "add_linear(int model, Tensor weight, Tensor? bias, Tensor? memory, int int8_rows, "
      "Tensor? int8_weight, Tensor? int8_scale) -> int",
      &add_linear);
  library.def("add_pool(int model, int layer, Tensor keys, Tensor values) -> ()", &add_pool);
  library.def("load_graph(str path) -> int", &load_graph);
  library.def("drop_graph(int graph) -> ()", &drop_graph);
  library.def("graph_constants(int graph) -> str[]", &graph_constants);
  library.def("set_constants(int graph, Dict(str, Tensor) constants) -> ()", &set_constants);
  library.def("run_graph(int model, int graph, Tensor[] inputs) -> Tensor[]", &run_graph);
  library.def("linear(Tensor rows, int index, int out_features) -> Tensor");
  library.def("once(Tensor computed) -> Tensor");
  library.def("write_kv(Tensor keys, Tensor values, Tensor slots, int layer) -> Tensor");
  library.def(
      "attend(Tensor query, Tensor layer, Tensor spans, Tensor tables, float scaling, int window, "
      "bool causal) -> Tensor");
  library.def("multiply(Tensor rows, Tensor memory, Tensor? bias, int out_features) -> Tensor");
  library.def(
      "paged_attention(Tensor query, Tensor keys, Tensor values, Tensor spans, Tensor tables, "
      "int block_size, float scaling, int window, bool causal) -> Tensor");
}

TORCH_LIBRARY_IMPL(tandem, CPU, library) {
  library.impl("linear", &linear);
  library.impl("once", &once);
  library.impl("write_kv", &write_kv);
  library.impl("attend", &attend);
  library.impl("multiply", &multiply);
  library.impl("paged_attention", &paged_attention);
}
