"""What grows in a seed stands in the graph, as its extras say."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_rpc.proto.leyline.v1 import BlueprintDescriptor, SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import RunSeed, RunSite
from esper_servers.policy import graph as graph_module
from esper_servers.policy import growth
from esper_servers.policy.graph import BlueprintCandidate, RunGraph
from esper_servers.policy.policy import Policy

CONNECTS, MONITORS = ("layer", "connects", "layer"), ("seed", "monitors", "layer")
COMPOSES = ("blueprint", "composes", "layer")
HOST = {
    "layers": [{"layer_id": name, "type": "Linear"} for name in "abc"],
    "activations": [{"activation_id": "host", "type": "ReLU"}],
    "adjacency": {"layer": [[0, 1], [1, 2]]},
}
EXTRAS = {
    "layers": [
        {"layer_id": "down", "type": "Linear", "parameter_count": 64, "activation": "GELU"},
        {"layer_id": "up", "type": "Linear", "parameter_count": 64},
    ],
    "activations": [{"activation_id": "0", "type": "GELU"}],
    "adjacency": {"layer": [["down", "up", 0.5]]},
}


def candidate(extras=EXTRAS, digest=b"", *, risk=0.1, name="lora"):
    return BlueprintCandidate(
        blueprint_id=name, descriptor=BlueprintDescriptor(blueprint_id=name, risk=risk), extras=extras,
        extras_digest=digest, fits=frozenset("b"),
    )  # fmt: skip


def graph_of(attached, *blueprints, topology=HOST, site="b"):
    seeds = [RunSeed(seed_id="s0", site_id=site), RunSeed(seed_id="s1", site_id="c")]
    sites = [RunSite(site_id=site), RunSite(site_id="c")]
    return RunGraph(topology, sites, seeds, blueprints or [candidate()], attached=attached)


def edges(graph, relation):
    return sorted(graph.edges[relation].T.tolist())


def test_a_seed_that_grows_nothing_adds_nothing():
    assert graph_of({}).counts["layer"] == graph_of({"s1": "unknown", "s9": "lora"}).counts["layer"] == 3


def test_layers_that_grow_stand_between_the_layer_of_their_site_and_where_it_leads():
    graph = graph_of({"s0": "lora"})
    assert (graph.counts["layer"], graph.counts["activation"]) == (5, 2)
    assert edges(graph, CONNECTS) == [[0, 1], [1, 2], [1, 3], [3, 4], [4, 2]]
    assert edges(graph, MONITORS) == [[0, 1], [0, 3], [0, 4], [1, 2]]
    assert edges(graph, COMPOSES) == [[0, 1], [0, 3], [0, 4]]
    assert edges(graph, ("layer", "feeds", "activation")) == [[3, 1]]
    shares = graph.coverage().types
    assert {shares[f"edges.{name}"] for name in ("layer_connects", "seed_monitors", "blueprint_composes")} == {1.0}


def test_what_is_told_of_the_edges_of_a_blueprint_is_known():
    graph = graph_of({"s0": "lora"})
    number = graph.edges[CONNECTS].T.tolist().index([3, 4])
    assert graph.inputs.attributes[CONNECTS][number].tolist() == pytest.approx([math.tanh(0.5), 1.0, 0.0, 0.0])


def test_layers_that_grow_have_features_and_the_depth_of_their_site():
    graph = graph_of({"s0": "lora"})
    rows = graph.fill(SystemStatePacket()).features["layer"]
    depth = 2 * 1
    assert rows[3, depth : depth + 2].tolist() == rows[1, depth : depth + 2].tolist() == [0.5, 1.0]
    assert rows[3, depth + 2 : depth + 4].tolist() == pytest.approx([math.log1p(64) / 4, 1.0])


def test_the_same_blueprint_may_grow_in_several_seeds():
    graph = graph_of({"s0": "lora", "s1": "lora"})
    assert graph.counts["layer"] == 7
    assert edges(graph, COMPOSES) == [[0, 1], [0, 3], [0, 4], [0, 5], [0, 6]]
    assert [edge for edge in edges(graph, CONNECTS) if 5 in edge] == [[2, 5], [5, 6]]


@pytest.mark.parametrize(
    ("extras", "layers", "inner"),
    [
        ({}, 0, []),
        ({"layers": 7, "adjacency": 3, "activations": "x"}, 0, []),
        ({"layers": [{}]}, 1, []),
        ({"layers": [{}, {}, "x", {}]}, 3, [[3, 4], [4, 5]]),
        ({"layers": [{}, {}], "adjacency": {"layer": [[0, 9], [1, 0]]}}, 2, [[4, 3]]),
    ],
)
def test_extras_that_tell_little_give_a_chain(extras, layers, inner):
    graph = graph_of({"s0": "lora"}, candidate(extras))
    assert graph.counts["layer"] == 3 + layers
    assert [edge for edge in edges(graph, CONNECTS) if min(edge) >= 3] == inner


def test_a_chain_that_nobody_told_counts_as_untold():
    told = graph_of({"s0": "lora"}).coverage().types["edges.layer_connects"]
    untold = graph_of({"s0": "lora"}, candidate({"layers": [{}, {}]})).coverage().types["edges.layer_connects"]
    assert (told, untold) == (1.0, 0.8)


def test_at_a_site_that_is_no_layer_it_is_joined_with_nothing_but_its_seed():
    graph = graph_of({"s0": "lora"}, site="elsewhere")
    assert edges(graph, CONNECTS) == [[0, 1], [1, 2], [3, 4]]
    assert [layer for seed, layer in edges(graph, MONITORS) if seed == 0][-2:] == [3, 4]


def test_without_a_host_it_stands_behind_the_blank_layer():
    graph = graph_of({"s0": "lora"}, topology={})
    assert graph.counts["layer"] == 3
    assert edges(graph, CONNECTS) == [[1, 2]]
    assert not graph.inputs.features["layer"][0].any()


def test_there_is_room_for_so_many_layers_and_what_has_none_is_left_out_whole(monkeypatch):
    monkeypatch.setattr(graph_module, "MAX_LAYERS", 6)
    graph = graph_of({"s0": "lora", "s1": "small"}, candidate(), candidate({"layers": [{}]}, name="small"))
    assert graph.counts["layer"] == 6
    assert graph_of({"s0": "lora", "s1": "lora"}).counts["layer"] == 5


def test_risk_max_keeps_a_seed_that_grows_something_dangerous_from_what_it_monitors():
    topology = HOST | {"monitored_layers": [[0, 0]], "monitors": {"thresholds": {"risk_max": 0.5}}}
    safe = graph_of({"s0": "lora"}, candidate(risk=0.5), topology=topology)
    dangerous = graph_of({"s0": "lora"}, candidate(risk=0.6), topology=topology)
    assert ([0, 0] in edges(safe, MONITORS), [0, 0] in edges(dangerous, MONITORS)) == (True, False)


def test_a_structure_is_read_once_for_each_digest(monkeypatch):
    asked = []
    read = growth._read
    monkeypatch.setattr(growth, "_read", lambda extras: asked.append(extras) or read(extras))
    for extras, digest in ((EXTRAS, b"first"), (EXTRAS, b"first"), ({"layers": [{}]}, b"second"), (EXTRAS, b"first")):
        graph_of({"s0": "lora"}, candidate(extras, digest))
    assert len(asked) == 2


def test_a_policy_sees_what_grows():
    policy, packet = Policy.initial(), SystemStatePacket(training_metrics={"loss": 0.5})
    bare, grown = (float(policy.compute(graph_of(a).fill(packet)).value) for a in ({}, {"s0": "lora"}))
    assert bare != pytest.approx(grown, abs=1e-4)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 4) | st.floats() | st.sampled_from(["down", "GELU", "layer"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*EXTRAS, "layer_id", "type"]), inner),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(EXTRAS, ANY)), st.booleans())
def test_whatever_extras_say_edges_join_nodes_that_exist(extras, in_both):
    graph = graph_of({"s0": "lora"} | ({"s1": "lora"} if in_both else {}), candidate(extras))
    for (source, _, target), pairs in graph.edges.items():
        assert all(0 <= a < graph.counts[source] and 0 <= b < graph.counts[target] for a, b in pairs.T.tolist())
    assert all(0 <= share <= 1 for share in graph.coverage().types.values())
