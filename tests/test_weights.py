"""ExpertWeights: layout, memory, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cutedsl_kernels import ExpertWeights, MoEShape

pytestmark = pytest.mark.cpu

E, I, H = 5, 12, 20


def raw(dtype: torch.dtype = torch.bfloat16, experts: int = E) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(experts, 2 * I, H).to(dtype), torch.randn(experts, H, I).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_down_rows_are_the_columns_of_w2(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    w13, w2 = raw(dtype)
    before = w2.clone()
    weights = ExpertWeights.from_w13_w2(w13, w2)
    assert torch.equal(weights.w2_rows, before.transpose(1, 2))
    assert weights.w2_rows.is_contiguous()
    assert weights.w13.data_ptr() == w13.data_ptr()
    assert weights.shape(2) == MoEShape(E, 2, H, I)


@pytest.mark.parametrize(("inter", "hidden"), [(1, H), (I, 1), (1, 1)])
def test_one_neuron_or_one_column_is_its_own_transpose(inter: int, hidden: int) -> None:
    w13, w2 = torch.randn(E, 2 * inter, hidden), torch.randn(E, hidden, inter)
    before = w2.clone()
    assert torch.equal(ExpertWeights.from_w13_w2(w13, w2).w2_rows, before.transpose(1, 2))


def test_overwriting_keeps_the_addresses() -> None:
    old, new = ExpertWeights.from_w13_w2(*raw(torch.float32)), ExpertWeights.from_w13_w2(*raw(torch.float32))
    place = old.w2_rows.data_ptr()
    old.copy_(new)
    assert torch.equal(old.w13, new.w13)
    assert torch.equal(old.w2_rows, new.w2_rows)
    assert old.w2_rows.data_ptr() == place
    biased = ExpertWeights(new.w13, new.w2_rows, torch.zeros(E, 2 * I), torch.zeros(E, H))
    with pytest.raises(ValueError, match="w13_bias must be given for both"):
        biased.copy_(new)


class LargestAllocation(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned in storage of its own."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in self.known:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("interleaved", [False, True])
def test_never_holds_more_than_one_expert_twice(interleaved: bool) -> None:
    w13, w2 = raw(experts=64)
    with LargestAllocation(w13, w2) as allocation:
        weights = ExpertWeights.from_w13_w2(w13, w2, interleaved=interleaved)
    assert 0 < allocation.largest <= 2 * I * H
    assert weights.w2_rows.untyped_storage().data_ptr() == w2.untyped_storage().data_ptr()


def test_interleaved_rows_and_biases(seed: int) -> None:
    torch.manual_seed(seed)
    w13, w2 = raw()
    bias13, bias2 = torch.randn(E, 2 * I), torch.randn(E, H)
    gate, up = w13[:, 0::2].clone(), w13[:, 1::2].clone()
    weights = ExpertWeights.from_w13_w2(w13, w2, w13_bias=bias13, w2_bias=bias2, interleaved=True)
    assert torch.equal(weights.w13, torch.cat([gate, up], dim=1))
    assert weights.w13_bias is not None
    assert torch.equal(weights.w13_bias, torch.cat([bias13[:, 0::2], bias13[:, 1::2]], dim=1))
    assert weights.w2_bias is bias2


@pytest.mark.parametrize(
    ("w13", "w2", "error", "message"),
    [
        (None, torch.zeros(E, H, I), TypeError, "w13 must be a torch.Tensor, got NoneType"),
        (torch.zeros(2 * I, H), torch.zeros(E, H, I), ValueError, "w13 must have 3 non-empty dimensions"),
        (torch.zeros(0, 2 * I, H), torch.zeros(0, H, I), ValueError, "w13 must have 3 non-empty dimensions"),
        (torch.zeros(E, 2 * I + 1, H), torch.zeros(E, H, I), ValueError, "odd number of rows"),
        (torch.zeros(E, 2 * I, H), torch.zeros(E, I, H), ValueError, r"already \[E, I, H\]"),
        (torch.zeros(E, 2 * I, H), torch.zeros(E, H, I + 1), ValueError, r"w2 must be \[E, H, I\] = \(5, 20, 12\)"),
        (torch.zeros(E, 2 * I, H), torch.zeros(E, H, I).half(), TypeError, "w2 must have w13's dtype"),
        (torch.zeros(E, 2 * I, H).int(), torch.zeros(E, H, I).int(), TypeError, "bfloat16, float16 or float32"),
        (torch.zeros(E, 2 * I, H), torch.zeros(E, I, H).transpose(1, 2), ValueError, "w2 must be contiguous"),
        (torch.zeros(E, 2 * I, H), torch.zeros(E, H, I, device="meta"), ValueError, "w2 must be on cpu like w13"),
    ],
)
def test_errors_name_the_argument(w13: Any, w2: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ExpertWeights.from_w13_w2(w13, w2)


@pytest.mark.parametrize(
    ("biases", "error", "message"),
    [
        ({"w13_bias": torch.zeros(E, I)}, ValueError, r"w13_bias must be \(5, 24\), got \(5, 12\)"),
        ({"w2_bias": torch.zeros(E, H).int()}, TypeError, "w2_bias must be a float tensor, got torch.int32"),
        ({"w2_bias": [0.0]}, TypeError, "w2_bias must be a float tensor, got list"),
    ],
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_bias_errors(biases: dict[str, Any], error: type[Exception], message: str, interleaved: bool) -> None:
    """Raised before anything is re-laid, so that the same tensors can be passed in again."""
    w13, w2 = torch.randn(E, 2 * I, H), torch.randn(E, H, I)
    before = w13.clone(), w2.clone()
    with pytest.raises(error, match=message):
        ExpertWeights.from_w13_w2(w13, w2, interleaved=interleaved, **biases)
    assert torch.equal(w13, before[0])
    assert torch.equal(w2, before[1])
