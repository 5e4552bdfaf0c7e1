// Attention over the block pool, on a CPU.
//
// Keys are read in tiles that begin at multiples of `TILE` of their positions, and a query's weights
// are corrected from tile to tile. Sums go over the tiles in order, over the elements of a tile in
// order, and keys that a query doesn't see add zeros: so its result depends, to the last bit, on
// nothing but its own keys, neither on what else is in the pass nor on where its blocks lie.
//
// Source: Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
// 2022.

#include "operators.h"

#include <ATen/native/CPUBlas.h>
#include <omp.h>

#include <algorithm>
#include <vector>

#include "lanes.h"

namespace tandem {
namespace {

using at::native::cpublas::brgemm;

// Keys of a tile, and rows of queries that read it together: one for each token and head.
constexpr int64_t TILE = 64, MAX_ROWS = 128;
constexpr float HIDDEN = -1e30f;

int64_t rounded_up(int64_t number) { return (number + LANES - 1) / LANES * LANES; }

Lanes load(const float *from) {
  Lanes value;
  memcpy(&value, from, sizeof value);
  return value;
}

void store(float *to, Lanes value) { memcpy(to, &value, sizeof value); }

void store(at::BFloat16 *to, Lanes value) {
  const Halves result = to_bfloat16(value);
  memcpy(to, &result, sizeof result);
}

float largest(Lanes value) {
  float result = value[0];
  for (int i = 1; i < LANES; i++) result = value[i] > result ? value[i] : result;
  return result;
}

// 16 rows of 16 words to 16 columns.
template <int STEP>
INLINE void exchange(Lanes *rows) {
  Ints low, high;
  for (int i = 0; i < LANES; i++) {
    low[i] = i & STEP ? LANES + i - STEP : i;
    high[i] = i & STEP ? LANES + i : i + STEP;
  }
  for (int i = 0; i < LANES; i++) {
    if (i & STEP) continue;
    const Lanes first = rows[i], second = rows[i + STEP];
    rows[i] = __builtin_shuffle(first, second, low);
    rows[i + STEP] = __builtin_shuffle(first, second, high);
  }
}

// [num_rows, num_columns] words of 32 bits to [num_columns, num_rows].
void transpose(const float *from, int64_t stride, int64_t num_rows, int64_t num_columns, float *to,
               int64_t to_stride) {
  for (int64_t r = 0; r < num_rows; r += LANES)
    for (int64_t c = 0; c < num_columns; c += LANES) {
      if (r + LANES <= num_rows && c + LANES <= num_columns) {
        Lanes block[LANES];
        for (int i = 0; i < LANES; i++) block[i] = load(from + (r + i) * stride + c);
        exchange<8>(block);
        exchange<4>(block);
        exchange<2>(block);
        exchange<1>(block);
        for (int i = 0; i < LANES; i++) store(to + (c + i) * to_stride + r, block[i]);
        continue;
      }
      for (int64_t i = r; i < std::min(r + LANES, num_rows); i++)
        for (int64_t j = c; j < std::min(c + LANES, num_columns); j++)
          memcpy(to + j * to_stride + i, from + i * stride + j, sizeof(float));
    }
}

// What is multiplied: bfloat16 where the processor has products of it, else float32.
template <typename Factor>
constexpr int64_t PAIR = sizeof(float) / sizeof(Factor);

// `count` elements.
template <typename Element, typename Factor>
void convert(const Element *from, int64_t count, Factor *to) {
  if constexpr (std::is_same_v<Element, Factor>)
    memcpy(to, from, count * sizeof(Factor));
  else
    for (int64_t i = 0; i < count; i++) to[i] = static_cast<Factor>(from[i]);
}

// Rows of one KV head, by the positions of their tokens.
template <typename Element>
struct Rows {
  const Element *pool;
  const int32_t *table;
  int64_t stride, block_size;

  const Element *at(int64_t position) const {
    return pool + (table[position / block_size] * block_size + position % block_size) * stride;
  }

  // The end of the blocks that lie one behind the other from `position` on, or `stop`.
  int64_t end_of_run(int64_t position, int64_t stop) const {
    int64_t block = position / block_size;
    while ((block + 1) * block_size < stop && table[block + 1] == table[block] + 1) block++;
    return std::min(stop, (block + 1) * block_size);
  }
};

// Some queries of one sequence, and the KV head that they read.
struct Task {
  const Span *span;
  int64_t start, count, kv_head;
};

template <typename Element, typename Factor>
class Attention {
 public:
  Attention(const Tensor &query, const Pool &pool, Tensor &output, const int32_t *tables,
            int64_t block_size, double scaling, const Sight &sight)
      : from_(query.const_data_ptr<Element>()),
        head_stride_(query.stride(1)),
        token_stride_(query.stride(2)),
        keys_(pool.keys.const_data_ptr<Element>()),
        values_(pool.values.const_data_ptr<Element>()),
        to_(output.mutable_data_ptr<Element>()),
        tables_(tables),
        block_size_(block_size),
        scaling_(static_cast<float>(scaling)),
        sight_(sight),
        num_heads_(query.size(1)),
        num_kv_heads_(pool.keys.size(1)),
        dim_(query.size(3)),
        groups_(num_heads_ / num_kv_heads_) {}

  void run(const Span *spans, int64_t num_spans, int num_threads) {
    const int64_t at_once = std::max<int64_t>(1, MAX_ROWS / groups_);
    std::vector<Task> tasks;
    int64_t num_products = 0;
    for (const Span *span = spans; span < spans + num_spans; span++)
      for (int64_t start = 0; start < span->num_queries; start += at_once)
        for (int64_t head = 0; head < num_kv_heads_; head++)
          tasks.push_back({span, start, std::min(at_once, span->num_queries - start), head});
    for (const Task &task : tasks)
      num_products += task.count * groups_ * task.span->kv_len * dim_;
    const auto num_tasks = static_cast<int64_t>(tasks.size());
    const bool is_shared = num_tasks > 1 && num_products >= MIN_SHARED;
#pragma omp parallel num_threads(num_threads) if (is_shared)
    {
      // The last queries of a prompt see the most keys.
#pragma omp for schedule(dynamic) nowait
      for (int64_t i = num_tasks - 1; i >= 0; i--) attend(tasks[i]);
      at::native::cpublas::brgemm_release(PAIR<Factor> > 1);
    }
  }

 private:
  // What one thread needs.
  struct Scratch {
    std::vector<Factor> rows, queries, keys, values, weights;
    std::vector<float> scores, by_query, sums, most, results;

    void resize(int64_t num_rows, int64_t padded, int64_t dim) {
      rows.resize(num_rows * dim);
      queries.assign(padded * dim, Factor(0));
      keys.resize(TILE * dim);
      values.resize(TILE * dim);
      weights.resize(num_rows * TILE);
      scores.resize(TILE * padded);
      by_query.resize(padded * TILE);
      sums.assign(num_rows * LANES, 0.0f);
      most.assign(num_rows, HIDDEN);
      results.assign(num_rows * dim, 0.0f);
    }
  };

  int64_t stop_of(const Task &task, int64_t query) const {
    const Span &span = *task.span;
    return sight_.causal ? span.kv_len - span.num_queries + task.start + query + 1 : span.kv_len;
  }

  void attend(const Task &task) const {
    thread_local Scratch own;
    const int64_t num_rows = task.count * groups_, padded = rounded_up(num_rows);
    own.resize(num_rows, padded, dim_);
    read_queries(task, own, num_rows, padded);
    const int64_t stop = stop_of(task, task.count - 1);
    const int64_t first = sight_.first_key(stop_of(task, 0)), offset = task.kv_head * dim_;
    const int32_t *table = tables_ + task.span->table;
    const Rows<Element> keys{keys_ + offset, table, num_kv_heads_ * dim_, block_size_};
    const Rows<Element> values{values_ + offset, table, num_kv_heads_ * dim_, block_size_};
    for (int64_t tile = first / TILE * TILE; tile < stop; tile += TILE) {
      // Blocks that no query sees may be another's.
      const int64_t from = std::max(tile, first / block_size_ * block_size_);
      const int64_t to = std::min(tile + TILE, stop);
      score(keys, own, tile, from, to, padded);
      for (int64_t row = 0; row < num_rows; row++) {
        const int64_t last = stop_of(task, row / groups_);
        soften(own, row, sight_.first_key(last) - tile, last - tile);
      }
      read_values(values, own, tile, from, to);
      brgemm(num_rows, dim_, TILE, TILE, dim_, dim_, true, own.weights.data(), own.values.data(),
             own.results.data(), PAIR<Factor> > 1);
    }
    write(task, own, num_rows);
  }

  // Queries as columns, in pairs of elements where a product takes two at once.
  void read_queries(const Task &task, Scratch &own, int64_t num_rows, int64_t padded) const {
    for (int64_t row = 0; row < num_rows; row++) {
      const int64_t head = task.kv_head * groups_ + row % groups_;
      const int64_t token = task.span->row + task.start + row / groups_;
      convert(from_ + head * head_stride_ + token * token_stride_, dim_,
              own.rows.data() + row * dim_);
    }
    const int64_t words = dim_ / PAIR<Factor>;
    transpose(reinterpret_cast<const float *>(own.rows.data()), words, num_rows, words,
              reinterpret_cast<float *>(own.queries.data()), padded);
  }

  // The scores of a tile's keys from `from` to `to`, a row for each query; others are anything.
  void score(const Rows<Element> &keys, Scratch &own, int64_t tile, int64_t from, int64_t to,
             int64_t padded) const {
    const int64_t block_end = (to + block_size_ - 1) / block_size_ * block_size_;
    const int64_t stop = std::min(tile + TILE, block_end);
    for (int64_t at = from, end; at < to; at = end) {
      end = keys.end_of_run(at, stop);
      float *scores = own.scores.data() + (at - tile) * padded;
      if constexpr (std::is_same_v<Element, Factor>) {
        brgemm(end - at, padded, dim_, keys.stride, padded, padded, false, keys.at(at),
               own.queries.data(), scores, PAIR<Factor> > 1);
      } else {
        for (int64_t i = at; i < end; i++)
          convert(keys.at(i), dim_, own.keys.data() + (i - at) * dim_);
        brgemm(end - at, padded, dim_, dim_, padded, padded, false, own.keys.data(),
               own.queries.data(), scores, PAIR<Factor> > 1);
      }
    }
    transpose(own.scores.data(), padded, TILE, padded, own.by_query.data(), TILE);
  }

  // Scores to weights; the query sees those from `first` to `last` of the tile.
  void soften(Scratch &own, int64_t row, int64_t first, int64_t last) const {
    Factor *weights = own.weights.data() + row * TILE;
    first = std::max<int64_t>(first, 0), last = std::min(last, TILE);
    if (first >= last) {
      std::fill(weights, weights + TILE, Factor(0));
      return;
    }
    float *scores = own.by_query.data() + row * TILE;
    std::fill(scores, scores + first, HIDDEN);
    std::fill(scores + last, scores + TILE, HIDDEN);
    Lanes parts[TILE / LANES];
    for (int64_t i = 0; i < TILE / LANES; i++) parts[i] = load(scores + i * LANES) * scaling_;
    Lanes most = parts[0];
    for (int64_t i = 1; i < TILE / LANES; i++) {
      const Ints more = parts[i] > most;
      most = (Lanes)(((Ints)parts[i] & more) | ((Ints)most & ~more));
    }
    const float before = own.most[row], highest = std::max(before, largest(most));
    float *sums = own.sums.data() + row * LANES;
    Lanes total = load(sums);
    if (highest != before) {
      const float share = exponential(Lanes{} + (before - highest))[0];
      total *= share;
      float *results = own.results.data() + row * dim_;
      for (int64_t d = 0; d < dim_; d++) results[d] *= share;
      own.most[row] = highest;
    }
    for (int64_t i = 0; i < TILE / LANES; i++) {
      const Lanes weight = exponential(parts[i] - highest);
      total += weight;
      store(weights + i * LANES, weight);
    }
    store(sums, total);
  }

  // Values of a tile, and zeros where none are read: a weight of 0 doesn't hide what is no number.
  void read_values(const Rows<Element> &values, Scratch &own, int64_t tile, int64_t from,
                   int64_t to) const {
    Factor *packed = own.values.data();
    for (int64_t at = tile; at < tile + TILE; at += PAIR<Factor>) {
      Factor *row = packed + (at - tile) * dim_;
      if constexpr (PAIR<Factor> == 1) {
        if (at >= from && at < to)
          convert(values.at(at), dim_, row);
        else
          std::fill(row, row + dim_, Factor(0));
      } else {
        const bool has_first = at >= from && at < to, has_second = at + 1 >= from && at + 1 < to;
        const auto *first = reinterpret_cast<const uint16_t *>(has_first ? values.at(at) : nullptr);
        const auto *second =
            reinterpret_cast<const uint16_t *>(has_second ? values.at(at + 1) : nullptr);
        auto *words = reinterpret_cast<uint32_t *>(row);
        if (has_first && has_second)
          for (int64_t d = 0; d < dim_; d++) words[d] = first[d] | uint32_t(second[d]) << 16;
        else
          for (int64_t d = 0; d < dim_; d++)
            words[d] = (has_first ? first[d] : 0) | (has_second ? uint32_t(second[d]) << 16 : 0);
      }
    }
  }

  void write(const Task &task, const Scratch &own, int64_t num_rows) const {
    for (int64_t row = 0; row < num_rows; row++) {
      const float share = 1.0f / sum(load(own.sums.data() + row * LANES));
      const int64_t head = task.kv_head * groups_ + row % groups_;
      const int64_t token = task.span->row + task.start + row / groups_;
      Element *to = to_ + (token * num_heads_ + head) * dim_;
      const float *results = own.results.data() + row * dim_;
      for (int64_t d = 0; d < dim_; d++) to[d] = static_cast<Element>(results[d] * share);
    }
  }

  const Element *from_;
  int64_t head_stride_, token_stride_;
  const Element *keys_, *values_;
  Element *to_;
  const int32_t *tables_;
  int64_t block_size_;
  float scaling_;
  Sight sight_;
  int64_t num_heads_, num_kv_heads_, dim_, groups_;
};

template <typename Element, typename Factor>
void run(const Tensor &query, const Pool &pool, Tensor &output, const Tensor &spans,
         const Tensor &tables, int64_t block_size, double scaling, const Sight &sight,
         int num_threads) {
  Attention<Element, Factor>(query, pool, output, tables.const_data_ptr<int32_t>(), block_size,
                             scaling, sight)
      .run(reinterpret_cast<const Span *>(spans.const_data_ptr<int32_t>()), spans.size(0),
           num_threads);
}

}  // namespace

Tensor attend(const Tensor &query, const Pool &pool, const Tensor &spans, const Tensor &tables,
              int64_t block_size, double scaling, const Sight &sight, int num_threads) {
  const int64_t num_heads = query.size(1), num_tokens = query.size(2), dim = query.size(3);
  TORCH_CHECK(query.stride(3) == 1 && query.dtype() == pool.keys.dtype());
  TORCH_CHECK(pool.keys.is_contiguous() && pool.values.is_contiguous());
  TORCH_CHECK(dim == pool.keys.size(2) && num_heads % pool.keys.size(1) == 0);
  Tensor output = at::empty({1, num_tokens, num_heads, dim}, query.options());
  const auto compute = [&](auto element, auto factor) {
    run<decltype(element), decltype(factor)>(query, pool, output, spans, tables, block_size,
                                             scaling, sight, num_threads);
  };
  switch (query.scalar_type()) {
    case at::kFloat: compute(float(), float()); break;
    case at::kHalf: compute(at::Half(), float()); break;
    case at::kBFloat16:
      if (dim % 2 == 0 && has_bfloat16_products())
        compute(at::BFloat16(), at::BFloat16());
      else
        compute(at::BFloat16(), float());
      break;
    default: TORCH_CHECK(false, "no attention for ", query.scalar_type());
  }
  return output;
}

}  // namespace tandem
