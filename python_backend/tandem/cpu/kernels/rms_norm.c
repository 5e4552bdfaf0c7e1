// RMSNorm of rows, on a CPU: each is divided by its root mean square and multiplied by a gain.

#include "lanes.h"

// `rounds` tells whether the quotient is rounded before it is multiplied, as Llama's is.
void rms_norm(const Element *input, Element *output, const float *gain, int64_t num_rows, int dim,
              float eps, int rounds, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_rows * dim > 65536)
  for (int64_t row = 0; row < num_rows; row++) {
    const Element *from = input + row * dim;
    Element *to = output + row * dim;
    Lanes squares = {0};
    for (int d = 0; d < dim; d += LANES) {
      Lanes value = load_some(from + d, dim - d < LANES ? dim - d : LANES);
      squares += value * value;
    }
    float scale = 1.0f / __builtin_sqrtf(sum(squares) / dim + eps);
    for (int d = 0; d < dim; d += LANES) {
      int count = dim - d < LANES ? dim - d : LANES;
      Lanes value = load_some(from + d, count) * scale, factor = {0};
      memcpy(&factor, gain + d, count * sizeof(float));
      if (rounds) {
        Element rounded[LANES];
        store(rounded, value);
        value = load(rounded);
      }
      store_some(to + d, value * factor, count);
    }
  }
}
