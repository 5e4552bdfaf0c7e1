// The parts of a model's pass that a compiled graph leaves to others: products with packed weights,
// and what touches the block pool.
//
// A graph can hold neither packed weights nor the pool. So it names them by number, and whoever runs
// it says whose they are. It runs from here because an operator, unlike torch's own loader, lets
// Python's other threads go on meanwhile.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/library.h>

#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace {

using at::Tensor;
using Loader = torch::inductor::AOTIModelPackageLoader;

// `paged_attention` in attention.c.
using Attention = void (*)(const void *, int64_t, int64_t, const void *, const void *, void *,
                           const int32_t *, const int32_t *, int, int, int, int, int, float,
                           float *, int64_t, int64_t, int);

constexpr int64_t LANES = 16, MAX_GROUPS = 8;

struct Linear {
  Tensor weight;  // packed
  std::optional<Tensor> bias;
  // For the product of up to so many rows: weights in 8 bits, and one scale a row of them.
  int64_t int8_rows;
  std::optional<Tensor> int8_weight, int8_scale;
};

struct Pool {
  Tensor keys, values;  // [num_slots, num_kv_heads, head_dim]
};

struct Model {
  Attention attention;
  int64_t block_size;
  std::vector<Linear> linears;
  std::map<int64_t, Pool> pools;  // by layer
};

std::mutex mutex;
std::map<int64_t, std::unique_ptr<Model>> models;
std::map<int64_t, std::unique_ptr<Loader>> graphs;
int64_t num_made = 0;
thread_local Model *current = nullptr;

int64_t rounded_up(int64_t number) { return (number + LANES - 1) / LANES * LANES; }

Model &find(int64_t model) {
  std::lock_guard<std::mutex> lock(mutex);
  return *models.at(model);
}

int64_t make_model(int64_t attention, int64_t block_size) {
  std::lock_guard<std::mutex> lock(mutex);
  auto made = std::make_unique<Model>();
  made->attention = reinterpret_cast<Attention>(attention);
  made->block_size = block_size;
  models[++num_made] = std::move(made);
  return num_made;
}

void drop_model(int64_t model) {
  std::lock_guard<std::mutex> lock(mutex);
  models.erase(model);
}

int64_t add_linear(int64_t model, const Tensor &weight, const std::optional<Tensor> &bias,
                   int64_t int8_rows, const std::optional<Tensor> &int8_weight,
                   const std::optional<Tensor> &int8_scale) {
  auto &linears = find(model).linears;
  linears.push_back({weight, bias, int8_rows, int8_weight, int8_scale});
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
  current = &find(model);
  auto outputs = loaded(graph).run(inputs);
  current = nullptr;
  return outputs;
}

Model &running() {
  TORCH_CHECK(current != nullptr, "only graphs may call this");
  return *current;
}

Tensor linear(const Tensor &rows, int64_t index, int64_t out_features) {
  using Options = c10::List<std::optional<at::Scalar>>;
  static const auto product =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
          .typed<Tensor(const Tensor &, const Tensor &, const std::optional<Tensor> &,
                        std::string_view, Options, std::optional<std::string_view>)>();
  const Linear &found = running().linears.at(index);
  if (found.int8_weight && rows.numel() <= found.int8_rows * rows.size(-1)) {
    const Tensor flat = rows.reshape({-1, rows.size(-1)}).to(at::kBFloat16).contiguous();
    auto shape = rows.sizes().vec();
    shape.back() = out_features;
    return at::_weight_int8pack_mm(flat, *found.int8_weight, *found.int8_scale)
        .to(rows.scalar_type())
        .view(shape);
  }
  return product.call(rows, found.weight, found.bias, "none", Options(), "");
}

Tensor write_kv(const Tensor &keys, const Tensor &values, const Tensor &slots, int64_t layer) {
  const Pool &found = running().pools.at(layer);
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

Tensor attend(const Tensor &query, const Tensor &layer, const Tensor &queries, const Tensor &tables,
              double scaling) {
  const Model &model = running();
  const Pool &found = model.pools.at(*layer.const_data_ptr<int64_t>());
  const int64_t num_heads = query.size(1), num_tokens = query.size(2), dim = query.size(3);
  const int num_queries = static_cast<int>(queries.size(0)), num_threads = at::get_num_threads();
  const int32_t *spans = queries.const_data_ptr<int32_t>();
  int64_t num_keys = 0;
  for (int i = 0; i < num_queries; i++)
    num_keys = std::max<int64_t>(num_keys, spans[4 * i + 3] - spans[4 * i + 2]);
  const int64_t row = rounded_up(num_keys), own = MAX_GROUPS * (row + rounded_up(dim));
  Tensor scratch = at::empty({num_threads * own}, at::kFloat);
  Tensor output = at::empty({1, num_tokens, num_heads, dim}, query.options());
  TORCH_CHECK(query.stride(3) == 1 && query.dtype() == found.keys.dtype());
  TORCH_CHECK(dim == found.keys.size(2) && num_heads % found.keys.size(1) == 0);
  TORCH_CHECK(num_heads / found.keys.size(1) <= MAX_GROUPS);
  model.attention(query.const_data_ptr(), query.stride(1), query.stride(2),
                  found.keys.const_data_ptr(), found.values.const_data_ptr(),
                  output.mutable_data_ptr(), tables.const_data_ptr<int32_t>(), spans, num_queries,
                  static_cast<int>(num_heads), static_cast<int>(found.keys.size(1)),
                  static_cast<int>(dim), static_cast<int>(model.block_size),
                  static_cast<float>(scaling), scratch.mutable_data_ptr<float>(), own, row,
                  num_threads);
  return output;
}

}  // namespace

TORCH_LIBRARY(tandem, library) {
  library.def("make_model(int attention, int block_size) -> int", &make_model);
  library.def("drop_model(int model) -> ()", &drop_model);
  library.def(
      "add_linear(int model, Tensor weight, Tensor? bias, int int8_rows, Tensor? int8_weight, "
      "Tensor? int8_scale) -> int",
      &add_linear);
  library.def("add_pool(int model, int layer, Tensor keys, Tensor values) -> ()", &add_pool);
  library.def("load_graph(str path) -> int", &load_graph);
  library.def("drop_graph(int graph) -> ()", &drop_graph);
  library.def("graph_constants(int graph) -> str[]", &graph_constants);
  library.def("set_constants(int graph, Dict(str, Tensor) constants) -> ()", &set_constants);
  library.def("run_graph(int model, int graph, Tensor[] inputs) -> Tensor[]", &run_graph);
  library.def("linear(Tensor rows, int index, int out_features) -> Tensor");
  library.def("write_kv(Tensor keys, Tensor values, Tensor slots, int layer) -> Tensor");
  library.def(
      "attend(Tensor query, Tensor layer, Tensor queries, Tensor tables, float scaling) -> Tensor");
}

TORCH_LIBRARY_IMPL(tandem, CPU, library) {
  library.impl("linear", &linear);
  library.impl("write_kv", &write_kv);
  library.impl("attend", &attend);
}
