"""Steps of several runs that are decided in one pass of the policy."""

from __future__ import annotations

import asyncio
import hashlib
import time

import numpy as np
import pytest
from prometheus_client import REGISTRY

from esper_rpc.proto.leyline.v1 import AdaptationCommand, CircuitState
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.tamiyo.v1 import EvaluateStepRequest, EvaluateStepsResponse, Step
from esper_servers.policy.policy import Policy
from esper_servers.tamiyo.turns.step_queue import BatchConfig

STAGE = Stage.SEED_LIFECYCLE_STAGE_GERMINATED
RUNS = ("run", "second", "third", "fourth")
SOON = 10.0


@pytest.fixture
def policy():
    """One for each test, since tests break it."""
    return Policy.initial()


@pytest.fixture
def controller(start, policy):
    """Whose runs have all had their first step."""
    made = start(policy, batch=BatchConfig(most=8))
    for run_id in RUNS[1:]:
        made.open(run_id)
    for run_id in RUNS:
        asyncio.run(ask(made, 1, run_id))
    made.pipeline.report()
    return made


def raw_step(controller, sequence, run_id, loss=0.5, budget_us=5_000_000):
    step = Step(run_id=run_id, sequence=sequence, budget_us=budget_us, packet=controller.packet(STAGE, loss=loss))
    return EvaluateStepRequest(step=step).SerializeToString()


async def ask(controller, sequence, run_id, **fields):
    """The decision on one step."""
    raw = await controller.pipeline.evaluate_in_band(raw_step(controller, sequence, run_id, **fields), controller.owner)
    return EvaluateStepsResponse.FromString(raw).decision


async def begin_together(controller, *asked):
    """Tasks of steps that share a turn, which is about to begin."""
    queue = controller.pipeline.queue
    await queue.take_turn(time.perf_counter(), 1.0)
    tasks = [asyncio.create_task(each) for each in asked]
    async with asyncio.timeout(SOON):
        while len(queue) < len(tasks):
            await asyncio.sleep(0)
    queue.end_turn()
    return tasks


async def ask_together(controller, *asked):
    return await asyncio.wait_for(asyncio.gather(*await begin_together(controller, *asked)), SOON)


def all_runs(controller, sequence=2, **fields):
    return [ask(controller, sequence, run_id, **fields) for run_id in RUNS]


def batch_size(controller, decision):
    controller.pipeline.report()
    return controller.decisions.explain(decision.command.nonce).evidence.batch_size


async def test_steps_that_share_a_turn_are_decided_in_one_pass_and_each_is_bound_to_its_own_request(controller):
    asked = [raw_step(controller, 2, run_id, 0.5 + n / 1000) for n, run_id in enumerate(RUNS)]
    answers = await ask_together(
        controller, *(controller.pipeline.evaluate_in_band(r, controller.owner) for r in asked)
    )
    for raw, answer, run_id in zip(asked, answers, RUNS, strict=True):
        decision = EvaluateStepsResponse.FromString(answer).decision
        assert decision.command.request_digest == hashlib.sha256(raw).digest()
        assert decision.command.run_id == run_id
        assert batch_size(controller, decision) == 4


async def test_what_is_decided_together_is_replayed_alone(controller):
    together = await ask_together(controller, *all_runs(controller))
    controller.pipeline.report()
    for run_id, decision in zip(RUNS, together, strict=True):
        command = AdaptationCommand.FromString(decision.command.payload)
        assert controller.replay.differences(command.command_id) in ([], ["evidence.batch_size: recorded 4, now 1"])
        assert controller.decisions.explain(command.command_id).evidence.run_id == run_id


async def test_the_ledger_tells_what_it_waited_for_the_others(controller, policy, monkeypatch):
    slow = controller.pipeline.runs.find("second").graph
    fill = slow.fill
    monkeypatch.setattr(slow, "fill", lambda packet: (time.sleep(0.1), fill(packet))[1])
    first, second, *_ = await ask_together(controller, *all_runs(controller))
    assert first.ledger.batch_wait_us >= 100_000
    assert first.ledger.batch_wait_us - second.ledger.batch_wait_us >= 50_000
    parts = [field.name for field in first.ledger.DESCRIPTOR.fields if field.name != "total_us"]
    assert sum(getattr(first.ledger, part) for part in parts) <= first.ledger.total_us


async def test_one_slow_member_costs_those_their_answer_whose_budget_it_spends(controller, monkeypatch):
    slow = controller.pipeline.runs.find("second").graph
    fill = slow.fill
    monkeypatch.setattr(slow, "fill", lambda packet: (time.sleep(0.5), fill(packet))[1])
    asked = [ask(controller, 2, run_id, budget_us=400_000 if run_id == "run" else 5_000_000) for run_id in RUNS]
    short, *others = await ask_together(controller, *asked)
    assert short.no_action.reason == "budget_exhausted"
    assert [decision.HasField("command") for decision in others] == [True] * 3


async def test_members_that_do_not_need_the_policy_are_not_waited_for(controller):
    found = await ask_together(
        controller, ask(controller, 2, "run"), ask(controller, 2, "second", loss=float("nan")), ask(controller, 1, "third"),
        ask(controller, 1, "fourth", loss=0.7),
    )  # fmt: skip
    assert batch_size(controller, found[0]) == 1
    assert found[1].ledger.inference_us == 0 < found[1].ledger.total_us
    assert (found[2].sequence, found[3].HasField("error")) == (1, True)


@pytest.mark.parametrize("turns", range(8))
async def test_a_member_whose_caller_goes_away_harms_nobody_and_its_decision_is_kept_if_it_was_begun(controller, turns):
    gone, *others = await begin_together(controller, *all_runs(controller))
    for _ in range(turns):
        await asyncio.sleep(0)
    gone.cancel()
    found = await asyncio.wait_for(asyncio.gather(*others), SOON)
    assert all(decision.HasField("command") for decision in found)
    await asyncio.wait([gone], timeout=SOON)
    run = controller.pipeline.runs.find("run")
    assert run.steps == run.last_sequence
    async with asyncio.timeout(SOON):
        assert (await ask(controller, 2, "run")).HasField("command")


class Failing:
    """Takes the place of a method of the policy, and fails when it is asked about one of these graphs."""

    def __init__(self, method, *graphs):
        self.method, self.graphs, self.calls = method, [graph.inputs for graph in graphs], 0

    def __call__(self, asked, *rest, **keywords):
        self.calls += 1
        asks_about = [each.inputs for each in asked] if isinstance(asked, list) else [asked]
        if any(each is graph for each in asks_about for graph in self.graphs):
            raise RuntimeError("illegal")
        return self.method(asked, *rest, **keywords)


class Counting:
    """Takes the place of a policy's evaluation of many, and keeps how many they were."""

    def __init__(self, policy):
        self.sizes, self._evaluate_many = [], policy.evaluate_many
        policy.evaluate_many = self

    def __call__(self, asked):
        self.sizes.append(len(asked))
        return self._evaluate_many(asked)


def graph_of(controller, run_id):
    return controller.pipeline.runs.find(run_id).graph


async def test_when_a_batch_fails_each_member_is_answered_alone(controller, policy, monkeypatch):
    every = [graph_of(controller, run_id) for run_id in RUNS]
    monkeypatch.setattr(policy, "evaluate_many", Failing(policy.evaluate_many, *every))
    found = await ask_together(controller, *all_runs(controller))
    assert [batch_size(controller, decision) for decision in found] == [1] * 4
    assert controller.pipeline.breaker.consecutive_failures == 0


async def test_a_member_that_fails_alone_too_is_the_only_one_without_an_action(controller, policy, monkeypatch):
    bad = graph_of(controller, "second")
    monkeypatch.setattr(policy, "evaluate_many", Failing(policy.evaluate_many, bad))
    monkeypatch.setattr(policy, "evaluate", Failing(policy.evaluate, bad))
    found = await ask_together(controller, *all_runs(controller))
    assert [decision.no_action.reason for decision in found] == ["", "inference_failed", "", ""]


async def test_a_member_that_is_not_finite_is_the_only_one_without_an_action(controller, policy, monkeypatch):
    compute = policy._eager._compute

    def spoil(heads):
        return heads._replace(risk=heads.risk * np.nan)

    def compute_many(graphs):
        return [spoil(h) if g is bad else h for g, h in zip(graphs, many(graphs), strict=True)]

    bad, many = graph_of(controller, "third").inputs, policy._eager.compute_many
    monkeypatch.setattr(policy._eager, "compute_many", compute_many)
    monkeypatch.setattr(policy._eager, "_compute", lambda i, s: spoil(compute(i, s)) if i is bad else compute(i, s))
    found = await ask_together(controller, *all_runs(controller))
    assert [decision.no_action.reason for decision in found] == ["", "", "inference_failed", ""]
    assert [batch_size(controller, found[n]) for n in (0, 1, 3)] == [4] * 3


async def test_what_a_batch_spoils_is_computed_alone(controller, policy, monkeypatch):
    compute_many = policy._eager.compute_many

    def spoil(graphs):
        first, *others = compute_many(graphs)
        return [first._replace(value=first.value * np.nan), *others]

    monkeypatch.setattr(policy._eager, "compute_many", spoil)
    found = await ask_together(controller, *all_runs(controller))
    assert [batch_size(controller, decision) for decision in found] == [1, 4, 4, 4]


async def test_a_batch_that_fails_for_all_is_one_failure_for_the_breaker(controller, policy, monkeypatch):
    every = [graph_of(controller, run_id) for run_id in RUNS]
    monkeypatch.setattr(policy, "evaluate", Failing(policy.evaluate, *every))
    monkeypatch.setattr(policy, "evaluate_many", Failing(policy.evaluate_many, *every))
    found = await ask_together(controller, *all_runs(controller))
    assert {decision.no_action.reason for decision in found} == {"inference_failed"}
    assert controller.pipeline.breaker.consecutive_failures == 1
    assert controller.pipeline.breaker.state == CircuitState.CIRCUIT_STATE_CLOSED


async def test_members_with_different_policies_are_decided_each_by_its_own(controller, policy):
    successor = Policy.initial(seed=1)
    successor.version = "successor"
    asked_together, asked_successor = Counting(policy), Counting(successor)
    tasks = await begin_together(controller, *all_runs(controller))
    queue = controller.pipeline.queue
    while len(queue):
        await asyncio.sleep(0)
    find = controller.pipeline.runs.find("third").begin_step
    controller.pipeline.runs.find("third").begin_step = lambda: (controller.pipeline.take_up(successor), find())
    found = await asyncio.wait_for(asyncio.gather(*tasks), SOON)
    payloads = [AdaptationCommand.FromString(decision.command.payload) for decision in found]
    assert (asked_together.sizes, asked_successor.sizes) == ([2], [2])
    versions = [payload.annotations["policy_version"] for payload in payloads]
    assert versions == [policy.version] * 2 + ["successor"] * 2


async def test_the_sizes_of_batches_are_counted_by_decision(controller):
    def counted(size):
        return REGISTRY.get_sample_value("esper_decision_batch_size_bucket", {"le": f"{size}.0"}) or 0.0

    before = counted(3), counted(4)
    await ask_together(controller, *all_runs(controller))
    controller.pipeline.report()
    assert (counted(3) - before[0], counted(4) - before[1]) == (0, 4)


async def test_a_batched_decision_whose_outputs_differ_by_more_is_named_when_it_is_replayed(controller):
    found = await ask_together(controller, *all_runs(controller))
    batch_size(controller, found[0])

    def drift(by):
        def edit(record):
            values = np.frombuffer(record.evidence.outputs["risk"].values, "<f4") + np.float32(by)
            record.evidence.outputs["risk"].values = values.tobytes()

        return edit

    near, far = found[0].command.nonce, found[1].command.nonce
    controller.change(near, drift(3e-6))
    controller.change(far, drift(1e-3))
    assert controller.replay.differences(near) == ["evidence.batch_size: recorded 4, now 1"]
    names = {line.partition(":")[0] for line in controller.replay.differences(far)}
    assert {"evidence.batch_size", "evidence.outputs.risk"} <= names


async def test_a_record_from_before_batches_is_replayed_bit_for_bit(controller):
    decision = await ask(controller, 2, "run")
    assert batch_size(controller, decision) == 1
    controller.change(decision.command.nonce, lambda record: record.evidence.ClearField("batch_size"))
    assert controller.replay.differences(decision.command.nonce) == []
