// Attention of queries over the block pool, on a CPU.
//
// A query's result depends on nothing but its own keys in the order of their positions: neither on
// what else is in the pass, nor on where its blocks lie, nor on the number of threads.

#include <omp.h>

#include "lanes.h"

#define KEYS 4   // that are scored together
#define PARTS 4  // vectors of a value that are summed together

INLINE float largest(Lanes value) {
  float result = value[0];
  for (int i = 1; i < LANES; i++) result = value[i] > result ? value[i] : result;
  return result;
}

// One sequence's keys or values of one head.
typedef struct {
  const Element *pool;
  const int32_t *table;
  int64_t stride;  // elements from one token to the next
  int block_size, first, stop;
} Rows;

// The rows from position `at` to the end of its block; their number is left in `count`.
INLINE const Element *run_of(const Rows *rows, int at, int *count) {
  int offset = at % rows->block_size, left = rows->stop - at;
  *count = rows->block_size - offset < left ? rows->block_size - offset : left;
  return rows->pool + ((int64_t)rows->table[at / rows->block_size] * rows->block_size + offset) *
                          rows->stride;
}

// Adds the products of `count` elements of each key and query.
INLINE void add_products(Lanes sums[KEYS][8], const Element *keys, int64_t stride, int count,
                         const float *query, int padded_dim, const int num_keys,
                         const int num_groups) {
  Lanes key[KEYS];
  for (int k = 0; k < num_keys; k++) key[k] = load_some(keys + k * stride, count);
  for (int g = 0; g < num_groups; g++) {
    Lanes q;
    memcpy(&q, query + g * padded_dim, sizeof q);
    for (int k = 0; k < num_keys; k++) sums[k][g] += key[k] * q;
  }
}

INLINE void score_keys(const Element *keys, int64_t stride, int dim, const float *query,
                       int padded_dim, float *scores, int64_t scores_stride, const int num_keys,
                       const int num_groups) {
  Lanes sums[KEYS][8] = {{{0}}};
  int d = 0;
  for (; d + LANES <= dim; d += LANES)
    add_products(sums, keys + d, stride, LANES, query + d, padded_dim, num_keys, num_groups);
  if (d < dim)
    add_products(sums, keys + d, stride, dim - d, query + d, padded_dim, num_keys, num_groups);
  for (int g = 0; g < num_groups; g++)
    for (int k = 0; k < num_keys; k++) scores[g * scores_stride + k] = sum(sums[k][g]);
}

// Scores of all keys, one row for each query head.
INLINE void score(const Rows *keys, int dim, const float *query, int padded_dim, float *scores,
                  int64_t scores_stride, const int num_groups) {
  int count;
  for (int at = keys->first; at < keys->stop; at += count) {
    const Element *run = run_of(keys, at, &count);
    float *to = scores + at - keys->first;
    int k = 0;
    for (; k + KEYS <= count; k += KEYS)
      score_keys(run + k * keys->stride, keys->stride, dim, query, padded_dim, to + k,
                 scores_stride, KEYS, num_groups);
    for (; k < count; k++)
      score_keys(run + k * keys->stride, keys->stride, dim, query, padded_dim, to + k,
                 scores_stride, 1, num_groups);
  }
}

// Scores to weights; the inverse of each row's sum is left in `scales`.
INLINE void soften(float *scores, int64_t scores_stride, int num_keys, float *scales,
                   int num_groups) {
  for (int g = 0; g < num_groups; g++) {
    float *row = scores + g * scores_stride;
    int padded = (num_keys + LANES - 1) / LANES * LANES;
    for (int t = num_keys; t < padded; t++) row[t] = -1e30f;
    Lanes most, total = {0};
    memcpy(&most, row, sizeof most);
    for (int t = LANES; t < padded; t += LANES) {
      Lanes value;
      memcpy(&value, row + t, sizeof value);
      Ints more = value > most;
      most = (Lanes)(((Ints)value & more) | ((Ints)most & ~more));
    }
    float highest = largest(most);
    for (int t = 0; t < padded; t += LANES) {
      Lanes value;
      memcpy(&value, row + t, sizeof value);
      value = exponential(value - highest);
      total += value;
      memcpy(row + t, &value, sizeof value);
    }
    scales[g] = 1.0f / sum(total);
  }
}

INLINE void weigh_part(const Rows *values, int d, const int num_parts, int rest,
                       const float *weights, int64_t weights_stride, const float *scales,
                       Element *output, int dim, const int num_groups) {
  Lanes sums[8][PARTS] = {{{0}}};
  int count;
  for (int at = values->first; at < values->stop; at += count) {
    const Element *run = run_of(values, at, &count) + d;
    const float *weight = weights + at - values->first;
    for (int t = 0; t < count; t++) {
      Lanes value[PARTS];
      for (int p = 0; p < num_parts; p++)
        value[p] = load_some(run + t * values->stride + p * LANES, rest);
      for (int g = 0; g < num_groups; g++)
        for (int p = 0; p < num_parts; p++)
          sums[g][p] += value[p] * weight[g * weights_stride + t];
    }
  }
  for (int g = 0; g < num_groups; g++)
    for (int p = 0; p < num_parts; p++)
      store_some(output + g * dim + d + p * LANES, sums[g][p] * scales[g], rest);
}

INLINE void weigh(const Rows *values, int dim, const float *weights, int64_t weights_stride,
                  const float *scales, Element *output, const int num_groups) {
  int d = 0;
  for (; d + PARTS * LANES <= dim; d += PARTS * LANES)
    weigh_part(values, d, PARTS, LANES, weights, weights_stride, scales, output, dim, num_groups);
  for (; d < dim; d += LANES)
    weigh_part(values, d, 1, dim - d < LANES ? dim - d : LANES, weights, weights_stride, scales,
               output, dim, num_groups);
}

// `num_groups` query heads of one token over one KV head.
INLINE void attend(const Element *query, int64_t head_stride, Element *output, Rows keys,
                   Rows values, int dim, float scaling, float *scratch, int64_t scores_stride,
                   const int num_groups) {
  int padded_dim = (dim + LANES - 1) / LANES * LANES;
  float *scaled = scratch, *scores = scratch + num_groups * padded_dim, scales[8];
  for (int g = 0; g < num_groups; g++)
    for (int d = 0; d < padded_dim; d += LANES) {
      Lanes q = load_some(query + g * head_stride + d, dim - d < LANES ? dim - d : LANES) * scaling;
      memcpy(scaled + g * padded_dim + d, &q, sizeof q);
    }
  score(&keys, dim, scaled, padded_dim, scores, scores_stride, num_groups);
  soften(scores, scores_stride, keys.stop - keys.first, scales, num_groups);
  weigh(&values, dim, scores, scores_stride, scales, output, num_groups);
}

// Queries: for each, its token's row, where its block table begins, its first key, and the end.
typedef struct {
  int32_t row, table, first, stop;
} Query;

// query: [num_heads, num_tokens, dim] with strides; keys, values: [num_slots, num_kv_heads, dim];
// output: [num_tokens, num_heads, dim]; scratch: [num_threads, scratch_size], with a row of
// `scores_stride` and a query of `dim`, rounded up to LANES, for each of up to 8 heads.
void paged_attention(const Element *query, int64_t head_stride, int64_t token_stride,
                     const Element *keys, const Element *values, Element *output,
                     const int32_t *tables, const Query *queries, int num_queries, int num_heads,
                     int num_kv_heads, int dim, int block_size, float scaling, float *scratch,
                     int64_t scratch_size, int64_t scores_stride, int num_threads) {
  int groups = num_heads / num_kv_heads;
  int together = groups % 8 == 0 ? 8 : groups % 4 == 0 ? 4 : groups % 2 == 0 ? 2 : 1;
  int parts = num_heads / together, num_tasks = num_queries * parts;
#pragma omp parallel for num_threads(num_threads) schedule(dynamic) if (num_tasks > 1)
  for (int task = 0; task < num_tasks; task++) {
    const Query *q = queries + task / parts;
    int head = task % parts * together;
    int64_t offset = (int64_t)(head / groups) * dim, stride = (int64_t)num_kv_heads * dim;
    const Element *from = query + head * head_stride + q->row * token_stride;
    Element *to = output + ((int64_t)q->row * num_heads + head) * dim;
    Rows k = {keys + offset, tables + q->table, stride, block_size, q->first, q->stop}, v = k;
    v.pool = values + offset;
    float *own = scratch + omp_get_thread_num() * scratch_size;
#define ATTEND(n) attend(from, head_stride, to, k, v, dim, scaling, own, scores_stride, n)
    switch (together) {
      case 8: ATTEND(8); break;
      case 4: ATTEND(4); break;
      case 2: ATTEND(2); break;
      default: ATTEND(1);
    }
  }
}
