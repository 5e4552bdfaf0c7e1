// Products with packed weights, on a CPU.
//
// Each element of a product is summed up over the columns in their order, so it depends, to the last
// bit, on nothing but its own row: not on how many others there are, as it does in oneDNN's products.
// Nor is there code to be made for each number of rows.

#include "operators.h"

#include <ATen/native/CPUBlas.h>
#include <omp.h>

#include <algorithm>

#include "lanes.h"

namespace tandem {
namespace {

// Rows of one product, and columns of the result that are computed for them while they are in the
// caches.
constexpr int64_t ROWS = 32, COLUMNS = 256, MAX_BLOCK = 64;

void write(const float *sums, int64_t count, const float *bias, float *to) {
  for (int64_t i = 0; i < count; i++) to[i] = bias ? sums[i] + bias[i] : sums[i];
}

void write(const float *sums, int64_t count, const at::BFloat16 *bias, at::BFloat16 *to) {
  int64_t i = 0;
  if (bias == nullptr)
    for (; i + LANES <= count; i += LANES) {
      Words bits;
      memcpy(&bits, sums + i, sizeof bits);
      const Words nan = (Words)((Lanes)bits != (Lanes)bits);
      const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
      const Halves result = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Halves);
      memcpy(to + i, &result, sizeof result);
    }
  for (; i < count; i++) to[i] = bias ? sums[i] + static_cast<float>(bias[i]) : sums[i];
}

template <typename T>
void run(const Tensor &rows, const Tensor &memory, const std::optional<Tensor> &bias,
         Tensor &product, int num_threads) {
  const int64_t num_rows = rows.size(0), in_features = rows.size(1);
  const int64_t out_features = product.size(1), num_blocks = memory.size(0);
  const int64_t block = memory.size(2), at_once = std::max<int64_t>(1, COLUMNS / block);
  const T *from = rows.const_data_ptr<T>(), *weights = memory.const_data_ptr<T>();
  const T *biases = bias ? bias->const_data_ptr<T>() : nullptr;
  T *to = product.mutable_data_ptr<T>();
  constexpr bool pairs = sizeof(T) == 2;
#pragma omp parallel num_threads(num_threads)
  {
    alignas(64) float sums[ROWS * MAX_BLOCK];
    const int64_t number = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t stop = num_blocks * (number + 1) / threads;
    for (int64_t first = num_blocks * number / threads; first < stop; first += at_once)
      for (int64_t row = 0; row < num_rows; row += ROWS)
        for (int64_t b = first; b < std::min(stop, first + at_once); b++) {
          const int64_t count = std::min(ROWS, num_rows - row), column = b * block;
          at::native::cpublas::brgemm(count, block, in_features, in_features, block, block, false,
                                      from + row * in_features, weights + b * memory.stride(0),
                                      sums, pairs);
          for (int64_t i = 0; i < count; i++)
            write(sums + i * block, std::min(block, out_features - column),
                  biases ? biases + column : nullptr, to + (row + i) * out_features + column);
        }
    at::native::cpublas::brgemm_release(pairs);
  }
}

}  // namespace

Tensor multiply(const Tensor &rows, const Tensor &memory, const std::optional<Tensor> &bias,
                int64_t out_features, int num_threads) {
  const Tensor flat = rows.reshape({-1, rows.size(-1)}).contiguous();
  TORCH_CHECK(memory.dim() == 4 && memory.is_contiguous() && memory.size(2) <= MAX_BLOCK);
  TORCH_CHECK(memory.size(1) * memory.size(3) >= flat.size(1));
  TORCH_CHECK(memory.size(0) * memory.size(2) >= out_features && memory.dtype() == rows.dtype());
  auto shape = rows.sizes().vec();
  shape.back() = out_features;
  Tensor product = at::empty({flat.size(0), out_features}, rows.options());
  if (rows.scalar_type() == at::kBFloat16)
    run<at::BFloat16>(flat, memory, bias, product, num_threads);
  else
    run<float>(flat, memory, bias, product, num_threads);
  return product.view(shape);
}

}  // namespace tandem
