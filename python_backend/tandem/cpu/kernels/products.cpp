// Products with packed weights, on a CPU.
//
// Each element of a product is summed up over the columns in their order, so it depends, to the last
// bit, on nothing but its own row: not on how many others there are, as it does in oneDNN's products.
// Nor is there code to be made for each number of rows.

#include "operators.h"

#include <ATen/native/CPUBlas.h>
#include <omp.h>

#include <algorithm>
#include <vector>

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
      Lanes some;
      memcpy(&some, sums + i, sizeof some);
      const Halves result = to_bfloat16(some);
      memcpy(to + i, &result, sizeof result);
    }
  for (; i < count; i++) to[i] = bias ? sums[i] + static_cast<float>(bias[i]) : sums[i];
}

void write(const float *sums, int64_t count, const at::Half *bias, at::Half *to) {
  for (int64_t i = 0; i < count; i++)
    to[i] = static_cast<at::Half>(bias ? sums[i] + static_cast<float>(bias[i]) : sums[i]);
}

// A block of weights, [columns / width, block, width], as products read it.
template <typename T, typename Factor>
const Factor *block_of(const Tensor &memory, int64_t number, std::vector<Factor> &own) {
  const T *from = memory.const_data_ptr<T>() + number * memory.stride(0);
  if constexpr (std::is_same_v<T, Factor>) {
    return from;
  } else {
    const int64_t groups = memory.size(1), block = memory.size(2), width = memory.size(3);
    own.resize(groups * block * width);
    for (int64_t g = 0; g < groups; g++)
      for (int64_t w = 0; w < width; w++)
        for (int64_t n = 0; n < block; n++)
          own[(g * width + w) * block + n] = from[(g * block + n) * width + w];
    return own.data();
  }
}

// T is what goes in and out, and Factor, which the rows are in already, what is multiplied.
template <typename T, typename Factor>
void run(const Tensor &rows, const Tensor &memory, const std::optional<Tensor> &bias,
         Tensor &product, int num_threads) {
  const int64_t num_rows = rows.size(0), in_features = rows.size(1);
  const int64_t out_features = product.size(1), num_blocks = memory.size(0);
  const int64_t block = memory.size(2);
  constexpr bool is_converted = !std::is_same_v<T, Factor>, is_short = sizeof(Factor) == 2;
  const int64_t at_once = is_converted ? 1 : std::max<int64_t>(1, COLUMNS / block);
  const Factor *from = rows.const_data_ptr<Factor>();
  const T *biases = bias ? bias->const_data_ptr<T>() : nullptr;
  T *to = product.mutable_data_ptr<T>();
  const bool is_shared = num_rows * in_features * out_features >= MIN_SHARED;
#pragma omp parallel num_threads(num_threads) if (is_shared)
  {
    alignas(64) float sums[ROWS * MAX_BLOCK];
    thread_local std::vector<Factor> own;
    const int64_t number = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t stop = num_blocks * (number + 1) / threads;
    for (int64_t first = num_blocks * number / threads; first < stop; first += at_once)
      for (int64_t row = 0; row < num_rows; row += ROWS)
        for (int64_t b = first; b < std::min(stop, first + at_once); b++) {
          const int64_t count = std::min(ROWS, num_rows - row), column = b * block;
          const Factor *weights =
              is_converted && row > 0 ? own.data() : block_of<T, Factor>(memory, b, own);
          at::native::cpublas::brgemm(count, block, in_features, in_features, block, block, false,
                                      from + row * in_features, weights, sums, is_short);
          for (int64_t i = 0; i < count; i++)
            write(sums + i * block, std::min(block, out_features - column),
                  biases ? biases + column : nullptr, to + (row + i) * out_features + column);
        }
    at::native::cpublas::brgemm_release(is_short);
  }
}

// How many columns of a block lie side by side where products of a type read it; 0 if there are none.
template <typename T>
int64_t found_width() {
  for (const int64_t width : {2, 1}) {
    // 1 * 3 + 2 * 5 in each column.
    const T rows[2] = {T(1.0f), T(2.0f)};
    T block[2 * LANES];
    for (int64_t k = 0; k < 2; k++)
      for (int64_t n = 0; n < LANES; n++)
        block[width == 2 ? 2 * n + k : k * LANES + n] = T(k == 0 ? 3.0f : 5.0f);
    float sums[LANES];
    try {
      at::native::cpublas::brgemm(1, LANES, 2, 2, LANES, LANES, false, rows, block, sums, true);
      at::native::cpublas::brgemm_release(true);
    } catch (const std::exception &) {
      return 0;
    }
    if (std::all_of(sums, sums + LANES, [](float sum) { return sum == 13.0f; })) return width;
  }
  return 0;
}

template <typename T>
int64_t width_of_products() {
  static const int64_t width = found_width<T>();
  return width;
}

}  // namespace

bool has_bfloat16_products() { return width_of_products<at::BFloat16>() == 2; }

Tensor multiply(const Tensor &rows, const Tensor &memory, const std::optional<Tensor> &bias,
                int64_t out_features, int num_threads) {
  const Tensor flat = rows.reshape({-1, rows.size(-1)}).contiguous();
  TORCH_CHECK(memory.dim() == 4 && memory.is_contiguous() && memory.size(2) <= MAX_BLOCK);
  TORCH_CHECK(memory.size(1) * memory.size(3) >= flat.size(1));
  TORCH_CHECK(memory.size(0) * memory.size(2) >= out_features && memory.dtype() == rows.dtype());
  auto shape = rows.sizes().vec();
  shape.back() = out_features;
  Tensor product = at::empty({flat.size(0), out_features}, rows.options());
  const auto compute = [&]<typename T>(T) {
    // Where the processor has no products of a type, or not of weights that lie so, in float32.
    if (sizeof(T) == 2 && width_of_products<T>() != memory.size(3))
      run<T, float>(flat.to(at::kFloat), memory, bias, product, num_threads);
    else
      run<T, T>(flat, memory, bias, product, num_threads);
  };
  switch (rows.scalar_type()) {
    case at::kFloat: run<float, float>(flat, memory, bias, product, num_threads); break;
    case at::kBFloat16: compute(at::BFloat16()); break;
    case at::kHalf: compute(at::Half()); break;
    default: TORCH_CHECK(false, "no products of ", rows.scalar_type());
  }
  return product.view(shape);
}

}  // namespace tandem
