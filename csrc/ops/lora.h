#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "dispatch.h"

namespace safe_kernels {

using at::Tensor;

// Calls through the dispatcher. The formulas and shapes are in safe_kernels/reference/.
inline std::tuple<Tensor, Tensor> lora(const Tensor& x, const Tensor& base, const Tensor& lora_A, const Tensor& lora_B,
                                       double scaling, double dropout_p, const std::optional<Tensor>& rng_state,
                                       const std::optional<Tensor>& block_starts, int64_t block_rows,
                                       const std::optional<Tensor>& row_weight) {
  return call_op<lora>("safe_kernels::lora", x, base, lora_A, lora_B, scaling, dropout_p, rng_state, block_starts,
                       block_rows, row_weight);
}

inline std::tuple<Tensor, Tensor, Tensor> lora_backward(const Tensor& grad, const std::optional<Tensor>& x,
                                                        const Tensor& lora_A, const Tensor& lora_B, double scaling,
                                                        double dropout_p, const std::optional<Tensor>& rng_state,
                                                        std::array<bool, 3> output_mask) {
  return call_op<lora_backward>("safe_kernels::lora_backward", grad, x, lora_A, lora_B, scaling, dropout_p, rng_state,
                                output_mask);
}

// These throw an error that names the argument if a call is wrong on every backend. Other ops with an adapter share the
// first four: its two matrices; a last dimension that must match a weight; leading dimensions; the scored rows.
void check_adapter(const Tensor& lora_A, const Tensor& lora_B);
void check_features(const Tensor& tensor, const char* name, const Tensor& weight, const char* weight_name,
                    int64_t weight_dim);
void check_leading(const Tensor& tensor, const char* name, const Tensor& x);
void check_blocks(const Tensor& x, const Tensor& block_starts, int64_t block_rows,
                  const std::optional<Tensor>& row_weight);

void check_lora(const Tensor& x, const Tensor& base, const Tensor& lora_A, const Tensor& lora_B, double scaling,
                double dropout_p, const std::optional<Tensor>& rng_state, const std::optional<Tensor>& block_starts,
                int64_t block_rows, const std::optional<Tensor>& row_weight);

void check_lora_backward(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& lora_A, const Tensor& lora_B,
                         double scaling, double dropout_p, const std::optional<Tensor>& rng_state,
                         const std::array<bool, 3>& output_mask);

}  // namespace safe_kernels
