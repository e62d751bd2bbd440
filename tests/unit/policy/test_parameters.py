"""The numbers of an action: from the parameter head to what may be sent."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_servers.policy import parameters, prior, sample, schema
from esper_servers.policy.graph import RunGraph
from esper_servers.policy.parameters import Parameters
from esper_servers.policy.policy import Policy
from esper_servers.policy.prior import PriorConfig, RunSignals

LEAST = np.array([least for least, _ in schema.PARAMETER_BOUNDS.values()], dtype=np.float32)
MOST = np.array([most for _, most in schema.PARAMETER_BOUNDS.values()], dtype=np.float32)
SIGNALS = RunSignals(
    steps=1000, steps_since_germination=1000, loss_trend=0.0, loss_volatility=0.0, steps_since_optimizer=0
)
STATES = sample.sample_states(Stage.SEED_LIFECYCLE_STAGE_GERMINATED)
logits = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3)
numbers = st.builds(Parameters, *[st.floats()] * 3)


def test_the_numbers_stand_in_the_order_of_the_head():
    assert Parameters._fields == schema.PARAMETER_NAMES
    assert set(schema.PARAMETER_NAMES) > schema.MULTIPLIERS


@given(logits)
def test_whatever_the_head_says_lies_within_the_bounds(said):
    found = parameters.read_out(said)
    assert found.dtype == np.float32
    assert ((found >= LEAST) & (found <= MOST)).all()


@given(logits, logits)
def test_more_is_never_read_as_less(one, other):
    less, more = np.minimum(one, other), np.maximum(one, other)
    assert (parameters.read_out(less) <= parameters.read_out(more)).all()


def test_a_head_that_says_nothing_changes_no_learning_rate_and_one_that_is_sure_reaches_the_bounds():
    assert parameters.read_out([0.0] * 3).tolist() == [1.0, 0.5, 0.5]
    assert parameters.read_out([-1e30] * 3).tolist() == LEAST.tolist()
    assert parameters.read_out([1e30] * 3).tolist() == MOST.tolist()


@given(st.floats(-20, 20))
def test_a_multiplier_is_raised_as_far_as_it_is_lowered(logit):
    raised, lowered = (float(parameters.read_out([sign * logit, 0.0, 0.0])[0]) for sign in (1, -1))
    assert raised * lowered == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_overflowed_is_not_hidden(bad):
    assert np.isnan(parameters.read_out([0.0, bad, 0.0])).tolist() == [False, True, False]


@given(numbers)
def test_what_is_sent_is_within_its_bounds_and_in_order(wanted):
    sent = parameters.made_fit(wanted)
    assert all(least <= value <= most for value, least, most in zip(sent, LEAST, MOST, strict=True))
    assert sent.blending_schedule_start <= sent.blending_schedule_end
    assert parameters.made_fit(sent) == sent


def test_a_pair_in_the_wrong_order_is_swapped_and_what_is_fit_stays():
    assert parameters.made_fit(Parameters(1.25, 0.75, 0.25)) == (1.25, 0.25, 0.75)
    assert parameters.made_fit(prior.PARAMETERS) == prior.PARAMETERS


@pytest.fixture
def evaluate():
    """What a network that says this puts out, under a prior of this weight."""

    def say(said, weight):
        policy = Policy.initial(prior_config=PriorConfig(weight=weight))
        head = policy.network.parameter_head
        with torch.no_grad():
            head.weight.zero_()
            head.bias.copy_(torch.tensor(said))
        graph = RunGraph(sample.sample_topology(), sample.sample_sites(), sample.sample_seeds(), [])
        return policy.evaluate(graph.inputs, STATES, SIGNALS)

    return say


SAID = [2.0, -1.0, 1.0]


def test_the_whole_prior_leaves_nothing_to_the_network(evaluate):
    assert evaluate(SAID, 1.0).parameters.tolist() == np.float32(prior.PARAMETERS).tolist()


def test_without_a_prior_the_network_alone_decides(evaluate):
    assert evaluate(SAID, 0.0).parameters.tolist() == parameters.read_out(SAID).tolist()


def test_half_a_prior_is_the_middle_of_both(evaluate):
    middle = (np.array(prior.PARAMETERS) + parameters.read_out(SAID)) / 2
    assert evaluate(SAID, 0.5).parameters == pytest.approx(middle)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_head_that_overflows_spoils_the_output_also_under_the_whole_prior(evaluate, weight):
    assert not evaluate([0.0, math.inf, 0.0], weight).is_finite
