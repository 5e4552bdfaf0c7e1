// The likeliest token behind each hidden state, without reading the output head in full.
//
// Weights are read in 8 bits, and multiplied with the upper 8 of a state's 16 bits. What that can be
// wrong by is bounded (Cauchy and Schwarz: the norm of what was rounded off times the norm of what
// it is multiplied with), so few tokens are left whose score could be the largest; fewer when the
// lower bits are added. Only theirs are computed from the weights themselves.

#include <omp.h>

#include "lanes.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#include <math.h>
#include <stdlib.h>

#define ROWS 16  // states that are multiplied together

// A state in 16 bits: 256 * high + low, times `scale`.
typedef struct {
  const int32_t *high, *low;  // four numbers of 8 bits in each
  int32_t high_offset, low_offset;
  float scale, norm, low_norm;
} State;

// What may win in one row, as one thread has seen it.
typedef struct {
  int32_t *tokens;
  float *limits;  // that their scores can't exceed
  float least;    // that the largest score reaches
  int count;      // -1 if there were too many
} Found;

static void round_state(const Element *from, int dim, int num_steps, int8_t *high, int8_t *low,
                        State *state) {
  float largest = 0, squares = 0;
  float *values = malloc(sizeof(float) * (num_steps * 4 + LANES));
  memset(values, 0, sizeof(float) * (num_steps * 4 + LANES));
  for (int d = 0; d < dim; d += LANES) {
    Lanes value = load_some(from + d, dim - d < LANES ? dim - d : LANES);
    memcpy(values + d, &value, sizeof value);
  }
  for (int d = 0; d < dim; d++) {
    float size = fabsf(values[d]);
    largest = size > largest ? size : largest;
    squares += values[d] * values[d];
  }
  // 127 * 256 + 127 is the most that the two parts can hold.
  state->scale = largest / 32639;
  state->norm = sqrtf(squares);
  state->high_offset = state->low_offset = 0;
  float low_squares = 0;
  float inverse = largest > 0 && isfinite(squares) ? 1 / state->scale : 0;
  for (int d = 0; d < num_steps * 4; d++) {
    int whole = (int)lrintf(values[d] * inverse);
    int upper = (whole + 128) >> 8;
    high[d] = upper;
    low[d] = whole - 256 * upper;
    state->high_offset += 128 * upper;
    state->low_offset += 128 * low[d];
    low_squares += (float)low[d] * low[d];
  }
  state->low_norm = sqrtf(low_squares) * state->scale;
  free(values);
  state->high = (const int32_t *)high;
  state->low = (const int32_t *)low;
}

static void drop_losers(Found *found, int limit) {
  int kept = 0;
  for (int i = 0; i < found->count; i++)
    if (found->limits[i] >= found->least) {
      found->tokens[kept] = found->tokens[i];
      found->limits[kept++] = found->limits[i];
    }
  found->count = kept > limit ? -1 : kept;
}

INLINE __m512i multiply(const uint8_t *weights, const int32_t *part, int offset, int num_steps) {
  // Weights are stored with 128 added. Several sums, as one would wait for itself.
  __m512i sums[4] = {_mm512_set1_epi32(-offset)};
  int step = 0;
  for (; step + 4 <= num_steps; step += 4)
    for (int i = 0; i < 4; i++)
      sums[i] = _mm512_dpbusd_epi32(sums[i], _mm512_loadu_si512(weights + 64 * (int64_t)(step + i)),
                                    _mm512_set1_epi32(part[step + i]));
  for (; step < num_steps; step++)
    sums[0] = _mm512_dpbusd_epi32(sums[0], _mm512_loadu_si512(weights + 64 * (int64_t)step),
                                  _mm512_set1_epi32(part[step]));
  return _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3]));
}

// The head: see `likeliest`.
typedef struct {
  const Element *exact;
  int dim, num_groups, block, width;
  const uint8_t *weights;
  const float *scales, *errors, *norms;
  int num_steps;
} Head;

// Keeps those of 16 tokens that may win, given their products with the state's upper bits.
static void consider(const Head *head, int block, const State *state, __m512i upper, Found *found,
                     int capacity) {
  __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(head->scales + LANES * block),
                               _mm512_set1_ps(state->scale));
  __m512 high = _mm512_mul_ps(_mm512_cvtepi32_ps(upper), _mm512_set1_ps(256));
  __m512 bound =
      _mm512_mul_ps(_mm512_loadu_ps(head->errors + LANES * block), _mm512_set1_ps(state->norm));
  __m512 loose = _mm512_fmadd_ps(_mm512_loadu_ps(head->norms + LANES * block),
                                 _mm512_set1_ps(state->low_norm), bound);
  __m512 least = _mm512_set1_ps(found->least);
  __m512 limit = _mm512_fmadd_ps(high, scale, loose);
  if (!_mm512_cmp_ps_mask(limit, least, _CMP_GE_OQ) || found->count < 0) return;
  __m512i lower = multiply(head->weights + (int64_t)64 * head->num_steps * block, state->low,
                           state->low_offset, head->num_steps);
  __m512 score = _mm512_mul_ps(_mm512_add_ps(high, _mm512_cvtepi32_ps(lower)), scale);
  limit = _mm512_add_ps(score, bound);
  // What only fills the last block has a bound below 0.
  __mmask16 real = _mm512_cmp_ps_mask(bound, _mm512_setzero_ps(), _CMP_GE_OQ);
  float reached = _mm512_mask_reduce_max_ps(real, _mm512_sub_ps(score, bound));
  if (reached > found->least) found->least = reached;
  __mmask16 wins = _mm512_cmp_ps_mask(limit, _mm512_set1_ps(found->least), _CMP_GE_OQ);
  if (found->count + LANES > capacity) drop_losers(found, capacity - LANES);
  if (found->count < 0) return;
  float limits[LANES];
  _mm512_storeu_ps(limits, limit);
  for (; wins; wins &= wins - 1) {
    int lane = __builtin_ctz(wins);
    found->tokens[found->count] = LANES * block + lane;
    found->limits[found->count++] = limits[lane];
  }
}

INLINE void score_block(const Head *head, int block, const State *states, Found *found,
                        int capacity, const int num_rows) {
  const uint8_t *weights = head->weights + (int64_t)64 * head->num_steps * block;
  __m512i sums[ROWS];
  for (int r = 0; r < num_rows; r++) sums[r] = _mm512_set1_epi32(-states[r].high_offset);
  for (int step = 0; step < head->num_steps; step++) {
    __m512i weight = _mm512_loadu_si512(weights + 64 * (int64_t)step);
    // The next block, which comes from memory while this one is multiplied.
    _mm_prefetch(weights + 64 * (int64_t)(step + head->num_steps), _MM_HINT_T0);
    for (int r = 0; r < num_rows; r++)
      sums[r] = _mm512_dpbusd_epi32(sums[r], weight, _mm512_set1_epi32(states[r].high[step]));
  }
  for (int r = 0; r < num_rows; r++)
    consider(head, block, states + r, sums[r], found + r, capacity);
}

// A token's weights, one after the other.
static void read_row(const Head *head, int token, Element *row) {
  int64_t step = (int64_t)head->block * head->width;
  const Element *from = head->exact + token / head->block * head->num_groups * step +
                        token % head->block * head->width;
  for (int group = 0; group < head->num_groups; group++)
    memcpy(row + group * head->width, from + group * step, sizeof(Element) * head->width);
}

// The token with the largest score among the candidates, the first of equals; -1 if none is known.
static int64_t best_of(const Head *head, const Element *state, const Found *found, int64_t stride,
                       int num_threads) {
  int dim = head->dim;
  float least = -INFINITY, best = -INFINITY;
  int64_t token = -1;
  for (int t = 0; t < num_threads; t++) {
    const Found *f = found + t * stride;
    if (f->count < 0) return -1;
    least = f->least > least ? f->least : least;
  }
  Element *weight = malloc(sizeof(Element) * head->num_groups * head->width);
  for (int t = 0; t < num_threads; t++) {
    const Found *f = found + t * stride;
    for (int i = 0; i < f->count; i++) {
      if (f->limits[i] < least) continue;
      read_row(head, f->tokens[i], weight);
      Lanes products = {0};
      for (int d = 0; d < dim; d += LANES) {
        int count = dim - d < LANES ? dim - d : LANES;
        products += load_some(weight + d, count) * load_some(state + d, count);
      }
      float score = sum(products);
      if (score > best || (score == best && f->tokens[i] < token)) {
        best = score;
        token = f->tokens[i];
      }
    }
  }
  free(weight);
  return isfinite(best) ? token : -1;
}

// states: [num_rows, dim]; head: [vocabulary / block, num_groups, block, width]; weights: the head's
// in blocks of 16 tokens, [num_blocks, num_steps, 16, 4], rounded and with 128 added; scales,
// errors, norms: [num_blocks, 16], what a unit is, how far a token's score may be off for a state of
// norm 1, and the norm of its rounded weights. tokens: [num_rows], -1 where the state is no number,
// or too many tokens come into question.
void likeliest(const Element *states, const Element *head, const uint8_t *weights,
               const float *scales, const float *errors, const float *norms, int64_t *tokens,
               int num_rows, int dim, int num_groups, int block, int width, int num_blocks,
               int num_steps, int capacity, int num_threads) {
  Head whole = {head, dim, num_groups, block, width, weights, scales, errors, norms, num_steps};
  State *rounded = malloc(sizeof(State) * num_rows);
  int8_t *parts = malloc((size_t)8 * num_steps * num_rows);
  Found *found = malloc(sizeof(Found) * num_rows * num_threads);
  int32_t *room = malloc((sizeof(int32_t) + sizeof(float)) * capacity * num_rows * num_threads);
  for (int r = 0; r < num_rows; r++) {
    int8_t *own = parts + (int64_t)8 * num_steps * r;
    round_state(states + (int64_t)r * dim, dim, num_steps, own, own + 4 * num_steps, rounded + r);
  }
  for (int i = 0; i < num_rows * num_threads; i++) {
    int32_t *own = room + (int64_t)2 * capacity * i;
    found[i] = (Found){own, (float *)(own + capacity), -INFINITY, 0};
  }
#pragma omp parallel num_threads(num_threads)
  {
    int threads = omp_get_num_threads(), thread = omp_get_thread_num();
    Found *mine = found + (int64_t)thread * num_rows;
    int stop = (int64_t)num_blocks * (thread + 1) / threads;
    for (int i = (int64_t)num_blocks * thread / threads; i < stop; i++) {
      for (int r = 0; r < num_rows; r += ROWS) {
#define SCORE(n) \
  case n: score_block(&whole, i, rounded + r, mine + r, capacity, n); break
        switch (num_rows - r < ROWS ? num_rows - r : ROWS) {
          SCORE(1); SCORE(2); SCORE(3); SCORE(4); SCORE(5); SCORE(6); SCORE(7); SCORE(8);
          SCORE(9); SCORE(10); SCORE(11); SCORE(12); SCORE(13); SCORE(14); SCORE(15); SCORE(16);
        }
      }
    }
  }
#pragma omp parallel for num_threads(num_threads)
  for (int r = 0; r < num_rows; r++)
    tokens[r] = best_of(&whole, states + (int64_t)r * dim, found + r, num_rows, num_threads);
  free(rounded);
  free(parts);
  free(found);
  free(room);
}
#endif
