from __future__ import annotations

import math
import random

import pytest
import torch

from safe_kernels import AdapterStatistics
from safe_peft import ConfigError
from safe_peft.binding.adapters import ScoreInputs
from safe_peft.freezing.scores import find_score, register_score, score_names


def score(name: str, evidence: ScoreInputs) -> float:
    return find_score(name).function(evidence)


def test_the_scores_that_come_with_the_package() -> None:
    assert {"cka", "gradient_sensitivity", "random", "relative_norm"} <= set(score_names())


def test_each_score_says_what_it_needs() -> None:
    assert find_score("cka").needs_statistics and not find_score("cka").needs_gradients
    assert find_score("gradient_sensitivity").needs_gradients
    assert not any(find_score("relative_norm")[1:]) and not any(find_score("random")[1:])


@pytest.mark.parametrize("name", ["cka", "gradient_sensitivity", "random", "relative_norm"])
def test_without_evidence_importance_is_unknown(name: str) -> None:
    assert math.isnan(score(name, ScoreInputs()))


def test_cka_reads_the_sums() -> None:
    sums = torch.tensor([4.0, 1.0, 2.0, 128.0], dtype=torch.float64)
    assert score("cka", ScoreInputs(AdapterStatistics(sums))) == pytest.approx(1 - 5 / math.sqrt(4 * 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 16, 24), (32, 8, 8), (1, 5, 3)])
def test_relative_norm_is_that_of_the_whole_product(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    r, d_in, d_out = shape
    A, B, W = (
        torch.randn(r, d_in, dtype=dtype),
        torch.randn(d_out, r, dtype=dtype),
        torch.randn(d_out, d_in, dtype=dtype),
    )
    expected = 2.5 * torch.linalg.norm(B.double() @ A.double()) / torch.linalg.norm(W.double())
    got = score("relative_norm", ScoreInputs(lora_A=A, lora_B=B, scaling=-2.5, base_weight=W))
    assert got == pytest.approx(float(expected), rel=1e-5)


def test_relative_norm_of_an_adapter_that_does_nothing_is_zero() -> None:
    A, W = torch.randn(4, 16), torch.randn(8, 16)
    assert score("relative_norm", ScoreInputs(lora_A=A, lora_B=torch.zeros(8, 4), base_weight=W)) == 0.0
    assert math.isnan(score("relative_norm", ScoreInputs(lora_A=A, lora_B=torch.ones(8, 4), base_weight=0 * W)))


def test_gradient_sensitivity_is_the_mean_over_all_of_the_adapters_parameters() -> None:
    A, B, grad_A, grad_B = torch.randn(4, 16), torch.randn(8, 4), torch.randn(4, 16), torch.randn(8, 4)
    expected = torch.cat([(A * grad_A).abs().flatten(), (B * grad_B).abs().flatten()]).mean()
    got = score("gradient_sensitivity", ScoreInputs(lora_A=A, lora_B=B, grad_A=grad_A, grad_B=grad_B))
    assert got == pytest.approx(float(expected), rel=1e-5)


def test_random_depends_on_its_generator_alone() -> None:
    values = [score("random", ScoreInputs(generator=random.Random("0/1"))) for _ in range(2)]
    assert values[0] == values[1] != score("random", ScoreInputs(generator=random.Random("0/2")))


def test_an_unknown_score_is_named_beside_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"expected one of cka, .* got 'luck'"):
        find_score("luck")


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ConfigError, match="'cka' is already registered"):
        register_score("cka")
