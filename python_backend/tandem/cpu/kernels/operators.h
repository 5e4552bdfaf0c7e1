// What computes in compiled passes and beside them.

#pragma once

#include <ATen/ATen.h>

#include <algorithm>

namespace tandem {

using at::Tensor;

// Products of fewer elements gain nothing from a second thread, which may have to be waited for.
constexpr int64_t MIN_SHARED = 1 << 16;

struct Pool {
  Tensor keys, values;  // [num_slots, num_kv_heads, head_dim]
};

// A sequence's part of a packed row, as `PackedBatch.spans` writes it.
struct Span {
  int32_t row, num_queries, kv_len, table;
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
};

// [1, num_heads, num_tokens, head_dim] to [1, num_tokens, num_heads, head_dim].
Tensor attend(const Tensor &query, const Pool &pool, const Tensor &spans, const Tensor &tables,
              int64_t block_size, double scaling, const Sight &sight, int num_threads);

// [..., in_features] to [..., out_features], by a weight in blocks of rows; see `BlockedMatrix`.
Tensor multiply(const Tensor &rows, const Tensor &memory, const std::optional<Tensor> &bias,
                int64_t out_features, int num_threads);

// Whether a product of bfloat16 is one here, and not one of float32.
bool has_bfloat16_products();

}  // namespace tandem
