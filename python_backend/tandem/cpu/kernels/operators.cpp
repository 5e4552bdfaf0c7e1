// The parts of a model's pass that a compiled graph leaves to others: products with packed weights,
// and what touches the block pool.
//
// A graph can hold neither packed weights nor the pool. So it names them by number, and whoever runs
// it says whose they are. It runs from here because an operator, unlike torch's own loader, lets
// Python's other threads go on meanwhile.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
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

constexpr int64_t LANES = 16, MAX_GROUPS = 8, QUERIES_AT_ONCE = 128, MANY_ROWS = 8;

struct Linear {
  Tensor weight;  // packed
  std::optional<Tensor> bias;
  int64_t tile;  // rows of each product, which are filled up; 0 for any number
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
                   int64_t tile, int64_t int8_rows, const std::optional<Tensor> &int8_weight,
                   const std::optional<Tensor> &int8_scale) {
  auto &linears = find(model).linears;
  linears.push_back({weight, bias, tile, int8_rows, int8_weight, int8_scale});
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
  const auto multiply = [&](const Tensor &part) {
    return product.call(part, found.weight, found.bias, "none", none, "");
  };
  if (found.tile == 0) return multiply(rows);
  const Tensor flat = rows.reshape({-1, in_features});
  const int64_t count = flat.size(0), filled = (count + found.tile - 1) / found.tile * found.tile;
  std::vector<Tensor> parts;
  for (const Tensor &part : at::pad(flat, {0, 0, 0, filled - count}).split(found.tile))
    parts.push_back(multiply(part));
  return at::cat(parts).slice(0, 0, count).view(shape);
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

// A sequence's part of a packed row, as `PackedBatch.spans` writes it.
struct Span {
  int32_t row, num_queries, kv_len, table, by_products;
};

// What the kernel takes of a query.
struct Query {
  int32_t row, table, first, stop;
};

// Which keys a query sees that may see those before `stop`.
struct Sight {
  int64_t window;  // 0 for all
  bool causal;

  int64_t first_key(int64_t stop) const {
    if (window == 0) return 0;
    // transformers' bidirectional window includes both ends.
    return std::max<int64_t>(0, causal ? stop - window : stop - window - 1);
  }

  // [num_queries, stop - first], for queries that are the last tokens before `stop`.
  Tensor mask(int64_t num_queries, int64_t first, int64_t stop) const {
    const int64_t num_keys = stop - first;
    Tensor mask = at::full({num_queries, num_keys}, -INFINITY, at::kFloat);
    float *row = mask.mutable_data_ptr<float>();
    for (int64_t end = stop - num_queries + 1; end <= stop; end++, row += num_keys)
      std::fill(row + std::max<int64_t>(0, first_key(end) - first), row + end - first, 0.0f);
    return mask;
  }
};

// Tokens `first` to `stop` of a sequence, [num_tokens, num_kv_heads, head_dim]: a view of the pool
// where its blocks lie one behind the other.
Tensor read(const Tensor &pool, const int32_t *table, int64_t block_size, int64_t first,
            int64_t stop) {
  std::vector<std::pair<int64_t, int64_t>> runs;
  for (int64_t at = first, end; at < stop; at = end) {
    const int64_t slot = table[at / block_size] * block_size + at % block_size;
    end = std::min(stop, (at / block_size + 1) * block_size);
    if (!runs.empty() && runs.back().second == slot)
      runs.back().second += end - at;
    else
      runs.push_back({slot, slot + end - at});
  }
  std::vector<Tensor> parts;
  for (const auto &[start, end] : runs) parts.push_back(pool.slice(0, start, end));
  return parts.size() == 1 ? parts[0] : at::cat(parts);
}

// Attention of many queries by matrix products, some at a time: their scores stay in the caches,
// and keys behind the last of them are left out instead of being masked.
void attend_by_products(const Tensor &query, const Pool &pool, Tensor &output, const Span &span,
                        const int32_t *table, int64_t block_size, double scaling,
                        const Sight &sight) {
  const int64_t num_heads = query.size(1), dim = query.size(3), num_kv_heads = pool.keys.size(1);
  TORCH_CHECK(sight.causal, "many queries are those of a prompt");
  for (int64_t start = 0; start < span.num_queries; start += QUERIES_AT_ONCE) {
    const int64_t count = std::min(QUERIES_AT_ONCE, span.num_queries - start);
    const int64_t stop = span.kv_len - span.num_queries + start + count;
    const int64_t first = sight.first_key(stop - count + 1), row = span.row + start;
    const Tensor keys = read(pool.keys, table, block_size, first, stop);
    const Tensor values = read(pool.values, table, block_size, first, stop);
    // The query heads that share a KV head become rows of one product.
    const Tensor grouped =
        query[0].slice(1, row, row + count).reshape({num_kv_heads, -1, dim});
    Tensor scores = at::matmul(grouped, keys.permute({1, 2, 0})).to(at::kFloat).mul_(scaling);
    scores.view({num_heads, count, -1}).add_(sight.mask(count, first, stop));
    const Tensor attended =
        at::matmul(scores.softmax(-1).to(query.scalar_type()), values.transpose(0, 1));
    output[0].slice(0, row, row + count).copy_(
        attended.view({num_heads, count, dim}).transpose(0, 1));
  }
}

Tensor attend(const Tensor &query, const Tensor &layer, const Tensor &spans, const Tensor &tables,
              double scaling, int64_t window, bool causal) {
  const Run &run = running();
  const Threads all(run.num_threads);
  const Model &model = run.model;
  const Pool &found = model.pools.at(*layer.const_data_ptr<int64_t>());
  const int64_t num_heads = query.size(1), num_tokens = query.size(2), dim = query.size(3);
  TORCH_CHECK(query.stride(3) == 1 && query.dtype() == found.keys.dtype());
  TORCH_CHECK(dim == found.keys.size(2) && num_heads % found.keys.size(1) == 0);
  TORCH_CHECK(num_heads / found.keys.size(1) <= MAX_GROUPS);
  Tensor output = at::empty({1, num_tokens, num_heads, dim}, query.options());
  const Sight sight{window, causal};
  const int32_t *table = tables.const_data_ptr<int32_t>();
  const Span *span = reinterpret_cast<const Span *>(spans.const_data_ptr<int32_t>());
  std::vector<Query> queries;
  int64_t num_keys = 0;
  for (const Span *end = span + spans.size(0); span < end; span++) {
    if (span->by_products) {
      attend_by_products(query, found, output, *span, table + span->table, model.block_size,
                         scaling, sight);
      continue;
    }
    for (int32_t i = 0; i < span->num_queries; i++) {
      const int32_t stop = causal ? span->kv_len - span->num_queries + i + 1 : span->kv_len;
      const auto first = static_cast<int32_t>(sight.first_key(stop));
      queries.push_back({span->row + i, span->table, first, stop});
      num_keys = std::max<int64_t>(num_keys, stop - first);
    }
  }
  const int64_t row = rounded_up(num_keys), own = MAX_GROUPS * (row + rounded_up(dim));
  Tensor scratch = at::empty({run.num_threads * own}, at::kFloat);
  model.attention(query.const_data_ptr(), query.stride(1), query.stride(2),
                  found.keys.const_data_ptr(), found.values.const_data_ptr(),
                  output.mutable_data_ptr(), table, &queries.data()->row,
                  static_cast<int>(queries.size()), static_cast<int>(num_heads),
                  static_cast<int>(found.keys.size(1)), static_cast<int>(dim),
                  static_cast<int>(model.block_size), static_cast<float>(scaling),
                  scratch.mutable_data_ptr<float>(), own, row, run.num_threads);
  return output;
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
  library.def("make_model(int attention, int block_size) -> int", &make_model);
  library.def("drop_model(int model) -> ()", &drop_model);
  library.def(
      "add_linear(int model, Tensor weight, Tensor? bias, int tile, int int8_rows, "
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
}

TORCH_LIBRARY_IMPL(tandem, CPU, library) {
  library.impl("linear", &linear);
  library.impl("once", &once);
  library.impl("write_kv", &write_kv);
  library.impl("attend", &attend);
}
