"""Several graphs in one pass."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_rpc.proto.leyline.v1 import BlueprintDescriptor, SystemStatePacket
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.tamiyo.v1 import RunSeed, RunSite
from esper_servers.policy import plan, sample
from esper_servers.policy.dense_plan import DensePlan
from esper_servers.policy.graph import BlueprintCandidate, RunGraph
from esper_servers.policy.network import NetworkConfig, PolicyNetwork
from esper_servers.policy.plan import FusedPlan
from esper_servers.policy.policy import EAGER, Asked, Policy
from esper_servers.policy.prior import RunSignals

SIGNALS = RunSignals(
    steps=1000, steps_since_germination=1000, loss_trend=0.0, loss_volatility=0.0, steps_since_optimizer=0
)
STATES = sample.sample_states(Stage.SEED_LIFECYCLE_STAGE_GERMINATED)


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """As a controller has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


shapes = st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 3), st.integers(0, 4), st.integers(0, 3))


def graph_of(layers, activations, parameters, seeds, blueprints, *, strength=None):
    """A graph of so many nodes; `strength` is told of one connection."""
    topology = {
        "layers": [{"layer_id": f"l{i}", "type": "Linear"} for i in range(layers)],
        "activations": [{"type": "relu"}] * activations,
        "parameters": [{"min": i} for i in range(parameters)],
    }
    if strength is not None and layers > 1:
        topology["adjacency"] = {"layer": [[0, 1, strength], [1, 0]]}
    sites = [RunSite(site_id="l0")]
    candidates = [
        BlueprintCandidate(blueprint_id=f"b{i}", descriptor=BlueprintDescriptor(blueprint_id=f"b{i}"), fits={"l0"})
        for i in range(blueprints)
    ]
    runs_seeds = [RunSeed(seed_id=f"seed{i}", site_id="l0") for i in range(seeds)]
    return RunGraph(topology, sites, runs_seeds, candidates)


def filled(graph, loss):
    return graph.fill(SystemStatePacket(training_metrics={"loss": loss, "gradient_norm": 2 * loss}))


@pytest.fixture
def policy():
    return Policy.initial()


@pytest.fixture
def graphs():
    """Those of runs with one model, as a fleet has them, after the first step of each."""
    return [RunGraph(sample.sample_topology(), sample.sample_sites(), sample.sample_seeds(), []) for _ in range(3)]


def asked_about(policy, graphs):
    """A question about each, laid out as after its first step."""
    asked = []
    for number, graph in enumerate(graphs):
        inputs = graph.fill(SystemStatePacket(seed_states=STATES, training_metrics={"loss": 0.1 + number}))
        policy.warm_up(inputs)
        asked.append(Asked(inputs, STATES, SIGNALS))
    return asked


@settings(max_examples=25, deadline=None)
@given(
    company=st.lists(shapes, min_size=1, max_size=6), seed=st.integers(0, 100), strength=st.none() | st.floats(-3, 3)
)
def test_each_graph_of_a_union_comes_out_as_alone(company, seed, strength):
    torch.manual_seed(seed)
    eager = FusedPlan(PolicyNetwork(NetworkConfig(sage_width=24, gat_width=12)).eval())
    inputs = [filled(graph_of(*shape, strength=strength), 0.3 + number) for number, shape in enumerate(company)]
    with torch.inference_mode():
        alone = [eager(each) for each in inputs]
        together = eager.compute_many(inputs)
    for expected, found in zip(alone, together, strict=True):
        for name, value in expected._asdict().items():
            torch.testing.assert_close(getattr(found, name), value, rtol=1e-5, atol=1e-5, msg=name)


def test_the_order_of_a_company_changes_nothing_for_its_members(policy, graphs):
    asked = asked_about(policy, graphs)
    forward, backward = policy.evaluate_many(asked), policy.evaluate_many(asked[::-1])[::-1]
    for one, other in zip(forward, backward, strict=True):
        torch.testing.assert_close(one.value, other.value, rtol=1e-5, atol=1e-5)


def test_a_batch_tells_each_member_how_large_it_was_and_is_the_eager_plans(policy, graphs):
    outputs = policy.evaluate_many(asked_about(policy, graphs))
    assert [(output.batch_size, output.plan) for output in outputs] == [(3, EAGER)] * 3
    assert policy.evaluate(*asked_about(policy, graphs)[0]).batch_size == 1


def test_a_step_sees_what_was_filled_last(policy, graphs):
    asked = asked_about(policy, graphs)
    first = policy.evaluate_many(asked)
    graphs[1].fill(SystemStatePacket(seed_states=STATES, training_metrics={"loss": 9.0, "gradient_norm": 50.0}))
    second = policy.evaluate_many(asked)
    are_same = [a.value == pytest.approx(b.value, abs=1e-5) for a, b in zip(first, second, strict=True)]
    assert are_same == [True, False, True]


def test_what_is_not_finite_stays_with_its_own_graph(policy, graphs):
    asked = asked_about(policy, graphs)
    asked[1].inputs.features["layer"][0, 0] = math.nan
    assert [output.is_finite for output in policy.evaluate_many(asked)] == [True, False, True]


def test_a_graph_shares_a_pass_only_once_it_is_laid_out(policy, graphs):
    inputs = filled(graphs[0], 0.5)
    assert not policy.can_share(inputs)
    policy.prepare(inputs)
    assert policy.can_share(inputs)


def test_graphs_that_are_bound_by_their_arithmetic_are_evaluated_one_by_one(policy, graphs, monkeypatch):
    monkeypatch.setattr(plan, "DENSE_LIMIT", -1)
    asked = asked_about(policy, graphs)
    assert not policy.can_share(asked[0].inputs)
    assert [output.batch_size for output in policy.evaluate_many(asked)] == [1] * 3


def test_a_compiled_plan_is_never_batched(policy, graphs):
    asked = asked_about(policy, graphs)
    policy.serve_compiled(DensePlan(policy.network))
    assert not policy.can_share(asked[0].inputs)
    assert [(output.batch_size, output.plan) for output in policy.evaluate_many(asked)] == [(1, "compiled")] * 3


def test_what_is_kept_of_a_graph_goes_with_it(policy, graphs):
    policy.evaluate_many(asked_about(policy, graphs))
    gone = weakref.ref(graphs.pop().inputs)
    gc.collect()
    assert gone() is None
