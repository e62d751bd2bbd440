from __future__ import annotations

import hashlib

import orjson
import pytest

from esper_rpc.proto.urza.v1 import BatchGetExtrasResponse, BlueprintExtras
from esper_servers.policy import sample
from esper_servers.policy.graph import RunGraph
from esper_servers.tamiyo.blueprint_cache import BlueprintCache
from esper_servers.urza.seeding import installed_blueprints

ALLOWED = ("seed", "allowed", "parameter")
EXTRAS = {
    "layers": [{"layer_id": "a", "parameter_count": 1000}, {"layer_id": "b", "parameter_count": 24}],
    "parameters": [{"name": "rank", "min": 1, "max": 8, "span": 7, "default": 4}],
    "capabilities": {"allowed_blending_methods": ["CONVEX"]},
}


def graph_with(extras_json):
    """The graph of a host without parameters of its own, and one blueprint that fits each of its four sites."""
    blueprint = next(
        r.blueprint for r in installed_blueprints() if r.blueprint.descriptor.blueprint_id == "lora_linear"
    )
    blueprint.extras_digest = hashlib.sha256(extras_json).digest()
    told = BlueprintExtras(blueprint_id="lora_linear", extras_json=extras_json)
    cache = BlueprintCache()
    cache.replace_with([blueprint], BatchGetExtrasResponse(extras=[told]))
    candidates = cache.candidates(sample.sample_sites())
    topology = {**sample.sample_topology(), "parameters": []}
    return RunGraph(topology, sample.sample_sites(), sample.sample_seeds(), candidates)


def test_the_extras_of_a_blueprint_become_nodes_edges_and_features():
    graph = graph_with(orjson.dumps(EXTRAS))
    assert graph.counts["parameter"] == 1
    assert graph.edges[ALLOWED].T.tolist() == [[seed, 0] for seed in range(4)]
    coverage = graph.coverage()
    assert coverage.types["node.parameter"] == 1.0
    assert "blueprint.parameter_count" not in coverage.features


@pytest.mark.parametrize(
    "extras_json", [b"{}", b"[]", b"\xff", b'{"layers": 7, "parameters": "x", "capabilities": []}']
)
def test_without_extras_there_are_none_of_them_and_nothing_breaks(extras_json):
    graph = graph_with(extras_json)
    assert graph.counts["parameter"] == 0
    assert graph.edges[ALLOWED].shape[1] == 0
    coverage = graph.coverage()
    assert "node.parameter" not in coverage.types
    assert coverage.features["blueprint.parameter_count"] == 0.0
