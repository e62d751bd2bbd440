"""Tamiyo killed while it writes a dump: before a commit, inside its transaction, and after it."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys

import pytest

from esper_rpc.journal import Journal
from esper_servers.tamiyo.records.dump_journal import DumpJournal

STEPS = 200
PART = 32
# Killing is what a controller does to itself here, at a point that cannot be hit from outside.
CONTROLLER = f"""
import asyncio, json, os, signal, sys, traceback
from pathlib import Path

import structlog

from esper_rpc.journal import Journal
from esper_rpc.proto.leyline.v1 import TelemetryLevel
from esper_rpc.proto.tamiyo.v1 import EvaluateStepsRequest, EvaluateStepsResponse, Step
from esper_rpc.telemetry.events import tell_event
from esper_servers.tamiyo.records import step_dumps
from esper_servers.tamiyo.records.flight_recorder import FlightRecorder

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


def be_a_controller(path):
    recorder, journal = FlightRecorder(), Mortal(Path(path))
    dumps = step_dumps.StepDumps.of(recorder, journal, clock_ns=lambda: 10**18)
    step_dumps.PART_STEPS = {PART}
    for sequence in range(1, {STEPS} + 1):
        request = EvaluateStepsRequest(step=Step(run_id="run", sequence=sequence, budget_us=1)).SerializeToString()
        recorder.note("run", sequence, request, EvaluateStepsResponse().SerializeToString(), "policy-1", 0, False)
    tell_event("tamiyo", "loss_spike", TelemetryLevel.TELEMETRY_LEVEL_ERROR, reason="loss_spike")
    asyncio.run(dumps.catch_up())


# One process for each line, forked: to import takes far longer than to die.
for line in sys.stdin:
    path, death = json.loads(line)
    if pid := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    try:
        be_a_controller(path)
    except BaseException:
        traceback.print_exc()
    os._exit(1)
"""


@pytest.fixture(scope="module")
def die():
    """Runs a controller that kills itself at a commit; returns its exit code."""
    with subprocess.Popen(
        [sys.executable, "-c", CONTROLLER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as nursery:

        def end(path, place, commit):
            nursery.stdin.write(json.dumps([str(path), [place, commit]]) + "\n")
            nursery.stdin.flush()
            return int(nursery.stdout.readline())

        yield end
        nursery.stdin.close()


@pytest.mark.parametrize(
    ("place", "commit", "written"),
    [
        ("before", 1, None),
        ("inside", 1, None),
        ("after", 1, 32),
        ("before", 3, 64),
        ("inside", 3, 64),
        ("after", 3, 96),
    ],
)
def test_a_dump_that_was_cut_short_shows_as_partial_and_its_steps_are_read(die, tmp_path, place, commit, written):
    path = tmp_path / "journal.sqlite"
    assert die(path, place, commit) == -signal.SIGKILL
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    journal = Journal(path)
    dumps, _ = DumpJournal(journal).page(10, "")
    assert [(dump.event, dump.steps, dump.written) for dump in dumps] == (
        [] if written is None else [("loss_spike", STEPS, written)]
    )
    for dump in dumps:
        steps, more = DumpJournal(journal).steps(dump.dump_id, STEPS, "")
        assert ([step.sequence for step in steps], more) == (list(range(1, written + 1)), "")
    journal.close()
