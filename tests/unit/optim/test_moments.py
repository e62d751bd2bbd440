from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper_servers.optim.moments import carried_over, transformed

LAW = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
SIDES = st.integers(1, 6)
SHAPES = st.lists(SIDES, min_size=1, max_size=3).map(tuple)


def values_of(shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


@LAW
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_to_the_same_shape_values_come_bit_for_bit_as_a_copy(shape, seed):
    values = values_of(shape, seed)
    found = transformed(values, values.shape)
    assert torch.equal(found, values)
    assert found.data_ptr() != values.data_ptr()


@LAW
@given(shape=SHAPES, more=st.lists(st.integers(0, 4), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_expanded_values_keep_their_place_and_the_rest_is_their_mean(shape, more, seed):
    values = values_of(shape, seed)
    wider = torch.Size(side + extra for side, extra in zip(shape, more, strict=False))
    found = transformed(values, wider, fill_share=0.1)
    assert found.shape == wider
    old = tuple(slice(0, side) for side in shape)
    assert torch.equal(found[old], values)
    is_new = torch.ones(wider, dtype=torch.bool)
    is_new[old] = False
    torch.testing.assert_close(found[is_new], (values.mean() * 0.1).expand(int(is_new.sum())))
    assert torch.equal(transformed(found, values.shape), values)


@LAW
@given(shape=SHAPES, less=st.lists(st.integers(0, 5), min_size=3, max_size=3))
def test_contracted_values_are_the_leading_ones(shape, less):
    values = values_of(shape)
    narrower = torch.Size(max(1, side - fewer) for side, fewer in zip(shape, less, strict=False))
    assert torch.equal(transformed(values, narrower), values[tuple(slice(0, side) for side in narrower)])


@LAW
@given(shape=SHAPES, other=SHAPES, seed=st.integers(0, 99))
def test_nothing_comes_out_that_lies_outside_of_what_went_in(shape, other, seed):
    values = values_of(shape, seed)
    found = transformed(values, torch.Size(other))
    assert found.shape == other
    assert found.dtype == values.dtype
    assert values.min() * 0.9999 <= found.min() <= found.max() <= values.max() * 1.0001


def test_interpolated_values_go_from_the_first_to_the_last():
    ramp = torch.arange(4.0)[:, None].expand(4, 4).contiguous()
    found = transformed(ramp, torch.Size((7, 2)))
    torch.testing.assert_close(found, torch.arange(0.0, 3.1, 0.5)[:, None].expand(7, 2))
    torch.testing.assert_close(transformed(torch.arange(4.0), torch.Size((2, 2))), torch.arange(4.0).reshape(2, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5), (6, 6), (2, 2), (12,)])
def test_every_kind_of_number_keeps_its_kind(dtype, shape):
    assert transformed(torch.ones(4, 4, dtype=dtype), torch.Size(shape)).dtype == dtype


def test_a_plain_momentum_is_expanded_with_a_tenth_of_its_mean_and_counters_stay():
    old, new = torch.zeros(2), torch.zeros(3)
    state = {
        "momentum_buffer": torch.tensor([1.0, 3.0]),
        "exp_avg": torch.tensor([1.0, 3.0]),
        "step": torch.tensor(7.0),
    }
    found = carried_over(state, old, new)
    torch.testing.assert_close(found["momentum_buffer"], torch.tensor([1.0, 3.0, 0.2]))
    torch.testing.assert_close(found["exp_avg"], torch.tensor([1.0, 3.0, 2.0]))
    assert found["step"] == 7


def test_parts_with_shapes_of_their_own_are_not_carried_over():
    assert carried_over({"row_var": torch.ones(2, 1)}, torch.zeros(2, 3), torch.zeros(4, 3)) is None
