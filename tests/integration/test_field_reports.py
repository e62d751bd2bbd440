"""Field reports of real processes: listed and acknowledged by hand, and handed to a process that is killed at times."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from esper_client import TamiyoClient, attach, find_mesh
from esper_rpc.proto.leyline.v1 import CommandOutcome, SeedState, SystemStatePacket
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.tamiyo.v1 import (
    AckFieldReportRequest,
    EvaluateStepRequest,
    ListFieldReportsRequest,
    OpenRunRequest,
    PublishHistoryRequest,
    RunSeed,
    RunSite,
    Step,
)
from esper_rpc.testing import TemporaryMesh
from esper_servers.cli import app
from esper_servers.cli.processes import Supervisor

PATIENCE_SECONDS = 40.0
HERE = Path(__file__).parent


class Trainer:
    """A run that applies whatever it is told to."""

    def __init__(self, client, run_id="run"):
        self._client = client
        self._run_id = run_id
        self._sequence = 0

    async def open(self):
        site = RunSite(site_id="layers.0", module_kind="Linear", output_shape=[8], dtype="F32")
        await self._client.open_run(
            OpenRunRequest(
                run_id=self._run_id, protocol_versions=[2], receiver_epoch=bytes(range(16)), features=["seed", "pause"],
                sites=[site], seeds=[RunSeed(seed_id="seed-0", site_id="layers.0")], last_sequence=self._sequence,
            )
        )  # fmt: skip

    async def step(self, epoch, loss, *, applied=(), stage=Stage.SEED_LIFECYCLE_STAGE_FOSSILIZED):
        """Take a step; returns the identifier of the command, empty for none."""
        self._sequence += 1
        packet = SystemStatePacket(
            current_epoch=epoch, training_metrics={"loss": loss, "gradient_norm": 1.2},
            seed_states=[SeedState(seed_id="seed-0", stage=stage)],
        )  # fmt: skip
        outcomes = [CommandOutcome(command_id=each, result=CommandOutcome.RESULT_APPLIED) for each in applied]
        step = Step(run_id=self._run_id, sequence=self._sequence, budget_us=5_000_000, packet=packet, outcomes=outcomes)
        answer = await self._client.evaluate_step(EvaluateStepRequest(step=step), timeout=10.0)
        return answer.decision.command.nonce

    async def obey(self, epoch, loss):
        """Get a command and apply it; returns the identifier of its report."""
        command_id = await self.step(epoch, loss, stage=Stage.SEED_LIFECYCLE_STAGE_GERMINATED)
        assert command_id
        await self.step(epoch, loss, applied=[command_id])
        return f"fr-synth-{command_id}"


async def until(condition):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def esper(home, *arguments):
    result = CliRunner().invoke(app, [*arguments, "--home", str(home.directory)], obj={})
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def pending(mesh):
    with urllib.request.urlopen(f"http://{mesh.addresses['metrics']}/metrics") as answer:
        found = re.search(r"^esper_field_reports_pending (\S+)$", answer.read().decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


async def report_on_one_command(home):
    async with TamiyoClient(home.address("tamiyo"), identity=home.identity("trainer")) as client:
        trainer = Trainer(client, "reported")
        await trainer.open()
        report_id = await trainer.obey(0, 0.5)
        for epoch in (1, 2, 3):
            await trainer.step(epoch, 0.5 - 0.1 * epoch)
    return report_id


@pytest.fixture(scope="module")
def mesh(seeded_home):
    with Supervisor(seeded_home(), dict(os.environ)) as supervisor:
        yield supervisor


def reports_of(home, run_id):
    return [row for row in esper(home, "reports", "--json") if row["run"] == run_id]


async def test_an_operator_lists_a_report_and_acknowledges_it_once_although_tamiyo_is_killed(mesh):
    home, before = mesh.home, pending(mesh)
    report_id = await report_on_one_command(home)
    (row,) = await asyncio.to_thread(reports_of, home, "reported")
    assert (row["report"], row["seed"], row["outcome"], row["epochs"], row["loss_delta"]) == (
        report_id, "seed-0", "SUCCESS", 3, pytest.approx(-0.3, abs=1e-5),
    )  # fmt: skip
    assert pending(mesh) == before + 1
    answer = await asyncio.to_thread(esper, home, "reports", "ack", report_id, "--json")
    assert answer == {"report_id": report_id, "already_acknowledged": False}
    mesh.services["tamiyo"].process.kill()
    mesh.services["tamiyo"].process.wait()
    mesh.restart("tamiyo")
    answer = await asyncio.to_thread(esper, home, "reports", "ack", report_id, "--json")
    assert answer == {"report_id": report_id, "already_acknowledged": True}
    assert await asyncio.to_thread(reports_of, home, "reported") == [row]
    assert pending(mesh) == before


def train(session, model, optimizer, steps):
    """Take steps of a tiny regression; returns the outcomes of commands."""
    found = []
    for _ in range(steps):
        loss = model(torch.randn(4, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found += session.step(loss.detach())
    return found


def test_a_command_that_a_live_model_carried_out_is_reported_after_three_epochs(mesh):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    address = find_mesh({"ESPER_HOME": str(mesh.home.directory)})
    with attach(model, optimizer, mesh=address, run_id="live", step_budget_ms=50.0) as session:
        deadline, applied = time.monotonic() + PATIENCE_SECONDS, []
        while not applied:
            assert time.monotonic() < deadline, dict(session.reasons)
            outcomes = train(session, model, optimizer, 1)
            applied = [each for each in outcomes if each.result == CommandOutcome.RESULT_APPLIED]
        rows = []
        while not rows:
            assert time.monotonic() < deadline, dict(session.reasons)
            session.start_epoch(session.epoch + 1)
            train(session, model, optimizer, 5)
            rows = reports_of(mesh.home, "live")
    assert rows[0]["report"] == f"fr-synth-{applied[0].command_id}"
    assert rows[0]["seed"] == applied[0].seed_id
    assert rows[0]["epochs"] >= 3
    assert rows[0]["outcome"] != "ABORTED"


class Processes:
    """A Tamiyo and the process that takes its reports, each of which can be killed and started again."""

    def __init__(self, directory, stack):
        self.mesh = TemporaryMesh(directory / "mesh")
        for role in ("tamiyo", "simic", "trainer", "operator"):
            self.mesh.identity(role)
        self._stack = stack
        self._state, self._address, self._diary = directory / "state", directory / "address", directory / "diary"
        self._log = directory / "tamiyo.log"
        self._port = 0

    def start_consumer(self):
        process = self._start(
            "field_report_consumer.py", self.mesh.identity_dir("simic"), self._address, self._port, self._diary
        )
        self._port = int(process.stdout.readline())
        return process

    def start_tamiyo(self):
        process = self._start("field_report_tamiyo.py", self.mesh.identity_dir("tamiyo"), self._state, self._port)
        self._address.write_text(json.loads(process.stdout.readline())["address"])
        return process

    def client(self, role):
        return TamiyoClient(self._address.read_text(), identity=self.mesh.identity(role))

    def diary(self):
        return Counter(self._diary.read_text().splitlines() if self._diary.exists() else ())

    def told(self, event):
        """What the controllers logged of a kind, oldest first."""
        lines = (line for line in self._log.read_text().splitlines() if line.startswith("{"))
        return [entry for entry in map(json.loads, lines) if entry.get("event") == event]

    def _start(self, script, *arguments):
        log = self._stack.enter_context(self._log.open("a"))
        command = [sys.executable, str(HERE / script), *map(str, arguments)]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environ)
        self._stack.callback(kill, process)
        return process


def kill(process):
    process.kill()
    process.wait()
    process.stdout.close()


async def test_reports_reach_another_process_once_each_although_both_are_killed(tmp_path):
    with contextlib.ExitStack() as stack:
        processes = Processes(tmp_path, stack)
        consumer = processes.start_consumer()
        tamiyo = processes.start_tamiyo()
        async with processes.client("trainer") as client:
            trainer = Trainer(client)
            await trainer.open()
            first = await trainer.obey(0, 0.6)
            for epoch in (1, 2, 3):
                await trainer.step(epoch, 0.5)
            await until(lambda: processes.diary()[f"acknowledged {first}"])
            kill(consumer)
            second = await trainer.obey(3, 0.5)
            for epoch in (4, 5):
                await trainer.step(epoch, 0.4)
            third = await trainer.obey(5, 0.4)
            await trainer.step(6, 0.3)
            await until(lambda: len(processes.told("field_report_retry")) >= 2)
        kill(tamiyo)
        retries = processes.told("field_report_retry")
        assert [(entry["report_id"], entry["attempt"]) for entry in retries[:2]] == [(second, 2), (second, 3)]
        assert "Nobody takes reports" in retries[0]["error"]

        processes.start_consumer()
        processes.start_tamiyo()
        async with processes.client("trainer") as client:
            trainer = Trainer(client)
            await trainer.open()
            for epoch in (6, 7, 8):
                await trainer.step(epoch, 0.2)
            await until(lambda: processes.diary()[f"acknowledged {third}"])
        await until(lambda: processes.diary()[f"acknowledged {second}"])
        expected = {
            f"{what} {report_id}": 1 for what in ("took", "acknowledged") for report_id in (first, second, third)
        }
        async with processes.client("simic") as simic:
            listed = (await simic.list_field_reports(ListFieldReportsRequest(), timeout=10.0)).reports
            assert [report.report_id for report in listed] == [first, second, third]
            for report in listed:
                answer = await simic.ack_field_report(AckFieldReportRequest(report_id=report.report_id), timeout=10.0)
                assert answer.already_acknowledged
        assert processes.diary() == expected
        synthesised = [entry["report_id"] for entry in processes.told("field_report_synthesised")]
        assert sorted(synthesised) == sorted([first, second, third])
        await history_is_published_when_an_operator_says_so(processes)


async def history_is_published_when_an_operator_says_so(processes):
    async with processes.client("trainer") as client:
        trainer = Trainer(client, "another")
        await trainer.open()
        report_id = await trainer.obey(0, 0.6)
        await trainer.step(3, 0.5)
    async with processes.client("operator") as operator:
        # The chore may have been there first.
        answer = await operator.publish_history(PublishHistoryRequest(), timeout=10.0)
        assert (answer.telemetry_packets, answer.field_reports) in {(0, 0), (0, 1)}
    await until(lambda: processes.diary()[f"acknowledged {report_id}"])
