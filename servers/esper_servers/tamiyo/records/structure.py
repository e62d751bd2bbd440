from __future__ import annotations

import hashlib

import orjson

from esper_rpc.proto.tamiyo.v1 import GraphBlueprint, GraphSeed, OpenRunRequest, RunSeed, RunSite, RunStructure
from esper_servers.policy.graph import BlueprintCandidate, RunGraph
from esper_servers.tamiyo.run_state import RunState, build_graph


def write_structure(request: OpenRunRequest, graph: RunGraph) -> bytes:
    """Write what a graph was built from; the same graph gives the same bytes."""
    return RunStructure(
        host_topology=request.host_topology,
        site_ids=[site.site_id for site in request.sites],
        seeds=[GraphSeed(seed_id=seed.seed_id, site_id=seed.site_id, stage=seed.stage) for seed in request.seeds],
        features=sorted(request.features),
        blueprints=[_write_blueprint(candidate) for candidate in graph.blueprints],
        attached=graph.attached,
    ).SerializeToString(deterministic=True)


def digest_of(structure: bytes) -> bytes:
    """Return the name under which a structure is kept."""
    return hashlib.sha256(structure).digest()


def run_of(structure: RunStructure, run_id: str) -> RunState:
    """Build a run with the graph of a structure, as it was before its first step."""
    request = OpenRunRequest(
        run_id=run_id,
        features=structure.features,
        host_topology=structure.host_topology,
        sites=[RunSite(site_id=site_id) for site_id in structure.site_ids],
        seeds=[RunSeed(seed_id=seed.seed_id, site_id=seed.site_id, stage=seed.stage) for seed in structure.seeds],
    )
    blueprints = [_read_blueprint(blueprint) for blueprint in structure.blueprints]
    graph = build_graph(request, blueprints, None, structure.attached)
    return RunState(request, "", graph, 0)


def _write_blueprint(candidate: BlueprintCandidate) -> GraphBlueprint:
    return GraphBlueprint(
        descriptor=candidate.descriptor,
        extras_json=orjson.dumps(candidate.extras),
        extras_digest=candidate.extras_digest,
        fits=sorted(candidate.fits),
        hazard_band=candidate.hazard_band,
        handling_class=candidate.handling_class,
        bsds_risk=candidate.bsds_risk,
    )


def _read_blueprint(blueprint: GraphBlueprint) -> BlueprintCandidate:
    return BlueprintCandidate(
        blueprint_id=blueprint.descriptor.blueprint_id,
        descriptor=blueprint.descriptor,
        extras=orjson.loads(blueprint.extras_json),
        extras_digest=blueprint.extras_digest,
        fits=frozenset(blueprint.fits),
        hazard_band=blueprint.hazard_band,
        handling_class=blueprint.handling_class,
        bsds_risk=blueprint.bsds_risk if blueprint.HasField("bsds_risk") else None,
    )
