"""A float32 adapter over a bfloat16 base: three bfloat16 terms give what float32 products give."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, Shape, assert_results, ours, plain, problem
from torch import Tensor

import safe_kernels
from safe_kernels.triton.lib import skinny_matmul
from safe_kernels.triton.runtime import configs, host

MIXED = DTYPES[4]
SHAPE = Shape(37, 90, 77, 16)
NO_DROPOUT = host.Dropout(None, 0, 1.0)
LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
HIDDEN_NAN = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32).item()
"""NaN whose upper half is infinity's."""


def swept(x: Tensor, narrow: Tensor) -> Tensor:
    """``x narrow'`` by the kernel."""
    return skinny_matmul.sweep(x, narrow, NO_DROPOUT)[0].sum(0)[:, : narrow.shape[0]]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("rank", [1, 16, 17, 40, 70])
def test_ranks(rank: int, dropout_p: float) -> None:
    p = problem(Shape(37, 90, 77, rank), MIXED, dropout_p=dropout_p)
    assert_results(p, ours(p, safe_kernels.lora))


def test_which_products_have_terms() -> None:
    """float16 has more bits than bfloat16; two float32 matrices are multiplied exactly."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    assert host.adapter_product("lora_sweep", bf16, fp32, 16) == host.Product(bf16, "terms")
    for pair in ((fp16, fp32), (fp32, fp32), (fp32, bf16), (bf16, bf16)):
        assert host.adapter_product("lora_sweep", *pair, 16) == host.product(*pair)
    widest = max(entry.rank for entry in configs.TABLE["lora_input"] if entry.terms)
    assert not host.adapter_product("lora_input", bf16, fp32, 2 * widest).has_terms


def test_one_pass_over_grad(launches: list[str]) -> None:
    assert_results(p := problem(SHAPE, MIXED), ours(p, safe_kernels.lora))
    assert launches.count("_lora_input_kernel") == 1


def test_all_24_bits_count() -> None:
    """A row of x that is one power of two gives the adapter's elements themselves."""
    x = torch.diag(torch.tensor([2.0**k for k in range(-8, 8)])).bfloat16()
    narrow = torch.randint(2**31 - 2**24, (16, 16), dtype=torch.int32).view(torch.float32)
    narrow = torch.where(narrow.abs() > 2.0**-100, narrow, 1 / 3) * torch.where(narrow > 2.0**100, 2.0**-20, 1.0)
    assert torch.equal(swept(x, narrow), x.float() @ narrow.t())


@pytest.mark.parametrize("special", [torch.inf, -torch.inf, torch.nan, HIDDEN_NAN, LARGEST, -LARGEST, SMALLEST / 2])
def test_special_numbers_in_the_adapter(special: float) -> None:
    """Also with zeros, and with infinity in x."""
    x = torch.randn(20, 20).bfloat16()
    x[:, 3] = torch.tensor([1.0, -1.0, 0.0, torch.inf, torch.nan]).repeat(4)
    narrow = torch.randn(5, 20)
    narrow[2, 3] = special
    exact = x.double() @ narrow.double().t()
    torch.testing.assert_close(swept(x, narrow), exact.float(), equal_nan=True)


@pytest.mark.parametrize("weight", [1.0, 1.5, 1 + 2.0**-9, 1 + 2.0**-23, -1 - 2.0**-12, 2.0**-40])
@pytest.mark.parametrize("special", [torch.inf, -torch.inf, torch.nan])
def test_special_numbers_in_x_meet_terms_of_zero(special: float, weight: float) -> None:
    x = torch.randn(20, 20).bfloat16()
    x[5, 2] = special
    narrow = torch.full((5, 20), weight)
    torch.testing.assert_close(swept(x, narrow), x.float() @ narrow.t(), equal_nan=True)


@pytest.mark.parametrize("special", [torch.inf, torch.nan, LARGEST])
@pytest.mark.parametrize("name", ["x", "A", "B", "grad"])
def test_special_numbers_come_out_as_from_plain_pytorch(name: str, special: float) -> None:
    p = problem(SHAPE, MIXED)
    getattr(p, name)[3, 2] = special
    found, expected = ours(p, safe_kernels.lora), plain(p)
    for key in expected:
        assert torch.equal(found[key].isnan(), expected[key].isnan()), key
        assert torch.equal(found[key].isposinf(), expected[key].isposinf()), key
