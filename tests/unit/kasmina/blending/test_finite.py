"""Where a tensor is finite, and that of one that is so everywhere no mask is made."""

from __future__ import annotations

import pytest
import torch

from esper_servers.kasmina.blending.finite import finite_mask

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_a_finite_tensor_there_is_no_mask(dtype):
    assert finite_mask(torch.linspace(-1, 1, 257, dtype=dtype)) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_value_among_many_is_found(dtype, value):
    x = torch.ones(3, 5, 7, dtype=dtype)
    x[1, 2, 3] = value
    mask = finite_mask(x)
    assert (~mask).nonzero().tolist() == [[1, 2, 3]]


def test_infinities_that_cancel_are_found():
    x = torch.tensor([1.0, float("inf"), 2.0, float("-inf")])
    assert finite_mask(x).tolist() == [True, False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finite_values_whose_sum_is_not_are_finite(dtype):
    mask = finite_mask(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype))
    assert mask.all()


def test_an_empty_tensor_is_finite():
    assert finite_mask(torch.empty(0, 3)) is None
