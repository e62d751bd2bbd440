from __future__ import annotations

import asyncio
import pickle
import time

import orjson
import pytest

from esper_rpc.errors import NotFound, PermissionDenied
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.tamiyo.v1 import EvaluateStepsResponse, OpenRunRequest
from esper_servers.policy import sample
from esper_servers.tamiyo.records.memory import Memory
from esper_servers.tamiyo.step_processes.held_runs import HeldRuns
from esper_servers.tamiyo.step_processes.run_directory import RunDirectory

OWNER = "spiffe://esper/trainer/local"
LOSSES = [0.9, 0.8, 0.85, 0.7, 0.72, 0.6, 0.61, 0.58]


def opening(run_id="run", **fields):
    return OpenRunRequest(
        run_id=run_id, protocol_versions=[2], receiver_epoch=bytes(16), features=["seed", "pause", "optimizer"],
        sites=sample.sample_sites(), seeds=sample.sample_seeds(), host_topology=orjson.dumps(sample.sample_topology()),
        **fields,
    )  # fmt: skip


class Process:
    """A pipeline and the runs that it holds, as of one step process."""

    def __init__(self, controller, directory):
        self.controller, self.pipeline = controller, controller.pipeline
        controller.pipeline.runs.close("run", controller.owner)
        self.runs = HeldRuns(self.pipeline, self.pipeline._blueprints, directory.seen_by)

    async def step(self, sequence, loss=0.5):
        packet = self.controller.packet(Stage.SEED_LIFECYCLE_STAGE_DORMANT, loss=loss, gradient_norm=0.9)
        raw = self.controller.request(sequence, packet)
        return EvaluateStepsResponse.FromString(await self.pipeline.evaluate_in_band(raw, OWNER)).decision

    def run(self):
        return self.pipeline.runs.find("run")


@pytest.fixture
def processes(start, policy, tmp_path):
    """Two that share their runs, and one that stays alone."""
    controllers = [start(policy, tmp_path / name) for name in ("one", "other", "alone")]
    shared = RunDirectory()
    return [Process(c, directory) for c, directory in zip(controllers, [shared, shared, RunDirectory()], strict=True)]


def numbers(decision):
    """What a decision says, without what names it or tells the time."""
    kind = decision.WhichOneof("decision")
    return kind, decision.no_action.reason


async def test_a_run_that_moves_at_every_step_decides_as_one_that_stays(processes):
    one, other, alone = processes
    for process in (one, alone):
        await process.runs.open(opening(), OWNER, protocol_version=2)
    for sequence, loss in enumerate(LOSSES * 6, start=1):
        process = (one, other)[sequence % 2]
        assert numbers(await process.step(sequence, loss)) == numbers(await alone.step(sequence, loss))
        # Memory holds all numbers that a decision depends on and a step changes.
        assert Memory.of(process.run()) == Memory.of(alone.run())
    assert process.run().commands == alone.run().commands > 0
    assert process.run().planted.keys() == alone.run().planted.keys()
    assert (len(one.pipeline.runs), len(other.pipeline.runs)) in ((0, 1), (1, 0))


async def test_the_same_step_asked_again_elsewhere_has_the_same_answer(processes):
    one, other, _ = processes
    await one.runs.open(opening(), OWNER, protocol_version=2)
    packet = one.controller.packet(Stage.SEED_LIFECYCLE_STAGE_GERMINATED, loss=0.5)
    raw = one.controller.request(1, packet)
    assert await one.pipeline.evaluate_in_band(raw, OWNER) == await other.pipeline.evaluate_in_band(raw, OWNER)


async def test_a_run_moves_only_when_its_step_has_ended(processes):
    one, other, _ = processes
    await one.runs.open(opening(), OWNER, protocol_version=2)
    run = one.run()
    run.begin_step()
    moving = asyncio.create_task(other.runs.fetch("run", OWNER))
    async with asyncio.timeout(20):
        while not run.has_left:
            await asyncio.sleep(0)
    run.last_sequence = 7
    assert not moving.done()
    run.end_step()
    await moving
    assert other.run().last_sequence == 7


async def test_a_step_that_waited_while_its_run_left_fetches_it_back(processes):
    one, other, _ = processes
    await one.runs.open(opening(), OWNER, protocol_version=2)
    await one.pipeline.queue.take_turn(time.perf_counter(), 60.0)
    waiting = asyncio.create_task(one.step(1))
    async with asyncio.timeout(20):
        while not len(one.pipeline.queue):
            await asyncio.sleep(0)
    await other.runs.fetch("run", OWNER)
    one.pipeline.queue.end_turn()
    assert (await waiting).WhichOneof("decision") != "error"
    assert one.run().last_sequence == 1
    assert not other.pipeline.runs.holds("run")


async def test_another_identity_gets_nothing_of_it(processes):
    one, other, _ = processes
    await one.runs.open(opening(), OWNER, protocol_version=2)
    with pytest.raises(PermissionDenied):
        await other.runs.open(opening(), "spiffe://esper/trainer/thief", protocol_version=2)
    with pytest.raises(PermissionDenied):
        await other.runs.close("run", "spiffe://esper/trainer/thief")
    assert one.run().owner == OWNER


async def test_a_run_is_closed_wherever_that_is_asked(processes):
    one, other, _ = processes
    await one.runs.open(opening(), OWNER, protocol_version=2)
    assert await other.runs.close("run", OWNER)
    assert not await one.runs.close("run", OWNER)
    with pytest.raises(NotFound):
        await one.runs.fetch("run", OWNER)


async def test_a_run_that_is_opened_anew_starts_anew(processes):
    one, other, _ = processes
    await one.runs.open(opening(), OWNER, protocol_version=2)
    await one.step(1)
    again = opening()
    again.receiver_epoch = bytes(range(16))
    assert await other.runs.open(again, OWNER, protocol_version=2)
    assert other.run().last_sequence == 0


async def test_a_run_that_is_opened_again_elsewhere_goes_on(processes):
    one, other, _ = processes
    assert await one.runs.open(opening(), OWNER, protocol_version=2)
    await one.step(1)
    assert not await other.runs.open(opening(), OWNER, protocol_version=2)
    assert other.run().last_sequence == 1


async def test_what_holds_a_run_back_comes_along(processes):
    one, other, _ = processes
    await one.runs.open(opening(), OWNER, protocol_version=2)
    one.run().mode.enter("outcomes_missing")
    await other.runs.fetch("run", OWNER)
    assert (other.run().mode.enabled, other.run().mode.reason) == (True, "outcomes_missing")


async def test_what_is_carried_can_cross_between_processes(processes):
    one, *_ = processes
    await one.runs.open(opening(), OWNER, protocol_version=2)
    await one.step(1)
    carried = await one.runs.hand_over("run")
    crossed = pickle.loads(pickle.dumps(carried))
    assert (crossed.request, crossed.memory, crossed.last_reply) == (
        carried.request,
        carried.memory,
        carried.last_reply,
    )
    assert await one.runs.hand_over("run") is None
