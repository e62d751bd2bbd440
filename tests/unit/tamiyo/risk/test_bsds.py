from __future__ import annotations

import math

import orjson
import pytest

from esper_rpc.proto.leyline.v1 import BlueprintDescriptor, BlueprintTier, HandlingClass, HazardBand, SeedState
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.leyline.v1 import SeedOperation as Operation
from esper_rpc.proto.tamiyo.v1 import RunSeed
from esper_rpc.proto.urza.v1 import BatchGetExtrasResponse, Blueprint, BlueprintExtras
from esper_servers.policy import masks
from esper_servers.policy.graph import BlueprintCandidate, RunGraph
from esper_servers.tamiyo.blueprint_cache import BlueprintCache
from esper_servers.tamiyo.risk.bsds import Sheet, read_sheet

HIGH, CRITICAL = HazardBand.HAZARD_BAND_HIGH, HazardBand.HAZARD_BAND_CRITICAL
STANDARD, QUARANTINE = HandlingClass.HANDLING_CLASS_STANDARD, HandlingClass.HANDLING_CLASS_QUARANTINE


@pytest.mark.parametrize(
    ("extras", "sheet"),
    [
        ({}, Sheet()),
        (
            {"bsds": {"hazard_band": "HIGH", "handling_class": "quarantine", "risk_score": 0.7}},
            Sheet(HIGH, QUARANTINE, 0.7),
        ),
        ({"bsds": {"hazard_band": "HAZARD_BAND_CRITICAL", "handling_class": 1}}, Sheet(CRITICAL, STANDARD)),
        (
            {"bsds_hazard_band": "CRITICAL", "bsds_handling_class": "STANDARD", "bsds_risk": 1},
            Sheet(CRITICAL, STANDARD, 1),
        ),
        ({"bsds": {"hazard_band": "EXTREME", "handling_class": 99, "risk_score": 7}}, Sheet()),
        ({"bsds": {"hazard_band": [], "handling_class": None, "risk_score": math.nan}}, Sheet()),
        ({"bsds": "HIGH", "bsds_risk": "0.5"}, Sheet()),
    ],
    ids=["none", "names", "full name and number", "flat", "undefined", "other types", "no table"],
)
def test_a_sheet_is_read_and_what_is_odd_is_neutral(extras, sheet):
    assert read_sheet(extras) == sheet


def test_the_catalogue_takes_the_sheet_from_the_extras():
    cache = BlueprintCache()
    extras = orjson.dumps({"bsds": {"hazard_band": "HIGH", "risk_score": 0.9}})
    blueprint = Blueprint(descriptor=BlueprintDescriptor(blueprint_id="b", risk=0.1))
    cache.replace_with(
        [blueprint], BatchGetExtrasResponse(extras=[BlueprintExtras(blueprint_id="b", extras_json=extras)])
    )
    [(_, candidate)] = cache._entries
    assert (candidate.hazard_band, candidate.risk) == (HIGH, pytest.approx(0.9))


@pytest.mark.parametrize(
    ("fields", "free"),
    [
        ({}, True),
        ({"hazard_band": HazardBand.HAZARD_BAND_MEDIUM, "handling_class": STANDARD}, True),
        ({"hazard_band": HIGH}, False),
        ({"hazard_band": CRITICAL}, False),
        ({"handling_class": QUARANTINE}, False),
    ],
)
def test_a_blueprint_with_a_bad_sheet_is_not_planted(fields, free):
    descriptor = BlueprintDescriptor(tier=BlueprintTier.BLUEPRINT_TIER_SAFE)
    candidate = BlueprintCandidate(blueprint_id="b", descriptor=descriptor, fits=frozenset({"site"}), **fields)
    seed = SeedState(seed_id="s", stage=Stage.SEED_LIFECYCLE_STAGE_DORMANT)
    graph = RunGraph({}, [], [RunSeed(seed_id="s", site_id="site")], [candidate])
    legal = masks.legal([seed], graph.plantable, graph.blendable, frozenset({"seed"}))
    assert legal.operation[0, Operation.SEED_OPERATION_GERMINATE] == free
