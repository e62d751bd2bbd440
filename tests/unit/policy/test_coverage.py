from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.leyline.v1 import SeedState, SystemStatePacket
from esper_servers.policy import sample, schema
from esper_servers.policy.graph import RunGraph
from esper_servers.policy.vocabularies import ACTIVATION_TYPES, LAYER_TYPES

METRICS = schema.FEATURES["global"][:6]


def sample_graph():
    return RunGraph(sample.sample_topology(), sample.sample_sites(), sample.sample_seeds(), [])


def packet(states=None, **metrics):
    states = sample.sample_states(Stage.SEED_LIFECYCLE_STAGE_DORMANT) if states is None else states
    return SystemStatePacket(training_metrics=metrics, seed_states=states)


def masks(graph, kind):
    return graph.inputs.features[kind][:, 1 : 2 * len(schema.FEATURES[kind]) : 2]


def feature(graph, kind, name):
    """Value and mask of a feature of the first node."""
    place = 2 * schema.FEATURES[kind].index(name)
    value, mask = graph.inputs.features[kind][0, place : place + 2].tolist()
    return value, mask


def test_coverage_is_worked_out_anew_only_when_something_else_is_known():
    graph = sample_graph()
    graph.fill(packet(loss=0.5))
    first = graph.coverage()
    graph.fill(packet(loss=0.7))
    assert graph.coverage() is first
    graph.fill(packet(loss=0.7, gradient_norm=1.0))
    assert graph.coverage().overall > first.overall
    graph.fill(packet(loss=0.5))
    assert graph.coverage().features == first.features


@settings(max_examples=50, deadline=None)
@given(
    metrics=st.dictionaries(st.sampled_from(METRICS), st.sampled_from([0.0, 1.0, math.nan])),
    known=st.sets(st.sampled_from(["gradient_norm", "learning_rate", "risk_score"])),
    layers=st.integers(0, 5),
)
def test_the_shares_are_those_of_the_masks(metrics, known, layers):
    topology = {"layers": [{"type": "Linear", "dropout_rate": 0.1}] * layers, "activations": [{"type": "GELU"}, {}]}
    graph = RunGraph(topology, sample.sample_sites(), sample.sample_seeds(), [])
    states = [SeedState(seed_id="seed-0", **dict.fromkeys(known, 0.5)), SeedState(seed_id="seed-1")]
    graph.fill(packet(states, **metrics))
    coverage, have, total = graph.coverage(), 0.0, 0
    for kind, count in graph.counts.items():
        if not count:
            assert f"node.{kind}" not in coverage.types
            continue
        mask = masks(graph, kind)
        have, total = have + float(mask.sum()), total + mask.numel()
        assert coverage.types[f"node.{kind}"] == pytest.approx(float(mask.mean()), abs=1e-4)
        for name, column in zip(schema.FEATURES[kind], mask.T, strict=True):
            assert coverage.features.get(f"{kind}.{name}", 1.0) == pytest.approx(float(column.mean()), abs=1e-4)
    assert coverage.overall == pytest.approx(have / total, abs=1e-4)


def test_what_a_seed_tells_of_itself_is_a_feature_and_what_it_does_not_is_masked():
    graph = sample_graph()
    told = {"alpha": 0.25, "risk_tolerance": 0.5, "blend_allowed": 1.0}
    stage = Stage.SEED_LIFECYCLE_STAGE_BLENDING
    graph.fill(packet([SeedState(seed_id="seed-0", stage=stage, layer_depth=7, risk_score=0.125, metrics=told)]))
    expected = {"stage": stage / 11, "layer_depth": 0.07, "risk_score": 0.125, **told}
    for name in schema.FEATURES["seed"]:
        known = (pytest.approx(expected[name]), 1.0) if name in expected else (0.0, 0.0)
        assert feature(graph, "seed", name) == known, name
    others = graph.inputs.features["seed"][1 : len(sample.sample_seeds())]
    assert not others.any()
    graph.fill(packet([SeedState(seed_id="seed-0", stage=stage)]))
    known = [name for name in schema.FEATURES["seed"] if feature(graph, "seed", name)[1]]
    assert known == ["stage"]


def test_what_is_least_known_comes_first_and_what_is_known_of_all_is_left_out():
    graph = sample_graph()
    graph.fill(packet(loss=0.5))
    features = graph.coverage().features
    assert list(features.values()) == sorted(features.values())
    assert features["global.gradient_norm"] == 0.0
    assert "global.loss" not in features
    assert "layer.type" not in features


def test_a_graph_of_nothing_knows_nothing():
    graph = RunGraph({}, [], [], [])
    graph.fill(SystemStatePacket())
    coverage = graph.coverage()
    assert coverage.overall == 0.0
    assert {"node.layer", "node.global"} <= set(coverage.types)
    assert len(coverage.features) == len(schema.FEATURES["layer"]) + len(schema.FEATURES["global"])


def test_a_type_is_its_place_in_the_vocabulary_and_one_outside_it_is_masked():
    topology = {"layers": [{"type": "Linear"}], "activations": [{"type": "GELU"}]}
    graph = RunGraph(topology, [], [], [])
    place = (LAYER_TYPES.index("Linear") + 1) / len(LAYER_TYPES)
    assert feature(graph, "layer", "type") == (pytest.approx(place), 1.0)
    place = (ACTIVATION_TYPES.index("GELU") + 1) / len(ACTIVATION_TYPES)
    assert feature(graph, "activation", "type") == (pytest.approx(place), 1.0)


@pytest.mark.parametrize("name", ["MyOwnBlock", "", None, 7, ["Linear"], {}])
def test_a_type_outside_the_vocabulary_is_masked(name):
    graph = RunGraph({"layers": [{"type": name}], "activations": [{"type": name}]}, [], [], [])
    assert feature(graph, "layer", "type") == feature(graph, "activation", "type") == (0.0, 0.0)
    assert graph.coverage().features["layer.type"] == 0.0


def test_types_that_differ_are_seen_as_different():
    values = {feature(RunGraph({"layers": [{"type": name}]}, [], [], []), "layer", "type")[0] for name in LAYER_TYPES}
    assert len(values) == len(LAYER_TYPES)
