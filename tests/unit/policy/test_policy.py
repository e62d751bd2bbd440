from __future__ import annotations

import math
import unittest.mock
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_rpc.proto.leyline.v1 import BlueprintDescriptor, BlueprintTier, SeedState, SystemStatePacket
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.leyline.v1 import SeedOperation as Operation
from esper_rpc.proto.tamiyo.v1 import RunSeed, RunSite
from esper_servers.policy import compiled_plan, masks, plan, sample, schema
from esper_servers.policy.compiled_plan import CompiledPlan
from esper_servers.policy.dense_plan import DensePlan
from esper_servers.policy.edge_scores import EdgeScores
from esper_servers.policy.graph import BlueprintCandidate, RunGraph
from esper_servers.policy.plan import FusedPlan
from esper_servers.policy.policy import Policy
from esper_servers.policy.prior import PriorConfig, RunSignals, next_operation
from esper_servers.policy.reference import ReferenceNetwork

SIGNALS = RunSignals(
    steps=1000, steps_since_germination=1000, loss_trend=0.0, loss_volatility=0.0, steps_since_optimizer=0
)


def candidate(name, sites, *, tier=BlueprintTier.BLUEPRINT_TIER_SAFE, extras=None):
    return BlueprintCandidate(
        blueprint_id=name, descriptor=BlueprintDescriptor(blueprint_id=name, tier=tier), fits=frozenset(sites),
        extras=extras or {},
    )  # fmt: skip


def sample_graph():
    sites = [s.site_id for s in sample.sample_sites()]
    blueprints = [candidate(f"b{i}", sites) for i in range(3)]
    return RunGraph(sample.sample_topology(), sample.sample_sites(), sample.sample_seeds(), blueprints)


def random_graph(layers, activations, parameters, seeds, blueprints):
    """With edges of which nothing, something and everything is told, and a blueprint in every second seed."""
    topology = {
        "layers": [{"layer_id": f"l{i}", "type": "Linear", "latency_ms": i} for i in range(layers)],
        "activations": [{"activation_id": f"a{i}", "type": "ReLU"} for i in range(activations)],
        "parameters": [{"name": f"p{i}", "min": 0.0, "max": 1.0} for i in range(parameters)],
        "adjacency": {"layer": [[i, i + 1, 0.3 * i] if i % 2 else [i, i + 1] for i in range(layers - 1)]},
        "monitored_layers": [[i, 0, i - 1.0] for i in range(seeds)],
        "capabilities": {"by_seed_index": {str(i): [schema.SCHEDULES[i % 4]] for i in range(seeds)}},
    }
    sites = [RunSite(site_id=f"l{i}") for i in range(seeds)]
    run_seeds = [RunSeed(seed_id=f"s{i}", site_id=f"l{i}") for i in range(seeds)]
    inner = {"layers": [{"type": "Linear"}] * 2, "adjacency": {"layer": [[0, 1, 0.7]]}}
    candidates = [candidate(f"b{i}", ["l0"], extras=inner) for i in range(blueprints)]
    return RunGraph(topology, sites, run_seeds, candidates, attached={f"s{i}": "b0" for i in range(0, seeds, 2)})


def packet(stage=Stage.SEED_LIFECYCLE_STAGE_DORMANT, **metrics):
    return SystemStatePacket(training_metrics={"loss": 0.5, **metrics}, seed_states=sample.sample_states(stage))


def test_the_sample_graph_has_the_size_that_is_measured():
    graph = sample_graph()
    counts = graph.counts
    assert (counts["layer"], counts["activation"], counts["parameter"], counts["seed"]) == (24, 8, 16, 4)
    assert graph.edge_count >= 600


@settings(max_examples=15, deadline=None)
@given(
    layers=st.integers(0, 12), activations=st.integers(0, 4), parameters=st.integers(0, 4), seeds=st.integers(0, 5),
    blueprints=st.integers(0, 4), seed=st.integers(0, 100),
)  # fmt: skip
def test_the_fused_plan_equals_the_reference(layers, activations, parameters, seeds, blueprints, seed):
    graph = random_graph(layers, activations, parameters, seeds, blueprints)
    torch.manual_seed(seed)
    network = ReferenceNetwork().eval()
    inputs = graph.fill(SystemStatePacket(training_metrics={"loss": 0.3}))
    with torch.no_grad():
        reference, dense = network(inputs), FusedPlan(network)(inputs)
        with unittest.mock.patch.object(plan, "DENSE_LIMIT", -1):
            sparse = FusedPlan(network)(inputs)
    for expected, first, second in zip(reference, dense, sparse, strict=True):
        torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    layers=st.integers(0, 12), activations=st.integers(0, 4), parameters=st.integers(0, 4), seeds=st.integers(0, 5),
    blueprints=st.integers(0, 4), seed=st.integers(0, 100),
)  # fmt: skip
def test_what_is_compiled_equals_the_reference(layers, activations, parameters, seeds, blueprints, seed):
    graph = random_graph(layers, activations, parameters, seeds, blueprints)
    torch.manual_seed(seed)
    network = ReferenceNetwork().eval()
    inputs = graph.fill(SystemStatePacket(training_metrics={"loss": 0.3}))
    with torch.no_grad():
        reference, found = network(inputs), CompiledPlan(DensePlan(network), None, EdgeScores(network))(inputs)
    for expected, value in zip(reference, found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def test_what_is_told_of_edges_matters_in_every_plan():
    def value(compute, strength):
        topology = sample.sample_topology() | {"adjacency": {"layer": [[0, 1, strength], [2, 1, 0.5]]}}
        return float(compute(graph_of(topology).fill(packet())).value)

    torch.manual_seed(0)
    network = ReferenceNetwork().eval()
    plans = (network, FusedPlan(network), CompiledPlan(DensePlan(network), None, EdgeScores(network)))
    with torch.no_grad():
        weak, strong = ([value(plan, strength) for plan in plans] for strength in (0.1, 5.0))
    assert weak == pytest.approx([weak[0]] * 3, abs=1e-5)
    assert strong == pytest.approx([strong[0]] * 3, abs=1e-5)
    assert abs(weak[0] - strong[0]) > 1e-4


def test_a_compiled_plan_sees_what_a_step_fills():
    graph, policy = sample_graph(), Policy.initial()
    policy.serve_compiled(DensePlan(policy.network))
    first = policy.compute(graph.fill(packet()))
    served = policy.evaluate(graph.fill(packet(gradient_norm=50.0)), packet().seed_states, SIGNALS)
    assert policy.plan == "compiled"
    assert served.value == pytest.approx(float(policy.compute(graph.inputs).value), abs=1e-5)
    assert served.value != pytest.approx(float(first.value), abs=1e-5)


def test_a_graph_that_is_too_large_for_matrices_is_left_to_the_eager_plan(monkeypatch):
    monkeypatch.setattr(compiled_plan, "CELL_LIMIT", 10)
    asked = []
    CompiledPlan(None, asked.append, None)(sample_graph().inputs)
    assert len(asked) == 1


def test_a_package_that_fails_is_left_for_the_eager_plan():
    graph, policy = sample_graph(), Policy.initial()

    def broken(_tensors):
        raise RuntimeError("illegal instruction")

    policy.serve_compiled(broken)
    assert policy.evaluate(graph.fill(packet()), packet().seed_states, SIGNALS).is_finite
    assert policy.plan == "eager"


def test_a_missing_value_is_masked_and_zero_is_not():
    graph = sample_graph()
    graph.fill(packet(gradient_norm=0.0))
    row = graph.inputs.features["global"][0]
    position = 2 * schema.FEATURES["global"].index("gradient_norm")
    assert row[position + 1] == 1
    graph.fill(packet())
    assert (row[position], row[position + 1]) == (0, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_masked(bad):
    graph = sample_graph()
    state = SeedState(seed_id="seed-0", gradient_norm=bad, metrics={"alpha": bad})
    inputs = graph.fill(SystemStatePacket(training_metrics={"loss": bad, "gradient_norm": bad}, seed_states=[state]))
    assert all(bool(torch.isfinite(x).all()) for x in inputs.features.values())


def test_ten_thousand_unknown_seeds_change_nothing():
    graph = sample_graph()
    before = graph.fill(packet()).features["seed"].clone()
    flood = packet()
    flood.seed_states.extend(SeedState(seed_id=f"x{i}", stage=99) for i in range(10_000))
    assert torch.equal(graph.fill(flood).features["seed"], before)


LIFE = [
    (Stage.SEED_LIFECYCLE_STAGE_DORMANT, {}, Operation.SEED_OPERATION_GERMINATE),
    (Stage.SEED_LIFECYCLE_STAGE_GERMINATED, {}, Operation.SEED_OPERATION_START_TRAINING),
    (Stage.SEED_LIFECYCLE_STAGE_TRAINING, {"steps_in_stage": 5}, None),
    (Stage.SEED_LIFECYCLE_STAGE_TRAINING, {"steps_in_stage": 60}, Operation.SEED_OPERATION_START_GRAFTING),
    (Stage.SEED_LIFECYCLE_STAGE_BLENDING, {"alpha": 0.5}, None),
    (Stage.SEED_LIFECYCLE_STAGE_BLENDING, {"alpha": 1.0}, Operation.SEED_OPERATION_STABILIZE),
    (Stage.SEED_LIFECYCLE_STAGE_SHADOWING, {"steps_in_stage": 10}, Operation.SEED_OPERATION_EVALUATE),
    (Stage.SEED_LIFECYCLE_STAGE_PROBATIONARY, {"steps_in_stage": 30}, Operation.SEED_OPERATION_FOSSILIZE),
    (
        Stage.SEED_LIFECYCLE_STAGE_PROBATIONARY, {"steps_in_stage": 30, "loss_since_graft": 1.0},
        Operation.SEED_OPERATION_CULL,
    ),
    (Stage.SEED_LIFECYCLE_STAGE_FOSSILIZED, {}, None),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "metrics", "expected"), LIFE)
def test_the_prior_leads_a_seed_through_its_life(stage, metrics, expected):
    assert next_operation(SeedState(stage=stage, metrics=metrics), SIGNALS, PriorConfig()) == expected


def chosen(policy, stage, signals=SIGNALS, features=frozenset({"seed", "optimizer", "pause"})):
    graph = sample_graph()
    state = packet(stage)
    output = policy.evaluate(graph.fill(state), list(state.seed_states), signals)
    legal = masks.legal(list(state.seed_states), graph.plantable, graph.blendable, features)
    return masks.choose(output.kind, output.operation, output.blueprint, output.schedule, legal)


def test_different_states_lead_to_different_actions():
    policy = Policy.initial()
    germinate = chosen(policy, Stage.SEED_LIFECYCLE_STAGE_DORMANT)
    train = chosen(policy, Stage.SEED_LIFECYCLE_STAGE_GERMINATED)
    nothing = chosen(policy, Stage.SEED_LIFECYCLE_STAGE_FOSSILIZED)
    restless = chosen(
        policy, Stage.SEED_LIFECYCLE_STAGE_FOSSILIZED, replace(SIGNALS, loss_volatility=2.0, steps_since_optimizer=500)
    )
    assert germinate.operation == Operation.SEED_OPERATION_GERMINATE
    assert germinate.blueprint >= 0
    assert train.operation == Operation.SEED_OPERATION_START_TRAINING
    assert (nothing.kind, restless.kind) == (schema.KIND_NONE, schema.KIND_OPTIMIZER)


def test_a_seed_is_blended_only_as_it_may_be():
    graph = sample_graph()
    state = packet(Stage.SEED_LIFECYCLE_STAGE_DORMANT)
    legal = masks.legal(list(state.seed_states), graph.plantable, graph.blendable, frozenset({"seed"}))
    logits = Policy.initial().evaluate(graph.fill(state), list(state.seed_states), SIGNALS)
    for seed, may in enumerate(({"linear"}, {"cosine", "sigmoid"}, set(schema.SCHEDULES), set(schema.SCHEDULES))):
        operation = np.where(np.arange(4)[:, None] == seed, logits.operation, -np.inf)
        for liked in range(4):
            liking = np.eye(4, dtype=np.float32)[liked]
            choice = masks.choose(logits.kind, operation, logits.blueprint, liking, legal)
            assert (choice.seed, schema.SCHEDULES[choice.schedule] in may) == (seed, True)
            assert choice.schedule == liked or schema.SCHEDULES[liked] not in may


def test_an_action_that_the_run_does_not_offer_is_never_chosen():
    assert chosen(Policy.initial(), Stage.SEED_LIFECYCLE_STAGE_DORMANT, features=frozenset()).kind == schema.KIND_NONE


@given(st.lists(st.sampled_from(range(12)), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_whatever_the_logits_the_choice_is_legal(stages, seed):
    draw = np.random.default_rng(seed)
    seeds = [SeedState(stage=stage) for stage in stages]
    blueprints = [candidate("a", ["x"]), candidate("b", ["x"], tier=BlueprintTier.BLUEPRINT_TIER_HIGH_RISK)]
    run_seeds = [RunSeed(seed_id=str(i), site_id="x") for i in range(len(stages))]
    graph = RunGraph({}, [], run_seeds, blueprints)
    legal = masks.legal(seeds, graph.plantable, graph.blendable, frozenset({"seed"}))
    shapes = (4, (len(seeds), schema.OPERATION_COUNT), 2, 4)
    choice = masks.choose(*(draw.normal(size=shape).astype(np.float32) for shape in shapes), legal)
    if choice.kind == schema.KIND_SEED:
        assert choice.operation in masks.LEGAL_OPERATIONS[stages[choice.seed]]
        assert choice.operation != Operation.SEED_OPERATION_GERMINATE or choice.blueprint == 0
    else:
        assert choice.kind == schema.KIND_NONE


def test_the_shipped_policy_is_deterministic_and_says_that_it_is_untrained():
    first, second = Policy.initial(), Policy.initial()
    assert first.digest == second.digest
    assert "heuristic" in first.origin


def graph_of(topology, blueprints=()):
    return RunGraph(topology, sample.sample_sites(), sample.sample_seeds(), blueprints)


def test_extras_with_counts_that_are_no_numbers_are_read():
    extras = {"layers": [{"parameter_count": "many"}, {"parameter_count": None}, {"parameter_count": 3}]}
    blueprint = BlueprintCandidate(blueprint_id="b", descriptor=BlueprintDescriptor(), extras=extras)
    assert graph_of({}, [blueprint]).counts["blueprint"] == 1


def test_a_value_too_large_for_the_network_neither_warns_nor_spoils_the_features():
    topology = {
        "layers": [{"dropout_rate": 1e300}],
        "activations": [{"saturation_rate": -1e308, "gradient_flow": 1e38}],
    }
    state = SystemStatePacket(validation_accuracy=3e38, training_metrics={"loss_delta": -3e38, "loss": 3e38})
    graph, states = graph_of(topology), sample.sample_states(Stage.SEED_LIFECYCLE_STAGE_DORMANT)
    output = Policy.initial().evaluate(graph.fill(state), states, SIGNALS)
    assert output.is_finite


def test_a_huge_topology_makes_a_graph_of_bounded_size():
    topology = {"layers": [{}] * 5000, "activations": [{}] * 5000, "parameters": [{}] * 5000}
    graph = graph_of(topology | {"adjacency": {"layer": [[0, 1]] * 10_000}})
    assert graph.node_count < 1000
    assert graph.edge_count < 100_000
