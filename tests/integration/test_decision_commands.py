"""esper explain and esper replay against a mesh that runs."""

from __future__ import annotations

import asyncio
import json
import time
import uuid

import pytest
from typer.testing import CliRunner

from esper_client import TamiyoClient
from esper_rpc.journal import Journal, JournalReader
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage, SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import EvaluateStepRequest, ExplainDecisionRequest, OpenRunRequest, Step
from esper_servers.cli import app
from esper_servers.policy import sample
from esper_servers.tamiyo.records.decisions import KIND

GERMINATED = SeedLifecycleStage.SEED_LIFECYCLE_STAGE_GERMINATED


@pytest.fixture(scope="module")
def mesh(shared_mesh):
    return shared_mesh


@pytest.fixture(scope="module")
def command_id(mesh):
    return asyncio.run(decide(mesh.home))


async def decide(home, run_id="run"):
    """Open a run whose seeds are due for training, and ask one step."""
    packet = SystemStatePacket(training_metrics={"loss": 0.5}, seed_states=sample.sample_states(GERMINATED))
    opened = OpenRunRequest(
        run_id=run_id, protocol_versions=[2], receiver_epoch=bytes(16), features=["seed"],
        sites=sample.sample_sites(), seeds=sample.sample_seeds(),
    )  # fmt: skip
    asked = EvaluateStepRequest(step=Step(run_id=run_id, sequence=1, budget_us=5_000_000, packet=packet))
    async with TamiyoClient(home.address("tamiyo"), identity=home.identity("trainer")) as client:
        await client.open_run(opened)
        return (await client.evaluate_step(asked)).decision.command.nonce


async def explained(home, command_id):
    async with TamiyoClient(home.address("tamiyo"), identity=home.identity()) as client:
        return await client.explain_decision(ExplainDecisionRequest(command_id=command_id))


def esper(mesh, *arguments):
    return CliRunner().invoke(app, [*arguments, "--home", str(mesh.home.directory)], obj={})


def test_explain_shows_what_it_was_decided_on(mesh, command_id):
    result = esper(mesh, "explain", command_id)
    assert result.exit_code == 0, result.output
    for title in ("Decision", "Inputs", "Signals", "Remembered before", "Risk", "Policy", "Ledger"):
        assert title in result.stdout
    assert all(
        text in result.stdout
        for text in (
            "START_TRAINING", "loss_trend", "none, seed", "kind: seed", "blending_schedule_end", "gnn_v1", "total_us",
        )
    )  # fmt: skip


def test_explain_as_json_has_the_features_as_numbers(mesh, command_id):
    document = json.loads(esper(mesh, "explain", command_id, "--json").stdout)
    assert document["command"]["command_id"] == command_id
    assert len(document["evidence"]["features"]["seed"]) == sample.SEEDS
    assert len(document["evidence"]["outputs"]["kind"]) == 4
    assert document["ledger"]["total_us"] > 0


async def idle_until_sampled(home):
    """Open a run whose seeds need nothing, and ask the steps up to the first that is recorded."""
    opened = OpenRunRequest(
        run_id="team/idle", protocol_versions=[2], receiver_epoch=bytes(16), features=["pause"],
        sites=sample.sample_sites(), seeds=sample.sample_seeds(),
    )  # fmt: skip
    async with TamiyoClient(home.address("tamiyo"), identity=home.identity("trainer")) as client:
        await client.open_run(opened)
        for sequence in (1, 100):
            packet = SystemStatePacket(training_metrics={"loss": 0.5})
            step = Step(run_id="team/idle", sequence=sequence, budget_us=5_000_000, packet=packet)
            assert (await client.evaluate_step(EvaluateStepRequest(step=step))).decision.HasField("no_action")


def test_a_step_without_a_command_is_explained_and_replayed_by_its_run_and_sequence(mesh):
    asyncio.run(idle_until_sampled(mesh.home))
    result = esper(mesh, "explain", "team/idle/100")
    assert result.exit_code == 0, result.output
    assert all(text in result.stdout for text in ("NO_ACTION", "team/idle", "loss_trend"))
    assert esper(mesh, "replay", "team/idle/100").stdout == "Identical, bit for bit.\n"
    assert "team/idle/1" in esper(mesh, "explain", "team/idle/1").output


def test_replay_is_identical_also_by_a_controller_that_was_killed_and_started_again(mesh, command_id):
    assert esper(mesh, "replay", command_id).stdout == "Identical, bit for bit.\n"
    mesh.services["tamiyo"].process.kill()
    mesh.services["tamiyo"].process.wait()
    mesh.restart("tamiyo")
    result = esper(mesh, "replay", command_id, "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (0, {"identical": True, "differences": []})


def test_a_decision_is_on_the_disk_soon_though_nobody_asks(mesh):
    command_id = asyncio.run(decide(mesh.home, "silent"))
    reader = JournalReader(mesh.home.state_dir("tamiyo") / "journal.sqlite")
    deadline = time.monotonic() + 10
    while reader.find(KIND, command_id) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_replay_names_what_differs_and_exits_with_1(mesh, command_id):
    record = asyncio.run(explained(mesh.home, command_id))
    journal = Journal(mesh.home.state_dir("tamiyo") / "journal.sqlite")
    record.command.target_seed_id, spoilt = "seed-9", str(uuid.uuid4())
    assert journal.keep("decision", spoilt, record.SerializeToString())
    journal.close()
    result = esper(mesh, "replay", spoilt)
    assert result.exit_code == 1
    assert result.stdout == "command.target_seed_id: recorded 'seed-9', now 'seed-0'\n"


@pytest.mark.parametrize("command", ["explain", "replay"])
def test_a_decision_that_was_never_made_is_one_line(mesh, command):
    result = esper(mesh, command, str(uuid.uuid4()))
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert "There is no decision" in result.output
