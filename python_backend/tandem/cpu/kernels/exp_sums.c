// Sums of e^(logit / temperature - highest) over whole rows of logits, on a CPU.
//
// A row's sum depends on nothing but the row.

#include "lanes.h"

#define BLOCK 256

// Of the rows `rows`; `num_candidates` is a multiple of BLOCK.
void exp_sums(const Element *logits, const int64_t *rows, const float *temperatures,
              const float *highest, float *sums, int num_rows, int num_candidates,
              int num_threads) {
#pragma omp parallel for num_threads(num_threads)
  for (int i = 0; i < num_rows; i++) {
    const Element *from = logits + rows[i] * num_candidates;
    double total = 0;
    for (int block = 0; block < num_candidates; block += BLOCK) {
      Lanes part = {0};
      for (int c = block; c < block + BLOCK; c += LANES) {
        Lanes score = load(from + c) / temperatures[i] - highest[i];
        // What is forbidden is at minus infinity, which `exponential` takes for no number.
        part += (Lanes)((Ints)exponential(score) & (score != -__builtin_inff()));
      }
      total += sum(part);
    }
    sums[i] = total;
  }
}
