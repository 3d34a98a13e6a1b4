"""What the norms refuse, and that the message names the argument, what it got and what would do."""

from __future__ import annotations

import pytest
import torch

import safe_kernels

ops = torch.ops.safe_kernels
ONES = torch.ones(5)
X = torch.ones(2, 3, 5)
WRONG_FOR_BOTH = [
    ({"x": torch.tensor(1.0)}, ValueError, ["x", "dimension"]),
    ({"x": torch.ones(3, 9)}, ValueError, ["weight", "[9]", "[5]"]),
    ({"x": torch.ones(3, 5, dtype=torch.int64)}, TypeError, ["x", "float32"]),
    ({"weight": torch.ones(4)}, ValueError, ["weight", "[5]", "[4]"]),
    ({"weight": torch.ones(1, 5)}, ValueError, ["weight", "[5]", "[1, 5]"]),
    ({"weight": torch.tensor(1.0)}, ValueError, ["weight", "[5]"]),
    ({"weight": torch.ones(5, dtype=torch.complex64)}, TypeError, ["weight", "float32"]),
    ({"weight": torch.ones(5, device="meta")}, ValueError, ["weight", "meta", "cpu", "move"]),
    ({"eps": -1e-6}, ValueError, ["eps", "0", "-1e-06"]),
    ({"eps": float("nan")}, ValueError, ["eps", "nan"]),
]
WRONG_BIAS = [
    ({"bias": torch.ones(4)}, ValueError, ["bias", "[5]", "[4]"]),
    ({"bias": torch.ones(5, dtype=torch.bool)}, TypeError, ["bias", "float32"]),
    ({"bias": torch.ones(5, device="meta")}, ValueError, ["bias", "meta", "cpu"]),
]


def refused(call, kind: type[Exception], words: list[str]) -> None:
    with pytest.raises(kind) as error:
        call()
    assert type(error.value) is kind
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(("changes", "kind", "words"), WRONG_FOR_BOTH)
def test_rms_norm(changes: dict, kind: type[Exception], words: list[str]) -> None:
    refused(lambda: safe_kernels.rms_norm(**{"x": X, "weight": ONES, "eps": 1e-6, **changes}), kind, words)


@pytest.mark.parametrize(("changes", "kind", "words"), [*WRONG_FOR_BOTH, *WRONG_BIAS])
def test_layer_norm(changes: dict, kind: type[Exception], words: list[str]) -> None:
    arguments = {"x": X, "weight": ONES, "bias": ONES, "eps": 1e-6, **changes}
    refused(lambda: safe_kernels.layer_norm(**arguments), kind, words)


ROWS = torch.ones(2, 3)
BACKWARD = {"grad": X, "retained": X, "weight": ONES, "rstd": ROWS, "from_output": False}


@pytest.mark.parametrize("changes", [{"grad": torch.ones(3, 5)}, {"rstd": torch.ones(3)}, {"weight": torch.ones(4)}])
def test_backward_shapes(changes: dict) -> None:
    (name,) = changes
    rms = {**BACKWARD, "weight_offset": 0.0, "output_mask": [True, True], **changes}
    refused(lambda: ops.rms_norm_backward(**rms), ValueError, [name])
    layer = {**BACKWARD, "bias": None, "mean": ROWS, "output_mask": [True, True, False], **changes}
    refused(lambda: ops.layer_norm_backward(**layer), ValueError, [name])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mean": None}, ["mean", "from_output=False", "None"]),
        ({"mean": torch.ones(3)}, ["mean", "[2, 3]", "[3]"]),
        ({"weight": None}, ["weight", "None"]),
        ({"output_mask": [True, True, True]}, ["bias", "None"]),
    ],
)
def test_layer_norm_backward(changes: dict, words: list[str]) -> None:
    arguments = {**BACKWARD, "bias": None, "mean": ROWS, "output_mask": [True, True, False], **changes}
    refused(lambda: ops.layer_norm_backward(**arguments), ValueError, words)


@pytest.mark.parametrize("argument", ["x", "weight", "bias"])
def test_forward_mode_is_refused(argument: str) -> None:
    tensors = {"x": X, "weight": ONES, "bias": ONES}

    def layer(tensor: torch.Tensor) -> torch.Tensor:
        return safe_kernels.layer_norm(**{**tensors, argument: tensor}, eps=1e-6)

    def rms(tensor: torch.Tensor) -> torch.Tensor:
        return safe_kernels.rms_norm(**{"x": X, "weight": ONES, argument: tensor}, eps=1e-6)

    for call in [layer] if argument == "bias" else [layer, rms]:
        with pytest.raises((NotImplementedError, RuntimeError), match="forward"):
            torch.func.jvp(call, (tensors[argument],), (torch.ones_like(tensors[argument]),))


def test_dual_tensors_are_refused_by_name() -> None:
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(X, X)
        with pytest.raises(NotImplementedError, match=r"x has a forward-mode tangent.*reverse mode"):
            safe_kernels.rms_norm(x, ONES, 1e-6)
        with pytest.raises(NotImplementedError, match=r"x has a forward-mode tangent.*reverse mode"):
            safe_kernels.layer_norm(x, ONES, ONES, 1e-6)
