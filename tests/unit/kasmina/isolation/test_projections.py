"""Where gradients lie in memory, what is kept of them, and the sample of the host's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esper_servers.kasmina.isolation import projection
from esper_servers.kasmina.isolation.host_sample import BLOCK, BLOCKS, HostSample
from esper_servers.kasmina.isolation.projection import BUCKETS, WINDOW, Projection, as_it_lies, part_as_it_lies
from esper_servers.kasmina.isolation.spans import MemoryMap, span_of


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def projected(flat, extent, at=0):
    taken = Projection(extent)
    taken.add(flat, at)
    return taken.take()


def test_the_projected_product_is_near_that_of_the_gradients():
    # Not around zero, or sums would do without signs.
    a = drawn(200_000) + 1.0
    b = a.flip(0) + 0.5 * a
    product = float(projected(a, 200_000) @ projected(b, 200_000))
    assert product == pytest.approx(float(a @ b), abs=6 * (2 / BUCKETS) ** 0.5 * float(a.norm() * b.norm()))
    # What one of them gives to even places and the other to odd ones does not overlap.
    even = a * (torch.arange(200_000) % 2)
    apart = float(projected(even, 200_000) @ projected(b - b * (torch.arange(200_000) % 2), 200_000))
    assert abs(apart) < 6 * (2 / BUCKETS) ** 0.5 * float(a.norm() * b.norm())


def test_a_part_is_projected_as_the_same_part_of_the_whole():
    whole = drawn(5000)
    alone = torch.zeros(5000)
    alone[700:2900] = whole[700:2900]
    assert torch.allclose(projected(whole[700:2900], 5000, at=700), projected(alone, 5000), atol=1e-4)
    assert projected(whole, 5000, at=5000) is None
    # What lies before the beginning is left out.
    assert torch.allclose(projected(whole, 4000, at=-1000), projected(whole[1000:], 4000), atol=1e-4)


def test_what_is_larger_than_a_window_is_gone_through_in_turn():
    extent = 2 * WINDOW + 10
    seen, running = [], Projection(extent)
    for _ in range(4):
        for place in (0, WINDOW, 2 * WINDOW):
            running.add(torch.full((1,), float(place + 1)), place)
        seen.append(float(running.take().abs().sum()))
    assert seen == [1.0, WINDOW + 1.0, 2 * WINDOW + 1.0, 1.0]


def test_signs_are_of_both_kinds_and_leave_the_generator_of_the_user_alone():
    before = torch.get_rng_state()
    projection._signs.cache_clear()
    signs = projection._signs(torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 0.01


LAYOUTS = {
    "contiguous": drawn(4, 6),
    "transposed": drawn(6, 4).T,
    "channels last": drawn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "gaps": drawn(4, 12)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_contiguous", [True, False])
def test_a_gradient_is_brought_into_the_order_of_its_parameter(layout, is_contiguous):
    parameter = LAYOUTS[layout]
    gradient = drawn(*parameter.shape) if is_contiguous else torch.empty_like(parameter).copy_(drawn(*parameter.shape))
    flat = as_it_lies(gradient, parameter)
    assert torch.equal(flat.as_strided(parameter.shape, parameter.stride()), gradient)
    assert flat.abs().sum() == pytest.approx(float(gradient.abs().sum()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("first", "last"), [(0, 24), (-9, 5), (7, 8), (13, 99), (30, 40), (-9, -2)])
def test_a_part_of_a_gradient_lies_where_it_is_said_to(layout, first, last):
    parameter = LAYOUTS[layout]
    gradient = drawn(*parameter.shape)
    whole = as_it_lies(gradient, parameter)
    part, begins = part_as_it_lies(gradient, parameter, first, last)
    assert torch.equal(part, whole[begins : begins + len(part)])
    low, high = max(first, 0), min(last, len(whole))
    assert low >= high or (begins <= low and begins + len(part) >= high)


def test_of_a_gradient_in_another_order_only_the_rows_that_are_wanted_are_copied():
    parameter, gradient = torch.zeros(100, 10), drawn(10, 100).T
    part, begins = part_as_it_lies(gradient, parameter, 205, 222)
    assert (begins, len(part)) == (200, 30)
    assert torch.equal(part.view(3, 10), gradient[20:23])


def test_the_gradient_of_an_embedding_may_be_sparse():
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 3, 1])).sum().backward()
    assert as_it_lies(table.weight.grad, table.weight).tolist() == [0] * 3 + [2] * 3 + [0] * 3 + [1] * 3 + [0] * 3


def test_who_lies_on_a_span_is_found_whatever_lies_between():
    block = torch.zeros(100)
    long, short, beside, empty = block[:90], block[10:12], block[92:], torch.zeros(0)
    known = MemoryMap([long, short, beside, empty])
    names = {id(long): "long", id(short): "short", id(beside): "beside"}

    def over(tensor):
        return {names[id(each)] for each in known.over(span_of(tensor))}

    assert over(block[50:60]) == {"long"}
    assert over(block[11:13]) == {"long", "short"}
    assert over(block[90:92]) == set()
    assert over(block[89:93]) == {"long", "beside"}
    assert over(torch.zeros(100)) == set()
    assert span_of(empty) is span_of(torch.zeros(3, device="meta")) is None


def test_a_map_knows_when_a_tensor_has_moved():
    model = nn.Linear(3, 3)
    known = MemoryMap(model.parameters())
    assert known.is_current
    model.double()
    assert not known.is_current


def with_gradients(*sizes):
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    for parameter in parameters:
        parameter.grad = drawn(parameter.numel())
    return parameters


def test_the_norm_of_a_small_model_is_exact_and_that_of_a_large_one_near():
    small, large = with_gradients(7, 2000, 5), with_gradients(900_000, 30, 400_000)
    for parameters, error in ((small, 1e-5), (large, 0.03)):
        exact = torch.cat([p.grad for p in parameters]).norm()
        assert float(HostSample(parameters).norm()) == pytest.approx(float(exact), rel=error)


def test_a_sample_looks_at_as_much_of_any_model():
    sample = HostSample(nn.Parameter(torch.zeros(3_000_000)) for _ in range(2))
    assert len(sample._blocks) == BLOCKS
    assert sample._sampled <= BLOCKS * BLOCK
    assert {id(block.parameter) for block in sample._blocks} == {id(p) for p in sample._parameters}


def test_what_has_no_gradient_counts_as_zero_and_nothing_has_no_norm():
    parameters = with_gradients(10, 10)
    parameters[1].grad = None
    assert float(HostSample(parameters).norm()) == pytest.approx(float(parameters[0].grad.norm()))
    parameters[0].grad = None
    assert HostSample(parameters).norm() is None
    assert HostSample([]).norm() is None


def test_gradients_in_half_precision_do_not_overflow():
    half = nn.Parameter(torch.zeros(1000, dtype=torch.float16))
    half.grad = torch.full((1000,), 6e4, dtype=torch.float16)
    assert float(HostSample([half]).norm()) == pytest.approx(6e4 * 1000**0.5, rel=1e-2)
