"""Tamiyo killed at every commit of the life of a report: before it, inside its transaction, and after it."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys

import pytest

from esper_rpc.journal import Journal
from esper_servers.tamiyo.field_reports.report_journal import ACK, KEPT, REPORT, WINDOW

# Killing is what a controller does to itself here, at a point that cannot be hit from outside.
CONTROLLER = """
import asyncio, json, os, signal, sys, traceback
from pathlib import Path
from types import SimpleNamespace

import structlog

from esper_rpc.journal import Journal
from esper_rpc.proto.leyline.v1 import CommandOutcome, SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import ExplainDecisionResponse, OpenRunRequest, Step, StepLedger
from esper_servers.tamiyo.choosing import Decided
from esper_servers.tamiyo.field_reports.config import ReportConfig
from esper_servers.tamiyo.field_reports.observations import Observations
from esper_servers.tamiyo.field_reports.report_journal import KEPT
from esper_servers.tamiyo.field_reports.reports import FieldReports
from esper_servers.tamiyo.reporting import Reported
from esper_servers.tamiyo.risk.engine import Verdict

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Mortal(Journal):
    commits = 0

    def _commit(self, records):
        self.commits += 1
        if death == ["before", self.commits]:
            die()
        super()._commit(records)
        if death == ["after", self.commits]:
            die()

    def _trim(self, connection):
        if death == ["inside", self.commits]:
            die()
        super()._trim(connection)


async def live(journal, first_epoch, tell):
    observations = Observations()
    reports = FieldReports.of(observations, journal, ReportConfig(), clock_ns=lambda: 10**18)
    for epoch in range(first_epoch, 5):
        outcomes = [CommandOutcome(command_id="c", result=CommandOutcome.RESULT_APPLIED)] if epoch == 0 else []
        packet = SystemStatePacket(current_epoch=epoch, training_metrics={"loss": 1.0 - 0.1 * epoch})
        step = Step(run_id="run", sequence=epoch + 1, packet=packet, outcomes=outcomes)
        run = SimpleNamespace(request=OpenRunRequest(run_id="run", receiver_epoch=bytes(16)))
        verdict = Verdict((True,) * 4, 0, "", 0.0, {})
        observations.note(Reported(step, StepLedger(), "NO_ACTION", Decided(None, ""), run, verdict))
        await reports.catch_up()
        tell(f"epoch {epoch}")
    await reports.acknowledge("fr-synth-c")
    tell("acknowledged")


def be_a_controller(directory, first_epoch, told):
    journal = Mortal(Path(directory) / "journal.sqlite", kept=KEPT)

    def tell(what):
        journal.flush()
        os.write(told, f"{what}\\n".encode())

    if first_epoch == 0:
        decision = ExplainDecisionResponse()
        decision.evidence.run_id = "run"
        journal.append("decision", "c", decision.SerializeToString())
        tell("decided")
    asyncio.run(live(journal, first_epoch, tell))
    journal.close()


for line in sys.stdin:
    directory, first_epoch, death = json.loads(line)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            be_a_controller(directory, first_epoch, writing)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        told = pipe.read().splitlines()
    print(json.dumps([told, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]), flush=True)
"""


@pytest.fixture
def live():
    """Run a controller from an epoch on until it ends or dies; returns what it told and whether it was killed."""
    with subprocess.Popen(
        [sys.executable, "-c", CONTROLLER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as nursery:

        def begin(directory, first_epoch, point="never", commit=0):
            nursery.stdin.write(json.dumps([str(directory), first_epoch, [point, commit]]) + "\n")
            nursery.stdin.flush()
            told, exit_code = json.loads(nursery.stdout.readline())
            assert exit_code in (0, -signal.SIGKILL)
            return told, exit_code != 0

        yield begin
        nursery.stdin.close()


def bodies(directory, kind):
    journal = Journal(directory / "journal.sqlite", kept=KEPT)
    found = [record.body for record in journal.read(kind)]
    journal.close()
    return found


def kill_everywhere(live, directory, point):
    """Yield the directory, and what was told, of a controller killed at each commit in turn."""
    for commit in range(1, 100):
        place = directory / f"{point}-{commit}"
        place.mkdir()
        told, was_killed = live(place, 0, point, commit)
        if not was_killed:
            return
        yield place, told


@pytest.mark.parametrize("point", ["before", "inside", "after"])
def test_what_was_on_the_disk_is_reported_once_wherever_the_controller_was_killed(live, tmp_path, point):
    kills = 0
    for place, told in kill_everywhere(live, tmp_path, point):
        kills += 1
        with sqlite3.connect(place / "journal.sqlite") as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        connection.close()
        # The trainer goes on with the epoch after the last one that was answered, and tells no outcome again.
        next_epoch = sum(line.startswith("epoch") for line in told)
        was_observed = bool(bodies(place, WINDOW)) or bool(bodies(place, REPORT))
        assert was_observed or next_epoch == 0
        live(place, next_epoch)
        assert len(bodies(place, REPORT)) == (was_observed or next_epoch == 0)
        assert len(bodies(place, ACK)) == len(bodies(place, REPORT))
        assert bodies(place, WINDOW) == []
    assert kills >= 4
