"""esper dumps, and esper explain of a step that only a dump holds, against a mesh that runs."""

from __future__ import annotations

import asyncio
import json
import math
import os
import uuid

import pytest
from typer.testing import CliRunner

from esper_client import TamiyoClient
from esper_rpc.proto.leyline.v1 import SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import EvaluateStepRequest, OpenRunRequest, Step
from esper_servers.cli import app
from esper_servers.cli.home import Home
from esper_servers.cli.processes import Supervisor
from esper_servers.policy import sample

CALM = {"loss": 0.5, "gradient_norm": 1.0, "samples_per_s": 4000.0, "hook_latency_ms": 1.0}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("mesh"))
    home.prepare()
    with Supervisor(home, os.environ) as supervisor:
        asyncio.run(train(home))
        yield supervisor


async def train(home):
    """Take two calm steps, and one whose loss is not a number."""
    opened = OpenRunRequest(
        run_id="team/run", protocol_versions=[2], receiver_epoch=bytes(16), features=["pause"],
        sites=sample.sample_sites(), seeds=sample.sample_seeds(),
    )  # fmt: skip
    async with TamiyoClient(home.address("tamiyo"), identity=home.identity("trainer")) as client:
        await client.open_run(opened)
        for sequence, loss in enumerate((0.5, 0.5, math.nan), 1):
            packet = SystemStatePacket(global_step=sequence, training_metrics=CALM | {"loss": loss})
            step = Step(run_id="team/run", sequence=sequence, budget_us=5_000_000, packet=packet)
            await client.evaluate_step(EvaluateStepRequest(step=step))


def esper(mesh, *arguments):
    return CliRunner().invoke(app, [*arguments, "--home", str(mesh.home.directory)], obj={})


def dump_of(mesh):
    (dump,) = json.loads(esper(mesh, "dumps", "--json").stdout)
    return dump


def test_dumps_lists_what_was_written_down_because_of_which_event(mesh):
    dump = dump_of(mesh)
    assert (dump["reason"], dump["priority"], dump["run"]) == ("loss_not_finite", "HIGH", "team/run")
    assert (dump["steps"], dump["written"], dump["partial"]) == (3, 3, False)
    table = esper(mesh, "dumps")
    assert (table.exit_code, "Dumps" in table.stdout) == (0, True)


def test_show_lists_the_steps_with_what_was_answered(mesh):
    result = esper(mesh, "dumps", "show", dump_of(mesh)["dump"], "--json")
    assert result.exit_code == 0, result.output
    steps = json.loads(result.stdout)
    assert [(step["run"], step["sequence"], step["step"]) for step in steps] == [
        ("team/run", 1, 1), ("team/run", 2, 2), ("team/run", 3, 3),
    ]  # fmt: skip
    assert [step["decision"] for step in steps] == ["NO_ACTION", "NO_ACTION", "PAUSE"]
    assert [bool(step["command"]) for step in steps] == [False, False, True]
    assert steps[2]["reason"] == "loss_not_finite"
    assert all(step["budget_us"] == 5_000_000 and step["total_us"] > 0 for step in steps)


def test_a_step_without_a_record_is_explained_from_the_dump(mesh):
    dump_id = dump_of(mesh)["dump"]
    document = json.loads(esper(mesh, "explain", "team/run/2", "--json").stdout)
    assert document["dump_id"] == dump_id
    assert document["packet"]["training_metrics"] == CALM
    result = esper(mesh, "explain", "team/run/2")
    assert result.exit_code == 0, result.output
    assert all(text in result.stdout for text in ("NO_ACTION", "gradient_norm", "total_us", "none was kept"))
    assert not any(title in result.stdout for title in ("Risk", "Signals", "conservative"))
    refused = esper(mesh, "replay", "team/run/2")
    assert (refused.exit_code, "only request and reply were kept" in refused.output) == (1, True)


def test_a_command_is_explained_by_its_record_also_when_it_is_named_by_its_step(mesh):
    dump_of(mesh)
    document = json.loads(esper(mesh, "explain", "team/run/3", "--json").stdout)
    assert document["evidence"]["run_id"] == "team/run"
    assert "dump_id" not in document


def test_a_dump_that_was_never_written_is_one_line(mesh):
    result = esper(mesh, "dumps", "show", str(uuid.uuid4()))
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert "There is no dump" in result.output
