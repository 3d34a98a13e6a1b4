#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace safe_kernels {

using at::Tensor;

// Calls through the dispatcher. The formulas and shapes stand in safe_kernels/reference/.
std::tuple<Tensor, Tensor> lora(const Tensor& x, const Tensor& base, const Tensor& lora_A, const Tensor& lora_B,
                                double scaling, double dropout_p, const std::optional<Tensor>& rng_state,
                                const std::optional<Tensor>& block_starts, int64_t block_rows,
                                const std::optional<Tensor>& row_weight);

std::tuple<Tensor, Tensor, Tensor> lora_backward(const Tensor& grad, const std::optional<Tensor>& x,
                                                 const Tensor& lora_A, const Tensor& lora_B, double scaling,
                                                 double dropout_p, const std::optional<Tensor>& rng_state,
                                                 std::array<bool, 3> output_mask);

// Throw, naming the argument, when a call cannot be right on any backend. The first four are parts that other ops with
// an adapter share: its two matrices; a tensor whose last dimension is a dimension of a weight; leading dimensions; the
// rows that are scored.
void check_adapter(const Tensor& lora_A, const Tensor& lora_B);
void check_features(const Tensor& tensor, const char* name, const Tensor& weight, const char* weight_name,
                    int64_t weight_dim);
void check_leading(const Tensor& tensor, const char* name, const Tensor& x);
void check_blocks(const Tensor& x, const Tensor& block_starts, int64_t block_rows,
                  const std::optional<Tensor>& row_weight);

void check_lora(const Tensor& x, const Tensor& base, const Tensor& lora_A, const Tensor& lora_B, double dropout_p,
                const std::optional<Tensor>& rng_state, const std::optional<Tensor>& block_starts, int64_t block_rows,
                const std::optional<Tensor>& row_weight);

void check_lora_backward(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& lora_A, const Tensor& lora_B,
                         double scaling, double dropout_p, const std::optional<Tensor>& rng_state,
                         const std::array<bool, 3>& output_mask);

}  // namespace safe_kernels
