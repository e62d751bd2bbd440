from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper_rpc.errors import InvalidRequest
from esper_servers.tolaria.aggregation.aggregator import AggregationConfig
from esper_servers.tolaria.aggregation.batches import BatchAggregator

LAW = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def aggregated(*batches, **config):
    aggregator = BatchAggregator(AggregationConfig(**config))
    for gradients, samples in batches:
        aggregator.add([None if each is None else each.clone() for each in gradients], samples=samples)
    return aggregator, aggregator.finish()


@LAW
@given(batches=st.lists(st.tuples(st.integers(0, 99), st.integers(1, 64)), min_size=1, max_size=6))
def test_without_conflicts_it_is_the_mean_over_the_samples(batches):
    rows = [(torch.rand(5, generator=torch.Generator().manual_seed(seed)), samples) for seed, samples in batches]
    _, found = aggregated(*(([row], samples) for row, samples in rows))
    expected = sum(row * samples for row, samples in rows) / sum(samples for _, samples in rows)
    assert found.conflicts == ()
    torch.testing.assert_close(found.gradients[0], expected)


@LAW
@given(seeds=st.lists(st.integers(0, 99), min_size=2, max_size=5))
def test_the_norm_has_a_limit(seeds):
    rows = [torch.randn(3, generator=torch.Generator().manual_seed(seed)) * 1e4 for seed in seeds]
    _, found = aggregated(*(([row], 1) for row in rows))
    assert float(found.gradients[0].norm()) <= 10.0 * (1 + 1e-5)


def test_a_batch_that_pulls_against_those_before_it_is_projected():
    first, second = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    aggregator, found = aggregated(([first], 1), ([second], 1))
    assert found.conflicts == ("1",)
    torch.testing.assert_close(found.gradients[0], torch.tensor([1.0, 0.5]))
    assert aggregator.rate.metrics() == {"grad_conflict_rate": 1.0}


def test_a_batch_that_is_left_out_does_not_count_as_samples():
    first, second = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    _, found = aggregated(([first], 1), ([second], 1), conflict="priority")
    torch.testing.assert_close(found.gradients[0], first)


def test_a_batch_that_is_no_number_is_left_out_alone_and_told(told):
    one = torch.ones(2)
    _, found = aggregated(([one * math.nan], 1), ([one], 1), ([one], 2))
    assert found.dropped == ("0",)
    torch.testing.assert_close(found.gradients[0], one)
    assert [(name, details["origin"]) for name, details in told()] == [("gradient_dropped", "microbatch")]


def test_where_no_batch_is_a_number_there_is_no_gradient():
    _, found = aggregated(([torch.tensor([math.inf]), None], 1))
    assert found.gradients == [None, None]


def test_a_parameter_that_only_some_batches_reach_has_their_share():
    _, found = aggregated(([torch.ones(2), None], 3), ([torch.ones(2), torch.ones(2)], 1))
    torch.testing.assert_close(found.gradients[1], torch.full((2,), 0.25))


def test_the_next_step_begins_anew():
    aggregator, _ = aggregated(([torch.ones(2)], 1))
    aggregator.add([torch.full((2,), 3.0)], samples=5)
    torch.testing.assert_close(aggregator.finish().gradients[0], torch.full((2,), 3.0))


def test_no_samples_no_batches_and_other_parameters_are_refused():
    aggregator = BatchAggregator()
    with pytest.raises(InvalidRequest, match="one microbatch"):
        aggregator.finish()
    with pytest.raises(InvalidRequest, match="one sample"):
        aggregator.add([torch.ones(2)], samples=0)
    aggregator.add([torch.ones(2)], samples=1)
    with pytest.raises(InvalidRequest, match="one entry for each parameter"):
        aggregator.add([torch.ones(2), None], samples=1)
    torch.testing.assert_close(aggregator.finish().gradients[0], torch.ones(2))
