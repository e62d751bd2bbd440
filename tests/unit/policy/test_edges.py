from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_rpc.proto.leyline.v1 import BlueprintDescriptor
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.tamiyo.v1 import RunSeed, RunSite
from esper_servers.cli.bench import scene
from esper_servers.policy import sample, schema
from esper_servers.policy.graph import BlueprintCandidate, RunGraph
from esper_servers.policy.links import MOST_LINKS

CONNECTS, FEEDBACK = ("layer", "connects", "layer"), ("layer", "feedback", "layer")
MONITORS, ALLOWED = ("seed", "monitors", "layer"), ("seed", "allowed", "parameter")
COMPOSES = ("blueprint", "composes", "layer")
DORMANT, BLENDING = Stage.SEED_LIFECYCLE_STAGE_DORMANT, Stage.SEED_LIFECYCLE_STAGE_BLENDING


def graph_of(topology=(), *, sites=("a", "b"), stages=(DORMANT, DORMANT), blueprints=(), parameters=3):
    """Three layers a, b and c, two parameters, and a seed at each site."""
    document = {
        "layers": [{"layer_id": name} for name in "abc"],
        "parameters": [{"name": f"p{i}"} for i in range(parameters)],
    }
    seeds = [RunSeed(seed_id=f"s{i}", site_id=site, stage=stages[i]) for i, site in enumerate(sites)]
    return RunGraph(document | dict(topology), [RunSite(site_id=site) for site in sites], seeds, blueprints)


def blueprint(*, fits="a", **capabilities):
    extras = {"capabilities": capabilities}
    descriptor = BlueprintDescriptor(blueprint_id="x")
    return BlueprintCandidate(blueprint_id="x", descriptor=descriptor, extras=extras, fits=frozenset(fits))


def edges(graph, relation):
    return graph.edges[relation].T.tolist()


def shares(graph):
    return graph.coverage().types


# connects


def test_layers_are_connected_as_the_topology_says():
    graph = graph_of({"adjacency": {"layer": [[0, 2], [2, 1]]}})
    assert edges(graph, CONNECTS) == [[0, 2], [2, 1]]
    assert edges(graph, FEEDBACK) == [[2, 0], [1, 2]]
    assert (shares(graph)["edges.layer_connects"], shares(graph)["edges.layer_feedback"]) == (1.0, 1.0)


def test_layers_may_be_called_by_name():
    assert edges(graph_of({"adjacency": {"layer": [["a", "c"], ["c", 1], ["a", "x"]]}}), CONNECTS) == [[0, 2], [2, 1]]


@pytest.mark.parametrize(
    "adjacency", [None, 7, True, "chain", {"a": 1}, [], [7, None, {}], [[0, 9], "x", [-1, 0], [True, 2], [0]]]
)
def test_without_a_usable_adjacency_there_is_a_chain_and_it_counts_as_untold(adjacency):
    graph = graph_of({"adjacency": {"layer": adjacency}})
    assert edges(graph, CONNECTS) == [[0, 1], [1, 2]]
    assert (shares(graph)["edges.layer_connects"], shares(graph)["edges.layer_feedback"]) == (0.0, 0.0)


def test_bad_indices_are_ignored_beside_good_ones():
    graph = graph_of({"adjacency": {"layer": [[0, 9], [1, 2], [2.5, 0], [0, -1]]}})
    assert edges(graph, CONNECTS) == [[1, 2]]


def test_a_strength_is_counted_and_changes_no_edge():
    plain = graph_of({"adjacency": {"layer": [[0, 1], [1, 2]]}})
    strong = graph_of({"adjacency": {"layer": [[0, 1, 0.5], [1, 2, "much"]]}})
    assert edges(plain, CONNECTS) == edges(strong, CONNECTS)
    # Of two edges with a strength and a latency each.
    assert (shares(plain)["attributes.layer_connects"], shares(strong)["attributes.layer_connects"]) == (0.0, 0.25)


def told(graph, relation):
    """What is told of each edge, None where it is masked."""
    rows = graph.inputs.attributes[relation].tolist()
    return [[v if known else None for v, known in zip(row[::2], row[1::2], strict=True)] for row in rows]


def test_an_edge_knows_its_strength_and_the_latency_of_its_source_against_the_slowest():
    layers = [{"layer_id": "a", "latency_ms": 1.0}, {"layer_id": "b", "latency_ms": 4.0}, {"layer_id": "c"}]
    graph = graph_of({"layers": layers, "adjacency": {"layer": [[0, 1, 0.5], [1, 2], [2, 0, 9.0]]}})
    expected = [[math.tanh(0.5), 0.25], [None, 1.0], [math.tanh(9.0), None]]
    for relation in (CONNECTS, FEEDBACK):
        assert told(graph, relation) == [pytest.approx(row) for row in expected]


@pytest.mark.parametrize("latency", [-1.0, math.nan, math.inf, "fast", True, None, 0.0])
def test_latencies_that_are_none_are_masked(latency):
    graph = graph_of({"layers": [{"latency_ms": latency}, {}], "adjacency": {"layer": [[0, 1]]}})
    assert told(graph, CONNECTS) == [[None, 0.0 if latency == 0.0 and latency is not False else None]]


def test_of_an_edge_that_is_told_twice_the_first_stands():
    graph = graph_of({"adjacency": {"layer": [[0, 1, 0.5], ["a", "b", 3.0], [0, 1]]}})
    assert edges(graph, CONNECTS) == [[0, 1]]
    assert told(graph, CONNECTS) == [[pytest.approx(math.tanh(0.5)), None]]


# feeds


def test_a_layer_feeds_the_activation_that_it_names():
    layers = [{"activation": "act.1"}, {"activation": "ReLU"}, {"activation": "none"}, {"activation": 3}]
    activations = [{"activation_id": "act.0", "type": "ReLU"}, {"activation_id": "act.1", "type": "GELU"}]
    graph = graph_of({"layers": layers, "activations": activations})
    assert edges(graph, ("layer", "feeds", "activation")) == [[0, 1], [1, 0]]
    assert edges(graph, ("activation", "activates", "layer")) == [[1, 0], [0, 1]]
    assert (shares(graph)["edges.layer_feeds"], shares(graph)["edges.activation_activates"]) == (1.0, 1.0)


# monitors


def test_a_seed_monitors_the_layers_that_the_topology_says():
    graph = graph_of({"monitored_layers": [[0, 1], [0, 2, 0.5], ["s1", "a"]]})
    assert edges(graph, MONITORS) == [[0, 1], [0, 2], [1, 0]]
    assert shares(graph)["edges.seed_monitors"] == 1.0
    assert shares(graph)["attributes.seed_monitors"] == pytest.approx(1 / 3, abs=1e-4)


def test_a_seed_that_the_topology_does_not_name_monitors_the_layer_of_its_site():
    graph = graph_of({"monitored_layers": [[0, 2], [5, 1], [0, 9]]})
    assert edges(graph, MONITORS) == [[0, 2], [1, 1]]
    assert shares(graph)["edges.seed_monitors"] == 1.0


def test_a_site_that_is_no_layer_is_guessed_by_its_place_and_counts_as_untold():
    graph = graph_of(sites=("a", "elsewhere"))
    assert edges(graph, MONITORS) == [[0, 0], [1, 1]]
    assert shares(graph)["edges.seed_monitors"] == 0.5


def test_a_site_stands_for_the_first_layer_within_it():
    layers = {"layers": [{"layer_id": "head"}, {"layer_id": "block.0"}, {"layer_id": "block.1"}]}
    assert edges(graph_of(layers, sites=("block", "bloc")), MONITORS) == [[0, 1], [1, 1]]


def test_the_monitored_layers_of_the_benchmark_are_all_there():
    topology = scene.topology()
    graph = RunGraph(topology, sample.sample_sites(), sample.sample_seeds(), [])
    assert edges(graph, MONITORS) == topology["monitored_layers"]
    assert edges(graph, CONNECTS) == [pair[:2] for pair in topology["adjacency"]["layer"]]


@pytest.mark.parametrize(
    ("monitors", "expected"),
    [
        ({"by_seed_id": {"s1": [2, ["a", 0.5]]}}, [[1, 2], [1, 0], [0, 0]]),
        ({"by_seed_index": {"0": ["c"]}}, [[0, 2], [1, 1]]),
        ({"by_seed_id": {"s0": ["b"]}, "by_seed_index": {"0": ["c"]}}, [[0, 1], [1, 1]]),
        ({"by_seed_id": {"s9": ["b"], "s0": 7}, "by_seed_index": [1]}, [[0, 0], [1, 1]]),
    ],
)
def test_the_layers_that_a_seed_monitors_may_be_listed_by_seed(monitors, expected):
    assert edges(graph_of({"monitors": monitors}), MONITORS) == expected


@pytest.mark.parametrize(
    ("least", "kept"),
    [("BLENDING", [1]), (4, [1]), ("fossilized", []), (0, [0, 1]), ("strange", [0, 1]), (2.5, [0, 1]), (None, [0, 1])],
)
def test_a_seed_that_is_not_far_enough_monitors_only_the_layer_of_its_site(least, kept):
    topology = {"monitored_layers": [[0, 2], [1, 2]], "monitors": {"thresholds": {"stage_min": least}}}
    graph = graph_of(topology, stages=(DORMANT, BLENDING))
    assert [seed for seed, layer in edges(graph, MONITORS) if layer == 2] == kept
    assert {seed for seed, _ in edges(graph, MONITORS)} == {0, 1}


def test_the_weight_of_what_is_monitored_is_known():
    graph = graph_of({"monitored_layers": [[0, 1, 2.0], [1, 2]]})
    assert told(graph, MONITORS) == [[pytest.approx(math.tanh(2.0))], [None]]


# allowed


def test_without_an_allowance_no_seed_may_set_a_parameter():
    graph = graph_of()
    assert edges(graph, ALLOWED) == []
    assert shares(graph)["edges.seed_allowed"] == 0.0


ALLOWANCES = {
    "of the very seed, by name": ({"by_seed_id": {"s1": ["CONVEX"]}}, (DORMANT, DORMANT), [1]),
    "of the very seed, by number": ({"by_seed_index": {"0": ["CONVEX"]}}, (DORMANT, DORMANT), [0]),
    "an empty list of the very seed forbids": (
        {"by_seed_id": {"s0": []}, "allowed_blending_methods": ["CONVEX"]}, (BLENDING, DORMANT), [1],
    ),
    "by stage": ({}, (DORMANT, BLENDING), [1]),
    "a seed that came to its end is not blended": ({}, (Stage.SEED_LIFECYCLE_STAGE_CULLED, DORMANT), []),
    "for all": ({"allowed_blending_methods": ["CONVEX"]}, (DORMANT, DORMANT), [0, 1]),
    "for none": ({"allowed_blending_methods": []}, (DORMANT, DORMANT), []),
    "of the wrong type": ({"by_seed_id": 3, "by_seed_index": {"0": "x"}, "allowed_blending_methods": {}}, (DORMANT, DORMANT), []),
}  # fmt: skip


@pytest.mark.parametrize(("capabilities", "stages", "allowed"), ALLOWANCES.values(), ids=ALLOWANCES.keys())
def test_an_allowance_joins_a_seed_with_every_parameter(capabilities, stages, allowed):
    graph = graph_of({"capabilities": capabilities}, stages=stages)
    assert edges(graph, ALLOWED) == [[seed, parameter] for seed in allowed for parameter in range(3)]
    assert shares(graph)["edges.seed_allowed"] == len(allowed) / 2


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        (["linear", "SIGMOID", 7], [1.0, 0.0, 0.0, 1.0]),
        (["cosine", "unheard of"], [0.0, 1.0, 0.0, 0.0]),
        (["CONVEX"], [None] * 4),
    ],
)
def test_an_allowance_knows_the_methods_that_it_names(methods, expected):
    graph = graph_of({"capabilities": {"by_seed_index": {"1": methods}}}, parameters=2)
    assert told(graph, ALLOWED) == [expected, expected]
    named = [bool(value) for value in expected]
    assert graph.blendable.tolist() == [[True] * 4, named if any(named) else [True] * 4]


def test_what_a_blueprint_allows_holds_where_it_can_grow():
    graph = graph_of(blueprints=[blueprint(allowed_blending_methods=["CONVEX"])])
    assert edges(graph, ALLOWED) == [[0, 0], [0, 1], [0, 2]]


def test_without_parameters_there_is_nothing_to_allow():
    graph = graph_of({"capabilities": {"allowed_blending_methods": ["CONVEX"]}}, parameters=0)
    assert edges(graph, ALLOWED) == []
    assert "edges.seed_allowed" not in shares(graph)


# composes


def test_a_blueprint_composes_the_layers_of_the_sites_that_it_fits():
    graph = graph_of(sites=("b", "elsewhere"), blueprints=[blueprint(fits="b"), blueprint(fits=["elsewhere"])])
    assert edges(graph, COMPOSES) == [[0, 1], [1, 1]]
    assert shares(graph)["edges.blueprint_composes"] == 0.5


# the rest


def test_relations_that_nobody_tells_join_all_nodes_and_count_as_untold():
    graph = RunGraph(sample.sample_topology(), sample.sample_sites(), sample.sample_seeds(), [])
    counts = graph.counts
    for source, name, target in schema.RELATIONS:
        if name in {"feeds", "activates", "configures", "modulates", "tunes"}:
            assert len(edges(graph, (source, name, target))) == counts[source] * counts[target]
            assert shares(graph)[f"edges.{source}_{name}"] == 0.0
        if "global" in {source, target}:
            assert shares(graph)[f"edges.{source}_{name}"] == 1.0


def test_a_relation_of_types_without_nodes_has_no_share():
    graph = RunGraph({}, [], [], [])
    assert set(shares(graph)) == {
        "node.layer", "node.global", "edges.global_influences", "edges.layer_summarises",
    }  # fmt: skip


def test_the_same_topology_gives_the_same_edges():
    topology = {"monitored_layers": [[1, 2]], "capabilities": {"by_seed_id": {"s0": ["CONVEX"]}}}
    first, second = graph_of(topology), graph_of(json.loads(json.dumps(topology)))
    assert all(edges(first, relation) == edges(second, relation) for relation in schema.RELATIONS)


def test_a_topology_may_say_only_so_much():
    told = [*[[0, 1]] * (MOST_LINKS - 1), [0, 2], [1, 1]]
    graph = graph_of({"adjacency": {"layer": told}, "monitored_layers": told})
    assert edges(graph, CONNECTS) == [[0, 1], [0, 2]]
    assert edges(graph, MONITORS) == [[0, 1], [0, 2], [1, 1]]
    assert shares(graph)["edges.seed_monitors"] == 1.0


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.sampled_from(["a", "s0", "0"])),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(["layer", "s0", "0"]), inner)),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "adjacency": st.one_of(JSON, st.fixed_dictionaries({"layer": JSON})),
            "monitored_layers": JSON,
            "monitors": st.one_of(
                JSON,
                st.fixed_dictionaries(
                    {"by_seed_id": JSON},
                    optional={
                        "by_seed_index": JSON,
                        "thresholds": st.one_of(JSON, st.fixed_dictionaries({"stage_min": JSON, "risk_max": JSON})),
                    },
                ),
            ),
            "capabilities": st.one_of(
                JSON,
                st.fixed_dictionaries(
                    {}, optional=dict.fromkeys(("by_seed_id", "by_seed_index", "allowed_blending_methods"), JSON)
                ),
            ),
        },
    )
)
def test_whatever_the_topology_says_edges_join_nodes_that_exist_and_shares_are_shares(topology):
    graph = graph_of(topology)
    for source, name, target in schema.RELATIONS:
        for first, second in edges(graph, (source, name, target)):
            assert 0 <= first < graph.counts[source]
            assert 0 <= second < graph.counts[target]
    assert all(0 <= share <= 1 for share in shares(graph).values())
    assert {seed for seed, _ in edges(graph, MONITORS)} == {0, 1}
