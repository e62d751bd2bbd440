"""Many runs at a Tamiyo that serves the eager plan: steps that wait together are decided together."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os

import pytest

from esper_client import TamiyoClient
from esper_rpc.identity import SpiffeId
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage, SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import EvaluateStepRequest, ExplainDecisionRequest, OpenRunRequest, Step
from esper_servers.cli.home import Home
from esper_servers.cli.plan import without_plan
from esper_servers.cli.processes import Supervisor
from esper_servers.policy import sample

GERMINATED = SeedLifecycleStage.SEED_LIFECYCLE_STAGE_GERMINATED
TRAINERS, RUNS, MOST_ROUNDS = 4, 16, 50


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    place = Home(tmp_path_factory.mktemp("mesh"))
    place.prepare()
    with Supervisor(place, without_plan(os.environ)):
        yield place


def request_of(run_id, sequence):
    """A step of which no other has the bytes."""
    packet = SystemStatePacket(training_metrics={"loss": 0.5}, seed_states=sample.sample_states(GERMINATED))
    return EvaluateStepRequest(step=Step(run_id=run_id, sequence=sequence, budget_us=5_000_000, packet=packet))


async def opened(client, run_id):
    asked = OpenRunRequest(
        run_id=run_id, protocol_versions=[2], receiver_epoch=bytes(16), features=["seed"],
        sites=sample.sample_sites(), seeds=sample.sample_seeds(),
    )  # fmt: skip
    await client.open_run(asked)


async def ask(home):
    """Let all runs ask at once until some waited for each other; returns requests with their answers, and records."""
    async with contextlib.AsyncExitStack() as stack:
        names = [SpiffeId("trainer", f"t{number}") for number in range(TRAINERS)]
        clients = [
            await stack.enter_async_context(TamiyoClient(home.address("tamiyo"), identity=home.issue_identity(name)))
            for name in names
        ]
        runs = {f"run-{number}": clients[number % TRAINERS] for number in range(RUNS)}
        for run_id, client in runs.items():
            await opened(client, run_id)
        found = []
        for sequence in range(1, MOST_ROUNDS + 1):
            requests = [request_of(run_id, sequence) for run_id in runs]
            answers = await asyncio.gather(
                *(client.evaluate_step(request) for client, request in zip(runs.values(), requests, strict=True))
            )
            found += zip(requests, answers, strict=True)
            if any(answer.decision.ledger.batch_wait_us for answer in answers):
                break
        operator = await stack.enter_async_context(TamiyoClient(home.address("tamiyo"), identity=home.identity()))
        commands = [answer.decision.command.nonce for _, answer in found]
        records = [await operator.explain_decision(ExplainDecisionRequest(command_id=name)) for name in commands]
        return found, [record.evidence for record in records]


def test_runs_that_ask_at_once_share_batches_and_each_gets_the_command_of_its_own_request(home):
    found, evidence = asyncio.run(ask(home))
    for request, answer in found:
        command = answer.decision.command
        assert (command.run_id, command.sequence) == (request.step.run_id, request.step.sequence)
        assert command.request_digest == hashlib.sha256(request.SerializeToString()).digest()
    assert [each.run_id for each in evidence] == [request.step.run_id for request, _ in found]
    assert {each.plan for each in evidence} == {"eager"}
    sizes = [each.batch_size for each in evidence]
    assert max(sizes) > 1
    assert all(
        answer.decision.ledger.batch_wait_us == 0 for (_, answer), size in zip(found, sizes, strict=True) if size == 1
    )
