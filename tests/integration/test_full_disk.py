"""A disk without room, permission or sound files: at the start, and while a service runs.

A limit on the size of files stands for the full disk: it needs no privilege and can be set on a running process.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import time

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from esper_client import UrzaClient
from esper_rpc import errors
from esper_rpc.audit import AuditLog
from esper_rpc.journal import Journal
from esper_rpc.proto.leyline.v1 import TelemetryLevel
from esper_rpc.proto.tamiyo.v1 import EvaluateStepsRequest, Step
from esper_rpc.proto.urza.v1 import (
    Blueprint,
    GetBlueprintRequest,
    KernelHeader,
    SaveBlueprintRequest,
    UploadKernelRequest,
)
from esper_rpc.telemetry import shared_files
from esper_rpc.telemetry.events import tell_event
from esper_rpc.testing import FakeClock
from esper_servers.cli.home import Home
from esper_servers.cli.processes import cli_command, end
from esper_servers.tamiyo.records.dump_journal import DumpJournal
from esper_servers.tamiyo.records.flight_recorder import FlightRecorder
from esper_servers.tamiyo.records.step_dumps import LEAST_SECONDS, StepDumps

ROOM = resource.RLIM_INFINITY
NO_ROOM = 2048
SERVICES = [("urza", ()), ("tamiyo", ("--urza", "127.0.0.1:1"))]
KERNEL = os.urandom(100_000)


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path / "mesh")
    home.prepare()
    return home


def start(home, service, *options, room=ROOM):
    command = [*cli_command(), "serve", service, "--home", str(home.directory), *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Python 3.11 leaves bytecode behind that is cut short where there is no room.
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY)),
    )  # fmt: skip


def last_words(process):
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in stderr
    return stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("room", [0, NO_ROOM])
@pytest.mark.parametrize(("service", "options"), SERVICES)
def test_a_service_does_not_start_on_a_full_disk_and_names_the_directory(home, service, options, room):
    words = last_words(start(home, service, *options, room=room))
    assert str(home.state_dir(service)) in words
    assert "free space or permit writing" in words
    assert not list(home.state_dir(service).iterdir())


def test_a_service_with_no_room_for_its_metrics_names_its_state_directory_too(home, monkeypatch):
    home.metrics_dir.mkdir(parents=True)
    monkeypatch.setenv(shared_files.DIRECTORY_VARIABLE, str(home.metrics_dir))
    assert str(home.state_dir("urza")) in last_words(start(home, "urza", room=NO_ROOM))
    assert not list(home.metrics_dir.iterdir())


@pytest.mark.parametrize(("service", "options"), SERVICES)
def test_a_service_does_not_start_where_it_may_not_write(home, service, options):
    (home.directory / "state").symlink_to("/proc")  # Nobody makes a directory there, root neither.
    words = last_words(start(home, service, *options))
    assert str(home.state_dir(service)) in words
    assert "name another one" in words


@pytest.mark.parametrize(("service", "options"), SERVICES)
def test_a_service_does_not_start_where_it_may_not_write_its_audit_log(home, service, options):
    (home.directory / "logs").symlink_to("/proc")
    words = last_words(start(home, service, *options))
    assert f"The directory {home.directory / 'logs'} cannot be written" in words


@pytest.mark.parametrize(("service", "file"), [("urza", "library.sqlite"), ("tamiyo", "journal.sqlite")])
def test_a_service_whose_database_is_damaged_says_which_and_does_not_start(home, service, file):
    database = home.state_dir(service) / file
    database.parent.mkdir(parents=True)
    database.write_bytes(b"no database" * 1000)
    words = last_words(start(home, service, *dict(SERVICES)[service]))
    assert words.startswith(f"esper: The database {database} cannot be opened (file is not a database); move it away")


@pytest.fixture
def urza(home):
    process = start(home, "urza")
    yield process, json.loads(process.stdout.readline())["address"]
    end(process)
    process.stderr.close()


def save(blueprint_id, weights=b""):
    blueprint = Blueprint()
    blueprint.descriptor.blueprint_id = blueprint_id
    blueprint.descriptor.name = blueprint_id
    blueprint.manifest.factory = "residual_mlp"
    blueprint.manifest.weights_sha256 = hashlib.sha256(weights).digest() if weights else b""
    return SaveBlueprintRequest(blueprint=blueprint, extras_json=b"{}")


async def upload(client, blueprint_id):
    async def parts():
        yield UploadKernelRequest(
            header=KernelHeader(
                blueprint_id=blueprint_id, size_bytes=len(KERNEL), sha256=hashlib.sha256(KERNEL).digest()
            )
        )
        yield UploadKernelRequest(chunk=KERNEL)

    return await client.upload_kernel(parts())


async def test_a_library_whose_disk_fills_up_says_so_serves_on_and_recovers(home, urza):
    process, address = urza
    async with UrzaClient(address, identity=home.identity("operator")) as client:
        await client.save_blueprint(save("before", KERNEL))
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (NO_ROOM, resource.RLIM_INFINITY))
        with pytest.raises(errors.ResourceExhausted, match="free space"):
            await client.save_blueprint(save("during"))
        with pytest.raises(errors.ResourceExhausted, match="Nothing was kept"):
            await upload(client, "before")
        assert not [f for f in (home.state_dir("urza") / "kernels").rglob("*") if f.is_file()]
        assert (await client.get_blueprint(GetBlueprintRequest(blueprint_id="before"))).blueprint.descriptor.name
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))
        await client.save_blueprint(save("during"))
        await upload(client, "before")


def test_a_journal_without_room_drops_counts_says_so_once_and_goes_on(tmp_path):
    journal = Journal(tmp_path / "journal.sqlite")
    journal.append("decision", "before", b"x")
    journal.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (NO_ROOM, resource.RLIM_INFINITY))
    try:
        with capture_logs() as told:
            for number in range(20):
                journal.append("decision", str(number), b"x" * 4096)
                journal.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))
    journal.append("decision", "after", b"x")
    journal.flush()
    assert journal.dropped == 20
    assert [record.key for record in journal.read("decision")] == ["before", "after"]
    journal.close()
    assert [entry["event"] for entry in told] == ["journal_write_failed"]


def test_appending_never_waits_for_a_disk_that_fails(tmp_path):
    journal = Journal(tmp_path / "journal.sqlite")
    resource.setrlimit(resource.RLIMIT_FSIZE, (NO_ROOM, resource.RLIM_INFINITY))
    try:
        started = time.perf_counter()
        for number in range(2000):
            journal.append("decision", str(number), b"x" * 512)
        took = time.perf_counter() - started
    finally:
        journal.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))
    journal.close()
    assert took < 5


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lost(cause):
    return REGISTRY.get_sample_value("esper_audit_records_lost_total", {"cause": cause})


def test_an_audit_log_without_room_counts_what_it_loses_says_so_once_and_goes_on(tmp_path, capfd):
    path, before = tmp_path / "audit.jsonl", lost("disk")
    audit = AuditLog(path)
    audit.admitted("operator", "/before")
    until(path.read_text)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    try:
        with capture_logs() as told:
            for number in range(20):
                audit.admitted("operator", f"/during/{number}")
            until(lambda: lost("disk") == before + 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))
    audit.admitted("operator", "/after")
    audit.close()
    assert [json.loads(line)["method"] for line in path.read_text().splitlines()] == ["/before", "/after"]
    assert [entry["event"] for entry in told if entry["event"] != "admin_call"] == ["audit_write_failed"]
    assert "Traceback" not in capfd.readouterr().err


async def test_a_dump_without_room_is_partial_and_the_next_has_the_rest(tmp_path):
    clock, recorder, journal = FakeClock(), FlightRecorder(), Journal(tmp_path / "journal.sqlite")
    dumps = StepDumps(recorder, DumpJournal(journal), clock=clock)
    request = EvaluateStepsRequest(step=Step(run_id="x" * 8192)).SerializeToString()
    for sequence in range(1, 321):
        recorder.note("run", sequence, request, b"", "policy-1", 0, is_epoch=False)
    tell_event("tamiyo", "loss_spike", TelemetryLevel.TELEMETRY_LEVEL_ERROR, reason="loss_spike")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * 1024, resource.RLIM_INFINITY))
    try:
        with capture_logs() as told:
            await dumps.catch_up()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))
    assert {entry["event"] for entry in told} == {"journal_write_failed", "step_dump_failed"}
    clock.advance(LEAST_SECONDS)
    partial, rest = (await dumps.page(10, ""))[0]
    assert 0 < partial.written < partial.steps == 320
    assert rest.written == rest.steps == 320 - partial.written
    found = [await dumps.steps(dump.dump_id, 1000, "") for dump in (partial, rest)]
    assert [step.sequence for steps, _ in found for step in steps] == list(range(1, 321))
    dumps.stop_listening()
    journal.close()
