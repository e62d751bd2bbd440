"""A library that is slow or silent costs a step nothing, and is told with priority HIGH."""

from __future__ import annotations

import asyncio
import time

import pytest
import structlog

from esper_client import UrzaClient
from esper_rpc.journal import Journal
from esper_rpc.proto.leyline.v1 import SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import EvaluateStepRequest, EvaluateStepsResponse, OpenRunRequest, Step
from esper_rpc.proto.urza.v1 import urza_service_pb2
from esper_rpc.testing import serving
from esper_servers.policy import sample
from esper_servers.policy.policy import Policy
from esper_servers.tamiyo import blueprint_cache
from esper_servers.tamiyo.blueprint_cache import BlueprintCache
from esper_servers.tamiyo.conservative_mode import ConservativeMode
from esper_servers.tamiyo.pipeline import StepPipeline
from esper_servers.tamiyo.records.decisions import DecisionLog
from esper_servers.tamiyo.run_state import Runs
from esper_servers.urza.library import BlueprintLibrary
from esper_servers.urza.seeding import installed_blueprints
from esper_servers.urza.service import UrzaServicer

URZA = urza_service_pb2.DESCRIPTOR.services_by_name["UrzaService"]
OWNER = "spiffe://esper/trainer/local"
METHODS = ("ListBlueprints", "BatchGetExtras")


class SlowUrza(UrzaServicer):
    """Does not answer the method it is silent about, and counts what it is asked."""

    silent_about = ""

    def __init__(self, library):
        super().__init__(library)
        self.asked = dict.fromkeys(METHODS, 0)

    async def ListBlueprints(self, request, call):
        await self._wait("ListBlueprints")
        return await super().ListBlueprints(request, call)

    async def BatchGetExtras(self, request, call):
        await self._wait("BatchGetExtras")
        return await super().BatchGetExtras(request, call)

    async def _wait(self, method):
        self.asked[method] += 1
        if self.silent_about == method:
            await asyncio.Event().wait()


@pytest.fixture
def library(tmp_path):
    opened = BlueprintLibrary(tmp_path / "urza")
    for request in installed_blueprints():
        opened.save(request.blueprint, request.extras_json)
    yield opened
    opened.close()


@pytest.fixture
async def slow(mesh, library):
    servicer = SlowUrza(library)
    async with serving(mesh.identity("urza"), (URZA, servicer)) as server:
        async with UrzaClient(server.address, identity=mesh.identity("tamiyo")) as client:
            yield servicer, client


@pytest.fixture
def pipeline(mesh, tmp_path):
    journal = Journal(tmp_path / "journal.sqlite")
    made = StepPipeline(
        policy=Policy.initial(), runs=Runs(), blueprints=BlueprintCache(), keyring=mesh.keyring("tamiyo"),
        decisions=DecisionLog(journal), mode=ConservativeMode(),
    )  # fmt: skip
    made.runs.open(OpenRunRequest(run_id="run", sites=sample.sample_sites(), seeds=sample.sample_seeds()), OWNER, [], 0)
    yield made
    journal.close()


async def decide(pipeline, sequence):
    packet = SystemStatePacket(training_metrics={"loss": 0.5})
    step = Step(run_id="run", sequence=sequence, budget_us=1_000_000, packet=packet)
    raw = await pipeline.evaluate_in_band(EvaluateStepRequest(step=step).SerializeToString(), OWNER)
    return EvaluateStepsResponse.FromString(raw).decision


@pytest.mark.parametrize("method", METHODS)
async def test_steps_are_decided_while_it_is_silent(slow, pipeline, method, monkeypatch):
    for budget in ("CATALOGUE_SECONDS", "EXTRAS_SECONDS"):
        monkeypatch.setattr(blueprint_cache, budget, 60.0)
    servicer, client = slow
    servicer.silent_about = method
    asking = asyncio.create_task(pipeline._blueprints.refresh(client))
    while not servicer.asked[method]:
        await asyncio.sleep(0)
    decisions = [await decide(pipeline, sequence) for sequence in range(1, 4)]
    assert not asking.done()
    assert [decision.no_action.reason for decision in decisions] == ["nominal"] * 3
    asking.cancel()
    await asyncio.wait([asking])


@pytest.mark.parametrize(
    ("method", "budget"),
    [("ListBlueprints", blueprint_cache.CATALOGUE_SECONDS), ("BatchGetExtras", blueprint_cache.EXTRAS_SECONDS)],
)
async def test_it_is_waited_for_as_long_as_its_budget_and_an_event_tells_when_that_is_over(slow, method, budget):
    servicer, client = slow
    servicer.silent_about = method
    await BlueprintCache().refresh(client)  # Connects.
    begun = time.monotonic()
    with structlog.testing.capture_logs() as logs:
        assert not await BlueprintCache().refresh(client)
    assert 0.9 * budget < time.monotonic() - begun < budget + 1.0
    (event,) = logs
    assert (event["event"], event["reason"], event["priority"]) == ("timeout_urza", "DEADLINE_EXCEEDED", "HIGH")
    assert event["metadata_timeout_budget_ms"] == pytest.approx(budget * 1000)


async def test_what_is_known_stays_until_it_answers_again(slow, library):
    servicer, client = slow
    cache = BlueprintCache()
    while not await cache.refresh(client):
        pass
    known, version = len(cache), cache.version
    servicer.silent_about = "ListBlueprints"
    assert not await cache.refresh(client)
    assert (len(cache), cache.version) == (known, version)
    servicer.silent_about = ""
    blueprint = next(iter(installed_blueprints())).blueprint
    blueprint.descriptor.blueprint_id = "another"
    library.save(blueprint, b"{}")
    while not await cache.refresh(client):
        pass
    assert (len(cache), cache.version) == (known + 1, version + 1)


async def test_extras_are_asked_for_only_when_something_changed(slow):
    servicer, client = slow
    cache = BlueprintCache()
    while not await cache.refresh(client):
        pass
    asked = servicer.asked["BatchGetExtras"]
    assert await cache.refresh(client)
    assert servicer.asked["BatchGetExtras"] == asked
