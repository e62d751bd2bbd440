"""Where the policy runs: on the loop while turns are short, beside it when they are long."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import time

import pytest
from grpc import StatusCode

from esper_rpc.proto.leyline.v1 import AdaptationCommand
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.tamiyo.v1 import EvaluateStepRequest, EvaluateStepsResponse, Step
from esper_servers.tamiyo.giving_way import SWITCH_SECONDS, giving_way
from esper_servers.tamiyo.turns import step_queue

STAGE = Stage.SEED_LIFECYCLE_STAGE_GERMINATED
SOON = 10.0


class Native:
    """A policy that leaves the interpreter to others, and works until it is told to finish."""

    def __init__(self, policy, version="native-1"):
        self._policy = policy
        self.version, self.digest, self.prior, self.plan = version, policy.digest, policy.prior, "compiled"
        self.begun, self.may_finish = threading.Event(), threading.Event()
        self.threads = []
        self.fails = False

    def can_share(self, _inputs):
        return False

    def can_run_beside(self, _inputs):
        return True

    def evaluate(self, *arguments, beside=False):
        self.threads.append(threading.get_ident())
        self.begun.set()
        if beside:
            assert self.may_finish.wait(SOON)
        if self.fails:
            raise RuntimeError("native")
        return self._policy.evaluate(*arguments)


@pytest.fixture
def long_turns(monkeypatch):
    monkeypatch.setattr(step_queue, "LONG_TURN_SECONDS", -1.0)


@pytest.fixture
def short_turns(monkeypatch):
    monkeypatch.setattr(step_queue, "LONG_TURN_SECONDS", math.inf)


@pytest.fixture
def native(policy):
    made = Native(policy)
    yield made
    made.may_finish.set()


@pytest.fixture
def controller(start, native):
    made = start(native)
    made.open("other")
    return made


@pytest.fixture
def pipeline(controller):
    return controller.pipeline


async def ask(controller, sequence, run_id="run", budget_us=5_000_000):
    """The decision on one step."""
    step = Step(run_id=run_id, sequence=sequence, budget_us=budget_us, packet=controller.packet(STAGE, loss=0.5))
    raw = EvaluateStepRequest(step=step).SerializeToString()
    answer = await controller.pipeline.evaluate_in_band(raw, controller.owner)
    return EvaluateStepsResponse.FromString(answer).decision


async def ask_in_a_crowd(controller, *asked):
    """Tasks of steps that all wait, then one after the other have their turns."""
    queue = controller.pipeline.queue
    await queue.take_turn(time.perf_counter(), 1.0)
    tasks = [asyncio.create_task(ask(controller, *each)) for each in asked]
    await until(lambda: len(queue) == len(tasks))
    queue.end_turn()
    return tasks


async def until(condition):
    async with asyncio.timeout(SOON):
        while not condition():
            await asyncio.sleep(0)


@pytest.mark.usefixtures("short_turns")
async def test_short_turns_are_spared_the_hop_to_another_thread(controller, native):
    tasks = await ask_in_a_crowd(controller, (1,), (2,), (3,))
    assert [(await task).HasField("command") for task in tasks] == [True] * 3
    assert set(native.threads) == {threading.get_ident()}


@pytest.mark.usefixtures("long_turns")
async def test_while_turns_are_long_the_loop_is_free_to_refuse_at_once(controller, native):
    first, second = await ask_in_a_crowd(controller, (1,), (2,))
    await until(native.begun.is_set)
    refused = await ask(controller, 3, budget_us=1_000)
    assert refused.error.code == StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert not first.done()
    native.may_finish.set()
    assert [(await task).sequence for task in (first, second)] == [1, 2]
    assert threading.get_ident() not in native.threads


@pytest.fixture
def eager(start, policy):
    return start(policy)


@pytest.mark.usefixtures("long_turns")
async def test_the_eager_plan_keeps_to_the_loop(eager, policy):
    found = []
    evaluate = policy.evaluate
    policy.evaluate = lambda *arguments: (found.append(threading.get_ident()), evaluate(*arguments))[1]
    try:
        await asyncio.gather(*await ask_in_a_crowd(eager, (1,), (2,)))
    finally:
        del policy.evaluate
    assert found == [threading.get_ident()] * 2


@pytest.mark.usefixtures("long_turns")
async def test_a_policy_that_is_taken_up_meanwhile_decides_from_the_next_step_on(controller, native, policy):
    tasks = await ask_in_a_crowd(controller, (1,), (2,))
    await until(native.begun.is_set)
    successor = Native(policy, version="native-2")
    successor.may_finish.set()
    controller.pipeline.take_up(successor)
    native.may_finish.set()
    payloads = [AdaptationCommand.FromString((await task).command.payload) for task in tasks]
    assert [payload.annotations["policy_version"] for payload in payloads] == ["native-1", "native-2"]


@pytest.mark.usefixtures("long_turns")
async def test_what_a_replaced_policy_does_wrong_is_not_held_against_its_successor(controller, native, policy):
    first, second = await ask_in_a_crowd(controller, (1,), (2,))
    await until(native.begun.is_set)
    successor = Native(policy, version="native-2")
    successor.may_finish.set()
    controller.pipeline.take_up(successor)
    native.fails = True
    native.may_finish.set()
    assert (await first).no_action.reason == "inference_failed"
    assert controller.pipeline.breaker.consecutive_failures == 0
    assert (await second).HasField("command")


@pytest.mark.usefixtures("long_turns")
async def test_a_decision_is_finished_for_whoever_asks_again_though_its_caller_left(controller, native):
    gone, other = await ask_in_a_crowd(controller, (1,), (1, "other"))
    await until(native.begun.is_set)
    gone.cancel()
    await asyncio.sleep(0)
    assert not other.done()
    native.may_finish.set()
    await asyncio.wait([gone], timeout=SOON)
    assert (await other).HasField("command")
    run = controller.pipeline.runs.get("run", controller.owner)
    assert (run.steps, run.last_sequence) == (1, 1)
    assert (await ask(controller, 1)).HasField("command")
    assert run.steps == 1


async def test_the_interpreter_changes_hands_quickly_until_the_last_who_gives_way_is_done():
    usual = sys.getswitchinterval()
    first, second = giving_way(), giving_way()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
    second.__exit__(None, None, None)
    assert sys.getswitchinterval() == pytest.approx(usual)
